"""Calls past the dispatcher: what was decided for one call never outlives what it was made from, whatever comes next."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastdsm
from fastdsm import projection, reference
from fastdsm._ops import operators, plain, runs, transforms

BACKENDS = ("torch", "triton")


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    projection._calls.kept.clear()
    runs._runs.clear()


@pytest.fixture
def operations() -> Iterator[list[str]]:
    """Names of fastdsm's operators that torch dispatches."""
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        yield seen


def check(x: Tensor, backend: str, **options: Any) -> None:
    """Value and gradient of a projection against the oracle."""
    wide = x.detach().double().requires_grad_(x.requires_grad)
    plan = fastdsm.sinkhorn(x, backend=backend, **options)
    truth = reference.sinkhorn(wide, **options)
    # Of 20 sweeps, and what rounding to 16 bits leaves of an entry of at most 1.
    tol = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}[x.dtype]
    assert plan.dtype == x.dtype
    torch.testing.assert_close(plan.double(), truth, atol=tol, rtol=0)
    if x.requires_grad:
        cotangent = torch.randn_like(x)
        (found,) = torch.autograd.grad(plan, x, cotangent)
        (right,) = torch.autograd.grad(truth, wide, cotangent.double())
        torch.testing.assert_close(found.double(), right, atol=2 * tol, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_offsets_dtypes_and_gradients_change_between_calls_of_one_shape(backend: str) -> None:
    def forms() -> Iterator[Tensor]:
        room = torch.randn(3 * 4 * 4 + 16)
        yield room[:48].view(3, 4, 4)
        yield room[:48].view(3, 4, 4).mT
        yield room[1:49].view(3, 4, 4)  # not aligned
        yield room[4:52].view(3, 4, 4)
        yield torch.randn(6, 4, 4)[::2]
        yield torch.randn(1, 4, 4).expand(3, 4, 4)
        yield torch.randn(3, 4, 4).double()
        yield torch.randn(3, 4, 4).bfloat16()

    for _ in range(2 if backend == "torch" else 1):  # interpreted, once in every form and back to the first
        for x in (*forms(), *itertools.islice(forms(), 1)):
            check(x, backend)
            check(x.detach().requires_grad_(), backend)
            check(x, backend, first="row")
            with torch.no_grad():
                check(x.detach(), backend)
            with torch.inference_mode():
                check(x.clone(), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_call_reads_its_own_tensors(backend: str) -> None:
    """Prepared launches take every pointer from the call at hand: inputs that share memory, too."""
    for step in range(3):
        shared = torch.rand(2, 3, 5) + 0.5
        row = shared[0]
        options: list[dict[str, Any]] = [
            {"row_marginal": row, "col_marginal": row},
            {"row_marginal": row, "f0": row},
            {"f0": shared[0], "row_marginal": shared[1]},
            {"temperature": shared[0, :, 0]},
            {"mask": torch.rand(3, 5, 5) < 0.9},
            {"temperature": 0.5 + step},
        ]
        for given in options:
            leaf = torch.randn(3, 5, 5, requires_grad=True)
            check(leaf, backend, n_iters=6, **given)
            found = fastdsm.sinkhorn_sigma2(leaf, n_iters=6, backend=backend, **given)
            truth = reference.sinkhorn_sigma2(leaf.double(), n_iters=6, **given)
            torch.testing.assert_close(found.sigma2.double(), truth.sigma2, atol=2e-6, rtol=0)
            torch.testing.assert_close(found.f.double(), truth.f, atol=4e-6, rtol=0)


def test_cotangents_of_any_form() -> None:
    x = torch.randn(3, 4, 4, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    room = torch.randn(3 * 16 + 1)
    cotangents = [
        room[1:].view(3, 4, 4),
        torch.randn(3, 4, 4).mT,
        torch.ones(()).expand(3, 4, 4),
        torch._neg_view(torch.randn(3, 4, 4)),
    ]
    for _ in range(2):
        for backend in BACKENDS:
            for cotangent in cotangents:
                (found,) = torch.autograd.grad(fastdsm.sinkhorn(x, backend=backend), x, cotangent)
                (right,) = torch.autograd.grad(reference.sinkhorn(wide), wide, cotangent.double())
                torch.testing.assert_close(found.double(), right, atol=2e-5, rtol=0)


def test_negative_views_and_threads_and_autocast() -> None:
    x = torch.randn(3, 4, 4)
    expected = fastdsm.sinkhorn(x)
    torch.testing.assert_close(fastdsm.sinkhorn(torch._neg_view(-x)), expected)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(fastdsm.sinkhorn(x)))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = fastdsm.sinkhorn(x)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_gradients_and_jacobians(backend: str) -> None:
    def project(x: Tensor) -> Tensor:
        return fastdsm.sinkhorn(x, n_iters=3, backend=backend)

    x = torch.randn(2, 3, 3)
    project(x)
    jacobian = torch.autograd.functional.jacobian(lambda y: reference.sinkhorn(y, n_iters=3), x.double()).float()
    for vectorize in (False, True):
        found = torch.autograd.functional.jacobian(project, x, vectorize=vectorize)
        torch.testing.assert_close(found, jacobian, atol=1e-5, rtol=0)
    leaf = x.clone().requires_grad_()
    basis = torch.eye(18).view(18, 2, 3, 3)
    (batched,) = torch.autograd.grad(project(leaf), leaf, basis, is_grads_batched=True)
    torch.testing.assert_close(batched.view(2, 3, 3, 2, 3, 3), jacobian, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend: str) -> None:
    x = torch.randn(2, 3, 3)

    def slope(project: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        y = y.clone().requires_grad_()
        (first,) = torch.autograd.grad(project(y).square().sum(), y, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), y)
        return second

    found = slope(lambda y: fastdsm.sinkhorn(y, n_iters=3, backend=backend), x)
    torch.testing.assert_close(found.double(), slope(lambda y: reference.sinkhorn(y, n_iters=3), x.double()), atol=1e-4, rtol=0)


def test_tracing() -> None:
    x = torch.randn(3, 4, 4)
    expected = fastdsm.sinkhorn(x)
    traced = torch.jit.trace(lambda y: fastdsm.sinkhorn(y), x)
    assert "fastdsm::sinkhorn" in str(traced.graph)
    torch.testing.assert_close(traced(x), expected)


def test_modes_see_the_operators(operations: list[str]) -> None:
    x = torch.randn(3, 4, 4, requires_grad=True)
    plan = fastdsm.sinkhorn(x)
    torch.autograd.grad(plan, x, torch.randn_like(plan))
    assert [name for name in operations if name.startswith("fastdsm")] == [
        "fastdsm.sinkhorn.default",
        "fastdsm.sinkhorn_backward.default",
    ]


def test_a_mode_entered_between_forward_and_backward() -> None:
    x = torch.randn(3, 4, 4, requires_grad=True)
    plan = fastdsm.sinkhorn(x)
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.autograd.grad(plan, x, torch.randn_like(plan))
    assert "fastdsm.sinkhorn_backward.default" in seen


def test_function_modes_are_not_passed_by() -> None:
    x = torch.randn(3, 4, 4)
    fastdsm.sinkhorn(x)
    seen: list[Any] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        fastdsm.sinkhorn(x)
    assert any("fastdsm" in str(func) for func in seen)


def test_subclasses_go_by_the_operator() -> None:
    class Marked(Tensor):
        pass

    x = torch.randn(3, 4, 4)
    expected = fastdsm.sinkhorn(x)
    found = fastdsm.sinkhorn(x.as_subclass(Marked))
    assert type(found) is Marked
    torch.testing.assert_close(found.as_subclass(Tensor), expected)


def test_the_profiler_shows_the_operators() -> None:
    x = torch.randn(3, 4, 4, requires_grad=True)
    fastdsm.sinkhorn(x)
    with torch.profiler.profile() as profile:
        fastdsm.sinkhorn(x).square().sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastdsm::sinkhorn", "fastdsm::sinkhorn_backward"} <= names


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    x = torch.randn(3, 4, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(fastdsm.sinkhorn(x).square().sum(), x)
    checkpoint(lambda y: fastdsm.sinkhorn(y).square().sum(), x, use_reentrant=reentrant).backward()
    torch.testing.assert_close(x.grad, expected)


def test_selective_checkpointing_sees_the_operators() -> None:
    x = torch.randn(3, 4, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(fastdsm.sinkhorn(x).square().sum(), x)
    seen: list[str] = []

    def policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(str(func))
        return CheckpointPolicy.MUST_SAVE if "fastdsm" in str(func) else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    checkpoint(lambda y: fastdsm.sinkhorn(y).square().sum(), x, use_reentrant=False, context_fn=contexts).backward()
    assert "fastdsm.sinkhorn.default" in seen
    torch.testing.assert_close(x.grad, expected)


def test_compiled_autograd() -> None:
    x = torch.randn(3, 4, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(fastdsm.sinkhorn(x).square().sum(), x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        fastdsm.sinkhorn(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_saved_tensors_that_hooks_replace() -> None:
    x = torch.randn(3, 4, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(fastdsm.sinkhorn(x).square().sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.mT.contiguous(), lambda t: t.mT):
        loss = fastdsm.sinkhorn(x).square().sum()
    (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, expected)


def test_bad_arguments_after_good_ones() -> None:
    x = torch.randn(3, 4, 4)
    fastdsm.sinkhorn(x, n_iters=1)
    fastdsm.sinkhorn(x, n_iters=20, tol=1e-3)
    for wrong, error in (
        ({"n_iters": True}, TypeError),
        ({"n_iters": 20.0}, TypeError),
        ({"backend": "cuda"}, ValueError),
        ({"first": ["col"]}, ValueError),
        ({"temperature": True}, TypeError),
        ({"temperature": 0.0}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"temperature": float("inf")}, ValueError),
        ({"tol": -1.0}, ValueError),
        ({"solver": "sinkhorn", "grad": "exact"}, ValueError),
    ):
        for _ in range(2):
            with pytest.raises(error):
                fastdsm.sinkhorn(x, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_values_are_looked_at_in_every_call(backend: str) -> None:
    x, good, bad = torch.randn(3, 4, 4), torch.ones(4), torch.tensor([1.0, -1.0, 2.0, 2.0])
    fastdsm.sinkhorn(x, row_marginal=good, col_marginal=good, temperature=torch.ones(3), backend=backend)
    with pytest.raises(ValueError, match="row_marginal must be >= 0"):
        fastdsm.sinkhorn(x, row_marginal=bad, col_marginal=good, temperature=torch.ones(3), backend=backend)
    with pytest.raises(ValueError, match="equal totals"):
        fastdsm.sinkhorn(x, row_marginal=2 * good, col_marginal=good, temperature=torch.ones(3), backend=backend)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        fastdsm.sinkhorn(x, row_marginal=good, col_marginal=good, temperature=torch.zeros(3), backend=backend)
    with pytest.raises(ValueError, match="got nan"):
        fastdsm.sinkhorn(x, row_marginal=good * torch.nan, backend=backend)


def test_a_tolerance_in_a_tensor_is_read_each_time() -> None:
    x, tol = torch.randn(3, 4, 4), torch.tensor(1e-1)
    coarse = fastdsm.sinkhorn(x, tol=tol, return_info=True)[1].sweeps  # type: ignore[arg-type]
    tol.fill_(1e-6)
    fine = fastdsm.sinkhorn(x, tol=tol, return_info=True)[1].sweeps  # type: ignore[arg-type]
    assert bool((fine > coarse).all())


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.Kept, "LIMIT", 5)
    for batch in range(1, 12):
        check(torch.randn(batch, 3, 3), "triton")
    assert len(projection._calls.kept) <= 5
    assert len(runs._runs) <= 5


def test_nothing_of_a_call_is_kept_alive() -> None:
    x = torch.randn(3, 4, 4)
    row = torch.ones(3, 4)
    results = [fastdsm.sinkhorn_sigma2(x, row_marginal=row, backend=backend) for backend in BACKENDS]
    storages = [StorageWeakRef(t.untyped_storage()) for t in (x, row, *results[0], *results[1])]
    del x, row, results
    gc.collect()  # Triton's interpreter leaves cycles
    assert all(storage.expired() for storage in storages)


def test_without_torchs_private_calls_every_call_goes_by_its_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4, 4, requires_grad=True)
    expected = fastdsm.sinkhorn(x)
    for module in (plain, transforms):
        monkeypatch.setattr(module, "thread_is_plain", lambda: False)
    implementations = dict.fromkeys(operators.IMPLEMENTATIONS)
    monkeypatch.setattr(transforms.sinkhorn, "_implementation", implementations)
    monkeypatch.setattr(transforms.sinkhorn, "_apply", implementations)
    found = fastdsm.sinkhorn(x)
    torch.testing.assert_close(found, expected)
    assert "sinkhorn" in str(found.grad_fn)


def test_a_compiled_call_looks_at_nothing_that_is_kept() -> None:
    """A dictionary of forms, as a variable of the graph, was guarded entry by entry: seconds, where a program had had many."""
    guards = []
    for _ in range(2):
        torch._dynamo.reset()
        guards.append(len(torch._dynamo.explain(lambda x: fastdsm.sinkhorn(x))(torch.randn(3, 4, 4)).out_guards))
        for n in range(2, 60):
            fastdsm.sinkhorn(torch.randn(1, n, 2))
    assert guards[0] == guards[1]
