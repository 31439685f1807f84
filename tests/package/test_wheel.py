"""The source distribution and the wheel, built, checked, installed where nothing else is, and used as a user does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from .test_release import PROJECT, PYTHONS, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("build") is None or find_spec("twine") is None, reason="the extra release"),
]
SKIPPED = (".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", ".*_cache", ".hypothesis", ".benchmarks")


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What a command prints; it has to succeed, and sees nothing of this checkout or of pytest's settings."""
    around = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(x) for x in command],
        cwd=cwd,
        env={**around, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@dataclass(frozen=True)
class Built:
    """A copy of the checkout, and what was built of it."""

    tree: Path
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """As `make dist` does: the source distribution of the tree, and the wheel of that."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*SKIPPED))
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", tree, cwd=folder)
    (sdist,), (wheel,) = ((folder / "dist").glob(x) for x in ("*.tar.gz", "*.whl"))
    return Built(tree, sdist, wheel)


@pytest.fixture(scope="module")
def clean(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and what it requires, of the tested set."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{built.wheel}[cli]", cwd=folder)
    return python


def test_twine_has_no_complaint(built: Built) -> None:
    out = run(sys.executable, "-m", "twine", "check", "--strict", built.sdist, built.wheel, cwd=built.tree)
    assert out.count("PASSED") == 2


def test_source_distribution_is_the_checkout(built: Built) -> None:
    """All that is tracked but links; of docs/results, which is one, what the pages show."""
    with tarfile.open(built.sdist) as archive:
        members = archive.getmembers()
    held = {member.name.split("/", 1)[1] for member in members if member.isfile()}
    assert all(member.isfile() or member.isdir() for member in members)
    if (ROOT / ".git").exists():
        tracked = {x for x in run("git", "ls-files", cwd=ROOT).splitlines() if (ROOT / x).is_file()}
        assert tracked <= held
        shown = {x for x in held if x.startswith("docs/results/")}
        assert shown <= {f"docs/{x.removeprefix('benchmarks/')}" for x in tracked}
        made = {"PKG-INFO", "setup.cfg", *shown}
        assert {x for x in held - tracked - made if not x.startswith("fastdsm.egg-info/")} <= _untracked()


def _untracked() -> set[str]:
    return set(run("git", "ls-files", "--others", "--exclude-standard", cwd=ROOT).splitlines())


def test_wheel_of_the_tree_is_the_wheel_of_the_source_distribution(built: Built, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, built.tree, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    contents = []
    for path in (wheel, built.wheel):
        with zipfile.ZipFile(path) as archive:
            contents.append({x.filename: archive.read(x) for x in archive.infolist()})
    assert contents[0] == contents[1]
    assert "fastdsm/kernels/tile/launch.py" in contents[0]


def test_wheel_works_in_a_clean_environment(clean: Path, tmp_path: Path) -> None:
    where = run(clean, "-c", "import fastdsm; print(fastdsm.__file__, fastdsm.__version__)", cwd=tmp_path)
    assert where.split() == [str(_site(clean) / "fastdsm" / "__init__.py"), PROJECT["version"]]
    gradient = (
        "import torch, fastdsm; x = torch.randn(5, 4, 4, requires_grad=True)\n"
        "fastdsm.sinkhorn(x).square().sum().backward(); print(float(x.grad.abs().sum()) > 0)"
    )
    assert run(clean, "-c", gradient, cwd=tmp_path) == "True\n"
    fastdsm = clean.parent / "fastdsm"
    assert PROJECT["version"] in run(fastdsm, "--version", cwd=tmp_path)
    assert "cpu threads" in run(fastdsm, "info", cwd=tmp_path)
    assert "every one within its budget" in run(fastdsm, "verify", "--quick", cwd=tmp_path)
    for example in ("soft_sorting", "matching"):
        assert run(clean, ROOT / "examples" / f"{example}.py", cwd=tmp_path)


def _site(python: Path) -> Path:
    (found,) = (python.parents[1] / "lib").glob("python3.*/site-packages")
    return found


def test_a_users_file_runs(clean: Path, tmp_path: Path) -> None:
    assert run(clean, ROOT / "tests" / "package" / "users_file.py", cwd=tmp_path).endswith("all of it ran\n")


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    """Away from the checkout, whose settings and sources it must not see, with one error more in a second file."""
    wrong = "import fastdsm, torch\n\nfastdsm.sinkhorn(torch.ones(2, 2), n_iter=3)\n"
    (tmp_path / "wrong.py").write_text(wrong, encoding="utf-8")
    shutil.copy(ROOT / "tests" / "package" / "users_file.py", tmp_path)
    return tmp_path


def test_a_users_file_under_mypy(clean: Path, users_file: Path) -> None:
    pytest.importorskip("mypy", reason="the extra dev")
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", clean)
    assert "no issues found" in run(*mypy, "users_file.py", cwd=users_file)
    with pytest.raises(AssertionError, match="n_iter"):
        run(*mypy, "wrong.py", cwd=users_file)


def test_a_users_file_under_pyright(clean: Path, users_file: Path) -> None:
    pytest.importorskip("pyright", reason="the extra release")
    pyright = (sys.executable, "-m", "pyright", "--pythonpath", clean)
    assert "0 errors, 0 warnings" in run(*pyright, "users_file.py", cwd=users_file)
    with pytest.raises(AssertionError, match=r"No overloads|n_iter"):
        run(*pyright, "wrong.py", cwd=users_file)


@pytest.mark.parametrize("version", PYTHONS[1:])
def test_wheel_on_a_newer_python(version: str, built: Built, tmp_path: Path) -> None:
    """Requirements resolve to wheels, the wheel installs and all of it compiles; what it computes is not run."""
    environment = {"PYENV_VERSION": version}
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], env={**os.environ, **environment}, capture_output=True).returncode:
        pytest.skip(f"no python{version}")
    run(python, "-m", "venv", tmp_path / "env", cwd=tmp_path, env=environment)
    python = tmp_path / "env" / "bin" / "python"
    asked = run(python, "-m", "pip", "install", "--dry-run", "--only-binary", ":all:", f"{built.wheel}[cli]", cwd=tmp_path)
    would = next(line for line in asked.splitlines() if line.startswith("Would install"))
    assert all(f" {name}-" in would for name in ("fastdsm", "torch", "numpy", "typer", "rich"))
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", built.wheel, cwd=tmp_path)
    run(python, "-W", "error", "-m", "compileall", "-q", "-f", _site(python) / "fastdsm", cwd=tmp_path)
