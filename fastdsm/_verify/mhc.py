"""``fastdsm.mhc`` held against the float64 oracle; what :mod:`fastdsm._verify.sinkhorn` adds for it.

A case is a layer: pre and post with a branch that adds its own values, post with the next pre, or a head. Budgets are the
policy's, of results relative to their largest entry, as these are sums of streams. Gradients of parameters are sums over tokens
that may cancel: of T terms of the cotangent's size, whose rounding adds up as sqrt(T) of them. Streams of 16 bits are rounded
between post and the next pre, and so is their gradient: there the oracle takes the call's own streams, and gradients may be off
by four units of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import mhc
from .._ops.problem import compute_dtype
from ..reference import mhc as oracle
from .sinkhorn import DTYPES, Case, Record, Target, compare, failed, gradient_size

_JOINT = ("post pre", "shifted")
_LAYERS = (*_JOINT, "head")
_INFO = "info"  # DeepSeek's layer, and the spectra of its mixes
_PARAMETERS = ("fn", "scale", "base")
_Results = Mapping[str, Tensor]


@dataclass(frozen=True)
class MhcCase(Case):
    """As :class:`~fastdsm._verify.sinkhorn.Case`; ``shape`` (T, n, C), ``option`` a variant or another layer."""

    @property
    def summary(self) -> str:
        """Everything but the dtype."""
        return f"mhc {'x'.join(map(str, self.shape))}, std {self.std:g}, {self.n_iters} sweeps, {self.option}"


def mhc_cases(target: Target, quick: bool = False) -> list[MhcCase]:
    """Numbers of streams, channels and tokens by dtype; variants and layers; spreads of the mix's logits."""
    variants = list(mhc.VARIANTS)
    if quick or target.interpreted:
        shapes = [(3, 4, 16)] if quick else [(5, 1, 3), (3, 4, 40), (2, 8, 8), (2, 11, 5)]
        spreads, dtypes = [1.0], DTYPES[:2] if quick else DTYPES
    else:
        shapes = [(1, 1, 1), (300, 4, 256), (17, 2, 33), (64, 3, 100), (33, 8, 64), (9, 16, 40)]
        spreads, dtypes = [0.1, 4.0, 16.0], DTYPES
    layers = [MhcCase(shape, x, 1.0, 20, option) for shape in shapes for option in (*variants, _INFO, *_LAYERS) for x in dtypes]
    wild = [MhcCase(shapes[-1], x, std, 20, option) for std in spreads for option in variants[:1] for x in dtypes]
    return layers + wild


def verify_mhc_case(case: MhcCase, target: Target) -> list[Record]:
    """Hold results and gradients against the oracle; a call that raises is a miss."""
    try:
        return _compare(case, target)
    except Exception as error:
        return [failed(case, target, error)]


def _compare(case: MhcCase, target: Target) -> list[Record]:
    operands = _operands(case, target.device)
    generator = torch.Generator().manual_seed(1)
    call = partial(_called, case, target.backend)
    with torch.no_grad():
        like = call(operands)
    narrow = case.dtype != compute_dtype(case.dtype)
    definition = partial(_defined, case, like["streams"] if narrow and case.option in _JOINT else None)
    cotangents = {name: torch.randn(x.shape, generator=generator).to(x) for name, x in like.items()}
    (results, slopes), (truths, truth_slopes), (plains, plain_slopes) = (
        _pulled(function, operands, cotangents, dtype)
        for function, dtype in ((call, None), (definition, torch.float64), (definition, torch.float32))
    )
    record = partial(compare, target=target, case=case)
    records = [
        record("mhc", name, results[name], truth, plains[name], size=max(1.0, truth.abs().amax().item()))
        for name, truth in truths.items()
    ]
    if case.option == _INFO:
        truth, plain = (oracle.spectrum(definition(_held(operands, x))["comb"]) for x in (torch.float64, torch.float32))
        records.append(record("mhc", "spectrum", _spectra(case, target.backend, operands), truth, plain, size=1.0))
    spread = torch.cat([x.double().flatten() for x in cotangents.values()])
    for name, truth in truth_slopes.items():
        terms = case.shape[0] if name in _PARAMETERS else 1
        size = gradient_size(truth, spread * terms**0.5)
        found, plain = slopes[name], plain_slopes[name]
        if narrow and case.option in _JOINT:
            size *= 1.0 + 4e6 * torch.finfo(case.dtype).eps
        elif found.dtype == case.dtype and narrow:  # a gradient of streams is the sum of two that are rounded to these
            size *= 1.0 + 1e6 * torch.finfo(case.dtype).eps
        records.append(record("mhc", f"gradient of {name}", found, truth, plain, size=size))
    return records


def _pulled(
    function: Callable[[dict[str, Tensor]], _Results],
    operands: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results of ``function`` and the gradients of its operands, these held in ``dtype`` before."""
    leaves = {name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for name, x in operands.items()}
    results = function(leaves)
    given = [cotangents[name].to(x.dtype) for name, x in results.items()]
    slopes = torch.autograd.grad(list(results.values()), list(leaves.values()), given)
    return {name: x.detach() for name, x in results.items()}, dict(zip(leaves, slopes, strict=True))


def _held(operands: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) for name, x in operands.items()}


def _spectra(case: MhcCase, backend: str, given: Mapping[str, Tensor]) -> Tensor:
    """As the oracle has them."""
    layer = [given[name] for name in ("fn", "scale", "base")]
    *_, info = mhc.mhc_pre(given["residual"], *layer, sinkhorn_repeat=case.n_iters, return_info=True, backend=backend)
    return torch.cat([info.singular_values, info.sigma2.unsqueeze(-1), info.residual.unsqueeze(-1)], -1)


def _called(case: MhcCase, backend: str, given: dict[str, Tensor]) -> _Results:
    """What the public calls make of these operands."""
    option = case.option
    layer = [given[name] for name in ("fn", "scale", "base")]
    if option == "head":
        return {"h": mhc.mhc_head(given["residual"], *layer, backend=backend)}
    if option in _LAYERS:
        written = [given[name] for name in ("x", "residual", "weights", "comb")]
        mixed, h, (post, comb) = mhc.mhc_post_pre(*written, *layer, mixes=given.get("mixes"), backend=backend)
        return {"streams": mixed, "h": h, "post": post.squeeze(-1), "comb": comb}
    variant = "deepseek" if option == _INFO else option
    h, (post, comb) = mhc.mhc_pre(given["residual"], *layer, variant=variant, sinkhorn_repeat=case.n_iters, backend=backend)
    mixed = mhc.mhc_post(given["x"], given["residual"], post, comb, backend=backend)
    return {"h": h, "post": post.squeeze(-1), "comb": comb, "streams": mixed}


def _defined(case: MhcCase, rounded: Tensor | None, given: dict[str, Tensor]) -> _Results:
    """The same by the oracle. rounded: the streams that the next pre is of, where they are not those that it has found."""
    n, option = case.shape[1], case.option
    mixing = mhc.VARIANTS.get(option, mhc.VARIANTS["deepseek"])._replace(n_iters=case.n_iters)
    layer = given["scale"], given["base"], n, mixing
    streams = whole = given["residual"]
    if option in _JOINT:
        streams = whole = oracle.post(given["x"], streams, given["weights"], given["comb"])
    if rounded is not None:
        streams = whole + (rounded.to(whole) - whole).detach()
    pre, post, comb = oracle.split(oracle.mixes(streams, given["fn"], mixing.norm_eps), *layer)
    if option == "shifted":
        pre = oracle.split(given["mixes"], *layer)[0]
    h = oracle.collapse(streams, pre)
    if post is None or comb is None:
        return {"h": h}
    if option in _LAYERS:
        return {"streams": whole, "h": h, "post": post, "comb": comb}
    return {"h": h, "post": post, "comb": comb, "streams": oracle.post(given["x"], streams, post, comb)}


def _operands(case: MhcCase, device: str) -> dict[str, Tensor]:
    """Tensors of the call, drawn in float32 and then held in the dtypes of the call."""
    generator = torch.Generator().manual_seed(0)
    tokens, n, channels = case.shape
    rows = n if case.option == "head" else n * (n + 2)
    wide = compute_dtype(case.dtype)

    def normal(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    found = {"residual": normal(tokens, n, channels, dtype=case.dtype), "base": normal(rows)}
    found["fn"] = (normal(rows, n * channels).float() / (n * channels) ** 0.5).to(wide)
    found["scale"] = torch.tensor([0.7, 1.2, case.std][: 1 if case.option == "head" else 3], dtype=wide, device=device)
    if case.option != "head":
        found["x"] = normal(tokens, channels, dtype=case.dtype)
    if case.option in _JOINT:
        found |= {"weights": normal(tokens, n), "comb": normal(tokens, n, n)}
    if case.option == "shifted":
        found["mixes"] = normal(tokens, rows)
    return found
