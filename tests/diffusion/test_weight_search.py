"""The search of merge weights: finds, within its budget, and says what it tried."""

import pytest

from deme_lib.diffusion.weight_search import Candidate, Space, choose, propose, search, shortlist

CUBE = Space(3, 0.0, 1.5, 0.05)
OPTIMUM = (0.3, 0.9, 1.2)


def farthest(weights, optimum=OPTIMUM):
    return max(abs(w - o) for w, o in zip(weights, optimum, strict=True))


def bowl(weights):
    return sum((w - o) ** 2 for w, o in zip(weights, OPTIMUM, strict=True))


def run(score=bowl, space=CUBE, **options):
    given = {"losses": 60, "images": 8, "loss": bowl, "seed": 0} | options
    return search(space, score=lambda w: [score(w)], **given)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("bounds", [(0.0, 1.5, 0.05), (-0.5, 0.5, 0.1), (0.28, 1.48, 0.05)])
def test_proposals_are_valid_distinct_and_within_budget(single, bounds):
    """Multiples of the step, within the bounds unless a single one is taken, which leaves zeros."""
    space, asked = Space(3, *bounds, single=single), []
    found = propose(space, 40, lambda w: asked.append(w) or bowl(w), seed=0)
    weights = [c.weights for c in found]
    assert weights == asked and len(weights) == len(set(weights)) <= 40
    assert all(c.loss == bowl(c.weights) and c.scores is None for c in found)
    for w in weights:
        steps = [x / space.step for x in w]
        assert steps == pytest.approx([round(x) for x in steps], abs=1e-6) and len(w) == 3
        assert all(space.low <= x <= space.high for x in w if x or not single)
        assert not single or sum(x != 0 for x in w) <= 1


def test_a_shortlist_spreads_and_is_filled_up_with_near_ones():
    line = [Candidate((w / 64, 0.0), loss=w / 64) for w in range(64)]
    assert [c.weights[0] for c in shortlist(line, 4, gap=1 / 8)] == [0, 1 / 8, 2 / 8, 3 / 8]
    near = [Candidate((w,), loss=w) for w in (0.02, 0.0, 0.01, 0.5)]
    assert [c.weights[0] for c in shortlist(near, 3, gap=0.1)] == [0.0, 0.5, 0.01]
    assert len(shortlist(near, 9, gap=0.1)) == 4 and shortlist(near, 0, gap=0.1) == []


def test_a_known_optimum_is_found_as_a_function_of_the_seed():
    found = run(losses=125)
    assert found[0].scores == (bowl(found[0].weights),) and farthest(found[0].weights) <= 0.3
    assert run(seed=1) == run(seed=1) != run(seed=2)


def test_images_decide_not_the_loss():
    """The loss prefers its optimum; the score, its opposite."""
    found = run(lambda w: -bowl(w))
    scored = [c for c in found if c.scores is not None]
    assert found[0].scores == min(c.scores for c in scored)
    assert found[0].loss == max(c.loss for c in scored)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("images", [4, 7])
def test_budgets_are_kept_and_the_plain_choices_scored(single, images):
    losses, scored = [], []
    found = run(
        lambda w: scored.append(w) or bowl(w),
        Space(3, 0.0, 1.5, 0.05, single=single),
        losses=20,
        images=images,
        loss=lambda w: losses.append(w) or bowl(w),
    )
    plain = {(1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)} if single else {(1 / 3,) * 3}
    assert {(0.0, 0.0, 0.0), *plain} <= set(scored)
    assert len(losses) <= 20 + images and len(scored) == len(set(scored)) == images
    scores = [c.scores for c in found]
    assert scores[:images] == sorted(scores[:images]) and set(scores[images:]) <= {None}
    assert len({c.weights for c in found}) == len(found)


def test_the_way_to_the_best_by_loss_is_scored():
    """Loss may know the direction and not the length: here the score's optimum is half way."""
    half = tuple(w / 2 for w in OPTIMUM)
    found = run(lambda w: farthest(w, half), losses=125, loss=lambda w: 100 * bowl(w))
    best = min(found, key=lambda c: c.loss).weights
    assert farthest(found[0].weights, tuple(w / 2 for w in best)) <= 0.03


@pytest.mark.parametrize(
    ("gains", "taken"), [((0.2, 0.3, 0.25), True), ((0.9, -0.5, 0.1), False), ((0.1,), True)]
)
def test_a_plain_choice_is_left_only_beyond_one_standard_error(gains, taken):
    plain = Candidate((0.5, 0.5), 1.0, (1.0,) * len(gains))
    other = Candidate((0.1, 0.9), 0.9, tuple(1 - g for g in gains))
    unscored = Candidate((0.0, 0.0), 0.1)
    assert choose([other, plain, unscored], [(0.5, 0.5)]) is (other if taken else plain)
