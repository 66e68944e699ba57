"""Search of merge weights: held-out loss proposes, images dispose (paper Eq. 8, "grid search").

Held-out loss ranks distant merges well and near ones badly, and costs a thousandth of a FID. So a
strategy proposes by loss; a spread-out shortlist is scored by images on several noise streams; and
the best mean wins where it beats the plain choice by more than one standard error.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import optuna

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Candidate:
    """Weights, their held-out loss, and scores of their images, one a noise stream, where made."""

    weights: Weights
    loss: float
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Space:
    """Where weights may lie: [low, high]^dimensions in multiples of ``step``.

    ``single`` narrows it to vectors with one non-zero weight: an expert and its scale.
    """

    dimensions: int
    low: float
    high: float
    step: float
    single: bool = False

    def suggest(self, trial: optuna.Trial) -> Weights:
        if self.single:
            expert = trial.suggest_int("expert", 0, self.dimensions - 1)
            scale = trial.suggest_float("scale", self.low, self.high)
            return one_hot(expert, self.dimensions, self.snap(scale))
        names = [f"w{i}" for i in range(self.dimensions)]
        return tuple(self.snap(trial.suggest_float(n, self.low, self.high)) for n in names)

    def plain(self) -> list[Weights]:
        """The choices that need no search: 1/N each, or a single task vector as it is."""
        if self.single:
            return [one_hot(k, self.dimensions) for k in range(self.dimensions)]
        return [(1 / self.dimensions,) * self.dimensions]

    def snap(self, value: float) -> float:
        """The nearest multiple of ``step``: 0, or one within the bounds."""
        nearest = round(value / self.step)
        lowest, highest = math.ceil(self.low / self.step - 1e-9), self.high / self.step + 1e-9
        inside = max(lowest, min(math.floor(highest), nearest)) if nearest else 0
        return round(inside * self.step, 10)


def one_hot(index: int, dimensions: int, scale: float = 1.0) -> Weights:
    """All zero but one."""
    return tuple(scale if i == index else 0.0 for i in range(dimensions))


def propose(
    space: Space, budget: int, loss: Callable[[Weights], float], seed: int
) -> list[Candidate]:
    """Up to ``budget`` distinct weights with their held-out loss, by optuna's Parzen estimator."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    losses: dict[Weights, float] = {}

    def objective(trial: optuna.Trial) -> float:
        weights = space.suggest(trial)
        if weights not in losses:
            losses[weights] = loss(weights)
        return losses[weights]

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=budget)
    return [Candidate(weights, value) for weights, value in losses.items()]


def shortlist(candidates: Sequence[Candidate], size: int, gap: float) -> list[Candidate]:
    """The best by loss, no two closer than ``gap`` in every weight while there are others."""
    ranked = sorted(candidates, key=lambda c: c.loss)
    chosen: list[Candidate] = []
    for minimum in (gap, 0.0):
        for candidate in ranked:
            if len(chosen) == size:
                return chosen
            away = [np.subtract(candidate.weights, c.weights) for c in chosen]
            if candidate not in chosen and all(abs(d).max() >= minimum - 1e-9 for d in away):
                chosen.append(candidate)
    return chosen


def search(
    space: Space,
    *,
    losses: int,
    images: int,
    loss: Callable[[Weights], float],
    score: Callable[[Weights], Sequence[float]],
    seed: int,
) -> list[Candidate]:
    """Every candidate tried; those scored by images come first, the best (lowest) mean leading.

    Always scored by images are no merge at all, the plain choices, and the way from no merge to the
    best by loss: loss finds a direction, images its length.

    Args:
        losses: how many weights may be scored by loss.
        images: how many may be scored by images.
        loss, score: lower is better; handed in. A score has a number for every noise stream, the
            same streams for all.
    """
    proposed = propose(space, losses, loss, seed)
    best = min(proposed, key=lambda c: c.loss).weights
    shares = (0.25, 0.5, 0.75, 1.0)
    ray = [tuple(space.snap(share * w) for w in best) for share in shares]
    fixed = list(dict.fromkeys([(0.0,) * space.dimensions, *space.plain(), *ray]))[:images]
    listed = [Candidate(w, loss(w)) for w in fixed]
    others = [c for c in proposed if c.weights not in fixed]
    more = shortlist(others, images - len(listed), 4 * space.step)
    scored = [replace(c, scores=tuple(score(c.weights))) for c in listed + more]
    rest = [c for c in others if c not in more]
    return sorted(scored, key=lambda c: np.mean(c.scores)) + rest


def choose(candidates: Sequence[Candidate], plain: Sequence[Weights]) -> Candidate:
    """The best mean score; the best plain choice instead where it is within one standard error.

    The error is that of the paired difference over noise streams; with one stream there is none,
    and the best score wins.
    """
    scored = [c for c in candidates if c.scores is not None]
    best = min(scored, key=lambda c: np.mean(c.scores))
    simple = min((c for c in scored if c.weights in plain), key=lambda c: np.mean(c.scores))
    gain = np.subtract(simple.scores, best.scores)
    error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return best if gain.mean() > error else simple
