"""The search of merge weights (paper Eq. 8, "grid search"): optuna on the images' FID."""

from collections.abc import Callable

import optuna

Weights = tuple[float, ...]

REFERENCE = (0.1, 0.1, 0.2, 0.5)  # of the published code, for four ranges


def search_weights(
    n: int,
    score: Callable[[Weights], float],
    *,
    trials: int,
    low: float,
    high: float,
    seed: int,
) -> list[tuple[Weights, float]]:
    """``trials`` candidates of n weights each, and their scores, as optuna's TPE tried them.

    First come 1/n each, no merge at all, and for four ranges the published code's. The lower
    a score the better, such as FID. Weights are in [low, high], and a function of ``seed``.
    """
    first = [(1 / n,) * n, (0.0,) * n, *([REFERENCE] if n == len(REFERENCE) else [])]
    names = [f"w{i}" for i in range(n)]

    def objective(trial: optuna.Trial) -> float:
        return score(tuple(trial.suggest_float(name, low, high) for name in names))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for weights in first:
        study.enqueue_trial(dict(zip(names, weights, strict=True)))
    study.optimize(objective, n_trials=trials)
    return [(tuple(trial.params.values()), trial.value) for trial in study.trials]
