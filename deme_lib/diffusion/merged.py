"""Merging models (paper Eq. 8): the experts' task vectors added to a pretrained UNet."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from diffusers import UNet2DModel

from deme_lib.method.merging import merge, task_vector
from deme_lib.method.projection import is_projection, plain_or_projected


class Merger:
    """Merges one family of copies with any weights (Eq. 8), computing task vectors once.

    Args:
        base: the pretrained UNet; where the experts have projections it gets identity ones.
        experts: finetuned copies of it.

    Raises:
        KeyError, ValueError: an expert is of another architecture.
    """

    def __init__(self, base: UNet2DModel, experts: Sequence[UNet2DModel]):
        if not experts:
            raise ValueError("there is nothing to merge: give at least one expert")
        projected = any(is_projection(name) for name in experts[0].state_dict())
        self.base = plain_or_projected(base, projected).eval()
        self.start = self.base.state_dict()
        self.vectors = [task_vector(self.start, expert.state_dict()) for expert in experts]

    def merged(self, weights: Sequence[float]) -> UNet2DModel:
        """A new model, theta + sum_i w_i tau_i."""
        unet = copy.deepcopy(self.base)
        unet.load_state_dict(merge(self.start, self.vectors, weights))
        return unet.eval()


def merge_experts(
    base: UNet2DModel, experts: Sequence[UNet2DModel], weights: Sequence[float]
) -> UNet2DModel:
    """Eq. 8 on models: see ``Merger``, which is quicker for many weights."""
    return Merger(base, experts).merged(weights)
