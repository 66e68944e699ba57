"""Ensembles of denoisers, callable wherever a ``UNet2DModel`` is (paper Eq. 7 and its rival).

The paper's "before merge" is routed: each timestep is predicted by the expert of its range. The
"simple ensemble" of a reader is the average of all predictions at every timestep. Members are
called one after the other: stacked into one batched call (``torch.func.vmap``) they take longer on
a CPU (figures/benchmarks.md).
"""

from collections.abc import Sequence

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from deme_lib.method.timesteps import check_tiling, route


class _Ensemble(nn.Module):
    """What diffusers' pipelines ask of a UNet, answered by the first member."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs at least one member")
        self.members = nn.ModuleList(members)

    @property
    def config(self):
        return self.members[0].config

    @property
    def dtype(self) -> torch.dtype:
        return self.members[0].dtype

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    def forward(self, sample: torch.Tensor, timestep, return_dict: bool = True):
        """Predict the noise.

        Args:
            sample: [B, C, H, W] noisy images.
            timestep: one integer, or [B] int64 timesteps in [0, T), mixed as you like.
        """
        prediction = self.predict(sample, torch.as_tensor(timestep))
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)


class RoutedEnsemble(_Ensemble):
    """Eq. 7: the expert of range k predicts the samples whose timestep lies in range k.

    Args:
        experts: one denoiser a range.
        ranges: adjacent ranges that tile [0, T) in order, from ``split_timesteps``.
    """

    def __init__(self, experts: Sequence[nn.Module], ranges: Sequence[range]):
        super().__init__(experts)
        if len(experts) != len(ranges):
            raise ValueError(f"{len(experts)} experts for {len(ranges)} ranges: give one a range")
        check_tiling(ranges)
        self.ranges = list(ranges)

    def predict(self, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        owner = route(timesteps, self.ranges)
        owners = owner.unique().tolist()
        if len(owners) == 1:  # as in sampling: the cost of one model
            return self.members[owners[0]](sample, timesteps, return_dict=False)[0]
        prediction = torch.empty_like(sample)
        for k in owners:
            mine = owner == k
            prediction[mine] = self.members[k](sample[mine], timesteps[mine], return_dict=False)[0]
        return prediction


class AveragedEnsemble(_Ensemble):
    """The simple ensemble: the mean of the members' N predictions, at every timestep."""

    def predict(self, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        share = 1 / len(self.members)
        return sum(share * m(sample, timesteps, return_dict=False)[0] for m in self.members)
