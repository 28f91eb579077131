"""Notebooks as files: their parameters cell, and outputs kept clean in the committed copies.

``python -m rmlib.notebooks refresh`` runs every notebook with its own parameters and keeps the outputs in
place; ``python -m rmlib.notebooks check STEM FILE.yaml`` checks a parameter file before a kernel starts.
"""

import base64
import io
import re
import sys
from pathlib import Path

import nbformat
from PIL import Image

from rmlib import params
from rmlib.runs import ROOT

KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def parameters_cell(notebook: Path) -> dict[str, object]:
    """Values that a notebook's one cell tagged ``parameters`` sets. Raises ``ValueError`` if there is not one."""
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook}: {len(tagged)} cells are tagged 'parameters', expected one")
    values: dict[str, object] = {}
    exec(tagged[0].source, values)
    return {name: value for name, value in values.items() if not name.startswith("_")}


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what changes from run to run: timings, injected cells, error streams, paths."""
    notebook.metadata = nbformat.from_dict(KERNEL)
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": tags} if (tags := cell.metadata.get("tags")) else {})
        if cell.cell_type == "code":
            cell.outputs = [_clean_output(out) for out in cell.outputs if out.get("name") != "stderr"]
    return notebook


def _clean_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without our path; pictures in 128 colours, a quarter of the size: full resolution stands in ``figures/``."""
    if "text" in output:
        output.text = re.sub(rf"{re.escape(str(ROOT))}/?", "", output.text)
    if "image/png" in output.get("data", {}):
        picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
        small = io.BytesIO()
        picture.quantize(128, Image.Quantize.MAXCOVERAGE).save(small, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    return output


def main(command: str, stem: str = "", file: str = "") -> None:
    """``refresh`` all notebooks, or ``check`` a chapter's parameter file before a kernel starts."""
    if command == "refresh":
        import papermill

        for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
            print(path.name, file=sys.stderr, flush=True)
            executed = papermill.execute_notebook(path, None, kernel_name="python3", progress_bar=False)
            nbformat.write(clean(executed), path)
    elif command == "check":
        given = params.read_yaml(stem, Path(file), parameters_cell(ROOT / "notebooks" / f"{stem}.ipynb"))
        if given.preset != (place := Path(file).resolve().parent.name):  # it would write where another preset does
            raise params.ParameterError(f"{file}: preset = {given.preset!r}, but the file lies in params/{place}")
    else:
        raise ValueError(f"unknown command {command!r}; choose from refresh, check STEM FILE")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
