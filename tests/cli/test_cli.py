"""The command line, and the verification behind ``fastdsm verify``."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastdsm
from fastdsm import reference
from fastdsm._verify import attention as attention_verification
from fastdsm._verify import mhc as mhc_verification
from fastdsm._verify import newton as newton_verification
from fastdsm._verify import sinkhorn as verification
from fastdsm._verify.attention import AttentionCase
from fastdsm._verify.mhc import MhcCase
from fastdsm._verify.newton import NewtonCase, verify_newton_case
from fastdsm._verify.sinkhorn import Case, Target, budget, gradient_size, half_ulp, verify_case
from fastdsm.cli import app
from fastdsm.cli import warmup as warmup_command
from fastdsm.warmup import Warmed

CPU = Target("torch", "cpu")
TINY = [
    Case((2, 4, 4), torch.float32, 1.0),
    Case((2, 3, 5), torch.float64, 1.0, 3),
    Case((2, 4, 4), torch.bfloat16, 1.0),
]
TINY_ATTENTION = [AttentionCase((1, 2, 1, 5, 4, 3, 2), torch.float32, 2.0, 3, option) for option in ("", "mask", "padding")]

TINY_NEWTON = [NewtonCase((2, 4, 4), torch.float32, 2.0, 30), NewtonCase((2, 3, 8), torch.float64, 1.0, 30, "marginals")]
TINY_LAYERS = [MhcCase((2, 3, 4), torch.float32, 1.0, 5, "paper")]


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture
def tiny_grid(monkeypatch):
    monkeypatch.setattr(verification, "cases", lambda target, quick: TINY)
    monkeypatch.setattr(attention_verification, "attention_cases", lambda target, quick: TINY_ATTENTION)
    monkeypatch.setattr(newton_verification, "newton_cases", lambda target, quick: TINY_NEWTON)
    monkeypatch.setattr(mhc_verification, "mhc_cases", lambda target, quick: TINY_LAYERS)
    monkeypatch.setattr(verification, "targets", lambda: [CPU])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_ulp_is_the_largest_rounding_error(dtype):
    exponents = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 36 - 26
    values = torch.exp2(exponents)  # float32: from float64 torch would round twice
    allowed = half_ulp(values, dtype)
    error = (values.to(dtype).double() - values.double()).abs()
    assert (error <= allowed).all()
    assert (error / allowed).max() > 0.99


def test_budget_of_each_dtype():
    truth = torch.tensor([0.3, 0.75], dtype=torch.float64)
    plain = truth + torch.tensor([1e-7, -4e-7], dtype=torch.float64)
    assert budget(truth, plain, torch.float32).tolist() == pytest.approx([1.8e-6] * 2)
    assert budget(truth, plain, torch.float32, size=10.0).tolist() == pytest.approx([1.08e-5] * 2)
    assert budget(truth, plain, torch.float64).tolist() == pytest.approx([1.2e-6 * 2**-29 + 1e-13] * 2)
    assert budget(truth, plain, torch.bfloat16).tolist() == pytest.approx([1.8e-6 + 2**-10, 1.8e-6 + 2**-9])
    assert budget(truth[:0], plain[:0], torch.float32).shape == (0,)


def test_gradient_size_is_that_of_gradient_or_cotangent():
    cotangent = torch.tensor([3.0, -4.0])
    assert gradient_size(torch.tensor([0.1, -0.2]), cotangent) == pytest.approx(math.sqrt(12.5))
    assert gradient_size(torch.tensor([0.1, -7.0]), cotangent) == 7.0
    assert gradient_size(torch.empty(0), torch.empty(0)) == 0.0


@pytest.mark.parametrize("option", ["", *verification.OPTIONS])
def test_every_option_is_verified(option):
    records = verify_case(Case((3, 4, 6), torch.float32, 1.0, 12, option), CPU)
    assert [str(record) for record in records if not record.ok] == []
    assert {record.group for record in records} == {"forward", "gradient", "sigma2", "bounds"}
    assert ("stopping at tol" in {record.quantity for record in records}) == (option == "tol")


def test_stopping_early_and_late_are_misses(monkeypatch):
    genuine = verification.sinkhorn
    case = Case((6, 4, 4), torch.float32, 1.0, 20, "tol")
    for factor in (30.0, 1 / 30):
        monkeypatch.setattr(
            verification, "sinkhorn", lambda x, tol, factor=factor, **options: genuine(x, tol=tol * factor, **options)
        )
        misses = {record.quantity for record in verify_case(case, CPU) if not record.ok}
        assert "stopping at tol" in misses


def with_gradient_off(call):
    """The value is right and the gradient is a thousandth too large."""

    def wrong(x, **options):
        plan, info = call(x, **options)
        return 1.001 * plan - 0.001 * plan.detach(), info

    return wrong


@pytest.mark.parametrize("case", TINY_NEWTON)
def test_newton_is_verified(monkeypatch, case):
    records = verify_newton_case(case, CPU)
    assert [str(record) for record in records if not record.ok] == []
    assert {record.quantity for record in records} == {"plan", "residual", "gradient of logits"}
    genuine = newton_verification.sinkhorn
    monkeypatch.setattr(newton_verification, "sinkhorn", with_gradient_off(genuine))
    assert [record.quantity for record in verify_newton_case(case, CPU) if not record.ok] == ["gradient of logits"]
    monkeypatch.setattr(newton_verification, "sinkhorn", lambda x, tol=0, **options: genuine(x, tol=1e-2, **options))
    assert "residual" in [record.quantity for record in verify_newton_case(case, CPU) if not record.ok]


def test_nan_and_exceptions_are_misses(monkeypatch):
    monkeypatch.setattr(verification, "sigma2", lambda plan, **options: reference.sigma2(plan, mask=None) * math.nan)
    misses = [record for record in verify_case(TINY[0], CPU) if not record.ok]
    assert [record.quantity for record in misses] == ["sigma2 of a plan"]
    assert misses[0].share == math.inf

    def broken(*arguments, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(verification, "sinkhorn", broken)
    (record,) = verify_case(TINY[0], CPU)
    assert not record.ok
    assert record.quantity == "raised RuntimeError: no such kernel"


def test_the_interpreter_is_a_target_with_a_tiny_grid():
    target = Target("triton", "cpu")
    assert target in verification.targets()
    shapes = {case.shape for case in verification.cases(target)}
    assert max(math.prod(shape) for shape in shapes if max(shape) <= 256) <= 256
    assert [math.prod(shape) for shape in shapes if max(shape) > 256] == [6 * 264]  # the stream family
    assert len(verification.cases(target, quick=True)) < len(verification.cases(target))


@pytest.mark.usefixtures("tiny_grid")
def test_verify_passes_and_writes_json(tmp_path):
    path = tmp_path / "numbers" / "verify.json"
    result = run("verify", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "every one within its budget" in result.output
    for word in ("forward", "gradient", "sigma2", "bounds", "newton", "mhc", "bfloat16"):
        assert word in result.output
    rows = json.loads(path.read_text())["comparisons"]
    assert {row["dtype"] for row in rows} == {"float32", "float64", "bfloat16"}
    assert all(row["ok"] and row["error"] <= row["budget"] for row in rows)


@pytest.mark.usefixtures("tiny_grid")
def test_verify_exits_with_1_on_a_miss(monkeypatch, tmp_path):
    genuine = verification.sinkhorn
    monkeypatch.setattr(verification, "sinkhorn", lambda x, n_iters, **options: genuine(x, n_iters=n_iters - 1, **options))
    result = run("verify", "--json", str(tmp_path / "verify.json"))
    assert result.exit_code == 1
    assert "over budget" in result.output
    rows = json.loads((tmp_path / "verify.json").read_text())["comparisons"]
    assert {row["quantity"] for row in rows if not row["ok"]} >= {"plan", "residual"}


def test_verify_without_the_backend(monkeypatch):
    monkeypatch.setattr(attention_verification, "attention_cases", lambda target, quick: TINY_ATTENTION)
    monkeypatch.setattr(verification, "targets", lambda: [CPU])
    result = run("verify", "--backend", "triton")
    assert result.exit_code == 2
    assert "TRITON_INTERPRET=1" in result.output


def test_info_names_versions_and_backends():
    result = run("info")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output
    for words in ("256 x 256", "cpu threads", "triton interpreter", "on"):
        assert words in result.output
    rows = {line.split("│")[1].strip(): line for line in result.output.splitlines() if " x " in line and "│" in line}
    assert "registers" in rows["4 x 4"]
    assert [cell.strip() for cell in rows["512 x 512"].split("│")[2:-1]][:2] == ["PyTorch", "stream"]
    assert rows["4096 x 4096"].count("stream") == 4


def test_warmup_passes_its_options_on(monkeypatch):
    asked = []

    def warm(progress, **options):
        asked.append(options)
        progress(12, 12)
        return Warmed(12, 3, "sm_90")

    monkeypatch.setattr(warmup_command, "warm", warm)
    result = run(
        "warmup", "--target", "sm_90", "--call", "sinkhorn", "--dtype", "float32", "-n", "4", "-n", "300x257", "-j", "2"
    )
    assert result.exit_code == 0, result.output
    assert "12 kernels for sm_90 are ready, 3 of them compiled now" in result.output
    run("warmup")
    narrow = {
        "target": "sm_90",
        "calls": ["sinkhorn"],
        "dtypes": [torch.float32],
        "n": [(4, 4), (300, 257)],
        "features": None,
        "jobs": 2,
    }
    assert asked == [narrow, dict.fromkeys(narrow)]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 1, 'name the target it is to be, as target="sm_90"'),
        (["--target", "gfx"], 2, "got 'gfx'"),
        (["--target", "sm_90", "--n", "4y"], 2, "as 300x257, got 4y"),
        (["--target", "sm_90", "--call", "softmax"], 2, "got 'softmax'"),
    ],
)
def test_warmup_says_what_is_wrong(monkeypatch, arguments, code, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("warmup", *arguments)
    assert result.exit_code == code
    assert message in result.output


@pytest.mark.parametrize("command", ["info", "warmup", "verify", "demo", "bench"])
def test_help_shows_examples(command):
    assert command in run("--help").output
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.output
    assert f"fastdsm {command}" in result.output


def _without(*packages, code):
    """Run ``code`` in a process in which these packages cannot be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n{code}"
    return subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("package", ["typer", "rich"])
@pytest.mark.parametrize(
    "start", ["import runpy; runpy.run_module('fastdsm', run_name='__main__')", "from fastdsm.__main__ import main; main()"]
)
def test_without_its_packages_the_command_says_what_to_install(package, start):
    found = _without(package, code=start)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr == f'fastdsm: the command line needs {package}, which is not installed; pip install "fastdsm[cli]"\n'


def test_everything_but_the_command_line_works_without_its_packages():
    code = (
        "import torch, fastdsm, fastdsm.demo.model, fastdsm.trap.floor\n"
        "import fastdsm.diagnostics\n"
        "print(fastdsm.sinkhorn(torch.zeros(2, 2)).sum().item())\n"
        "fastdsm.diagnostics.spectral_report(fastdsm.nn.SinkhornProjection(), torch.zeros(1, 2, 2), figure=None)"
    )
    found = _without("typer", "rich", "matplotlib", "transformers", code=code)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("2.0\nlayer  ")


def test_module_runs_and_its_import_is_light():
    code = (
        "import sys, runpy; sys.argv = ['fastdsm', '--help']\n"
        "try: runpy.run_module('fastdsm', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'matplotlib', 'transformers', 'pytest', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert "Usage: fastdsm" in found.stdout


@pytest.mark.parametrize("start", ["-m", "script", "library"])
def test_an_interrupt_while_torch_is_imported(start, tmp_path):
    """Ends the command without a word, and is an exception for who imports the package."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    (tmp_path / "fastdsm").write_text("from fastdsm.__main__ import main\nmain()\n")
    arguments = {
        "-m": ["-m", "fastdsm", "info"],
        "script": [str(tmp_path / "fastdsm"), "info"],
        "library": ["-c", "import fastdsm"],
    }
    package = Path(fastdsm.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, *arguments[start]],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{package}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if start == "library":
        assert found.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in found.stderr
    else:
        assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


def test_an_interrupt_after_the_imports_is_an_exception_again():
    code = (
        "import sys; sys.argv = ['fastdsm']\n"
        "import signal, fastdsm, fastdsm._interrupts\n"
        "assert fastdsm._interrupts._is_command()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr


def test_version():
    found = run("--version")
    assert found.exit_code == 0
    assert found.output.strip() == f"fastdsm {fastdsm.__version__}"


def test_outputs_are_looked_at_before_the_work(tmp_path, tiny_grid):
    blocked = tmp_path / "file"
    blocked.write_text("")
    for arguments in (
        ("verify", "--json", str(blocked / "x.json")),
        ("demo", "--out", str(blocked)),
        ("trap", "--out", str(blocked / "x")),
    ):
        found = run(*arguments)
        assert found.exit_code == 2, arguments
        assert "cannot write" in found.output or "is a file" in found.output
        assert "Traceback" not in found.output
    kept = tmp_path / "new" / "found.json"
    assert run("verify", "--json", str(kept)).exit_code == 0
    assert len(json.loads(kept.read_text())) > 0
