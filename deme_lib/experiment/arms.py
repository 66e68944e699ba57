"""The arms of the two ablations: what each is made of, in one table.

Every arm starts from the same pretrained weights. An arm combines its members, a family of
finetuned copies, into one denoiser: by merging parameters (Eq. 8), by routing (Eq. 7), or by
averaging outputs. Families take the same number of optimiser steps in total.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Attributes:
        name: key in records and recipes.
        title: as printed.
        ablations: 1 (remove decoupling), 2 (replace merging by an ensemble).
        members: the finetuned copies it uses: one on all timesteps (``all_*``, ``reweighted``), N
            such (``soup*``), or one a range (``plain`` without technique, ``deme`` with).
        combine: how they become one denoiser.
        weights: "one" and "uniform" (1/N) are fixed, "preset" is the parameter merge_weights,
            the others name a search.
        checkpoints: the members are the N checkpoints along one run.
        ema_decay: of the EMA copies to use; None: the one that all arms are judged at.
    """

    name: str
    title: str
    ablations: tuple[int, ...]
    members: str
    combine: Literal["parameters", "routed", "outputs"]
    weights: str
    checkpoints: bool = False
    ema_decay: float | None = None


ARMS = {
    arm.name: arm
    for arm in (
        Arm("pretrained", "pretrained", (1, 2), "none", "parameters", "one"),
        Arm("all_plain", "one model, all timesteps", (1,), "all_plain", "parameters", "one"),
        Arm("soup", "soup of all-timestep models", (1,), "soup", "parameters", "uniform"),
        Arm("plain_routed", "plain experts, routed", (1,), "plain", "routed", "one"),
        Arm("deme_routed", "DeMe experts, routed", (1, 2), "deme", "routed", "one"),
        Arm("deme_merged", "DeMe merged", (1, 2), "deme", "parameters", "preset"),
        Arm("averaged", "averaged ensemble", (2,), "deme", "outputs", "uniform"),
        Arm("plain_merged", "plain experts, merged", (1,), "plain", "parameters", "uniform"),
        Arm("reweighted", "one model, loss re-weighted", (1,), "reweighted", "parameters", "one"),
        Arm("all_same", "one model, DeMe's techniques", (1,), "all_same", "parameters", "one"),
        Arm("soup_same", "soup, DeMe's techniques", (1,), "soup_same", "parameters", "uniform"),
        Arm(
            "all_checkpoints",
            "one model, checkpoints averaged",
            (1,),
            "all_plain",
            "parameters",
            "uniform",
            checkpoints=True,
        ),
        Arm("merged_searched", "DeMe merged, searched", (1, 2), "deme", "parameters", "merge"),
        Arm("soup_searched", "soup, searched", (1,), "soup", "parameters", "soup"),
        Arm("all_scaled", "one model, scale searched", (1,), "all_plain", "parameters", "scale"),
        Arm("one_scaled", "one expert, scale searched", (2,), "deme", "parameters", "single"),
    )
}

DEFAULT_ARMS = tuple(ARMS)[:7]

BASE = "base"
"""The cell of a sweep's base, and of every row of an experiment."""

SEARCHES = {"merge": "deme", "soup": "soup", "scale": "all_plain", "single": "deme"}
"""Search -> the family whose task vectors it weighs."""


def arm_of(name: str, ema_decays: Sequence[float] = ()) -> Arm:
    """The arm of a name; ``soup@0.98`` is the soup of copies with that EMA decay.

    Raises:
        ValueError: there is no such arm or decay.
    """
    base, at, decay = name.partition("@")
    if base not in ARMS:
        raise ValueError(f"no arm {base!r}; there are {', '.join(ARMS)}")
    if not at:
        return ARMS[base]
    known = {f"{d:g}": d for d in ema_decays}
    if decay not in known or ARMS[base].members == "none" or ARMS[base].checkpoints:
        raise ValueError(f"arm {name!r}: {base} has no EMA decay {decay!r}, only {list(known)}")
    title = f"{ARMS[base].title}, EMA {decay}"
    return replace(ARMS[base], name=name, title=title, ablations=(), ema_decay=known[decay])


def search_of(arm: Arm, merge_weights: str | list[float]) -> str | None:
    """The search that an arm's weights come from, if any."""
    if arm.weights == "preset":
        return "merge" if merge_weights == "search" else None
    return arm.weights if arm.weights in SEARCHES else None
