"""Ensembles of denoisers, callable wherever a ``UNet2DModel`` is (paper Eq. 7 and its rival).

The paper's "before merge" is routed: each timestep is predicted by the expert of its range. The
"simple ensemble" of a reader is the average of all predictions at every timestep. The output-space
merge combines predictions with the weights that Eq. 8 applies to parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from deme_lib.method.timesteps import route


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

    def predict(self, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, sample: torch.Tensor, timestep, return_dict: bool = True):
        """Predict the noise.

        Args:
            sample: [B, C, H, W] noisy images.
            timestep: one integer, or [B] int64 timesteps in [0, T), mixed as you like.
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        prediction = self.predict(sample, timesteps)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)


class RoutedEnsemble(_Ensemble):
    """Eq. 7: the expert of range k predicts the samples whose timestep lies in range k.

    Args:
        experts: one denoiser a range.
        ranges: adjacent ranges that tile [0, T), from ``split_timesteps``.
        active_device: where given, experts wait on the CPU and only the one at work is held
            there, so that the device holds one model instead of N.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        ranges: Sequence[range],
        active_device: torch.device | str | None = None,
    ):
        super().__init__(experts)
        if len(experts) != len(ranges):
            raise ValueError(f"{len(experts)} experts for {len(ranges)} ranges: give one a range")
        self.ranges = list(ranges)
        self.active_device = None if active_device is None else torch.device(active_device)
        self._active: int | None = None
        if active_device is not None:
            for expert in experts:
                expert.to("cpu")

    @property
    def device(self) -> torch.device:
        return self.active_device or super().device

    def _expert(self, k: int) -> nn.Module:
        if self.active_device is not None and self._active != k:
            if self._active is not None:
                self.members[self._active].to("cpu")
            self.members[k].to(self.active_device)
            self._active = k
        return self.members[k]

    def predict(self, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        owner = route(timesteps, self.ranges)
        prediction = None
        for k in owner.unique().tolist():
            mine = owner == k
            part = self._expert(k)(sample[mine], timesteps[mine], return_dict=False)[0]
            if prediction is None:
                prediction = part.new_empty(sample.shape[0], *part.shape[1:])
            prediction[mine] = part
        return prediction


class WeightedEnsemble(_Ensemble):
    """sum_i v_i eps_i(x_t, t) at every timestep; members of weight zero are never called."""

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[float]):
        if len(weights) != len(members):
            raise ValueError(f"{len(weights)} weights for {len(members)} members: give one each")
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"weights must be finite, got {list(weights)}")
        kept = [(m, float(w)) for m, w in zip(members, weights, strict=True) if w]
        super().__init__([m for m, _ in kept])
        self.weights = [w for _, w in kept]

    def predict(self, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return sum(
            weight * member(sample, timesteps, return_dict=False)[0]
            for weight, member in zip(self.weights, self.members, strict=True)
        )


def averaged_ensemble(experts: Sequence[nn.Module]) -> WeightedEnsemble:
    """The simple ensemble: the mean of the N predictions."""
    return WeightedEnsemble(experts, [1 / max(1, len(experts))] * len(experts))


def output_space_merge(
    base: nn.Module, experts: Sequence[nn.Module], weights: Sequence[float]
) -> WeightedEnsemble:
    """eps + sum_i w_i (eps_i - eps): Eq. 8's combination, made of outputs instead of weights."""
    return WeightedEnsemble([base, *experts], [1 - math.fsum(weights), *weights])
