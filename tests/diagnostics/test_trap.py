"""fastdsm trap: what each experiment measures lies where its law or bound says, and the report holds all of it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from fastdsm.cli import app
from fastdsm.demo import model
from fastdsm.trap import depth, digits, floor, language, noise, report, residual, temperature
from fastdsm.trap.result import Result


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    heads = torch.randn(4, 2, 24, 24, generator=torch.Generator().manual_seed(7))
    found = (temperature.run(), depth.run(heads), noise.run(), residual.run(), floor.run())
    return {result.name: result for result in found}


def test_temperature(results: dict[str, Result]) -> None:
    rows = results["temperature"].rows
    for before, after in itertools.pairwise(rows):
        assert after[1] > before[1]  # entropy up
        assert after[2] < before[2]  # sigma2 down
    for tau, _, measured, law, bound in rows:
        assert measured <= bound
        if tau >= 1.4:
            assert measured == pytest.approx(law, rel=0.08)


def test_depth(results: dict[str, Result]) -> None:
    rows = results["depth"].rows
    assert [row[1] for row in rows if row[0] == "MiniLM"] == [1.0, 2.0, 3.0, 4.0]
    for _, _, _, by_layers, of_product, measured in rows:
        assert 0 < measured <= of_product * (1 + 1e-4)
        assert of_product <= by_layers * (1 + 1e-4)


def test_noise(results: dict[str, Result]) -> None:
    stacks = {}
    for case, way, _, measured, law in results["noise"].rows:
        assert measured == pytest.approx(law, abs=0.02)
        if case != "one noise, SNR":
            stacks[case, way] = measured
    for eta, better in (("0.10", True), ("1.00", False)):
        case = f"noise {eta} at every layer"
        assert (stacks[case, "with LayerNorm"] > stacks[case, "without"]) == better


def test_residual(results: dict[str, Result]) -> None:
    for _, measured, bound, _, stack, product in results["residual"].rows:
        assert measured <= bound + 1e-9
        assert stack <= product + 1e-9
    first, last = results["residual"].rows[0], results["residual"].rows[-1]
    assert first[3] < 0.01
    assert first[4] > 0.5
    assert last[4] < 1e-10


def test_floor(results: dict[str, Result]) -> None:
    rows = results["floor"].rows
    for row, held in zip(rows[1:], (0.5, 0.9, 0.99), strict=True):
        assert row[1] >= held - 1e-3
        assert row[2] <= held + 1e-3
    energies = [row[5] for row in rows]
    assert energies == sorted(energies)
    assert energies[-1] > 1e10 * energies[0]


def test_report(results: dict[str, Result], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = report.write(list(results.values()), "one machine", tmp_path / "out")
    text = path.read_text(encoding="utf-8")
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text(encoding="utf-8"))
    for name, result in results.items():
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
        assert f"![{result.title}]({name}.png)" in text
        assert len(numbers[name]) == len(result.rows)
        assert text.count(f"| {' | '.join(report.cell(x) for x in result.rows[-1])} |") == 1
    assert numbers["residual"][-1]["stagnation index"] == "inf"


@pytest.fixture(scope="module")
def trained() -> Result:
    pytest.importorskip("sklearn")
    with torch.no_grad():  # as the command runs it
        return digits.run(seeds=1, epochs=1, layers=2)


def test_digits(trained: Result, tmp_path: Path) -> None:
    ways = ["softmax", "Sinkhorn", "Sinkhorn, floor 0.9"]
    assert [row[:2] for row in trained.rows] == [
        *(("pure mixing", way) for way in ways),
        *(("residual", way) for way in ways),
        ("no mixing", "R = I"),
    ]
    for setting, way, mean, least, most, before, *after, product in trained.rows:
        assert 0.25 < least <= mean <= most <= 1  # one epoch beats chance, 0.1
        if "floor" in str(way):
            assert min(before, *after) >= 0.9 - 1e-3
        if setting == "pure mixing" and way != "softmax":
            first, _, last = after  # two layers: the middle one is the last
            assert product <= first * last * (1 + 1e-4)
        if setting == "residual" and way != "softmax":
            first, _, last = after
            assert product <= (1 + first) * (1 + last) / 4 * (1 + 1e-4)
        if setting == "no mixing":
            assert product == 1
    pytest.importorskip("matplotlib")
    report.write([trained], "one machine", tmp_path)
    assert (tmp_path / "digits.png").stat().st_size > 5000


@pytest.mark.slow
def test_language_models_on_streams(tmp_path: Path) -> None:
    with torch.no_grad():
        result = language.run(seeds=1, steps=4, blocks=1)
    found = {row[0]: row[1:] for row in result.rows}
    assert list(found) == list(language.WAYS)
    train, held, kinds = language.text()
    assert len(train) > 8 * len(held) > 100_000
    for mean, least, most, start, *_ in found.values():
        assert least == mean == most < start < 1.1 * math.log(kinds)  # from about log(kinds) on
    plain, mixed, floor, identity = (row[4:] for row in found.values())
    assert all(math.isnan(x) for x in plain)
    assert mixed[0] < 0.5 < floor[0] + 1e-3  # sigma2 of a mix without and with the floor
    assert identity[:4] == pytest.approx((1.0,) * 4, abs=1e-6)
    assert 0 < mixed[3] <= mixed[2] < floor[2]  # of the product of both layers' mixes
    pytest.importorskip("matplotlib")
    report.write([result], "one machine", tmp_path)
    assert (tmp_path / "language.png").stat().st_size > 5000


def test_command_trains_only_if_asked(results: dict[str, Result], trained: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (temperature, depth, noise, residual, floor):
        known = results[module.__name__.rpartition(".")[2]]
        monkeypatch.setattr(module, "run", lambda *_, known=known: known)
    monkeypatch.setattr(digits, "run", lambda: trained)
    monkeypatch.setattr(model, "require_extra", lambda: None)
    monkeypatch.setattr(model, "attention_logits", lambda: SimpleNamespace(logits=None))
    written: list[list[str]] = []

    def write(found: list[Result], _conditions: str, out: Path) -> Path:
        written.append([result.name for result in found])
        return out

    monkeypatch.setattr(report, "write", write)
    monkeypatch.setattr(language, "run", lambda: replace(trained, name="language"))
    for arguments in ([], ["--trained"], ["--mhc"]):
        found = CliRunner().invoke(app, ["trap", *arguments])
        assert found.exit_code == 0, found.output
    assert written == [[*results], [*results, "digits"], [*results, "language"]]


def test_digits_networks_side_by_side_train_as_each_alone() -> None:
    pytest.importorskip("sklearn")
    train, test = digits.split()
    train, test = (train[0][:256], train[1][:256]), (test[0][:64], test[1][:64])

    def softmax(logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1)

    both = digits.train_networks(softmax, [(1.0, 0), (0.5, 1)], train, test, epochs=2, layers=2)
    for k, one in enumerate([(1.0, 0), (0.5, 1)]):
        alone = digits.train_networks(softmax, [one], train, test, epochs=2, layers=2)
        torch.testing.assert_close(both.after[k], alone.after[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(both.product[k], alone.product[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(both.after, both.before, atol=1e-3)  # and they did train


def test_digits_tokens_are_patches() -> None:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    (tokens, found), (held, _) = digits.split()
    assert len(found) + len(held) == len(data.target) == 1797
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(8))
    image = torch.tensor(data.images[order[len(held)]], dtype=torch.float32)
    token = tokens[0] - tokens[0].min()
    corner = image[2:4, 4:6].flatten()  # second row of patches, third column
    scale = image.max() / token.max()
    torch.testing.assert_close(token[6] * scale, corner, rtol=1e-4, atol=1e-4)


def test_command_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "find_spec", lambda _: None)
    found = CliRunner().invoke(app, ["trap"])
    assert found.exit_code == 2
    assert "pip install 'fastdsm[demo]'" in found.output
