"""Two runs agree when, and only when, no number moved further than rounding moves it."""

import json
import shutil

import pandas as pd
import pytest
from evidence import ALL, change, write

from deme_lib.report import reproduced


@pytest.fixture
def committed(tmp_path):
    return write(tmp_path / "one", training_seeds=(0, 1, 2), arms=ALL)


def changed(committed, name="metrics", seed=0, how=lambda frame: frame):
    """A copy of a run in which one training seed's file was changed."""
    folder = committed.with_name(f"{committed.name}-again")
    shutil.copytree(committed, folder)
    change(folder / f"seed-{seed}" / f"{name}.csv", how)
    return folder


def move(arm, column, by):
    def how(frame):
        frame.loc[frame["arm"] == arm, column] += by
        return frame

    return how


def test_rounding_is_reproduced_and_said(committed, capsys):
    other = changed(committed, how=move("soup", "fid", 3e-5))
    assert reproduced.verdict(committed, other) == 0
    said = capsys.readouterr().out
    assert said.startswith("reproduced: largest move 1e-05 of 0.00012 allowed (FID")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (move("soup", "fid", 1e-3), "FID of soup moved 0.00033 of 0.00012 allowed"),
        (move("averaged", "inception_score", 0.01), "IS of averaged moved"),
        (move("soup", "inception_score", float("nan")), "IS of soup moved nan"),
    ],
)
def test_a_planted_mistake_is_caught(committed, capsys, how, said):
    assert reproduced.verdict(committed, changed(committed, how=how)) == 1
    assert f"not reproduced: {said}" in capsys.readouterr().out


def test_other_weights_are_caught(committed, capsys):
    arms = pd.read_csv(committed / "seed-1" / "arms.csv").set_index("arm")
    weights = arms.loc["soup_searched", "weights"]
    other = changed(committed, "arms", 1, lambda f: f.replace(weights, "[0.2]"))
    assert reproduced.verdict(committed, other) == 1
    said = f"not reproduced: weights of soup_searched (training seed 1): {weights}"
    assert said in capsys.readouterr().out


def test_seeds_of_both_are_compared(committed):
    fewer = changed(committed)
    shutil.rmtree(fewer / "seed-0")
    assert reproduced.verdict(committed, fewer) == 0
    later = changed(fewer, seed=2, how=move("soup", "fid", 1.0))
    assert reproduced.verdict(committed, later) == 1


def test_without_a_seed_in_common_there_is_no_verdict(committed):
    other = write(committed.with_name("other"), training_seeds=(7,), arms=ALL)
    with pytest.raises(ValueError, match="no training seed in common"):
        reproduced.verdict(committed, other)


@pytest.mark.parametrize(("name", "value", "refused"), [("margin", 9, True), ("threads", 9, False)])
def test_another_experiment_is_refused(committed, name, value, refused):
    other = changed(committed)
    for path in other.glob("*/run.json"):
        run = json.loads(path.read_text())
        run["parameters"][name] = value
        path.write_text(json.dumps(run))
    if not refused:
        assert reproduced.verdict(committed, other) == 0
        return
    with pytest.raises(ValueError, match="not the same experiment: margin"):
        reproduced.verdict(committed, other)
