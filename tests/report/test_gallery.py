"""Pages of executed notebooks: what they keep, what they drop, what they belong to."""

import base64
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from deme_lib import ROOT
from deme_lib.report.gallery import gallery, records_hash

SHARED, OWN = b"\x89PNG a figure", b"\x89PNG drawn in the notebook"
BAR = "plane: 100%|####| 9/9 [00:00<00:00]"
FRAME = (
    '<div>\n<style scoped>\n    .dataframe {}\n</style>\n<table class="dataframe"></table>\n</div>'
)


def picture(content):
    return new_output("display_data", {"image/png": base64.b64encode(content).decode()})


def execute(path, *outputs, injected="# Parameters\nexperiment = 'mine'\nruns_dir = '/a/b'\nn = 3"):
    cells = [new_markdown_cell("# Title\n\nNext: [02_x](02_x.ipynb).")]
    cells += [new_code_cell(injected, metadata={"tags": ["injected-parameters"]})]
    cells += [new_code_cell("shown()", outputs=list(outputs))]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)


@pytest.fixture
def folders(tmp_path):
    executed, figures = tmp_path / "runs" / "mine", tmp_path / "figures" / "mine"
    executed.mkdir(parents=True)
    (figures / "records" / "seed-0").mkdir(parents=True)
    (figures / "records" / "seed-0" / "metrics.csv").write_text("arm,fid\n")
    (figures / "main.png").write_bytes(SHARED)
    return executed, figures


def test_pages_keep_results_and_drop_what_the_machine_said(folders):
    executed, figures = folders
    said = [new_output("stream", name="stdout", text=f"made now: data\n{ROOT}/figures\n")]
    said += [new_output("stream", name="stderr", text=BAR)]
    said += [new_output("display_data", {"text/html": FRAME, "text/plain": "frame"})]
    execute(executed / "01_x.ipynb", *said, picture(SHARED), picture(OWN))
    for _ in range(2):  # again over what is there
        gallery(executed, figures, executed.parent / "site")
        page = (figures / "notebooks" / "01_x.md").read_text()
        (own,) = (figures / "notebooks" / "pictures").iterdir()
        assert own.read_bytes() == OWN
        assert f"(pictures/{own.name})" in page
        assert "![main](../main.png)" in page
    assert page.startswith(f"<!-- records {records_hash(figures / 'records')} -->\n")
    for text in ("made now", "100%", "<style", str(ROOT), "runs_dir", "experiment = 'mine'"):
        assert text not in page
    for text in ("    figures\n", '<table class="dataframe">', "n = 3", "[02_x](02_x.md)"):
        assert text in page
    site = executed.parent / "site" / "mine"
    assert "01_x.html" in (site / "index.html").read_text()
    assert "02_x.html" in (site / "01_x.html").read_text()


def test_what_cannot_be_shown_is_refused(folders):
    executed, figures = folders
    with pytest.raises(FileNotFoundError, match="no executed notebook"):
        gallery(executed, figures, executed.parent / "site")
    execute(executed / "06_x.ipynb", picture(OWN))
    with pytest.raises(ValueError, match="shows figures that are not in"):
        gallery(executed, figures, executed.parent / "site")
    execute(executed / "06_x.ipynb", new_output("error", ename="E", evalue="", traceback=[]))
    with pytest.raises(ValueError, match="a cell failed"):
        gallery(executed, figures, executed.parent / "site")
    assert not (figures / "notebooks").exists()


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("figures/*/notebooks/*.md")), ids=lambda p: "-".join(p.parts[-3::2])
)
def test_committed_pages_belong_to_the_committed_records(page):
    text, folder = page.read_text(), page.parent
    assert text.startswith(f"<!-- records {records_hash(folder.parent / 'records')} -->\n")
    for link in re.findall(r"!\[\w+\]\((\S+)\)", text):
        assert (folder / link).is_file(), link
