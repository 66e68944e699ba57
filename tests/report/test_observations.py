"""The rules by which an observation of the paper counts as seen, for both answers."""

import itertools

import pandas as pd
import pytest

from deme_lib.report import observations


def gradients(near, far, num_train_timesteps=1000):
    """Timesteps 0, 100 and 500: of T = 1000 one pair is near, two are far."""
    pairs = {(0, 100): near, (0, 500): far, (100, 500): far}
    rows = [("pretrained", 0, *p, c) for a, c in pairs.items() for p in (a, a[::-1])]
    rows += [("pretrained", 0, t, t, 1.0) for t in (0, 100, 500)]
    columns = ["model", "draw", "timestep1", "timestep2", "cosine"]
    return observations.gradients(pd.DataFrame(rows, columns=columns), num_train_timesteps)


def activations(*parts):
    """Shares that channels, positions and random weight changes explain, of some ranges."""
    rows = [
        (k, "mid", dimension, share, random)
        for k, (channel, spatial, random) in enumerate(parts, start=1)
        for dimension, share in (("channel", channel), ("spatial", spatial))
    ]
    names = ["range", "block", "dimension", "share", "share_at_random"]
    return observations.activations(pd.DataFrame(rows, columns=names))


def landscape(*centres, saddle=False):
    """Bowls around a = centre, of all timesteps and of ranges; a saddle in range 1 where asked."""
    grid = (-0.2, -0.1, 0.0, 0.1, 0.2)
    rows = [
        (k, a, b, (a - centre) ** 2 + b**2 * (-1 if saddle and k == 1 else 1))
        for k, centre in enumerate(centres)
        for a, b in itertools.product(grid, grid)
    ]
    return observations.landscape(pd.DataFrame(rows, columns=["range", "a", "b", "loss"]))


def plane(w1, w2):
    """The lowest of three losses is at (w1, w2)."""
    rows = [(w1, w2, 0.9), (1, 1, 1.0), (-0.2, 0.5, 0.95)]
    return observations.plane(pd.DataFrame(rows, columns=["w1", "w2", "loss"]))


def task_vectors(*spreads):
    """Ranges whose values have these quartiles in two blocks."""
    rows = [(k, b, -s, s) for k, s in enumerate(spreads, start=1) for b in ("down", "up")]
    return observations.task_vectors(pd.DataFrame(rows, columns=["range", "block", "q25", "q75"]))


@pytest.mark.parametrize(
    ("found", "seen"),
    [
        (gradients(0.6, -0.1), True),
        (gradients(0.2, 0.3), False),
        (gradients(0.6, 0.1), False),  # near agree, none conflict
        (gradients(0.6, -0.1, 400), None),  # no pair is near
        (activations((0.6, 0.2, 0.1)), True),
        (activations((0.2, 0.6, 0.1)), False),
        (activations((0.6, 0.2, 0.7)), False),  # a random change does so more
        (activations((0.6, 0.2, 0.1), (0.2, 0.6, 0.1)), False),  # half of them
        (landscape(0.01, 0.1, 0.2, 0), True),  # finer than the grid
        (landscape(0, 0, 0.1), False),  # half of the ranges
        (landscape(0.1, 0.05, 0.05), False),
        (landscape(0.001, 0.005, 0.005), None),  # finer than the grid can tell
        (landscape(0, 0, saddle=True), True),  # a saddle has no minimum
        (plane(0.5, 0.2), True),
        (plane(0, 0.6), False),
        (plane(0, 0), False),
        (plane(1, 0.2), None),  # on the grid's edge
        (task_vectors(1, 2, 2, 3), True),
        (task_vectors(3, 2, 2, 1), False),
        (task_vectors(1, 9, 2), True),
        (task_vectors(1), None),
    ],
)
def test_an_observation_is_seen_by_its_rule(found, seen):
    assert found.seen is seen
