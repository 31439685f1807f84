"""How the operators live in PyTorch: compile, transforms, opcheck, autocast, checkpointing, meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

import fastdsm
from fastdsm import reference

ops = torch.ops.fastdsm


def project(x: Tensor) -> Tensor:
    """Five sweeps."""
    return fastdsm.sinkhorn(x, n_iters=5)


def plain(x: Tensor) -> Tensor:
    return reference.sinkhorn(x, n_iters=5)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "sinkhorn": project,
    "row first": lambda x: fastdsm.sinkhorn(x, first="row", temperature=0.5),
    "with info": lambda x: fastdsm.sinkhorn(x, tol=1e-3, return_info=True)[0],
    "temperature": lambda x: fastdsm.sinkhorn(x, temperature=torch.full(x.shape[:-2], 2.0)),
    "mask and marginal": lambda x: fastdsm.sinkhorn(x, mask=torch.eye(4) < 1, row_marginal=torch.arange(1.0, 5)),
    "newton": lambda x: fastdsm.sinkhorn(x, solver="newton", temperature=torch.full(x.shape[:-2], 2.0)),
    "implicit": lambda x: fastdsm.sinkhorn_sigma2(x, grad="implicit", first="row").sigma2,
    "sinkhorn_sigma2": lambda x: fastdsm.sinkhorn_sigma2(x).sigma2,
    "sigma2": lambda x: fastdsm.sigma2(x.exp()),
}


NUMBERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sinkhorn": lambda x, t: fastdsm.sinkhorn(x, temperature=t),
    "newton": lambda x, t: fastdsm.sinkhorn_sigma2(x, temperature=t, solver="newton").sigma2,
    "log": lambda x, t: fastdsm.log_sinkhorn(x, temperature=t, half_steps=3),
    "attention": lambda x, t: fastdsm.sinkhorn_attention(x, x, x, temperature=t),
    "sigma2 of attention": lambda x, t: fastdsm.sinkhorn_attention_sigma2(x, x, temperature=t),
    "a target": lambda x, t: fastdsm.temperature_for_sigma2(x, t / 4)[0].nan_to_num(0.0),
    "a floor": lambda x, t: fastdsm.nn.SinkhornProjection(temperature=t, sigma2_floor=0.3)(x),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_graph_break(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    logits = torch.randn(3, 4, 4, requires_grad=True)
    values, gradients = [], []
    for function in (call, compiled):
        found = function(logits)
        values.append(found)
        weights = torch.arange(found.numel(), dtype=found.dtype).view(found.shape)
        gradients.append(torch.autograd.grad((found * weights).sum(), logits)[0])
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"row_marginal": torch.arange(1.0, 5)}], ids=["uniform", "marginal"])
def test_a_compiled_backward_is_of_operators(options: dict[str, Any]) -> None:
    """Not of what they are made of: a compiler took 20 seconds for the projections of sigma2's vectors."""
    torch._dynamo.reset()
    called: list[str] = []

    def backward(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=backward)
    compiled = torch.compile(lambda x: fastdsm.sigma2(fastdsm.sinkhorn(x, **options), **options), backend=backend)
    compiled(torch.randn(3, 4, 4, requires_grad=True)).sum().backward()
    assert [name for name in called if "fastdsm" in name] == [
        "fastdsm.sigma2_backward.default",
        "fastdsm.sinkhorn_backward.default",
    ]
    assert len(called) < 10


def test_one_graph_serves_every_batch_and_temperature() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x, t: fastdsm.sinkhorn(x, temperature=t), fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 5, 9, 16):
        compiled(torch.randn(batch, 4, 4), torch.full((batch,), 0.1 * batch))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", NUMBERS)
def test_float_temperatures_do_not_compile_anew(name: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    call, x = NUMBERS[name], torch.randn(3, 4, 4)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for k in range(12):
        number = 0.25 + k / 16
        leaf = x.clone().requires_grad_()
        found = compiled(leaf, number)
        torch.testing.assert_close(found, call(x, number))
        found.sum().backward()
    assert len(graphs) == 2  # of a constant, and of a number


def test_vmap() -> None:
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    temperature = torch.arange(1.0, 7, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(project)(x), project(x))
    torch.testing.assert_close(torch.vmap(project, in_dims=1, out_dims=1)(x), project(x))
    torch.testing.assert_close(torch.vmap(torch.vmap(project))(x), project(x))
    torch.testing.assert_close(torch.vmap(fastdsm.sigma2)(x.exp()), fastdsm.sigma2(x.exp()))
    torch.testing.assert_close(torch.vmap(fastdsm.sigma2_bounds)(x.exp()), fastdsm.sigma2_bounds(x.exp()))
    found = torch.vmap(lambda a, t: fastdsm.sinkhorn(a, temperature=t))(x, temperature)
    torch.testing.assert_close(found, fastdsm.sinkhorn(x, temperature=temperature[:, None]))


def test_transforms_compose() -> None:
    x, weights = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(plain(leaf), leaf, weights)

    def loss(a: Tensor, w: Tensor) -> Tensor:
        return (project(a) * w).sum()

    torch.testing.assert_close(torch.func.grad(loss)(x, weights), expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x, weights), expected)
    torch.testing.assert_close(torch.func.grad(lambda a: (torch.vmap(project)(a) * weights).sum())(x), expected)
    torch.testing.assert_close(torch.func.jacrev(project)(x[0]), torch.func.jacrev(plain)(x[0]))
    second = torch.func.jacrev(torch.func.jacrev(lambda a: (project(a) ** 3).sum()))(x[0])
    torch.testing.assert_close(second, torch.func.hessian(lambda a: (plain(a) ** 3).sum())(x[0]))
    slopes = torch.vmap(torch.func.grad(lambda a: fastdsm.sinkhorn_sigma2(a).sigma2))(x)
    oracle = torch.vmap(torch.func.grad(lambda a: reference.sinkhorn_sigma2(a).sigma2))(x)
    torch.testing.assert_close(slopes, oracle)


def test_transforms_of_the_fixed_point() -> None:
    x, weights = torch.randn(2, 5, 3, 4, dtype=torch.float64)

    def converged(a: Tensor) -> Tensor:
        return fastdsm.sinkhorn(a, solver="newton")

    def oracle(a: Tensor) -> Tensor:
        return reference.sinkhorn(a, n_iters=300)

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(oracle(leaf), leaf, weights)
    torch.testing.assert_close(torch.vmap(converged)(x), converged(x))
    torch.testing.assert_close(torch.func.grad(lambda a: (converged(a) * weights).sum())(x), expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(lambda a, w: (converged(a) * w).sum()))(x, weights), expected)
    torch.testing.assert_close(torch.func.jacrev(converged)(x[0]), torch.func.jacrev(oracle)(x[0]))
    second = torch.func.jacrev(torch.func.jacrev(lambda a: (converged(a) ** 3).sum()))(x[0])
    torch.testing.assert_close(second, torch.func.hessian(lambda a: (oracle(a) ** 3).sum())(x[0]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("options", [{"solver": "newton"}, {"tol": 1e-9}, {"grad": "implicit"}, {}], ids=str)
def test_transforms_of_any_batch_shape(options: dict[str, Any], batch: tuple[int, ...]) -> None:
    """Whatever an operator leaves empty."""
    x = torch.randn(4, *batch, 3, 3, dtype=torch.float64)

    def plan(a: Tensor, **more: bool) -> Any:
        return fastdsm.sinkhorn(a, n_iters=60, **options, **more)

    torch.testing.assert_close(torch.vmap(plan)(x), plan(x))
    torch.testing.assert_close(torch.vmap(lambda a: plan(a, return_info=True)[0])(x), plan(x))
    jacobian = torch.func.jacrev(plan)(x[0])
    assert jacobian.shape == 2 * x[0].shape
    torch.testing.assert_close(torch.vmap(torch.func.jacrev(plan))(x)[0], jacobian)


def _projection_inputs(x: Tensor) -> tuple[object, ...]:
    return (x, None, None, None, None, None, 1.0, 5, True, -1.0, "torch")


@pytest.mark.parametrize(
    ("kind", "dtype"), [("contiguous", torch.float32), ("transposed", torch.bfloat16), ("empty", torch.float32)]
)
def test_opcheck(dtype: torch.dtype, kind: str) -> None:
    x = torch.randn(0 if kind == "empty" else 3, 4, 5, dtype=dtype)
    x = x.mT if kind == "transposed" else x
    leaf = x.detach().requires_grad_()
    temperature = torch.full((x.shape[0],), 0.7, requires_grad=True)
    opcheck(ops.sinkhorn.default, _projection_inputs(leaf))
    opcheck(ops.sinkhorn.default, (leaf, temperature, *_projection_inputs(leaf)[2:]))
    opcheck(ops.sinkhorn_info.default, (*_projection_inputs(leaf), True))
    opcheck(ops.sinkhorn_info.default, (*_projection_inputs(leaf), False))
    opcheck(ops.sinkhorn_backward.default, (x, None, *_projection_inputs(leaf), True))
    opcheck(ops.sigma2.default, (leaf, None, None, None, None, "auto", 1e-4, 0, "torch"))
    opcheck(ops.sigma2_bounds.default, (x, None, None, None, "torch"))
    cotangent, u, v = (torch.randn(shape) for shape in (x.shape[:1], x.shape[:2], x.shape[::2]))
    opcheck(ops.sigma2_backward.default, (cotangent.requires_grad_(), u, v, leaf, None, None, None, False))
    row = torch.ones(x.shape[:2], requires_grad=True)
    opcheck(ops.sigma2_backward.default, (cotangent, u, v, leaf, row, None, None, True))


def test_opcheck_of_the_fixed_point() -> None:
    x = torch.randn(2, 3, 4).mT
    leaf = x.detach().requires_grad_()
    temperature = torch.full((2,), 0.7, requires_grad=True)
    opcheck(ops.fixed_point.default, (leaf, temperature, *_projection_inputs(leaf)[2:9], 1e-3, "torch", "newton", True, True))
    opcheck(ops.fixed_point.default, (x, None, *_projection_inputs(x)[2:], "newton", False, False))
    opcheck(ops.fixed_point_backward.default, (x, torch.zeros(2, 4), torch.zeros(2, 3), *_projection_inputs(leaf), True))


def test_autocast_leaves_dtypes_alone() -> None:
    x = torch.randn(2, 8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = x @ x.mT
        assert logits.dtype == torch.bfloat16
        assert project(logits).dtype == torch.bfloat16
        assert project(x).dtype == torch.float32


def test_checkpoint() -> None:
    x = torch.randn(3, 4, 4, requires_grad=True)
    torch.utils.checkpoint.checkpoint(project, x, use_reentrant=False).square().sum().backward()
    (expected,) = torch.autograd.grad(project(x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)


def test_meta_tensors() -> None:
    found = fastdsm.sinkhorn_sigma2(torch.empty(2, 3, 5, device="meta", dtype=torch.float16))
    assert found.plan.shape == (2, 3, 5)
    assert found.plan.dtype == torch.float16
    assert found.sigma2.dtype == torch.float32


def test_export() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return project(x)

    x = torch.randn(2, 3, 3)
    exported = torch.export.export(Layer(), (x,))
    torch.testing.assert_close(exported.module()(x), project(x))
