"""Every example does what its docstring says that one sees, and a notebook is its source."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib import pyplot

from examples import matching, mhc_language_model, monitoring, notebooks, soft_sorting

mpl.use("Agg")

SOURCE = '''"""A title.

What ``one`` sees.
"""

import math

X = 1


def f() -> int:
    """One."""
    return X


def main(a: int = 2) -> int:
    """Main."""
    b = a

    # Why.
    # And how.
    for _ in range(a):
        b += f()

    return b


if __name__ == "__main__":
    main()
'''


def test_soft_sorting(capsys: pytest.CaptureFixture[str]) -> None:
    found = soft_sorting.main()
    assert found["warmest"] > 1
    assert found["coldest"] < 0.05
    assert found["before"] > 5
    assert found["after"] < 1
    assert found["cosine"] > 0.99
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_matching() -> None:
    found = matching.main()
    assert found["before"]["precision"] < 0.7
    assert found["before"]["outliers in the dustbin"] == 0
    assert min(found["after"].values()) > 0.95


def test_mhc_language_model() -> None:
    found = mhc_language_model.main()
    assert found["first"] > found["chance"] > found["last"] + 0.3
    assert found["difference"] < 1e-5
    assert found["off"] < 0.05


def test_monitoring(tmp_path: Path) -> None:
    found = monitoring.main(tmp_path / "monitoring.png")
    heads = found.pop("collapsed")
    assert heads[0] == 4
    assert heads[-1] == 0
    assert found["accuracy"][0] < 0.2
    assert found["accuracy"][-1] > 0.95
    sigma2 = found["sigma_2 of layers.1"]
    assert sigma2[0] < 0.05
    assert sigma2[-1] > 0.9
    assert (tmp_path / "monitoring.png").read_bytes().startswith(b"\x89PNG")


def test_colour_transport(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the extra dev")
    from examples import colour_transport

    found = colour_transport.main(tmp_path / "colours.png")
    assert found["residual"] < 1e-12
    assert found["bound"] <= found["cost"] < 1.01 * found["bound"]
    assert found["before"] > 0.5
    assert found["after"] < 0.01
    assert pyplot.imread(tmp_path / "colours.png").std() > 0.1
    assert not pyplot.get_fignums()


def test_vit_attention_swap_in_torch_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the extra dev")
    from examples import vit_attention_swap

    monkeypatch.setattr(vit_attention_swap, "vision_transformer", vit_attention_swap.TorchViT)
    found = vit_attention_swap.main()
    assert found["difference"] < 1e-5
    assert len(found["report"].changed) == 2
    assert not found["report"].left
    assert found["before"] > 0.85
    assert found["swapped"] < found["before"] - 0.1
    assert found["tuned"] > found["before"] - 0.05


def test_vit_attention_swap_in_timm() -> None:
    pytest.importorskip("sklearn", reason="the extra dev")
    from ..timm_package import import_timm

    import_timm()
    from examples import vit_attention_swap

    found = vit_attention_swap.main(steps=5, tuning=5)
    assert found["difference"] < 1e-5
    assert {entry.reason for entry in found["report"].changed} == {"now SinkhornAttention"}


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_notebook_is_its_source(name: str) -> None:
    cells = notebooks.cells_of((notebooks.FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    written = json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    remedy = "make notebooks writes it anew"
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in written["cells"]] == cells, remedy
    outputs = [output for cell in written["cells"] for output in cell.get("outputs", ())]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}


def test_cells_of_a_source() -> None:
    assert notebooks.cells_of(SOURCE) == [
        ("markdown", "# A title.\n\nWhat `one` sees."),
        ("code", "import math\n\nX = 1"),
        ("code", 'def f() -> int:\n    """One."""\n    return X'),
        ("code", "a: int = 2\nb = a"),
        ("markdown", "Why. And how."),
        ("code", "for _ in range(a):\n    b += f()"),
    ]


def test_what_a_cell_prints_and_draws() -> None:
    variables: dict[str, object] = {}
    code = "from matplotlib import pyplot\nx = 3\nprint(x)\npyplot.plot([x])"
    printed, drawn = notebooks.executed(code, variables)
    assert printed == {"output_type": "stream", "name": "stdout", "text": ["3\n"]}
    assert drawn["data"]["image/png"].startswith("iVBOR")
    assert variables["x"] == 3
    assert notebooks.executed("x", variables) == []
