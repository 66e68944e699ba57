"""The rules by which an observation of the paper counts as seen, for both answers."""

import itertools

import pandas as pd
import pytest
from evidence import write

from deme_lib.report import observations, records


def cosines(near, far):
    """Timesteps 0, 100 and 500 of T = 1000: one pair is near, two are far."""
    pairs = {(0, 100): near, (0, 500): far, (100, 500): far}
    rows = [("pretrained", 0, *p, c) for a, c in pairs.items() for p in (a, a[::-1])]
    rows += [("pretrained", 0, t, t, 1.0) for t in (0, 100, 500)]
    return pd.DataFrame(rows, columns=["model", "draw", "timestep1", "timestep2", "cosine"])


@pytest.mark.parametrize(
    ("near", "far", "seen"),
    [(0.6, -0.1, True), (0.2, 0.3, False), (0.6, 0.1, False)],  # near agree, none conflict
)
def test_gradients_compare_near_pairs_with_distant_ones(near, far, seen):
    found = observations.gradients(cosines(near, far), 1000)
    assert found.seen is seen
    said = f"{near:.2f} of pairs less than T/4 apart, {far:.2f} of the others"
    assert said.replace("-", "−") in found.numbers


def test_gradients_need_near_pairs():
    assert observations.gradients(cosines(0.6, -0.1), 400).seen is None


def shares(channel, spatial, random=0.1):
    names = ["range", "block", "dimension", "share", "share_at_random"]
    parts = (("channel", channel, random), ("spatial", spatial, random))
    return pd.DataFrame([(1, "mid", *part) for part in parts], columns=names)


@pytest.mark.parametrize(
    ("df", "seen"),
    [
        (shares(0.6, 0.2), True),
        (shares(0.2, 0.6), False),
        (shares(0.6, 0.2, 0.7), False),  # a random change does so more
        (pd.concat([shares(0.6, 0.2), shares(0.2, 0.6).assign(range=2)]), False),  # half of them
    ],
)
def test_activations_must_beat_positions_and_random_changes(df, seen):
    assert observations.activations(df).seen is seen


def bowls(*centres):
    grid = (-0.2, -0.1, 0.0, 0.1, 0.2)
    rows = [
        (k, a, b, (a - centre) ** 2 + b**2)
        for k, centre in enumerate(centres)
        for a, b in itertools.product(grid, grid)
    ]
    return pd.DataFrame(rows, columns=["range", "a", "b", "loss"])


@pytest.mark.parametrize(
    ("centres", "seen"),
    [
        ((0.01, 0.1, 0.2, 0), True),  # finer than the grid
        ((0, 0, 0.1), False),  # half of the ranges
        ((0.1, 0.05, 0.05), False),
        ((0.001, 0.005, 0.005), None),  # finer than the grid can tell
    ],
)
def test_a_landscape_compares_distances_of_minima(centres, seen):
    assert observations.landscape(bowls(*centres)).seen is seen


def test_a_saddle_has_no_minimum():
    saddle = bowls(0, 0).assign(loss=lambda df: df["loss"].where(df["range"] == 0, df["a"] ** 2))
    saddle.loc[saddle["range"] == 1, "loss"] -= saddle["b"] ** 2
    found = observations.landscape(saddle)
    assert found.seen and "inf in ranges" in found.numbers


@pytest.mark.parametrize(
    ("at", "seen"),
    [((0.5, 0.2), True), ((0, 0.6), False), ((0, 0), False), ((1, 0.2), None)],
)
def test_the_plane_s_minimum_must_merge_both(at, seen):
    rows = [(*at, 0.9), (1, 1, 1.0), (-0.2, 0.5, 0.95)]
    found = observations.plane(pd.DataFrame(rows, columns=["w1", "w2", "loss"]))
    assert found.seen is seen
    assert f"w1 = {at[0]:.2g}, w2 = {at[1]:.2g}" in found.numbers


@pytest.mark.parametrize(
    ("spreads", "seen"),
    [((1, 2, 2, 3), True), ((3, 2, 2, 1), False), ((1, 9, 2), True), ((1,), None)],
)
def test_task_vectors_compare_the_halves_of_the_timesteps(spreads, seen):
    rows = [(k, b, -s, s) for k, s in enumerate(spreads, start=1) for b in ("down", "up")]
    df = pd.DataFrame(rows, columns=["range", "block", "q25", "q75"])
    assert observations.task_vectors(df).seen is seen


def test_the_table_has_a_row_per_figure_of_the_paper(tmp_path):
    known = records.read(write(tmp_path / "one", training_seeds=(0,)))
    found = observations.table(known)
    assert list(found["figure"]) == ["1a", "2", "4", "6a", "6b"]
    assert set(found["seen here?"]) <= {"yes", "no", "not resolved"}
    bare = records.read(write(tmp_path / "two", training_seeds=(0,), optional=False))
    assert observations.table(bare).empty
