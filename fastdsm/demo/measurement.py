"""Every head's plan measured: residual, sigma2, entropy, and how deep the stack may be before detail is gone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..diagnostics import depth_bound, effective_depth, entropy
from ..projection import sinkhorn_sigma2
from ..spectrum import sigma2
from .timing import Agreement, Times, check, time_pair

N_ITERS = 20
EPS = 2.0**-9
# Wall time for the pairs of one forward, and again for those of one forward + backward.
LAYER_SECONDS = 0.5
HEAD_SECONDS = 0.1


@dataclass
class Measurement:
    """What the demo found; tensors over (layers, heads) or (layers,) unless said otherwise.

    softmax_sigma2 is that of the model's own attention A, whose rows alone sum to 1: the norm of A on the mean-free
    space, which may exceed 1. mean_sigma2 is sigma2 of a layer's plan averaged over its heads; product_sigma2 that of
    the product of these averages up to each layer, softmax_product_sigma2 the same for the averaged A. stack_depth and
    head_depth (heads,): layers after which detail must be below ``EPS``, inf where the six do not suffice;
    repeated_depth, repeated_head_depth (heads,): the same for a stack of equal layers whose sigma2 is the geometric
    mean.
    """

    logit_std: Tensor
    residual: Tensor
    sigma2: Tensor
    softmax_sigma2: Tensor
    shannon: Tensor
    renyi2: Tensor
    softmax_shannon: Tensor
    mean_sigma2: Tensor
    product_sigma2: Tensor
    softmax_product_sigma2: Tensor
    stack_depth: float
    repeated_depth: float
    head_depth: Tensor
    repeated_head_depth: Tensor
    head_times: list[list[Times]] = field(default_factory=list)
    layer_times: list[Times] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)


def measure(logits: Tensor) -> Measurement:
    """Project the (layers, heads, n, n) logits with :func:`fastdsm.sinkhorn_sigma2` and measure the plans."""
    found = sinkhorn_sigma2(logits, n_iters=N_ITERS)
    attention = logits.softmax(-1)
    means = found.plan.mean(1)
    mean_sigma2 = _value(sigma2(means))
    return Measurement(
        logit_std=logits.std((-2, -1)),
        residual=found.residual,
        sigma2=found.sigma2,
        softmax_sigma2=_value(sigma2(attention)),
        shannon=entropy(found.plan),
        renyi2=entropy(found.plan, order=2),
        softmax_shannon=entropy(attention),
        mean_sigma2=mean_sigma2,
        product_sigma2=_value(sigma2(_products(means))),
        softmax_product_sigma2=_value(sigma2(_products(attention.mean(1)))),
        stack_depth=depth_bound(mean_sigma2, EPS).item(),
        repeated_depth=effective_depth(mean_sigma2.log().mean().exp(), EPS).item(),
        head_depth=depth_bound(found.sigma2, EPS),
        repeated_head_depth=effective_depth(found.sigma2.log().mean(0).exp(), EPS),
    )


def time_all(logits: Tensor, into: Measurement) -> Iterator[str]:
    """Check each layer's outputs, then time the layer and each of its heads; yields a word after each step."""
    for layer in logits:
        into.agreement.append(check(layer, N_ITERS))
        yield "outputs checked"
        into.layer_times.append(time_pair(layer, N_ITERS, LAYER_SECONDS))
        into.head_times.append([])
        yield "layer timed"
        for head in layer:
            into.head_times[-1].append(time_pair(head, N_ITERS, HEAD_SECONDS))
            yield "head timed"


def timing_steps(logits: Tensor) -> int:
    """How many steps :func:`time_all` takes."""
    return logits.shape[0] * (2 + logits.shape[1])


def _products(layers: Tensor) -> Tensor:
    """P_1, P_2 P_1, ..., P_L ... P_1 of the (L, n, n) layers."""
    products = [layers[0]]
    for layer in layers[1:]:
        products.append(layer @ products[-1])
    return torch.stack(products)


def _value(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The value alone, which is all that comes where no vectors are asked for."""
    assert isinstance(result, Tensor)
    return result
