"""The list of changes fits the code and its record the list; the runner tells what is seen from what is not."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from benchmarks.mutation.change import Change
from benchmarks.mutation.changes import CHANGES
from benchmarks.mutation.command import of_part
from benchmarks.mutation.rows import read, record
from benchmarks.mutation.run import Verdict, verdicts
from benchmarks.rows import ROOT

LEAST, SCORE = 75, 0.98  # each survivor that says no reason is a test still missing

DOUBLED = Change("doubling.py", "2 * x", "3 * x", ("test_doubling.py::test_doubled",), "thrice")
UNSEEN = Change("doubling.py", "x < 0", "x <= 0", ("test_doubling.py",), "zero")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A module with a test that sees one thing and not another."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "doubling.py").write_text("def doubled(x):\n    return 0 if x < 0 else 2 * x\n")
    (root / "test_doubling.py").write_text(
        "from doubling import doubled\n\n\ndef test_doubled():\n    assert doubled(2) == 4\n"
    )
    return root


def test_every_change_fits_the_code() -> None:
    for change in CHANGES:
        assert change.applied(ROOT) != (ROOT / change.file).read_text()
    assert len({(x.file, x.before, x.after) for x in CHANGES}) == len(CHANGES) >= LEAST


def test_every_test_that_is_named_is_there() -> None:
    functions: dict[str, set[str]] = {}
    for test in {test for change in CHANGES for test in change.tests}:
        file, _, name = test.partition("::")
        if file not in functions:
            tree = ast.parse((ROOT / file).read_text())
            functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not name or name.partition("[")[0] in functions[file], test
    assert all(change.tests for change in CHANGES)


def test_the_record_is_of_these_changes_and_keeps_the_score() -> None:
    """A change of equal effect is one that no test sees, and that says why. What no run has judged yet has no row."""
    rows, listed = read(), {(x.file, x.before, x.after): x for x in CHANGES}
    assert {row.key for row in rows} <= set(listed)
    assert [row.equivalent for row in rows] == [listed[row.key].equivalent for row in rows]
    judged = [row for row in rows if row.equivalent is None]
    assert len(judged) >= LEAST
    assert sum(row.caught for row in judged) >= SCORE * len(judged)
    assert not any(row.caught for row in rows if row.equivalent is not None)


def test_a_change_is_caught_or_survives(tree: Path) -> None:
    text = (tree / "doubling.py").read_text()
    found = verdicts([DOUBLED, UNSEEN, DOUBLED, replace(DOUBLED, after="2 *")], tree)
    caught, survived, again = next(found), next(found), next(found)
    assert caught.by == again.by == "test_doubling.py::test_doubled"
    assert [caught.caught, survived.caught] == [True, False]
    with pytest.raises(RuntimeError, match="the tests did not run"):  # of what leaves nothing to run
        next(found)
    assert (tree / "doubling.py").read_text() == text


def test_tests_that_fail_by_themselves_judge_nothing(tree: Path) -> None:
    (tree / "test_doubling.py").write_text("def test_doubled():\n    assert False\n")
    with pytest.raises(RuntimeError, match=r"without any change test_doubling.py::test_doubled fails"):
        next(verdicts([DOUBLED], tree))


@pytest.mark.parametrize("before", ["4 * x", "x"])
def test_text_that_is_not_there_once_is_an_error(tree: Path, before: str) -> None:
    with pytest.raises(ValueError, match="must hold the text to change once"):
        replace(DOUBLED, before=before).applied(tree)


def test_a_run_replaces_its_rows_and_drops_what_is_no_longer_listed(tmp_path: Path) -> None:
    path = tmp_path / "mutation.jsonl"
    gone = replace(UNSEEN, after="x > 0")
    record([Verdict(DOUBLED, "", 1.0), Verdict(gone, "a test", 1.0)], [DOUBLED, gone], path)
    record([Verdict(UNSEEN, "", 2.0)], [UNSEEN, DOUBLED], path)
    record([Verdict(DOUBLED, "a test", 3.0)], [UNSEEN, DOUBLED], path)
    assert [(row.reason, row.caught, row.by) for row in read(path)] == [("zero", False, ""), ("thrice", True, "a test")]


def test_parts_are_the_whole() -> None:
    numbers = list(range(11))
    assert sorted(x for k in (1, 2, 3) for x in numbers[of_part(f"{k}/3")]) == numbers
    for wrong in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(typer.BadParameter, match="expected K/N"):
            of_part(wrong)
