"""The command line: what jobs and people type."""

import shutil

import pytest
import yaml

from deme_lib import ROOT
from deme_lib.__main__ import main


@pytest.fixture
def preset(tmp_path):
    """The smoke preset with a runs folder of its own."""
    values = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**values, "runs_dir": str(tmp_path / "runs")}))
    return str(path)


def test_list_and_make(preset, capsys):
    assert main(["list", "-f", preset]) == 0
    listed = capsys.readouterr().out
    assert "missing baseline-" in listed
    assert "stored" not in listed
    assert main(["make", "data", "-f", preset]) == 0
    main(["list", "-f", preset])
    assert "stored  data-" in capsys.readouterr().out


def test_render_gives_the_committed_tables_again(tmp_path):
    """Exactly, from the committed records alone."""
    committed = ROOT / "figures" / "digits"
    shutil.copytree(committed / "records", tmp_path / "records")
    assert main(["render", str(tmp_path)]) == 0
    for path in committed.iterdir():
        if path.suffix in (".csv", ".md", ".tex"):
            assert (tmp_path / path.name).read_text() == path.read_text(), path.name
