"""A user's program, run and type-checked against the installed wheel (test_wheel.py), and by `make lint` as it is.

It imports nothing but torch and fastdsm. What a type checker sees of each result stands beside it.
"""

import tempfile
from typing import Any, assert_type

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastdsm
import fastdsm.distributed
from fastdsm import compat, diagnostics, integrations, mhc
from fastdsm import nn as layers
from fastdsm.compat import geomloss, gumbel, hyper_connections, megatron, pot, pygmtools, sinkformers, sinkhorn_transformer
from fastdsm.compat.dinov2 import sinkhorn_knopp_teacher
from fastdsm.compat.superglue import log_optimal_transport, log_sinkhorn_iterations
from fastdsm.compat.swav import distributed_sinkhorn

Triple = tuple[Tensor, Tensor, Tensor]


def projections(logits: Tensor, wanted: bool) -> None:
    """The calls on matrices."""
    plan = fastdsm.sinkhorn(logits, n_iters=5, temperature=0.5, first="row", tol=1e-4)
    assert_type(plan, Tensor)
    assert_type(fastdsm.sinkhorn(logits, return_info=False), Tensor)
    assert_type(fastdsm.sinkhorn(logits, return_info=True), tuple[Tensor, fastdsm.SinkhornInfo])
    assert_type(fastdsm.sinkhorn(logits, return_info=wanted), Tensor | tuple[Tensor, fastdsm.SinkhornInfo])
    _, info = fastdsm.sinkhorn(logits, solver="newton", row_marginal=1.0, col_marginal=torch.ones(4), return_info=True)
    assert_type(info.converged, Tensor)
    assert_type(info.f + info.g, Tensor)
    assert_type(fastdsm.log_sinkhorn(logits, half_steps=3), Tensor)
    spectrum = fastdsm.sinkhorn_sigma2(logits, mask=torch.ones(4, 4, dtype=torch.bool))
    assert_type(spectrum, fastdsm.SinkhornSpectrum)
    assert_type(spectrum.sigma2, Tensor)
    assert_type(fastdsm.sigma2(plan), Tensor)
    assert_type(fastdsm.sigma2(plan, return_vectors=True), Triple)
    assert_type(fastdsm.sigma2(plan, return_vectors=wanted), Tensor | Triple)
    assert_type(fastdsm.sigma2_bounds(plan), tuple[Tensor, Tensor])
    assert_type(fastdsm.round_to_birkhoff(plan), Tensor)
    temperature, reached = fastdsm.temperature_for_sigma2(logits, 0.5)
    assert_type(temperature, Tensor)
    assert_type(reached, Tensor)
    assert_type(fastdsm.reference.sinkhorn_sigma2(logits.double()), fastdsm.SinkhornSpectrum)


def attention(query: Tensor, wanted: bool) -> None:
    """The calls on queries and keys."""
    key = value = query
    assert_type(fastdsm.sinkhorn_attention(query, key, value, None, 0.0, n_iters=2), Tensor)
    assert_type(fastdsm.sinkhorn_attention(query, key, value, return_info=True), tuple[Tensor, fastdsm.AttentionInfo])
    found = fastdsm.sinkhorn_attention(query, key, value, return_info=wanted)
    assert_type(found, Tensor | tuple[Tensor, fastdsm.AttentionInfo])
    assert_type(fastdsm.sinkhorn_attention_sigma2(query, key), Tensor)
    assert_type(fastdsm.sinkhorn_attention_sigma2(query, key, return_bounds=True), Triple)


def mixes(streams: Tensor) -> None:
    """The mHC layer by its calls."""
    n, width = streams.shape[-2:]
    fn, scale, base = torch.randn(n * (n + 2), n * width) / 32, torch.ones(3), torch.zeros(n * (n + 2))
    h, (post, comb) = mhc.mhc_pre(streams, fn, scale, base, variant="paper")
    assert_type(h, Tensor)
    assert_type(comb, Tensor)
    *_, info = mhc.mhc_pre(streams, fn, scale, base, return_info=True)
    assert_type(info, mhc.MixInfo)
    assert_type(mhc.mhc_post(h, streams, post, comb), Tensor)
    behind, following, (post, comb) = mhc.mhc_post_pre(h, streams, post, comb, fn, scale, base)
    assert_type(behind, Tensor)
    assert_type(following, Tensor)
    assert_type(mhc.mhc_post_pre(h, streams, post, comb, fn, scale, base, return_info=True)[3].sigma2, Tensor)
    assert_type(mhc.mhc_head(streams, fn[:n], scale[:1], base[:n]), Tensor)
    raw = mhc.mhc_mixes(streams, fn)
    assert_type(mhc.hc_split_sinkhorn(raw, scale, base, n), Triple)
    assert_type(mhc.sinkhorn_normalize(comb), Tensor)
    assert_type(list(mhc.VARIANTS), list[str])


class Network(nn.Module):
    """Modules as attributes keep their types; a call of any module is Any to a type checker, its forward is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = layers.SinkhornAttention(width, 2, batch_first=True, temperature=0.5)
        self.connection = layers.HyperConnection(nn.Linear(width, width), width, streams=4, variant="deepseek")
        self.stack = layers.HyperConnections([nn.Linear(width, width) for _ in range(3)], width, head=True, recompute=2)
        self.project = layers.SinkhornProjection(temperature=nn.Parameter(torch.ones(())), sigma2_floor=0.2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to the same."""
        out, weights = self.attention.forward(x, x, x)
        assert_type(out, Tensor)
        assert_type(weights, Tensor | None)
        streams = self.connection.expand(x + out)
        assert_type(self.connection.reduce(streams), Tensor)
        out = self.stack.forward(self.connection.reduce(self.connection.forward(streams)))
        assert_type(out, Tensor)
        plan = self.project.forward(out @ out.mT)
        assert_type(plan, Tensor)
        return plan @ out


def watched(network: Network, x: Tensor) -> None:
    """Training under a monitor, and what plans are measured by."""
    with diagnostics.SpectralMonitor(network, every=1) as monitor:
        network(x).square().sum().backward()
    assert_type(monitor, diagnostics.SpectralMonitor)
    assert_type(monitor.rows, list[diagnostics.Row])
    assert_type(monitor.rows[0].sigma2, float)
    assert_type(monitor.stream_rows, list[diagnostics.StreamRow])
    assert_type(diagnostics.spectral_report(network, x, figure=None), list[diagnostics.Row])
    plan = fastdsm.sinkhorn(torch.randn(3, 4, 4))
    summary = diagnostics.summarize(plan)
    assert_type(summary, diagnostics.PlanSummary)
    assert_type(summary.distance_to_identity, Tensor | None)
    assert_type(diagnostics.product_sigma2(plan), Tensor)
    assert_type(diagnostics.effective_depth(0.5), Tensor)
    assert_type(diagnostics.entropy(plan), Tensor)
    assert_type(layers.spectral_penalty(fastdsm.sigma2(plan), 0.5), Tensor)
    assert_type(layers.SpectralFloor(0.5).forward(torch.randn(3, 4, 4)), Tensor)


def converted() -> None:
    """Other packages' models."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2, enable_nested_tensor=False)
    report = integrations.convert(model, n_iters=2, leave=["layers.0.*"])
    assert_type(report, integrations.Report)
    assert_type(report.changed, list[integrations.Entry])
    assert_type(report.left[0].reason, str)


def others(scores: Tensor) -> None:
    """Other packages' calls; of those that take NumPy's arrays too the result is what came, Any."""
    assert_type(log_optimal_transport(scores, torch.zeros(()), 5), Tensor)
    assert_type(log_sinkhorn_iterations(scores, torch.zeros(4), torch.zeros(4), 5), Tensor)
    assert_type(hyper_connections.sinkhorn_knopps(scores), Tensor)
    assert_type(sinkformers.SinkhornDistance(0.5, 3).forward(scores), tuple[Tensor, Tensor, Tensor, Tensor])
    assert_type(gumbel.gumbel_sinkhorn(scores, tau=0.5), Tensor)
    assert_type(sinkhorn_transformer.sinkhorn_sorting_operator(scores), Tensor)
    assert_type(distributed_sinkhorn(scores[0]), Tensor)
    assert_type(sinkhorn_knopp_teacher(scores[0], 0.1), Tensor)
    assert_type(megatron.sinkhorn(scores[0]), Tensor)
    assert_type(pygmtools.sinkhorn(scores), Any)
    masses = torch.full((4,), 0.25)
    assert_type(pot.sinkhorn(masses, masses, scores[0].square(), 1.0, stopThr=1e-6), Any)
    assert_type(pot.batch.solve_batch(scores.square(), 1.0), pot.batch.OTResult)
    assert_type(geomloss.solve(scores[0].square(), reg=1.0), geomloss.OTResultMatrix)
    assert_type(compat.swav.sinkhorn(scores[0]), Tensor)
    assert_type(compat.conventions(), list[compat.Convention])


def shared(logits: Tensor, query: Tensor) -> None:
    """The calls over processes, of which there is one."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    plan = fastdsm.distributed.sinkhorn(logits, n_iters=3)
    assert_type(plan, Tensor)
    assert_type(fastdsm.distributed.sinkhorn(logits, return_info=True), tuple[Tensor, fastdsm.SinkhornInfo])
    assert_type(fastdsm.distributed.sigma2(plan), Tensor)
    assert_type(fastdsm.distributed.sinkhorn_attention(query, query, query), Tensor)
    assert_type(fastdsm.distributed.HyperConnectionParallel(sequence_dim=1), fastdsm.distributed.HyperConnectionParallel)
    dist.destroy_process_group()


def main() -> None:
    """Run all of it."""
    torch.manual_seed(0)
    projections(torch.randn(2, 4, 4, requires_grad=True), True)
    attention(torch.randn(1, 2, 6, 8), True)
    mixes(torch.randn(3, 4, 8))
    watched(Network(16), torch.randn(2, 6, 16))
    converted()
    others(torch.randn(2, 4, 4))
    shared(torch.randn(2, 4, 4), torch.randn(1, 2, 6, 8))
    print(f"fastdsm {assert_type(fastdsm.__version__, str)}: all of it ran")


if __name__ == "__main__":
    main()
