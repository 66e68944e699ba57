"""The arms of the two ablations: what each is made of, and how its members become one denoiser.

Every arm starts from the same pretrained weights. Families take the same number of optimiser steps
in total; the last expert alone takes its own, a distilled copy as many beside its teachers'. An arm
of your own is one plain function and one entry, made before parameters are read:

    def ties(base, members, ranges):
        ...
        return denoiser

    ARMS["ties"] = Arm("ties", "DeMe experts, TIES-merged", DEME, ties)

``tests/experiment/test_arms.py`` holds this example in full. An arm's images are made again when
the source of its function changes; what that function calls is its author's business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffusers import UNet2DModel
from torch import nn

from deme_lib.diffusion.merged import merge_experts
from deme_lib.method.ensembles import AveragedEnsemble, RoutedEnsemble

DEFAULT = "default"
"""The cell of all rows where an experiment has no cells, and always of the pretrained model."""


@dataclass(frozen=True)
class Family:
    """Finetuned copies of the pretrained model.

    Attributes:
        ranged: copy k trains on range k of N; otherwise on all timesteps.
        techniques: with DeMe's: probabilistic sampling, consistency loss, projections.
        copies: "N", which share ``total_steps`` evenly; "last", of these the last alone; or "one",
            which takes all steps.
        weighting: of the denoising loss: "", "balanced", "distilled", or "parameter", as
            ``loss_weighting`` says.
        teacher: the routed experts that a distilled copy learns from.
    """

    name: str
    ranged: bool = False
    techniques: bool = False
    copies: str = "N"
    weighting: str = ""
    teacher: "Family | None" = None


ALL_PLAIN = Family("all_plain", copies="one")
ALL_SAME = Family("all_same", techniques=True, copies="one")
BALANCED = Family("balanced", copies="one", weighting="balanced")
REWEIGHTED = Family("reweighted", copies="one", weighting="parameter")
SOUP = Family("soup")
SOUP_SAME = Family("soup_same", techniques=True)
PLAIN = Family("plain", ranged=True)
LAST = Family("plain", ranged=True, copies="last")
DEME = Family("deme", ranged=True, techniques=True)
DISTILLED = Family("distilled", copies="one", weighting="distilled", teacher=PLAIN)


def first(base: UNet2DModel, members: Sequence[UNet2DModel], ranges: Sequence[range]) -> nn.Module:
    """The only copy; without any, the pretrained model."""
    return members[0] if members else base


def merged(
    base: UNet2DModel,
    members: Sequence[UNet2DModel],
    ranges: Sequence[range],
    weights: Sequence[float] = (),
) -> nn.Module:
    """Eq. 8, with 1/N each where no weights are given."""
    return merge_experts(base, members, list(weights) or [1 / len(members)] * len(members))


def routed(base: UNet2DModel, members: Sequence[UNet2DModel], ranges: Sequence[range]) -> nn.Module:
    """Eq. 7: the expert of the timestep's range."""
    return RoutedEnsemble(members, ranges)


def last(base: UNet2DModel, members: Sequence[UNet2DModel], ranges: Sequence[range]) -> nn.Module:
    """The only copy in the last range, the pretrained model elsewhere; two models are held."""
    own = ranges[-1]
    return RoutedEnsemble([base, *members], [range(own.start), own]) if own.start else members[0]


def averaged(
    base: UNet2DModel, members: Sequence[UNet2DModel], ranges: Sequence[range]
) -> nn.Module:
    """The simple ensemble: the mean of all predictions, at every timestep."""
    return AveragedEnsemble(members)


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Attributes:
        title: as printed.
        family: the copies it uses; None: the pretrained model alone.
        combine: function of the pretrained model, the copies in order and the N ranges (which tile
            [0, T)) that returns the denoiser.
        weighted: ``combine`` also takes ``weights``, those of the parameter ``merge_weights``.
    """

    name: str
    title: str
    family: Family | None
    combine: Callable[..., nn.Module]
    weighted: bool = False


ARMS = {
    arm.name: arm
    for arm in (
        Arm("pretrained", "pretrained", None, first),
        Arm("all_plain", "one model, all timesteps", ALL_PLAIN, first),
        Arm("balanced", "one model, balanced loss", BALANCED, first),
        Arm("soup", "soup of all-timestep models", SOUP, merged),
        Arm("plain_routed", "plain experts, routed", PLAIN, routed),
        Arm("last_expert", "last expert, else pretrained", LAST, last),
        Arm("deme_routed", "DeMe experts, routed", DEME, routed),
        Arm("deme_merged", "DeMe merged", DEME, merged, weighted=True),
        Arm("averaged", "averaged ensemble", DEME, averaged),
        Arm("plain_merged", "plain experts, merged", PLAIN, merged),
        Arm("reweighted", "one model, loss re-weighted", REWEIGHTED, first),
        Arm("all_same", "one model, DeMe's techniques", ALL_SAME, first),
        Arm("soup_same", "soup, DeMe's techniques", SOUP_SAME, merged),
        Arm("distilled", "plain experts, distilled into one", DISTILLED, first),
    )
}

DEFAULT_ARMS = tuple(ARMS)[:9]


def label(cell: str, arm: str) -> str:
    """A row's name: its arm, in another cell than the default "cell / arm"."""
    return arm if cell == DEFAULT else f"{cell} / {arm}"
