"""Two runs agree when, and only when, no number moved further than rounding moves it."""

import shutil

import pytest

from deme_lib.report import reproduced
from deme_lib.report.records import RecordsError


@pytest.fixture
def again(folder):
    """The same records, to be changed."""
    return shutil.copytree(folder, folder.with_name("again"))


def move(arm, column, by, seed=None):
    """Of one training seed, or of all."""

    def how(frame):
        mine = seed is None or frame["training_seed"] == seed
        frame.loc[(frame["arm"] == arm) & mine, column] += by
        return frame

    return how


def test_rounding_is_reproduced_and_said(folder, again, change, capsys):
    change(again, "metrics.csv", move("soup", "fid", 1e-5))
    assert reproduced.verdict(folder, again) == 0
    said = "reproduced: largest move 1e-05 of 0.00012 allowed (FID of soup; 18 numbers)\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (move("soup", "fid", 2.5e-4), "FID of soup moved 0.00025 of 0.00012 allowed"),
        (move("averaged", "inception_score", 0.0013), "IS of averaged moved 0.0013 of 0.00045"),
    ],
)
def test_a_planted_mistake_is_caught(folder, again, change, capsys, how, said):
    change(again, "metrics.csv", how)
    assert reproduced.verdict(folder, again) == 1
    out = capsys.readouterr().out
    assert out.startswith("not reproduced: ") and said in out


def test_a_missing_arm_is_caught(folder, again, change, capsys):
    change(again, "metrics.csv arms.csv losses.csv", lambda f: f[f["arm"] != "soup"])
    assert reproduced.verdict(folder, again) == 1
    assert "FID of soup moved nan" in capsys.readouterr().out


def test_seeds_in_common_or_those_named_are_compared(folder, again, change):
    change(again, "metrics.csv", move("soup", "fid", 1e-2, seed=2))
    change(again, "run.json", lambda run: run["trainings"].pop("1"))
    assert reproduced.verdict(folder, again) == 1
    assert reproduced.verdict(folder, again, seeds=[0, 3]) == 0
    with pytest.raises(RecordsError, match=r"no training seeds \[1\] in both"):
        reproduced.verdict(folder, again, seeds=[1])


def test_another_experiment_is_no_reproduction(folder, again, change):
    change(again, "run.json", lambda run: run["parameters"].update(samples=9, seeds=[0]))
    with pytest.raises(RecordsError, match=r"not the same experiment: other parameters samples$"):
        reproduced.verdict(folder, again)
