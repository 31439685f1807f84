"""DTensors in the public calls, on two processes: values and gradients are those of plain tensors, batches stay apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import fastdsm
from fastdsm import mhc

from .pool import SIZE, Pool

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
Results = list[Tensor]
LEAD = (3, 2, 4, 5)  # 3 matrices over two processes: one has 2, the other 1


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def given(name: str) -> dict[str, Tensor]:
    """A call's tensors; the first leads."""
    torch.manual_seed(2)
    logits = normal(*LEAD)
    marginals = {"row_marginal": normal(2, 4).softmax(-1), "col_marginal": normal(3, 1, 5).softmax(-1)}
    mask = torch.rand(LEAD) > 0.2
    heads = {"query": normal(3, 2, 4, 2), "key": normal(3, 2, 5, 2), "value": normal(3, 2, 5, 3)}
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    streams = {"residual": normal(3, 2, 4, 6)}
    layer = {"fn": normal(24, 24) / 5, "scale": normal(3), "base": normal(24)}
    square = normal(3, 2, 4, 4)
    return {
        "sinkhorn": {"logits": logits, "temperature": normal(3, 1).exp(), **marginals},
        "newton": {"logits": logits, "temperature": normal().exp()},
        "sinkhorn_sigma2": {"logits": logits, "f0": normal(4), "mask": mask},
        "log_sinkhorn": {"logits": logits, "mask": mask},
        "sigma2": {"plan": fastdsm.sinkhorn(square)},
        "sigma2_bounds": {"plan": fastdsm.sinkhorn(square)},
        "temperature": {"logits": square, "target": torch.rand(3, 2, dtype=torch.float64) * 0.5 + 0.2},
        "round": {"plan": fastdsm.sinkhorn(square, n_iters=2)},
        "attention": {**heads, "attn_mask": normal(2, 4, 5), "key_padding_mask": padding, "temperature": normal(2).exp()},
        "attention sigma2": {"query": heads["query"], "key": heads["key"]},
        "mhc_pre": {**streams, **layer},
        "mhc_post": {**streams, "x": normal(3, 2, 6), "post_layer_mix": normal(3, 2, 4), "comb_res_mix": normal(3, 2, 4, 4)},
        "hc_split_sinkhorn": {"mixes": normal(3, 2, 24), "hc_scale": normal(3), "hc_base": normal(24)},
    }[name]  # fmt: skip


CALLS: dict[str, Callable[..., Any]] = {
    "sinkhorn": lambda **x: fastdsm.sinkhorn(**x, n_iters=7),
    "newton": lambda **x: fastdsm.sinkhorn(**x, solver="newton", return_info=True),
    "sinkhorn_sigma2": fastdsm.sinkhorn_sigma2,
    "log_sinkhorn": fastdsm.log_sinkhorn,
    "sigma2": fastdsm.sigma2,
    "sigma2_bounds": fastdsm.sigma2_bounds,
    "temperature": fastdsm.temperature_for_sigma2,
    "round": fastdsm.round_to_birkhoff,
    "attention": fastdsm.sinkhorn_attention,
    "attention sigma2": fastdsm.sinkhorn_attention_sigma2,
    "mhc_pre": lambda **x: mhc.mhc_pre(**x, return_info=True),
    "mhc_post": mhc.mhc_post,
    "hc_split_sinkhorn": mhc.hc_split_sinkhorn,
}


def flat(found: Any) -> Results:
    return [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, Tensor)]


def gradients(results: Results, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a sum of squares of what has a gradient."""
    total = sum(x.square().sum() for x in results if x.requires_grad)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    if not isinstance(total, Tensor):
        return {}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def leaf(x: Tensor) -> Tensor:
    return x.requires_grad_(x.is_floating_point())


def over_processes(name: str, dim: int, plain: bool) -> tuple[list[Tensor], dict[str, Tensor], bool]:
    """Results and gradients, whole, of a lead in Shard(dim); of the others plain, or replicated; whether results are apart."""
    mesh = init_device_mesh("cpu", (SIZE,))
    tensors = given(name)
    lead = next(iter(tensors))
    leaves = {
        key: leaf(distribute_tensor(x, mesh, [Shard(dim)]) if key == lead else x if plain else distribute_tensor(x, mesh))
        for key, x in tensors.items()
    }
    results = flat(CALLS[name](**leaves))
    slopes = {key: whole(x) for key, x in gradients(results, leaves).items()}
    apart = all(isinstance(x, DTensor) and x.placements == (Shard(dim),) for x in results)
    return [whole(x).detach() for x in results], slopes, apart


@pytest.mark.parametrize("plain", [True, False], ids=["plain arguments", "replicated arguments"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", CALLS)
def test_plain_tensors(workers: Pool, name: str, dim: int, plain: bool) -> None:
    leaves = {key: leaf(x) for key, x in given(name).items()}
    expected = flat(CALLS[name](**leaves))
    slopes = gradients(expected, leaves)
    for results, theirs, apart in workers.run(over_processes, name, dim, plain):
        assert apart
        for x, y in zip(results, expected, strict=True):
            torch.testing.assert_close(x, y.detach(), rtol=1e-9, atol=1e-11)
        assert theirs.keys() == slopes.keys()
        for key, x in slopes.items():
            torch.testing.assert_close(theirs[key], x, rtol=1e-8, atol=1e-10, msg=key)


def other_placements() -> list[bool]:
    """A batch that is a sum, one that is whole, and one that stays so beside arguments that are apart."""
    mesh = init_device_mesh("cpu", (SIZE,))
    torch.manual_seed(0)
    logits, temperature = normal(4, 3, 3), normal(4).exp()
    expected = fastdsm.sinkhorn(logits, temperature=temperature)
    half = DTensor.from_local(logits / SIZE, mesh, [Partial()])
    found = [fastdsm.sinkhorn(half, temperature=temperature)]
    found.append(
        fastdsm.sinkhorn(distribute_tensor(logits, mesh), temperature=distribute_tensor(temperature, mesh, [Shard(0)]))
    )
    found.append(fastdsm.sinkhorn(logits, temperature=distribute_tensor(temperature, mesh, [Shard(0)])))
    square = init_device_mesh("cpu", (1, SIZE))
    found.append(fastdsm.sinkhorn(distribute_tensor(logits, square, [Shard(0), Shard(0)]), temperature=temperature))
    return [torch.allclose(whole(x), expected, atol=1e-13) for x in found]


def test_other_placements(workers: Pool) -> None:
    assert workers.run(other_placements) == [[True] * 4] * SIZE


def derivatives() -> list[bool]:
    """A second derivative, and a graph."""
    mesh = init_device_mesh("cpu", (SIZE,))
    torch.manual_seed(0)
    logits = normal(4, 3, 3)

    def twice(x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(fastdsm.sinkhorn(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    plain, apart = (leaf(x) for x in (logits.clone(), distribute_tensor(logits, mesh, [Shard(0)])))
    compiled = torch.compile(fastdsm.sinkhorn, backend="aot_eager", fullgraph=True)
    return [
        torch.allclose(whole(twice(apart)), twice(plain), atol=1e-11),
        torch.allclose(whole(compiled(apart)), fastdsm.sinkhorn(plain), atol=1e-13),
    ]


def test_derivatives_and_compilation(workers: Pool) -> None:
    assert workers.run(derivatives) == [[True, True]] * SIZE


def rows_apart(first: str, solver: str) -> list[bool]:
    """Logits whose rows lie apart, 3 and 2 of them, with what is of rows and of columns plain."""
    mesh = init_device_mesh("cpu", (SIZE,))
    torch.manual_seed(0)
    tensors = {
        "logits": normal(2, 5, 4),
        "temperature": normal(2).exp(),
        "row_marginal": torch.rand(5, dtype=torch.float64) + 0.1,
    }
    tensors["col_marginal"] = torch.rand(2, 4, dtype=torch.float64) + 0.1
    tensors["col_marginal"] *= tensors["row_marginal"].sum() / tensors["col_marginal"].sum(1, keepdim=True)
    options: dict[str, Any] = {"first": first, "solver": solver, "return_info": True}
    if solver == "sinkhorn":  # of a mask there need be no fixed point
        options["mask"] = torch.rand(2, 5, 4) > 0.1
    plain = {name: leaf(x.clone()) for name, x in tensors.items()}
    apart = {
        name: leaf(distribute_tensor(x, mesh, [Shard(1)]) if name == "logits" else x.clone()) for name, x in tensors.items()
    }
    (expected, known), (plan, info) = (fastdsm.sinkhorn(**x, **options) for x in (plain, apart))
    weight = normal(2, 5, 4)
    (expected * weight).sum().backward()
    (plan * distribute_tensor(weight, mesh, [Shard(1)])).sum().backward()
    found = [plan.placements == (Shard(1),), torch.allclose(whole(plan), expected, atol=1e-10)]
    found += [torch.allclose(whole(info.residual), known.residual, atol=1e-10), whole(info.f).shape == known.f.shape]
    return found + [torch.allclose(whole(apart[name].grad), x.grad, atol=1e-8) for name, x in plain.items()]


@pytest.mark.parametrize(("first", "solver"), [("col", "sinkhorn"), ("row", "sinkhorn"), ("col", "newton")])
def test_rows_apart(workers: Pool, first: str, solver: str) -> None:
    assert workers.run(rows_apart, first, solver) == [[True] * 8] * SIZE


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (SIZE,))
    texts = []
    calls: list[Callable[[], Any]] = [
        lambda: fastdsm.sinkhorn(distribute_tensor(torch.randn(2, 4, 4), mesh, [Shard(2)])),
        lambda: fastdsm.log_sinkhorn(distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)])),
        lambda: fastdsm.sinkhorn_attention(*[distribute_tensor(torch.randn(1, 2, 4, 4), mesh, [Shard(2)])] * 3),
        lambda: mhc.mhc_post(
            torch.randn(4, 6),
            distribute_tensor(torch.randn(4, 4, 6), mesh, [Shard(1)]),
            torch.randn(4, 4),
            torch.randn(4, 4, 4),
        ),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError) as raised:
            call()
        texts.append(str(raised.value))
    return texts


def test_matrices_stay_whole(workers: Pool) -> None:
    for texts in workers.run(refusals):
        for text, words in zip(texts, ("logits", "logits", "query", "residual"), strict=True):
            assert text.startswith(words)
            assert "got Shard(dim=" in text
            assert "fastdsm.distributed" in text


def bad_on_one_process() -> bool:
    """Values that one process alone has are not looked at: it would raise, and the other wait in its next collective."""
    mesh = init_device_mesh("cpu", (SIZE,))
    temperature = distribute_tensor(torch.tensor([1.0, 1.0, -1.0, 1.0]), mesh, [Shard(0)])
    plan = fastdsm.sinkhorn(distribute_tensor(torch.randn(4, 3, 3), mesh, [Shard(0)]), temperature=temperature)
    return bool(whole(plan)[[0, 1, 3]].isfinite().all())


def test_no_value_is_looked_at_by_one_process(workers: Pool) -> None:
    assert workers.run(bad_on_one_process) == [True] * SIZE


def test_the_package_does_not_import_them() -> None:
    import subprocess
    import sys

    code = "import sys, fastdsm; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
