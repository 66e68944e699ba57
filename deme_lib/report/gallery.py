"""Executed notebooks as pages: Markdown beside the figures for GitHub, and one HTML site."""

import hashlib
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter, MarkdownExporter
from nbformat import NotebookNode

from deme_lib import ROOT
from deme_lib.report.records import FREE

PICTURES = "pictures"
MADE = "made now: "  # how stages begin to say what they make
OWN = FREE - {"seeds"} | {"experiment"}
"""Parameters that papermill was given and that say nothing of the experiment."""


def records_hash(records: Path) -> str:
    """A hash of all files of ``records/``, by which pages and records are known to belong."""
    digest = hashlib.sha256()
    for path in sorted(Path(records).glob("seed-*/*"), key=lambda p: p.parts[-2:]):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{'/'.join(path.parts[-2:])} {content}\n".encode())
    return digest.hexdigest()[:16]


def gallery(executed: Path, figures: Path, site: Path = ROOT / "runs" / "site") -> None:
    """Write ``figures/<experiment>/notebooks/*.md`` and ``site/<experiment>/*.html``.

    A picture that is a file of ``figures`` is linked there, all others are written beside the
    pages. Pages of the site hold their pictures themselves.

    Args:
        executed: folder of notebooks that papermill ran.
        figures: folder of the experiment's records, tables and figures.

    Raises:
        FileNotFoundError: no notebook was executed.
        ValueError: a notebook failed, or 06 shows figures that are not those in ``figures``.
    """
    executed, figures = Path(executed), Path(figures)
    paths = sorted(executed.glob("0*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"no executed notebook in {executed}: `make figures` runs them")
    shared = sorted([*figures.glob("*.png"), *figures.glob("sweeps/*.png")])
    known = {path.read_bytes(): path for path in shared}
    first = f"<!-- records {records_hash(figures / 'records')} -->"
    pages, pictures, html = {}, {}, {}
    for path in paths:
        body, own = _markdown(path, figures, known)
        if path.name.startswith("06") and own:
            raise ValueError(f"{path} shows figures that are not in {figures}: run `make figures`")
        pages[f"{path.stem}.md"], pictures = f"{first}\n{body.strip()}\n", pictures | own
        page = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="")
        html[f"{path.stem}.html"], _ = page.from_notebook_node(cleaned(path, ".html"))
    links = "".join(f'<li><a href="{name}">{name[:-5]}</a></li>' for name in html)
    html["index.html"] = f'<!doctype html><meta charset="utf-8"><title>deme</title><ul>{links}</ul>'
    _write(figures / "notebooks", pages | pictures)
    _write(site / figures.name, html)


def _markdown(path: Path, figures: Path, known: dict) -> tuple[str, dict[str, bytes]]:
    """A page, and the pictures that it has for itself, by name."""
    body, made = MarkdownExporter().from_notebook_node(
        cleaned(path, ".md"), {"unique_key": path.stem, "output_files_dir": PICTURES}
    )
    own = {}
    for name, content in made["outputs"].items():
        if content in known:
            shared = known[content].relative_to(figures).as_posix()
            body = body.replace(f"![png]({name})", f"![{known[content].stem}](../{shared})")
        else:
            own[name] = content
    return body, own


def cleaned(path: Path, suffix: str) -> NotebookNode:
    """A notebook without what papermill, progress bars and the machine left in it.

    Links to other notebooks lead to their pages, which end in ``suffix``.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\((0\w+)\.ipynb\)", rf"(\1{suffix})", cell.source)
            continue
        if any(output.output_type == "error" for output in cell.outputs):
            raise ValueError(f"{path}: a cell failed; run it again")
        if "injected-parameters" in cell.metadata.get("tags", []):
            lines = cell.source.splitlines()
            cell.source = "\n".join(x for x in lines if x.split(" = ")[0] not in OWN)
        cell.outputs = [o for o in map(_output, cell.outputs) if o is not None]
    empty = ("", "# Parameters")
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip() not in empty]
    return notebook


def _output(output: NotebookNode) -> NotebookNode | None:
    """An output as a page shows it; None for a progress bar and for what says what was made."""
    if output.output_type == "stream":
        lines = output.text.replace(f"{ROOT}/", "").splitlines(keepends=True)
        output.text = "".join(x for x in lines if not x.startswith(MADE)).strip("\n")
        return output if output.name == "stdout" and output.text else None
    if "application/vnd.jupyter.widget-view+json" in output.data:
        return None
    if "text/html" in output.data:  # GitHub would show pandas' style sheet as text
        output.data["text/html"] = re.sub(r"(?s)<style.*?</style>\s*", "", output.data["text/html"])
    return output


def _write(folder: Path, files: dict[str, str | bytes]) -> None:
    """Those files and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
