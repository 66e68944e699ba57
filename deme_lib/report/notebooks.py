"""Notebooks committed with their outputs: run in place, cleaned, stamped with what they show.

GitHub and JupyterLab show results before anything is run. A hash of a notebook's own cells, of
fashion8's records and of the other committed tables stands in its metadata; ``check`` recomputes
it.
"""

import hashlib
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from deme_lib import ROOT

FOLDER = ROOT / "notebooks"
FIGURES = ROOT / "figures"
MADE = re.compile(r"^(making |\S+: another process).*\n?", re.M)
"""What the store says while it works, which is no result."""


def stamp(notebook: NotebookNode) -> str:
    """A hash of the cells' sources and of all records and tables behind the outputs."""
    total = hashlib.sha256()
    for cell in notebook.cells:
        total.update(f"{cell.cell_type}\0{cell.source}\0".encode())
    for shown in ("fashion8/records/*", "*/table.md", "ladder.csv"):
        for path in sorted(FIGURES.glob(shown)):
            total.update(path.relative_to(FIGURES).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:16]


def execute(folder: Path = FOLDER) -> int:
    """Run every notebook in place with its defaults, and keep clean outputs."""
    for path in sorted(folder.glob("0*.ipynb")):
        print(path.name, flush=True)
        notebook = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": str(FOLDER)}}
        NotebookClient(notebook, timeout=None, kernel_name="python3", resources=where).execute()
        clean(notebook)
        notebook.metadata["deme"] = {"stamp": stamp(notebook)}
        nbformat.write(notebook, path)
    return 0


def clean(notebook: NotebookNode) -> None:
    """Take out what the run and the machine left: progress, warnings, widgets, paths, times."""
    notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec", "language_info")}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        if cell.cell_type == "code":
            cell.outputs = [o for o in map(_cleaned, cell.outputs) if o is not None]


def _cleaned(output: NotebookNode) -> NotebookNode | None:
    if output.output_type == "stream":
        output.text = MADE.sub("", output.text.replace(f"{ROOT}/", ""))
        return output if output.name == "stdout" and output.text.strip() else None
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return None
    if "text/html" in data:  # GitHub would show pandas' style sheet as text
        data["text/html"] = re.sub(r"(?s)<style.*?</style>\s*", "", data["text/html"])
    return output


def check(folder: Path = FOLDER) -> int:
    """Say which notebooks show other cells or records than they hold; 0 where none does."""
    stale = 0
    for path in sorted(folder.glob("0*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if notebook.metadata.get("deme", {}).get("stamp") != stamp(notebook):
            print(f"{path.name}: its outputs are of other cells or records: `make figures`")
            stale += 1
    return int(stale > 0)
