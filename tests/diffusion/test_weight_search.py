"""The search of merge weights: finds, within its budget, and says what it tried."""

import itertools

import pytest

from deme_lib.diffusion.weight_search import (
    Candidate,
    Space,
    choose,
    one_hot,
    propose,
    search,
    shortlist,
)

CUBE = Space(3, 0.0, 1.5, 0.05)
OPTIMUM = (0.3, 0.9, 1.2)


class Counted:
    """A function that remembers what it was asked."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, weights):
        self.asked.append(weights)
        return self.function(weights)


def bowl(weights):
    return sum((w - o) ** 2 for w, o in zip(weights, OPTIMUM, strict=True))


def run(space=CUBE, strategy="tpe", losses=60, score=bowl, **options):
    given = {"images": 8, "loss": bowl, "seed": 0} | options
    return search(space, strategy, losses=losses, score=lambda w: [score(w)], **given)


def is_valid(space, weights):
    """Multiples of the step, within the bounds unless a single one is taken, which leaves zeros."""
    steps = [w / space.step for w in weights]
    inside = all(space.low <= w <= space.high for w in weights)
    return (
        len(weights) == space.dimensions
        and steps == pytest.approx([round(s) for s in steps], abs=1e-6)
        and (sum(w != 0 for w in weights) <= 1 if space.single else inside)
    )


# the space


@pytest.mark.parametrize(("budget", "points"), [(1, 2), (26, 2), (27, 3), (64, 4), (10**6, 31)])
def test_a_grid_is_as_fine_as_budget_and_step_allow(budget, points):
    axes = list(CUBE.grid(budget).values())
    assert [len(axis) for axis in axes] == [points] * 3
    assert all(axis[0] == 0 and axis[-1] == 1.5 for axis in axes)


# proposals


@pytest.mark.parametrize("strategy", ["tpe", "grid"])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("bounds", [(0.0, 1.5, 0.05), (-0.5, 0.5, 0.1)])
def test_proposals_are_valid_distinct_and_within_budget(strategy, single, bounds):
    space, loss = Space(3, *bounds, single=single), Counted(bowl)
    found = propose(space, strategy, 40, loss, seed=0)
    weights = [c.weights for c in found]
    assert weights == loss.asked and len(weights) == len(set(weights)) <= 40
    assert all(is_valid(space, w) for w in weights)
    assert all(c.loss == bowl(c.weights) and c.scores is None for c in found)


def test_proposals_stay_between_bounds_that_are_no_multiples():
    space = Space(1, 0.28, 1.48, 0.05)
    found = [c.weights[0] for c in propose(space, "grid", 100, lambda w: w[0], seed=0)]
    assert min(found) >= 0.28 and max(found) <= 1.48


@pytest.mark.parametrize(
    ("space", "budget", "points"),
    [
        (CUBE, 70, set(itertools.product((0.0, 0.5, 1.0, 1.5), repeat=3))),
        (Space(2, 0, 1, 0.5, single=True), 6, {(0, 0), (0.5, 0), (1, 0), (0, 0.5), (0, 1)}),
    ],
)
def test_a_grid_is_covered_and_experts_share_its_budget(space, budget, points):
    assert {c.weights for c in propose(space, "grid", budget, sum, seed=0)} == points


# shortlist


def test_a_shortlist_spreads():
    line = [Candidate((w / 64, 0.0), loss=w / 64) for w in range(64)]
    assert [c.weights[0] for c in shortlist(line, 4, gap=1 / 8)] == [0, 1 / 8, 2 / 8, 3 / 8]


def test_a_shortlist_is_filled_up_with_near_ones():
    near = [Candidate((w,), loss=w) for w in (0.02, 0.0, 0.01, 0.5)]
    assert [c.weights[0] for c in shortlist(near, 3, gap=0.1)] == [0.0, 0.5, 0.01]
    assert len(shortlist(near, 9, gap=0.1)) == 4
    assert shortlist(near, 0, gap=0.1) == []


# the whole search


def test_a_known_optimum_is_found_and_tpe_beats_a_grid_of_the_same_budget():
    """Else it would only be drawing at random."""
    found = {s: run(strategy=s, losses=125) for s in ("tpe", "grid")}
    for best, *_ in found.values():
        assert best.scores == (bowl(best.weights),)
        assert max(abs(w - o) for w, o in zip(best.weights, OPTIMUM, strict=True)) <= 0.3
    assert min(c.loss for c in found["tpe"]) < min(c.loss for c in found["grid"])


def test_images_decide_not_the_loss():
    """The loss prefers its optimum; the score, its opposite."""
    found = run(score=lambda w: -bowl(w))
    scored = [c for c in found if c.scores is not None]
    assert found[0].scores == min(c.scores for c in scored)
    assert found[0].loss == max(c.loss for c in scored)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("images", [4, 7])
def test_budgets_are_kept_and_anchors_scored(single, images):
    space = Space(3, 0.0, 1.5, 0.05, single=single)
    loss, score = Counted(bowl), Counted(bowl)
    found = run(space, losses=20, images=images, loss=loss, score=score)
    anchors = [(0.0, 0.0, 0.0), *space.plain()]
    assert len(loss.asked) <= 20 + images
    assert len(score.asked) == len(set(score.asked)) == images
    assert set(anchors) <= set(score.asked)
    assert (0.0, 0.0, 0.0) in anchors
    plain = {one_hot(k, 3) for k in range(3)} if single else {(1 / 3,) * 3}
    assert plain <= set(anchors)
    scores = [c.scores for c in found]
    assert scores[:images] == sorted(scores[:images]) and set(scores[images:]) <= {None}
    assert len({c.weights for c in found}) == len(found)


def test_the_way_to_the_best_by_loss_is_scored():
    """Loss may know the direction and not the length: here the score's optimum is half way."""
    half = tuple(w / 2 for w in OPTIMUM)
    found = run(
        losses=125,
        loss=lambda w: 100 * bowl(w),
        score=lambda w: max(abs(a - b) for a, b in zip(w, half, strict=True)),
    )
    by_loss = min(found, key=lambda c: c.loss).weights
    expected = tuple(w / 2 for w in by_loss)
    assert max(abs(a - b) for a, b in zip(found[0].weights, expected, strict=True)) <= 0.03


@pytest.mark.parametrize(
    ("gains", "taken"), [((0.2, 0.3, 0.25), True), ((0.9, -0.5, 0.1), False), ((0.1,), True)]
)
def test_a_plain_choice_is_left_only_beyond_one_standard_error(gains, taken):
    plain = Candidate((0.5, 0.5), 1.0, (1.0,) * len(gains))
    other = Candidate((0.1, 0.9), 0.9, tuple(1 - g for g in gains))
    unscored = Candidate((0.0, 0.0), 0.1)
    assert choose([other, plain, unscored], [(0.5, 0.5)]) is (other if taken else plain)


def test_a_search_is_a_function_of_its_seed():
    assert run(seed=1) == run(seed=1) != run(seed=2)
