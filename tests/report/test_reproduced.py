"""Two runs agree when, and only when, no number moved further than rounding moves it."""

import json
import shutil

import pytest

from deme_lib.report import records, reproduced
from deme_lib.report.records import RecordsError


@pytest.fixture
def again(folder):
    """The same records, to be changed."""
    return shutil.copytree(folder, folder.with_name("again"))


def move(arm, column, by, seed=0):
    def how(frame):
        frame.loc[(frame["arm"] == arm) & (frame["training_seed"] == seed), column] += by
        return frame

    return how


def test_rounding_is_reproduced_and_said(folder, again, change, capsys):
    change(again, "metrics.csv", move("soup", "fid", 8e-5))
    assert reproduced.verdict(folder, again) == 0
    said = "reproduced: largest move 1e-05 of 0.00012 allowed (FID of soup; 14 numbers)\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (move("soup", "fid", 2e-3), "FID of soup moved 0.00025 of 0.00012 allowed"),
        (move("averaged", "inception_score", 0.0104), "IS of averaged moved 0.0013 of 0.00045"),
        (move("soup", "inception_score", float("nan")), "IS of soup moved nan"),
        (lambda f: f[f["arm"] != "soup"], "metrics.csv: missing or there twice: [(0, 'soup', 0)"),
    ],
)
def test_a_planted_mistake_is_caught(folder, again, change, capsys, how, said):
    change(again, "metrics.csv", how)
    assert reproduced.verdict(folder, again) == 1
    out = capsys.readouterr().out
    assert out.startswith("not reproduced: ") and said in out


def test_only_the_seeds_named_are_compared(folder, again, change, capsys):
    change(again, "metrics.csv", move("soup", "fid", 1e-3, seed=2))
    assert reproduced.verdict(folder, again) == 1  # 0.001 / 8 is above 0.00012
    assert reproduced.verdict(folder, again, seeds=[0, 1]) == 0
    assert reproduced.verdict(folder, again, seeds=[2]) == 1
    assert "FID of soup moved 0.001 of" in capsys.readouterr().out


def test_seeds_in_common_are_compared(folder, again, change):
    change(again, "run.json", lambda run: run.update(trainings={"0": {}, "9": {}}))
    for name in ("metrics", "arms", "losses"):
        change(again, f"{name}.csv", lambda f: f.replace({"training_seed": {7: 9}}))
    moves = reproduced.compare(records.read(folder), records.read(again))
    assert len(moves) == 14 and (moves["moved"] == 0).all()
    with pytest.raises(RecordsError, match=r"no training seeds \[9\] in both: in common are \[0\]"):
        reproduced.compare(records.read(folder), records.read(again), [9])


def test_another_experiment_is_no_reproduction(folder, again, change, capsys):
    change(again, "run.json", lambda run: run["parameters"].update(margin=0.1, seeds=[0]))
    assert reproduced.verdict(folder, again) == 1
    assert capsys.readouterr().out.endswith("not the same experiment: parameter margin\n")


def test_a_missing_arm_and_other_weights_are_caught(folder, again, change, capsys):
    for name in ("metrics", "arms", "losses"):
        change(again, f"{name}.csv", lambda f: f[f["arm"] != "soup"])
    assert reproduced.verdict(folder, again) == 1
    assert "soup of training seed 0 (missing" in capsys.readouterr().out
    other = {"weights": {json.dumps([0.25] * 4): json.dumps([0.25, 0.25, 0.2, 0.3])}}
    shutil.copy(folder / "arms.csv", again)
    for name in ("metrics", "losses"):
        shutil.copy(folder / f"{name}.csv", again)
    change(again, "arms.csv", lambda f: f.replace(other))
    assert reproduced.verdict(folder, again, [1]) == 1
    assert (
        "deme_merged of training seed 1 (missing, or with other weights)" in capsys.readouterr().out
    )
