"""CI's comparison fails when, and only when, a number moves further than was measured."""

import importlib.util
import sys

import pandas as pd
import pytest
import synthetic

from deme_lib.parameters import ROOT


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", ROOT / ".ci" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path):
    """A committed run and a repeat whose FIDs lie 0.01 higher in every arm but one."""
    committed = synthetic.write(tmp_path / "records") / "metrics.csv"
    spread = tmp_path / "spread"
    spread.mkdir()
    frame = pd.read_csv(committed)
    frame.loc[frame["arm"] != "pretrained", "fid"] += 0.01
    frame.to_csv(spread / "rounding.csv", index=False)
    return committed, spread


def moved(committed, by, tmp_path):
    frame = pd.read_csv(committed)
    frame.loc[frame["arm"] == "routed", "fid"] += by
    frame.to_csv(tmp_path / "other.csv", index=False)
    return tmp_path / "other.csv"


@pytest.mark.parametrize(("by", "numbers"), [(0.0, 0), (0.019, 0), (-0.019, 0), (0.021, 1)])
def test_moves_beyond_twice_the_spread_are_found(compare, runs, tmp_path, by, numbers):
    committed, spread = runs
    far = compare.compare(committed, moved(committed, by, tmp_path), spread)
    assert (len(far) > 0) == bool(numbers)
    assert all("routed" in row[0] and row[1] == "fid" for row in far.index)


def test_other_seeds_are_refused(compare, runs, tmp_path):
    committed, spread = runs
    frame = pd.read_csv(committed)
    frame["seed"] += 10
    frame.to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(ValueError, match="seeds"):
        compare.compare(committed, tmp_path / "other.csv", spread)


def test_without_a_measured_spread_nothing_passes(compare, runs, tmp_path):
    committed, _ = runs
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError):
        compare.compare(committed, committed, tmp_path / "none")


def test_the_committed_run_passes_against_itself(compare, monkeypatch, capsys):
    records = str(ROOT / "figures" / "digits" / "records")
    monkeypatch.setattr(sys, "argv", ["compare.py", records, records])
    assert compare.main() == 0
    assert "tolerance" in capsys.readouterr().out
