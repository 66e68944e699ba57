"""The finetuning objective (paper Eq. 2, 4 and 5), per sample so that callers may weight it."""

from __future__ import annotations

import torch


def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, ``[B, C, H, W]`` twice to float32 ``[B]``.

    With the noise as target this is the denoising loss (Eq. 2); with the frozen teacher's
    prediction as target it is the consistency loss (Eq. 4).
    """
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


def deme_loss(
    prediction: torch.Tensor,
    noise: torch.Tensor,
    teacher_prediction: torch.Tensor | None = None,
    consistency_weight: float = 1.0,
) -> torch.Tensor:
    """Eq. 5: denoising loss plus consistency loss (weight 1 in the paper), a float32 scalar.

    ``teacher_prediction=None`` leaves the consistency loss out.
    """
    loss = squared_error(prediction, noise)
    if teacher_prediction is not None:
        loss = loss + consistency_weight * squared_error(prediction, teacher_prediction)
    return loss.mean()
