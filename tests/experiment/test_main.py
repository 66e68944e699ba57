"""The command line: what jobs and people type."""

import shutil
import subprocess
import sys

import pytest

from deme_lib import ROOT
from deme_lib.__main__ import main
from deme_lib.experiment import parameters, recipes
from deme_lib.experiment.store import Store


def said(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_list_and_make_by_name_label_and_job(preset, capsys):
    """A job makes everything of its own, a label the artefact of every training seed."""
    preset = preset()
    p = parameters.load(preset).per_seed()[0]
    data, reference, merged = recipes.data(p), recipes.reference(p), recipes.merged(p)
    said(capsys, "make", data.name, "-f", preset)
    assert Store(p.runs_dir).missing(reference) == [reference]
    said(capsys, "make", reference.label, "-f", preset)
    listed = [line.split() for line in said(capsys, "list", "-f", preset).splitlines()]
    assert ["stored", reference.job, reference.name] in listed
    assert ["missing", merged.job, merged.name] in listed
    assert sum(state == "stored" for state, *_ in listed) == 2
    said(capsys, "make", reference.job, "-f", preset)
    assert recipes.floor(p).job == reference.job and Store(p.runs_dir).holds(recipes.floor(p))


@pytest.mark.parametrize("command", ["--help", "list", "parameters", "make xyzzy"])
def test_what_answers_at_once_imports_no_torch(command):
    """Asked in a process of its own."""
    script = f"import sys; from deme_lib.__main__ import main\ntry: main({command.split()})\n"
    script += "except SystemExit: pass\nassert 'deme_lib' in sys.modules\n"
    script += "assert not {'torch', 'pandas', 'matplotlib', 'sklearn'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RECORDED = sorted({path.parents[1] for path in (ROOT / "figures").glob("*/records/seed-*")})


@pytest.mark.parametrize("committed", RECORDED, ids=lambda path: path.name)
def test_render_gives_the_committed_tables_again(tmp_path, committed):
    """Exactly, from the committed records alone."""
    shutil.copytree(committed / "records", tmp_path / "records")
    assert main(["render", str(tmp_path)]) == 0
    for path in committed.iterdir():
        if path.suffix in (".csv", ".md", ".tex") and path.name != "README.md":
            assert (tmp_path / path.name).read_text() == path.read_text(), path.name
