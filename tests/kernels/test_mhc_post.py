"""The kernels behind a branch of an mHC layer, interpreted, against their definition in float64.

An error may be twice that of the definition in the dtype of the streams, and 1e-6 of what is summed, or half a unit in the last
place of a result of 16 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.static.report import identify
from fastdsm._verify.sinkhorn import half_ulp
from fastdsm.kernels.mhc import launch_post

SINGLE, DOUBLE = torch.float32, torch.float64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layer(NamedTuple):
    """What X' is made of."""

    x: Tensor
    X: Tensor
    post: Tensor
    comb: Tensor

    def cast(self, dtype: torch.dtype) -> Layer:
        return Layer(*(tensor.to(dtype) for tensor in self))


def layer(tokens: int, n: int, channels: int, dtype: torch.dtype, scale: float = 1.0) -> Layer:
    x, X = torch.randn(tokens, channels) * scale, torch.randn(tokens, n, channels) * scale
    return Layer(x.to(dtype), X.to(dtype), torch.rand(tokens, n) * 2, torch.rand(tokens, n, n).softmax(-1))


def definition(x: Tensor, X: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X', one new stream after the other."""
    news = []
    for new in range(X.shape[1]):
        total = post[:, new, None] * x
        for old in range(X.shape[1]):
            total = total + comb[:, old, new, None] * X[:, old]
        news.append(total)
    return torch.stack(news, 1)


def sizes(x: Tensor, X: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """What is summed, by its absolute values."""
    return definition(x.abs(), X.abs(), post.abs(), comb.abs())


def gradients(of: Layer, grad: Tensor) -> tuple[Tensor, ...]:
    """By autograd of the definition, in the dtype of ``of``."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in of]
    return torch.autograd.grad(definition(*leaves), leaves, grad.to(of.x.dtype))


def assert_near(found: Tensor, truth: Tensor, plain: Tensor, size: Tensor) -> None:
    """``size``: what is summed, by its absolute values."""
    allowed = 2 * (plain.double() - truth).abs() + 1e-6 * size
    if found.dtype != SINGLE:
        allowed = 1e-6 * size + half_ulp(truth.abs() + 1e-6 * size, found.dtype)
    error = (found.double() - truth).abs()
    assert found.shape == truth.shape
    assert bool((error <= allowed).all()), f"error {error.max():.3e}, allowed {allowed.flatten()[error.argmax()]:.3e}"


def check_forward(of: Layer) -> Tensor:
    found = launch_post.post(*of)
    assert found.dtype == of.X.dtype
    assert found.is_contiguous()
    exact = of.cast(DOUBLE)
    assert_near(found, definition(*exact), definition(*of.cast(SINGLE)), sizes(*exact))
    return found


def check_backward(of: Layer, grad: Tensor) -> tuple[Tensor, ...]:
    found = launch_post.post_backward(grad, *of)
    exact = of.cast(DOUBLE)
    truth, plain = gradients(exact, grad), gradients(of.cast(SINGLE), grad)
    summed = gradients(Layer(*(tensor.abs() for tensor in exact)), grad.abs())
    for value, true, near, size, like in zip(found, truth, plain, summed, of, strict=True):
        assert value.dtype == like.dtype
        assert value.is_contiguous()
        assert_near(value, true, near, size)
    return found


def check(of: Layer, grad: Tensor | None = None) -> None:
    check_forward(of)
    check_backward(of, torch.randn(of.X.shape).to(of.X.dtype) if grad is None else grad)


SIZES = [
    (1, 1, 1), (3, 1, 64), (3, 1, 5), (1, 3, 200), (3, 3, 1), (37, 3, 5), (3, 4, 5), (37, 4, 64), (3, 4, 200), (1, 4, 520),
    (3, 8, 200), (3, 8, 5), (1, 16, 200), (2, 16, 64), (2, 11, 5),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "n", "channels"), SIZES)
def test_every_size(tokens: int, n: int, channels: int, dtype: torch.dtype) -> None:
    check(layer(tokens, n, channels, dtype))


def sliced(x: Tensor, before: int) -> Tensor:
    """``x`` as part of a larger tensor whose other entries are NaN."""
    larger = torch.full([size + before + 8 for size in x.shape], torch.nan, dtype=x.dtype)
    part = larger[tuple(slice(before, before + size) for size in x.shape)]
    part.copy_(x)
    return part


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "before", "aligned"), [(4, 8, True), (4, 3, False), (6, 8, True)])
def test_strided(n: int, before: int, aligned: bool, dtype: torch.dtype) -> None:
    whole, grad = layer(3, n, 64, dtype), torch.randn(3, n, 64).to(dtype)
    of = whole._replace(x=sliced(whole.x, before), X=sliced(whole.X, before))
    parts = (of.x, of.X, sliced(grad, before))
    assert not any(part.is_contiguous() for part in parts)
    assert launch_post.aligned(*parts) == aligned
    assert torch.equal(launch_post.post(*of), launch_post.post(*whole))
    check(of, parts[2])


def test_one_cotangent_for_all() -> None:
    """What ``expand`` gives: every stride but the last is 0."""
    of = layer(3, 4, 64, torch.bfloat16)
    check(of, torch.randn(64).to(torch.bfloat16).expand(3, 4, 64))


@pytest.mark.parametrize("n", [4, 8])
def test_tokens_do_not_meet(n: int) -> None:
    """NaN in each input of one token: the bits of all others stay."""
    of, grad = layer(6, n, 40, torch.bfloat16), torch.randn(6, n, 40).to(torch.bfloat16)
    clean = (launch_post.post(*of), *launch_post.post_backward(grad, *of))
    for tensor in (grad, *of):
        tensor[2] = torch.nan
    broken = (launch_post.post(*of), *launch_post.post_backward(grad, *of))
    others = torch.arange(6) != 2
    for before, after in zip(clean, broken, strict=True):
        assert torch.equal(before[others], after[others])
        assert bool(after[2].isnan().all())


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e37), (torch.bfloat16, 1e37), (torch.float16, 1e4)])
def test_huge_values(dtype: torch.dtype, scale: float) -> None:
    of = layer(3, 4, 64, dtype, scale)
    of = of._replace(post=of.post / 4)
    assert bool(check_forward(of).isfinite().all())
    check_backward(of, (torch.randn(3, 4, 64) * min(1.0, 1e8 / scale)).to(dtype))


def test_infinity_arrives() -> None:
    """What overflows float16 is infinite, and no stream of another channel is."""
    of = layer(2, 4, 64, torch.float16)
    of.X[1, 2, 7] = 65504.0
    of.comb[1, 2] = 3.0
    found = launch_post.post(*of)
    assert bool((found[1, :, 7] == torch.inf).all())
    assert int(found.isinf().sum()) == 4


def test_streams_that_are_not_there() -> None:
    """What lies behind the n-th stream and its mixes is never read: NaN."""
    whole = layer(2, 8, 64, torch.float32)
    of = Layer(whole.x, whole.X[:, :5], whole.post[:, :5].contiguous(), whole.comb[:, :5, :5].contiguous())
    whole.X[:, 5:] = torch.nan
    check(of)


def test_nothing_compiles_anew_for_tokens() -> None:
    """The configuration depends on the dtype, the streams and the alignment alone, and each is in the table."""
    from fastdsm import kernels

    known = {identify(configuration) for configuration in kernels.configurations()}
    for n in (1, 4, 5, 16):
        used = set()
        for tokens in (1, 17, 1000):
            of = layer(tokens, n, 64, torch.bfloat16)
            with kernels.recorded() as launches:
                launch_post.post(*of)
                launch_post.post_backward(of.X, *of)
            used.add(tuple(identify(launch.configuration) for launch in launches))
        assert len(used) == 1
        assert set(*used) <= known


def next_layer(n: int, channels: int) -> Tensor:
    """fn of a layer behind, with rows of many sizes."""
    return torch.randn(n * (n + 2), n * channels) * torch.logspace(-3, 1, n * (n + 2))[:, None]


def check_partials(of: Layer, fn: Tensor, given: Tensor | None) -> tuple[Tensor, ...]:
    """X' is that of post; of it as rounded, products and squares are as exact as float32, and h is within the budget."""
    new, h, partials = launch_post.post_partials(*of, fn, given)
    (tokens, _n, _), rows = new.shape, fn.shape[0]
    assert torch.equal(new, launch_post.post(*of))
    assert partials.shape[1:] == (tokens, -(-(rows + 1) // 8) * 8)
    exact = new.double().flatten(1)
    sums, squares = partials.double().sum(0)[:, :rows], partials.double().sum(0)[:, rows]
    error = (sums - exact @ fn.double().T).abs() / (exact.abs() @ fn.double().abs().T)
    assert error.max() < 3e-7
    torch.testing.assert_close(squares, exact.square().sum(1), rtol=3e-7, atol=0)
    assert (h is None) == (given is None)
    if h is not None and given is not None:
        assert h.dtype == new.dtype
        truth, size = (torch.einsum("tn,tnc->tc", given.double(), x) for x in (new.double(), new.double().abs()))
        assert_near(h, truth, torch.einsum("tn,tnc->tc", given, new.float()), size)
    return new, h, partials


@pytest.fixture
def _many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels are shared by several programs."""
    monkeypatch.setattr(launch_post, "multiprocessors", lambda device: 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "n", "channels", "given"), [(1, 1, 8, False), (3, 4, 200, True), (37, 3, 64, False), (130, 2, 24, True)]
)
def test_partials(tokens: int, n: int, channels: int, given: bool, dtype: torch.dtype) -> None:
    """One program for all channels: the sums are those of one part."""
    of = layer(tokens, n, channels, dtype)
    _, _, partials = check_partials(of, next_layer(n, channels), torch.rand(tokens, n) if given else None)
    assert partials.shape[0] == 1


@pytest.mark.usefixtures("_many_parts")
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts(dtype: torch.dtype) -> None:
    """Parts of whole steps, the last one shorter; strided inputs between NaN."""
    of = layer(3, 4, 200, dtype)
    of = of._replace(x=sliced(of.x, 8), X=sliced(of.X, 8))
    _, _, partials = check_partials(of, next_layer(4, 200), torch.rand(3, 4))
    assert partials.shape[0] > 3


def test_tokens_do_not_meet_behind_the_product() -> None:
    of, fn, given = layer(6, 4, 40, torch.bfloat16), next_layer(4, 40), torch.rand(6, 4)
    results = []
    for value in (1.0, torch.nan):
        of.X[2, 1, 3] = value
        new, h, partials = launch_post.post_partials(*of, fn, given)
        assert h is not None
        results.append((new, h, partials.sum(0)[:, : len(fn) + 1]))
    others = torch.arange(6) != 2
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[others], after[others])
    assert bool(results[1][2][2].isnan().all())


FUSED = [(4, 64, 0, True), (1, 8, 8, True), (5, 64, 0, False), (4, 5, 0, False), (4, 64, 3, False)]


@pytest.mark.parametrize(("n", "channels", "before", "fuses"), FUSED)
def test_what_is_fused(n: int, channels: int, before: int, fuses: bool) -> None:
    """Up to four streams of whole vectors; the rest takes a launch for post and one for the product."""
    of = layer(2, n, channels, torch.bfloat16)
    X = sliced(of.X, before) if before else of.X
    assert launch_post.fuses(of.x, X, next_layer(n, channels)) == fuses


def test_what_is_aligned() -> None:
    """Where the first line starts counts, and no stride of an axis of one."""
    assert not launch_post.aligned(torch.empty(65)[1:].view(1, 64))
    assert launch_post.aligned(torch.empty(3, 64)[1:].view(2, 64), torch.empty(64).as_strided((1, 64), (3, 1)))


def test_lines_far_apart_are_not_fused() -> None:
    """Offsets in a tile are of 32 bits."""
    of = layer(2, 4, 8, torch.bfloat16)
    X = torch.empty(1 << 24, dtype=torch.bfloat16).as_strided((1, 4, 8), (1 << 24, 8, 1))
    assert not launch_post.fuses(of.x[:1], X, next_layer(4, 8))


def test_parts_leave_few_multiprocessors_idle() -> None:
    """All of a few tokens' channels at once; of many tokens no more parts than fill the device; waves that are full."""
    assert launch_post._steps_of_part(1, 256, 132) == 8
    assert launch_post._steps_of_part(4096, 256, 132) > 32
    for blocks in (64, 79, 133, 200):
        steps = launch_post._steps_of_part(blocks, 256, 132)
        waves = -(-blocks * -(-256 // steps) // 132)
        assert waves * steps * 132 < 1.3 * blocks * 256
