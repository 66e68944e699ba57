"""All notebooks through papermill on the smoke preset, and what committed copies must hold."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml
from papermill import execute_notebook
from papermill.inspection import inspect_notebook

from deme_lib import ROOT
from deme_lib.experiment import graph, parameters
from deme_lib.experiment.arms import ARMS
from deme_lib.experiment.parameters import FIELDS
from deme_lib.report import notebooks

NOTEBOOKS = {path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))}
TABLES = ("techniques", "ranges", "probability", "reweighting")
QUICK = {"seeds": [0], "total_steps": 16, "loss_images": 30, "gradient_bins": 2}
EVERY = pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=lambda path: path.stem)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def text_of(output) -> str:
    """All that an output shows but its images."""
    shown = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
    return "".join([output.get("text", ""), *map(str, shown.values())])


def papermill(folder, *arguments):
    """papermill as a user starts it, from a folder of theirs, offline."""
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_all_six_run_and_any_may_be_first(tmp_path):
    """04 and 06 before those whose work they need, the first of them on an empty runs folder."""
    values = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text()) | QUICK
    values |= {"runs_dir": str(tmp_path / "runs"), "figures_dir": str(tmp_path / "figures")}
    for name in ("04", "06", "01", "02", "03", "05"):
        done = execute_notebook(NOTEBOOKS[name], tmp_path / "out.ipynb", values, progress_bar=False)
        for output in outputs(done):
            assert "Warning" not in text_of(output) and "widget" not in json.dumps(output)
    (folder,) = (tmp_path / "figures").iterdir()
    for name in ("table.md", "comparisons.csv", "main.png", "landscape.png", "records/run.json"):
        assert (folder / name).is_file()
    assert "DeMe merged" in (folder / "table.md").read_text()


def test_a_table_of_the_paper_by_papermill(tmp_path):
    files = [flag for name in ("techniques", "smoke") for flag in ("-f", f"params/{name}.yaml")]
    quick = [flag for name, value in QUICK.items() for flag in ("-p", name, value)]
    quick += ["-p", "runs_dir", tmp_path / "runs", "-p", "figures_dir", tmp_path / "figures"]
    done = papermill(ROOT, NOTEBOOKS["05"], tmp_path / "out.ipynb", *files, *quick)
    assert done.returncode == 0, done.stderr
    shown = [text_of(output) for output in outputs(nbformat.read(tmp_path / "out.ipynb", 4))]
    table = next(text for text in shown if "difference to" in text)
    p = parameters.load("params/techniques.yaml")
    for cell in p.cells:
        for arm in cell.get("arms", p.arms):
            begin, paper = f"| {cell['cell']} / {ARMS[arm].title} |", cell.get("paper", {}).get(arm)
            (row,) = [line for line in table.splitlines() if line.startswith(begin)]
            assert row.endswith(f"| {paper:.2f} |" if paper else "| – |")


@pytest.mark.parametrize("name", TABLES)
def test_every_table_of_the_paper_has_its_rows(name):
    for behind in ({}, parameters.read("params/smoke.yaml")):
        p = parameters.check(parameters.read(f"params/{name}.yaml") | behind, name)
        scored = {a.name for made in graph.jobs(p.per_seed()[0], False).values() for a in made}
        rows = p.per_seed()[0].rows()
        assert {graph.scores(q, arm).name for arm, q in rows.values()} <= scored
        assert {cell["cell"] for cell in p.cells} <= {cell for cell, _ in rows}
        assert name == "probability" or any("paper" in cell for cell in p.cells)


def test_a_typo_stops_at_once(tmp_path):
    (tmp_path / "mine.yaml").write_text("n_range: 3\n")
    given = ("-f", "mine.yaml", "-p", "runs_dir", tmp_path)
    failed = papermill(tmp_path, NOTEBOOKS["03"], "out.ipynb", *given)
    assert failed.returncode and "did you mean 'n_ranges'" in failed.stderr
    assert not (tmp_path / "store").exists()


@EVERY
def test_declared_parameters_are_the_schemas(path):
    """Defaults, types and meanings, as `papermill --help-notebook` shows them too."""
    cells = nbformat.read(path, as_version=4).cells
    (source,) = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    declared = {s.target.id: ast.literal_eval(s.value) for s in ast.parse(source).body}
    assert 0 < len(declared) <= 8
    helped = inspect_notebook(str(path))
    assert set(helped) == set(declared)
    for name, value in declared.items():
        assert value == FIELDS[name].default and type(value) is type(FIELDS[name].default), name
        assert helped[name]["help"] in ("", FIELDS[name].description), name


@EVERY
def test_committed_notebooks_show_results_and_nothing_of_the_machine(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook.metadata
    story = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert path.name.startswith("06") or re.search(r"\$[^$]*\\\w+[^$]*\$", story), "an equation"
    shown = outputs(notebook)
    assert any("image/png" in output.get("data", {}) for output in shown)
    for output in shown:
        assert output.output_type != "error" and output.get("name") != "stderr"
        assert "widget" not in json.dumps(list(output.get("data", {})))
        odd = (
            r"making |Warning|\d(it|step|image)s?/s|%\||\d:\d\d|seconds|/(home|root|tmp|work|usr)/"
        )
        assert not re.search(odd, text_of(output)), text_of(output)


def test_stamps_are_of_the_committed_cells_and_records():
    assert notebooks.check() == 0


def test_an_edited_cell_or_record_is_seen(tmp_path, monkeypatch):
    figures, path = tmp_path / "figures", tmp_path / "02.ipynb"
    shutil.copytree(notebooks.FIGURES, figures)
    monkeypatch.setattr(notebooks, "FIGURES", figures)
    notebook = nbformat.read(NOTEBOOKS["02"], as_version=4)
    notebook.metadata["deme"] = {"stamp": notebooks.stamp(notebook)}
    nbformat.write(notebook, path)
    assert notebooks.check(tmp_path) == 0
    for shown in ("fashion8/records/metrics.csv", "ranges/table.md"):
        with (figures / shown).open("a") as file:
            file.write("\n")
        assert notebooks.check(tmp_path) == 1
        notebook.metadata["deme"] = {"stamp": notebooks.stamp(notebook)}
        nbformat.write(notebook, path)
        assert notebooks.check(tmp_path) == 0
    notebook.cells[2].source += " "
    nbformat.write(notebook, path)
    assert notebooks.check(tmp_path) == 1
