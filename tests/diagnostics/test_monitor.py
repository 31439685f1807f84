"""SpectralMonitor and spectral_report: what they record against direct measurement, and where they write it."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdsm
from fastdsm.diagnostics import Row, SpectralMonitor, distance_to_identity, distance_to_uniform, spectral_report
from fastdsm.nn import HyperConnection, HyperConnections, SinkhornAttention, SinkhornProjection


class Network(nn.Module):
    """A projection of given logits, attention, and a hyper-connection."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.mix = SinkhornProjection()
        self.attention = SinkhornAttention(8, 2, batch_first=True)
        self.connection = HyperConnection(nn.Linear(8, 8), 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.logits) @ x
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.connection.reduce(self.connection(self.connection.expand(x)))


def network() -> tuple[Network, Tensor]:
    return Network(torch.randn(6, 6)), torch.randn(5, 6, 8)


def by_layer(rows: list[Row]) -> dict[tuple[str, int], Row]:
    return {(row.layer, row.head): row for row in rows}


def check(row: Row, plans: Tensor) -> None:
    """Against plans (count, n, m), all of them sampled."""
    value = fastdsm.reference.sigma2(plans)
    expected = (value.mean(), value.min(), value.max(), distance_to_uniform(plans).mean(), distance_to_identity(plans).mean())
    assert row[3:8] == pytest.approx([x.item() for x in expected], rel=2e-3, abs=1e-5)
    assert row.residual == pytest.approx(fastdsm.diagnostics.residual(plans).max().item(), rel=1e-2, abs=1e-6)


def test_finds_every_layer_and_head() -> None:
    model, x = network()
    plans: list[Tensor] = []
    model.connection.projection.register_forward_hook(lambda _, __, plan: plans.append(plan.detach()))
    monitor = SpectralMonitor(model)
    model(x).sum().backward()
    found = by_layer(monitor.rows)
    assert set(found) == {("mix", 0), ("attention", 0), ("attention", 1), ("connection.projection", 0)}
    mixing = model.mix(model.logits).detach()
    check(found["mix", 0], mixing[None])
    check(found["connection.projection", 0], plans[0].flatten(0, 1))
    heads = model.attention.plan(mixing @ x, mixing @ x).detach()
    for head in range(2):
        check(found["attention", head], heads[:, head])


def test_steps_samples_and_modes() -> None:
    model, x = network()
    monitor = SpectralMonitor(model, every=3, sample=4)
    for _ in range(5):
        model(x)
    model.eval()
    model(x)
    assert monitor.step == 5
    assert sorted({row.step for row in monitor.rows}) == [0, 3]
    model.train()
    monitor.close()
    model(x)
    assert monitor.step == 5
    assert not model._forward_hooks
    assert not model.mix._forward_hooks


def test_it_changes_nothing() -> None:
    model, x = network()
    model(x).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with SpectralMonitor(model):
        model(x).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


def test_user_named_plans_and_repeated_layers() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = SinkhornProjection()
            self.monitor: SpectralMonitor | None = None

        def forward(self, logits: Tensor) -> Tensor:
            plan = fastdsm.sinkhorn(2 * logits)
            if self.monitor is not None:
                self.monitor.record("mine", plan)
                self.monitor.record("by head", plan, heads=True)
                self.monitor.record("nothing", plan[:0])
            return self.mix(self.mix(logits))

    model, logits = Loose(), torch.randn(4, 3, 5, 5)
    model.monitor = SpectralMonitor(model)
    model(logits)
    found = by_layer(model.monitor.rows)
    assert set(found) == {("mine", 0), ("mix", 0), *(("by head", h) for h in range(3))}
    check(found["mix", 0], fastdsm.sinkhorn(logits).flatten(0, 1))
    for head in range(3):
        check(found["by head", head], fastdsm.sinkhorn(2 * logits)[:, head])
    model.monitor.record("outside a step", torch.ones(2, 2))
    assert len(model.monitor.rows) == len(found)


@pytest.mark.parametrize("kind", ["uniform", "identity", ""])
def test_collapse_is_flagged(kind: str) -> None:
    logits = {"uniform": 0.01 * torch.randn(6, 6), "identity": 20 * torch.eye(6), "": torch.randn(6, 6)}[kind]
    model = Network(logits)
    monitor = SpectralMonitor(model)
    model(torch.randn(5, 6, 8))
    assert by_layer(monitor.rows)["mix", 0].collapse == kind


@pytest.mark.parametrize("batch_first", [False, True])
def test_of_a_large_batch_every_other_is_taken(batch_first: bool) -> None:
    model = SinkhornAttention(8, 2, batch_first=batch_first)
    x = torch.randn(6, 5, 8)
    padding = torch.arange(5) >= torch.tensor([5, 4, 3, 5, 4, 3])[:, None]
    mask = torch.randn(12, 5, 5)
    call = (x if batch_first else x.transpose(0, 1),) * 3
    with SpectralMonitor(model, sample=3) as monitor:
        model(*call, key_padding_mask=padding, attn_mask=mask)
    plan = model.plan(*call[:2], padding, mask).detach()[::2]
    value = fastdsm.reference.sigma2(plan, mask=~(padding[::2, None, None] | padding[::2, None, :, None]).expand_as(plan))
    for row in monitor.rows:
        assert row.sigma2 == pytest.approx(value[:, row.head].mean().item(), rel=2e-3)
        assert row.sigma2_max == pytest.approx(value[:, row.head].max().item(), rel=2e-3)


@pytest.mark.parametrize("sample", [1, 3, 4])
def test_a_sample_is_spread_over_the_batch(sample: int) -> None:
    """Of a batch whose second half differs: every 8th, 3rd and 2nd of eight plans."""
    logits = torch.cat([0.1 * torch.randn(4, 5, 5), 8 * torch.randn(4, 5, 5)])
    model = SinkhornProjection()
    with SpectralMonitor(model, sample=sample) as monitor:
        plans = model(logits)
    (row,) = monitor.rows
    check(row, plans[:: -(-8 // sample)])


def test_padding_takes_no_part() -> None:
    model = SinkhornAttention(8, 2, batch_first=True, n_iters=60)
    x = torch.randn(3, 6, 8)
    padding = torch.arange(6).expand(3, 6) >= 4
    monitor = SpectralMonitor(model)
    model(x, x, x, key_padding_mask=padding)
    plan = model.plan(x, x, padding).detach()
    value = fastdsm.reference.sigma2(plan, mask=~(padding[:, None, None] | padding[:, None, :, None]).expand_as(plan))
    assert monitor.rows[0].sigma2 == pytest.approx(value[:, 0].mean().item(), rel=2e-3)
    assert monitor.rows[0].residual < 1e-3


def test_rectangular_and_single_lines() -> None:
    model = SinkhornProjection()
    monitor = SpectralMonitor(model)
    model(torch.randn(3, 4, 6))
    model(torch.randn(3, 1, 1))
    wide, single = monitor.rows
    assert math.isnan(wide.to_identity)
    assert wide.collapse == single.collapse == ""


@pytest.mark.parametrize("kind", ["vmap", "grad", "vmap of grad", "jacrev", "jvp", "inside"])
def test_transforms_are_not_recorded(kind: str) -> None:
    """Neither as steps nor as layers of one; what comes after them is."""
    model: nn.Module = nn.Sequential(SinkhornProjection())
    if kind == "inside":
        model = _Mapped()
    x = torch.randn(3, 4, 4)

    def loss(logits: Tensor) -> Tensor:
        return model(logits).square().sum()

    calls = {
        "vmap": lambda: torch.vmap(model)(x),
        "grad": lambda: torch.func.grad(loss)(x),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(loss))(x),
        "jacrev": lambda: torch.func.jacrev(model)(x),
        "jvp": lambda: torch.func.jvp(model, (x,), (x,)),
        "inside": lambda: model(x),
    }
    with SpectralMonitor(model) as monitor:
        calls[kind]()
        assert (len(monitor.rows), monitor.step) == (0, kind == "inside")
        model.mapped = False
        model(x)
    assert [row.step for row in monitor.rows] == [int(kind == "inside")]


class _Mapped(nn.Sequential):
    """A projection inside vmap, or plain."""

    def __init__(self) -> None:
        super().__init__(SinkhornProjection())
        self.mapped = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self[0])(x) if self.mapped else self[0](x)


def test_threads() -> None:
    """Forwards side by side are steps by themselves: each with its own plans and a number of its own."""
    model = nn.Sequential(SinkhornProjection(), SinkhornProjection(first="row"))
    inputs = [float(scale) * torch.eye(4).expand(2, 4, 4) for scale in range(4)]
    expected = {round(fastdsm.sigma2(fastdsm.sinkhorn(x)).mean().item(), 4) for x in inputs}
    monitor = SpectralMonitor(model)
    with ThreadPoolExecutor(4) as threads:
        for made in [threads.submit(model, x) for _ in range(50) for x in inputs]:
            made.result()
    monitor.close()
    assert monitor.step == 200
    assert [(row.step, row.layer) for row in monitor.rows] == [(step, layer) for step in range(200) for layer in ("0", "1")]
    found = [round(row.sigma2, 4) for row in monitor.rows[::2]]
    assert all(found.count(value) == 50 for value in expected)


def test_a_module_that_holds_its_monitor_is_copied() -> None:
    model: Any = nn.Sequential(SinkhornProjection())
    model.monitor = SpectralMonitor(model)
    x = torch.randn(2, 3, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), fastdsm.sinkhorn(x))
        other.monitor.close()
    assert model.monitor.step == 0


def test_files(tmp_path: Path) -> None:
    class Writer:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.scalars.append((tag, value, step))

    model = nn.Sequential(SinkhornProjection(), SinkhornProjection(first="row"))
    writer = Writer()
    rows = []
    for suffix, sink in ((".jsonl", writer), (".csv", None)):
        with SpectralMonitor(model, path=tmp_path / "made" / f"spectra{suffix}", tensorboard=sink) as monitor:
            for _ in range(2):
                model(torch.randn(4, 3, 5))
        rows.append(monitor.rows)
    lines = [json.loads(line) for line in (tmp_path / "made" / "spectra.jsonl").read_text().splitlines()]
    assert [Row(**{**line, "to_identity": math.nan})[:7] for line in lines] == [row[:7] for row in rows[0]]
    assert all(line["to_identity"] is None for line in lines)
    with (tmp_path / "made" / "spectra.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(int(x["step"]), x["layer"], float(x["sigma2"]), x["to_identity"]) for x in table] == [
        (row.step, row.layer, row.sigma2, "") for row in rows[1]
    ]
    assert ("fastdsm/0/0/sigma2", rows[0][0].sigma2, 0) in writer.scalars
    assert not any("to_identity" in tag for tag, _, _ in writer.scalars)


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, x = network()
    monitor = SpectralMonitor(model)
    with pytest.raises(ValueError, match="no rows to draw"):
        monitor.figure(tmp_path / "none.png")
    model(x)
    monitor.figure(tmp_path / "one.png")
    model(x)
    monitor.figure(tmp_path / "steps.svg")
    assert (tmp_path / "one.png").stat().st_size > 5000
    assert "σ₂" in (tmp_path / "steps.svg").read_text() or (tmp_path / "steps.svg").stat().st_size > 5000


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_report(form: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, x = network()
    model.eval()
    text = io.StringIO()
    batch: Any = {"tensor": x, "tuple": (x,), "mapping": {"x": x}}[form]
    rows = spectral_report(model, batch, figure=tmp_path / "report.png", file=text)
    assert {row.layer for row in rows} == {"mix", "attention", "connection.projection"}
    for word in ("connection.projection", "sigma2", "report.png", f"{rows[0].sigma2:.3f}"):
        assert word in text.getvalue()
    assert (tmp_path / "report.png").exists()
    assert not model.training
    assert spectral_report(nn.Linear(2, 2), torch.ones(1, 2), file=text) == []


def test_under_compile() -> None:
    model, logits = nn.Sequential(SinkhornProjection()), torch.randn(3, 4, 4)
    monitor = SpectralMonitor(model)
    expected = model(logits)
    torch.testing.assert_close(torch.compile(model, backend="eager")(logits), expected)
    assert [(row.step, row.layer) for row in monitor.rows] == [(0, "0"), (1, "0")]
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        torch.compile(model, backend="eager", fullgraph=True)(logits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be >= 1, got 0"),
        ({"sample": 1.5}, TypeError, "sample must be an int"),
        ({"path": "rows.txt"}, ValueError, r"path must end in .jsonl or .csv, got 'rows.txt'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SpectralMonitor(SinkhornProjection(), **arguments)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got function"):
        SpectralMonitor(fastdsm.sinkhorn)


def test_copies_are_not_watched() -> None:
    """deepcopy, pickle, torch.save and an average of weights work, and the monitor goes on with the original."""
    model = Network(torch.randn(6, 6))
    x = torch.randn(5, 6, 8)
    with SpectralMonitor(model) as monitor:
        model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        copies.append(torch.optim.swa_utils.AveragedModel(model))
        for other in copies:
            torch.testing.assert_close(other(x), model.eval()(x))
        assert monitor.step == 1
        model.train()(x)
        assert monitor.step == 2


@pytest.mark.parametrize("variant", ["paper", "deepseek"])
def test_streams_of_connections(variant: str) -> None:
    """Spectra of the mixes, of their product in the order of the layers, and cosines, against direct measurement."""
    stack = HyperConnections([nn.Linear(6, 6) for _ in range(3)], 6, 3, variant=variant, offset=1.0)
    combs: list[Tensor] = []
    streams: list[Tensor] = []
    for layer in stack.layers:

        def keep(_: nn.Module, __: Any, kwargs: dict[str, Tensor], plan: Tensor, layer: HyperConnection = layer) -> None:
            combs.append(plan.detach().flatten(0, 1) if not layer.mixing.transposed else plan.detach().flatten(0, 1).mT)
            streams.append(kwargs["streams"].detach())

        layer.projection.register_forward_hook(keep, with_kwargs=True)
    monitor = SpectralMonitor(stack)
    stack(torch.randn(2, 5, 6)).sum().backward()
    assert [(row.step, row.layer) for row in monitor.stream_rows] == [(0, f"layers.{i}") for i in range(3)]
    product = torch.eye(3)
    for row, mix, X in zip(monitor.stream_rows, combs, streams, strict=True):
        product = mix @ product
        for found, matrices in ((row.singular_values, mix), (row.through_depth, product)):
            assert found == pytest.approx(torch.linalg.svdvals(matrices.double()).mean(0)[1:].tolist(), rel=1e-5, abs=1e-7)
        pairs = [torch.cosine_similarity(X[:, i], X[:, j], dim=-1).mean() for i in range(3) for j in range(i)]
        assert row.cosine == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
        assert row.to_identity == pytest.approx(distance_to_identity(mix).mean().item(), rel=1e-4)
        assert row.to_uniform == pytest.approx(distance_to_uniform(mix).mean().item(), rel=1e-4)
    assert monitor.stream_rows[0].cosine == pytest.approx(1.0)  # equal streams at first
    assert len(monitor.rows) == 3
