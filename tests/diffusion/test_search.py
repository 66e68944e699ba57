"""The search of merge weights: exactly its budget, the known weights first, then better ones."""

import pytest

from deme_lib.diffusion.search import search_weights

OPTIMUM = (0.3, 0.9, 1.2)


def bowl(weights):
    return sum((w - o) ** 2 for w, o in zip(weights, OPTIMUM, strict=False))


def run(n=3, score=bowl, **options):
    return search_weights(n, score, **{"trials": 8, "low": 0.0, "high": 1.5, "seed": 0} | options)


@pytest.mark.parametrize(
    ("n", "known"),
    [
        (1, [(1.0,), (0.0,)]),
        (2, [(0.5, 0.5), (0.0, 0.0)]),
        (4, [(0.25,) * 4, (0.0,) * 4, (0.1, 0.1, 0.2, 0.5)]),
    ],
)
def test_the_known_weights_come_first_and_the_budget_is_kept(n, known):
    asked = []
    found = run(n, lambda weights: asked.append(weights) or bowl(weights), low=-0.5)
    assert found == [(weights, bowl(weights)) for weights in asked]
    assert len(found) == len(set(asked)) == 8 and asked[: len(known)] == known
    assert all(len(w) == n and min(w) >= -0.5 and max(w) <= 1.5 for w in asked)
    assert [weights for weights, _ in run(n, trials=len(known))] == known


def test_a_known_optimum_is_neared_as_a_function_of_the_seed():
    scores = [score for _, score in run(trials=60)]
    assert min(scores) < min(scores[:2]) / 4
    assert sum(scores[-20:]) < sum(scores[2:22]) / 2  # it learns, where chance would not
    assert run(seed=1) == run(seed=1) != run(seed=2)
