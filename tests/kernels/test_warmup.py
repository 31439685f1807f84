"""After a warm-up nothing compiles: what it compiles is all that calls launch, under the keys that launches look for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import fastdsm
from fastdsm import kernels
from fastdsm._ops import launchable
from fastdsm._ops.launchable import places
from fastdsm._ops.plain import Kept
from fastdsm.kernels.common.configuration import Configuration, settle_key
from fastdsm.warmup import CALLS

from ..uninterpreted import rows_of

TARGET = "sm_80"  # on which no configuration has one of its own, as in the interpreter


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Configuration]:
    """Configurations that have been launched, in the interpreter."""
    Kept.forget()  # launches that have been prepared are not looked for again
    found: list[Configuration] = []
    launch = Configuration.launch

    def logged(configuration: Configuration, programs: int, **arguments: Any) -> None:
        found.append(configuration)
        launch(configuration, programs, **arguments)

    monkeypatch.setattr(Configuration, "launch", logged)
    return found


def _projections(call: Callable[..., Any], n: int, m: int, dtype: torch.dtype) -> None:
    """Calls with one option after the other, and their gradients."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base = torch.randn(3, n, m, dtype=dtype)
    shifted = torch.randn(3 * n * m + 1, dtype=dtype)[1:].view(3, n, m)
    for logits in (base, base.mT.contiguous().mT, shifted):
        call(logits.requires_grad_(), n_iters=3)
    mask = torch.rand(3, n, m) < 0.8
    mask[..., 0] = mask[:, 0] = True
    temperature = torch.rand(3, dtype=wide).add(0.5).requires_grad_()
    row = torch.ones(3, n, dtype=wide).requires_grad_()
    for options in (
        {"mask": mask}, {"first": "row"}, {"tol": 1e-3}, {"temperature": temperature}, {"row_marginal": row}, {"n_iters": 25},
        {"n_iters": 0}, {"solver": "newton"}, {"solver": "newton", "mask": mask, "first": "row"}, {"grad": "implicit"},
    ):  # fmt: skip
        call(base.requires_grad_(), **{"n_iters": 3, **options})


def _sinkhorn(logits: torch.Tensor, **options: Any) -> None:
    fastdsm.sinkhorn(logits, backend="triton", **options).square().sum().backward()
    fastdsm.sinkhorn(logits.detach(), backend="triton", return_info=True, **options)


def _sinkhorn_sigma2(logits: torch.Tensor, **options: Any) -> None:
    found = fastdsm.sinkhorn_sigma2(logits, backend="triton", **options)
    (found.plan.square().sum() + found.sigma2.sum()).backward()


def _attention(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, 2, lines, d, dtype=dtype, requires_grad=True) for lines in (n, m, m))
    bias = torch.randn(n, m, dtype=dtype, requires_grad=True)
    padding = torch.arange(m)[None] >= m - 1
    temperature = torch.rand(1, 2).add(0.5).requires_grad_()
    for options in (
        {}, {"first": "row"}, {"n_iters": 1}, {"attn_mask": bias}, {"attn_mask": bias > 0}, {"key_padding_mask": padding},
        {"dropout_p": 0.2, "first": "row"}, {"temperature": temperature}, {"grad": "implicit", "tol": 1e-4},
    ):  # fmt: skip
        out = fastdsm.sinkhorn_attention(query, key, value, backend="triton", **options)
        out.sum().backward()


def _attention_sigma2(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    query, key = (torch.randn(1, 2, lines, d, dtype=dtype, requires_grad=True) for lines in (n, m))
    for first in ("col", "row"):
        found = fastdsm.sinkhorn_attention_sigma2(query, key, first=first, max_steps=2, return_bounds=True, backend="triton")
        found[0].sum().backward()


def _of_plans(call: Callable[..., Any], n: int, m: int, dtype: torch.dtype) -> None:
    plan = fastdsm.sinkhorn(torch.randn(2, n, m, dtype=dtype))
    for given in (plan, plan.mT.contiguous().mT):
        call(given, backend="triton")


def _temperature(n: int, m: int, dtype: torch.dtype) -> None:
    temperature, _ = fastdsm.temperature_for_sigma2(
        torch.randn(2, n, m, dtype=dtype, requires_grad=True), 0.5, backend="triton"
    )
    temperature.nansum().backward()


def _layer(n: int, _: int, channels: int, dtype: torch.dtype) -> None:
    for tokens in (2, 20):
        X = torch.randn(tokens, n, channels, dtype=dtype, requires_grad=True)
        fn, scale, base = (torch.randn(shape) for shape in ((n * (n + 2), n * channels), (3,), (n * (n + 2),)))
        h, (post, comb) = fastdsm.mhc.mhc_pre(X, fn, scale, base, backend="triton")
        mixed, h, _ = fastdsm.mhc.mhc_post_pre(h, X, post, comb, fn, scale, base, backend="triton")
        mixed, h, _ = fastdsm.mhc.mhc_post_pre(
            h, mixed, post, comb, fn, scale, base, mixes=torch.zeros(tokens, len(base)), backend="triton"
        )
        (mixed.sum() + h.sum()).backward()


def _head(n: int, _: int, channels: int, dtype: torch.dtype) -> None:
    X = torch.randn(3, n, channels, dtype=dtype, requires_grad=True)
    fn, scale, base = (torch.randn(shape) for shape in ((n, n * channels), (1,), (n,)))
    fastdsm.mhc.mhc_head(X, fn, scale, base, backend="triton").sum().backward()


BFLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64
CASES: list[tuple[str, tuple[int, int], int | None, torch.dtype, Callable[..., None]]] = [
    *(("sinkhorn", (n, m), None, dtype, partial(_projections, _sinkhorn)) for n, m, dtype in (
        (4, 4, FLOAT32), (3, 2, BFLOAT16), (5, 5, FLOAT32), (6, 9, BFLOAT16), (3, 3, FLOAT64))),
    *(("sinkhorn_sigma2", (n, m), None, dtype, partial(_projections, _sinkhorn_sigma2)) for n, m, dtype in (
        (4, 4, BFLOAT16), (3, 6, FLOAT32))),
    *(("sigma2", (n, n), None, dtype, partial(_of_plans, fastdsm.sigma2)) for n, dtype in ((4, BFLOAT16), (9, FLOAT64))),
    ("sigma2_bounds", (5, 6), None, FLOAT32, partial(_of_plans, fastdsm.sigma2_bounds)),
    ("temperature_for_sigma2", (4, 4), None, BFLOAT16, _temperature),
    ("sinkhorn_attention", (5, 6), 8, FLOAT32, _attention),
    ("sinkhorn_attention", (5, 6), 8, BFLOAT16, _attention),
    ("sinkhorn_attention_sigma2", (5, 6), 8, BFLOAT16, _attention_sigma2),
    ("mhc_post_pre", (4, 4), 16, BFLOAT16, _layer),
    ("mhc_post_pre", (3, 3), 5, FLOAT32, _layer),
    ("mhc_head", (3, 3), 5, FLOAT32, _head),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "d", "dtype", "make"), CASES)
def test_what_a_call_launches_is_listed(
    name: str,
    shape: tuple[int, int],
    d: int | None,
    dtype: torch.dtype,
    make: Callable[..., None],
    launched: list[Configuration],
) -> None:
    make(*shape, *([] if d is None else [d]), dtype)
    # Interpreted, a kernel that is Hopper's alone is launched as well, and of two the one that is not.
    listed = [x for target in (TARGET, "sm_90") for x in places([name], [dtype], [shape], None if d is None else [d], target)]
    table = kernels.configurations()
    if "sinkhorn" in name and dtype != FLOAT64:  # only a CPU differentiates temperatures in float64
        launched = [x for x in launched if x.pointers.get("logits_ptr") != "fp64"]
    assert launched
    assert {f"{x.kernel.fn.__name__} {x.label}" for x in launched if table.index(x) not in listed} == set()


def test_sizes_and_features_narrow_the_list() -> None:
    one = places(["sinkhorn"], [FLOAT32], [(4, 4)], None, TARGET)
    assert set(one) < set(places(["sinkhorn"], [FLOAT32], [(4, 4), (16, 16)], None, TARGET))
    narrow = places(["sinkhorn_attention"], [FLOAT32], [(5, 6)], [64], TARGET)
    assert set(narrow) < set(places(["sinkhorn_attention"], [FLOAT32], [(5, 6)], [64, 65], TARGET))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT64])
def test_every_call_of_every_size_is_the_whole_table(dtype: torch.dtype) -> None:
    """But for squaring plans of up to 4x4, whose sigma2 is the register family's whatever they are."""
    element = {BFLOAT16: "bf16", FLOAT64: "fp64"}[dtype]
    listed = set(places(CALLS, [dtype], None, None, TARGET))
    table = kernels.configurations()
    for place in places(None, (), None, None, TARGET):
        own = (table[place].pointers.get(name) for name in ("logits_ptr", "plan_ptr", "line_ptr"))
        if element in own and place not in listed:
            assert table[place].kernel.fn.__name__ == "_sigma2_fwd_kernel"
            assert table[place].constants["P"] == 4


def test_all_is_what_a_target_can_launch() -> None:
    table = kernels.configurations()
    for target in ("sm_80", "sm_90", "sm_100"):
        assert places(None, (), None, None, target) == [i for i, x in enumerate(table) if target in x.targets]
    assert places(None, (), None, None, "sm_86") == places(None, (), None, None, "sm_80")


def test_the_calls_that_can_be_named_are_those_that_launch() -> None:
    assert {*launchable.PROJECTIONS, *launchable.ATTENTION, *launchable.LAYERS} == set(CALLS)


class _Driver(DriverBase):
    """A device of compute capability 9.0 that is not there: it loads what was compiled, and launches nothing."""

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
        load_binary=lambda *_: (1, 1, 32, 0, 1024),
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None


def _calls() -> Iterator[Callable[[], Any]]:
    """Launches for 4x4 float32 matrices, of every operator, in an order that is not the warm-up's."""
    operators, logits = torch.ops.fastdsm, torch.randn(2, 4, 4)
    options = itertools.product(
        (logits, logits.mT), (None, torch.ones(2, 4)), (None, logits < 9), (2, 30), (True, False), (-1.0, 1e-3)
    )
    for x, row, mask, n_iters, columns_first, tol in options:
        inputs = (x, None, None, row, None, mask, 1.0, n_iters, columns_first, tol, "triton")
        yield partial(operators.sinkhorn, *inputs)
        yield partial(operators.fixed_point, *inputs, "newton", True, False)
        yield partial(operators.sinkhorn_backward, x, None, *inputs, row is not None)
        yield partial(operators.fixed_point_backward, x, x[:, 0], x[:, 0], *inputs, row is not None)


def _after_warmup() -> list[Any]:
    """What was warmed up, how many compilations the launches asked for, and the names of those that were not in the cache."""
    warmed = fastdsm.warmup(target="sm_90", calls=["sinkhorn"], dtypes=[torch.float32], n=4)
    asked: list[tuple[str, bool]] = []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: asked.append((src.name, cache_hit))
    triton.runtime.driver.set_active(_Driver())
    calls = list(_calls())
    random.Random(0).shuffle(calls)
    for call in calls:
        call()
    return [warmed, len(asked), [name for name, hit in asked if not hit]]


@pytest.mark.slow
def test_nothing_compiles_after_a_warmup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (ready, compiled, target), asked, missed = rows_of(__name__, "_after_warmup")
    assert target == "sm_90"
    assert ready == compiled >= asked > 8
    assert missed == []


def _keys(order: int) -> dict[str, str]:
    named = {f"{x.kernel.fn.__module__}.{x.kernel.fn.__name__}": x.kernel for x in kernels.configurations()}
    for name in sorted(named)[::order]:
        settle_key(named[name])
    return {name: kernel.cache_key for name, kernel in named.items()}


def _keys_forwards() -> dict[str, str]:
    return _keys(1)


def _keys_backwards() -> dict[str, str]:
    return _keys(-1)


def test_keys_do_not_depend_on_what_was_launched_before() -> None:
    assert rows_of(__name__, "_keys_forwards") == rows_of(__name__, "_keys_backwards")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, RuntimeError, 'no CUDA device to compile for; name the target it is to be, as target="sm_90"'),
        ({"target": "sm_75"}, ValueError, "target must be \"sm_80\" or later, .* got 'sm_75'"),
        ({"target": "sm_90", "device": 0}, ValueError, "a device or a target, got device 0 and target 'sm_90'"),
        ({"target": "sm_90", "calls": ["softmax"]}, ValueError, "calls must be among sinkhorn, .* got 'softmax'"),
        ({"target": "sm_90", "dtypes": torch.int8}, ValueError, "dtypes must be among torch.float16, .* got torch.int8"),
        ({"target": "sm_90", "n": [(3, 0)]}, ValueError, r"n must be lines of a matrix, >= 1, .* got \(3, 0\)"),
        ({"target": "sm_90", "features": [0]}, ValueError, "features must be numbers of them, >= 1, got 0"),
        ({"target": "sm_90", "jobs": 0}, ValueError, "jobs must be an int >= 1, .* got 0"),
    ],
)
def test_bad_arguments(
    arguments: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        fastdsm.warmup(**arguments)
