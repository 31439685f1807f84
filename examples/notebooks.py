"""Notebooks of two examples: ``python -m examples.notebooks`` writes them anew, with what their cells print and draw.

A notebook is its source, with ``main`` unrolled: the module's docstring, each definition a cell, then main's arguments with
their defaults, and its paragraphs, whose comments become text. Nothing of the code is written twice.
"""

import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NAMES = ("monitoring", "colour_transport")


def cells_of(source: str) -> list[tuple[str, str]]:
    """("markdown" or "code", text) of every cell."""
    module, lines = ast.parse(source), source.splitlines()
    docstring = ast.get_docstring(module) or ""
    title, _, text = docstring.replace("``", "`").partition("\n")
    cells = [("markdown", f"# {title}\n{text}")]
    definitions = [node for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    imports = lines[module.body[1].lineno - 1 : definitions[0].lineno - 1]
    cells.append(("code", "\n".join(imports).strip()))
    *others, main = definitions
    cells += [("code", "\n".join(lines[node.lineno - 1 : node.end_lineno])) for node in others]
    assert isinstance(main, ast.FunctionDef)
    defaults = zip(main.args.args, main.args.defaults, strict=True)
    arguments = [f"{ast.unparse(argument)} = {ast.unparse(value)}" for argument, value in defaults]
    body = [line.removeprefix("    ") for line in lines[main.body[1].lineno - 1 : main.body[-1].lineno - 1]]
    for paragraph in "\n".join([*arguments, *body]).strip().split("\n\n"):
        rows = paragraph.split("\n")
        code = next(k for k, row in enumerate(rows) if not row.startswith("#"))
        if code:
            cells.append(("markdown", " ".join(row.removeprefix("# ") for row in rows[:code])))
        cells.append(("code", "\n".join(rows[code:])))
    return cells


def executed(code: str, variables: dict[str, Any]) -> list[dict[str, Any]]:
    """What a cell prints, and the figures that it leaves open, as Jupyter shows them."""
    from matplotlib import pyplot

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, variables)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)})
    for number in pyplot.get_fignums():
        picture = io.BytesIO()
        pyplot.figure(number).savefig(picture, format="png")
        data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    pyplot.close("all")
    return outputs


def notebook_of(source: str) -> dict[str, Any]:
    """The notebook, format 4.5, its cells executed one after the other."""
    variables: dict[str, Any] = {"__name__": "__main__"}
    cells: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells_of(source)):
        cell: dict[str, Any] = {
            "cell_type": kind,
            "id": f"cell-{number}",
            "metadata": {},
            "source": text.splitlines(keepends=True),
        }
        if kind == "code":
            count = 1 + sum(before["cell_type"] == "code" for before in cells)
            cell |= {"execution_count": count, "outputs": executed(text, variables)}
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    """Write all notebooks."""
    import matplotlib

    matplotlib.use("Agg")
    for name in NAMES:
        notebook = notebook_of((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
        path = FOLDER / f"{name}.ipynb"
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
