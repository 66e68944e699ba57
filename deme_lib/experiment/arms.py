"""The arms of the two ablations: what each is made of, in one table.

Every arm starts from the same pretrained weights. An arm combines its members, a family of
finetuned copies, into one denoiser: by merging parameters (Eq. 8), by routing (Eq. 7), or by
adding outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Members = Literal["none", "all_plain", "reweighted", "all_same", "soup", "experts"]
Weights = Literal["one", "uniform", "preset", "scale", "soup", "single", "best_single"]


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Attributes:
        name: key in records and recipes.
        title: as printed.
        ablations: 1 (remove decoupling), 2 (replace merging by an ensemble).
        members: the finetuned copies it uses.
        combine: how they become one denoiser.
        weights: "one" and "uniform" (1/N) are fixed, "preset" is the parameter merge_weights,
            the others name a search.
    """

    name: str
    title: str
    ablations: tuple[int, ...]
    members: Members
    combine: Literal["parameters", "routed", "outputs"]
    weights: Weights


ARMS = {
    arm.name: arm
    for arm in (
        Arm("pretrained", "pretrained", (1, 2), "none", "parameters", "one"),
        Arm("all_plain", "all timesteps, no technique", (1,), "all_plain", "parameters", "one"),
        Arm("reweighted", "all timesteps, re-weighted", (1,), "reweighted", "parameters", "one"),
        Arm("all_same", "all timesteps, same techniques", (1,), "all_same", "parameters", "one"),
        Arm("all_scaled", "all timesteps, scale searched", (1,), "all_same", "parameters", "scale"),
        Arm("soup_uniform", "soup, uniform", (1,), "soup", "parameters", "uniform"),
        Arm("soup", "soup, searched", (1,), "soup", "parameters", "soup"),
        Arm("routed", "DeMe routed", (1, 2), "experts", "routed", "one"),
        Arm("merged_uniform", "DeMe merged, uniform", (1, 2), "experts", "parameters", "uniform"),
        Arm("merged", "DeMe merged", (1, 2), "experts", "parameters", "preset"),
        Arm("averaged", "averaged ensemble", (2,), "experts", "outputs", "uniform"),
        Arm("output_merge", "output-space merge", (2,), "experts", "outputs", "preset"),
        Arm("one_scaled", "one task vector, scaled", (2,), "experts", "parameters", "single"),
        Arm("best_single", "best single expert", (2,), "experts", "parameters", "best_single"),
    )
}

BASE = "base"
"""What records of a sweep call the preset that its cells differ from."""

SEARCHES = {
    "merge": "weights of the experts' task vectors",
    "soup": "weights of the soup members' task vectors",
    "scale": "scale of the all-timestep task vector",
    "single": "one expert and the scale of its task vector",
}


def present(loss_weighting: str) -> list[Arm]:
    """The arms of an experiment; one with a re-weighted loss only where a weighting is named."""
    return [a for a in ARMS.values() if a.members != "reweighted" or loss_weighting != "none"]


def of_ablation(number: int, loss_weighting: str) -> list[Arm]:
    """The arms of ablation 1 or 2, in the order of the table."""
    return [arm for arm in present(loss_weighting) if number in arm.ablations]


def search_of(arm: Arm, merge_weights: str | list[float]) -> str | None:
    """The search that an arm's weights come from, if any."""
    if arm.weights == "preset":
        return "merge" if merge_weights == "search" else None
    return {"scale": "scale", "soup": "soup", "single": "single", "best_single": "single"}.get(
        arm.weights
    )
