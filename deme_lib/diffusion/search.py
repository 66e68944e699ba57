"""The search of merge weights (paper Eq. 8, "grid search"): optuna on the images' FID."""

from collections.abc import Callable

import optuna

Weights = tuple[float, ...]

REFERENCE = (0.1, 0.1, 0.2, 0.5)  # of the published code, for four ranges


def known_weights(n: int) -> list[Weights]:
    """What is tried first: 1/N each, no merge at all, and for four ranges the published code's."""
    return [(1 / n,) * n, (0.0,) * n, *([REFERENCE] if n == len(REFERENCE) else [])]


def search_weights(
    n: int,
    score: Callable[[Weights], float],
    *,
    trials: int,
    low: float,
    high: float,
    seed: int,
) -> list[tuple[Weights, float]]:
    """Exactly ``trials`` times n weights and their score, in the order tried, by optuna's TPE.

    The lower a score the better, such as FID to held-out images. Each weight is in [low, high];
    the same ``seed`` proposes the same ones.
    """
    first = known_weights(n)
    if trials < len(first):
        raise ValueError(f"{trials} trials are too few for the {len(first)} tried first: give more")
    if low > 0 or high < max(map(max, first)):
        raise ValueError(f"[{low}, {high}] leaves out some of {first}, tried first: widen it")
    names = [f"w{i}" for i in range(n)]
    tried: list[tuple[Weights, float]] = []

    def objective(trial: optuna.Trial) -> float:
        weights = tuple(trial.suggest_float(name, low, high) for name in names)
        tried.append((weights, score(weights)))
        return tried[-1][1]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for weights in first:
        study.enqueue_trial(dict(zip(names, weights, strict=True)))
    study.optimize(objective, n_trials=trials)
    return tried
