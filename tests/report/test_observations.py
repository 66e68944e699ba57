"""The rules by which an observation of the paper counts as seen, for both answers."""

import itertools

import pandas as pd
import pytest

from deme_lib.report import observations


def seen(text):
    """The answer; every sentence gives one, and the rule behind it."""
    assert text.startswith("Paper, Fig. ") and text.count("een here: ") == 1
    assert text.endswith(").") and "(seen if " in text
    return "Not seen here: " not in text


def cosines(near, far, model="pretrained"):
    """Timesteps 0, 100 and 500 of T = 1000: one pair is near, two are far."""
    pairs = {(0, 100): near, (0, 500): far, (100, 500): far}
    rows = [(model, 0, *p, c) for a, c in pairs.items() for p in (a, a[::-1])]
    rows += [(model, 0, t, t, 1.0) for t in (0, 100, 500)]
    return pd.DataFrame(rows, columns=["model", "draw", "timestep1", "timestep2", "cosine"])


def test_gradients_compare_near_pairs_with_distant_ones():
    assert seen(observations.gradients(cosines(0.6, -0.1), 1000))
    assert not seen(observations.gradients(cosines(0.2, 0.3), 1000))
    assert not seen(observations.gradients(cosines(0.6, 0.1), 1000))  # near agree, none conflict
    both = pd.concat([cosines(0.6, -0.1), cosines(0.5, 0.1, "merged")])
    text = observations.gradients(both, 1000)
    assert "pretrained 0.60 of pairs less than T/4 apart and -0.10 of the others, 100% of" in text
    assert "merged 0.50 of pairs less than T/4 apart and 0.10 of the others, 0% of" in text


def shares(channel, spatial, random=0.1):
    names = ["range", "block", "dimension", "share", "share_at_random"]
    parts = (("channel", channel, random), ("spatial", spatial, random))
    return pd.DataFrame([(1, "mid", *part) for part in parts], columns=names)


@pytest.mark.parametrize(
    "df, expected",
    [
        (shares(0.6, 0.2), True),
        (shares(0.2, 0.6), False),
        (shares(0.6, 0.2, 0.7), False),  # a random change does so more
    ],
)
def test_activations_must_beat_positions_and_random_changes(df, expected):
    text = observations.activations(df)
    assert seen(text) is expected
    assert f"in {int(expected)} of 1 pairs" in text


def test_activations_need_more_than_half_of_the_blocks():
    half = pd.concat([shares(0.6, 0.2), shares(0.2, 0.6).assign(range=2)])
    assert not seen(observations.activations(half))
    more = pd.concat([half, shares(0.6, 0.2).assign(range=3)])
    assert seen(observations.activations(more))


def bowls(*centres):
    grid = (-0.2, -0.1, 0.0, 0.1, 0.2)
    rows = [
        (k, a, b, (a - centre) ** 2 + b**2)
        for k, centre in enumerate(centres)
        for a, b in itertools.product(grid, grid)
    ]
    return pd.DataFrame(rows, columns=["range", "a", "b", "loss"])


def test_a_landscape_compares_distances_of_minima():
    text = observations.landscape(bowls(0.01, 0.1, 0.2, 0))
    assert seen(text)  # finer than the grid
    assert "lies 0.01 from it for all timesteps and 0.1, 0.2, " in text
    assert "grid's step is 0.1" in text
    assert not seen(observations.landscape(bowls(0, 0, 0.1)))  # half of the ranges
    assert not seen(observations.landscape(bowls(0.1, 0.05, 0.05)))


def test_minima_finer_than_the_grid_can_tell_are_not_resolved():
    assert "Not resolved here: " in observations.landscape(bowls(0.001, 0.005, 0.005))


def test_a_saddle_has_no_minimum():
    saddle = bowls(0, 0).assign(loss=lambda df: df["loss"].where(df["range"] == 0, df["a"] ** 2))
    saddle.loc[saddle["range"] == 1, "loss"] -= saddle["b"] ** 2
    assert seen(observations.landscape(saddle)) and "inf in ranges" in observations.landscape(
        saddle
    )


@pytest.mark.parametrize("at, expected", [((0.5, 0.2), True), ((0, 0.6), False), ((0, 0), False)])
def test_the_plane_s_minimum_must_merge_both(at, expected):
    rows = [(*at, 0.9), (1, 1, 1.0), (-0.2, 0.5, 0.95)]
    text = observations.plane(pd.DataFrame(rows, columns=["w1", "w2", "loss"]))
    assert seen(text) is expected
    assert f"$w_1$ = {at[0]:.2g}, $w_2$ = {at[1]:.2g}" in text


def vectors(*spreads):
    rows = [(k, b, -s, s) for k, s in enumerate(spreads, start=1) for b in ("down", "up")]
    return pd.DataFrame(rows, columns=["range", "block", "q25", "q75"])


def test_task_vectors_compare_the_halves_of_the_timesteps():
    assert seen(observations.task_vectors(vectors(1, 2, 2, 3)))
    assert not seen(observations.task_vectors(vectors(3, 2, 2, 1)))
    assert seen(observations.task_vectors(vectors(1, 9, 2)))  # the range in the middle is neither
    assert "in 2 of 2 blocks" in observations.task_vectors(vectors(1, 2))
    assert "is on ranges of each half" in observations.task_vectors(vectors(1))
