"""The finetuning objective (paper Eq. 2, 4 and 5), and the loss re-weightings it is compared with.

Losses are per sample, so that they may be weighted. Weights multiply the denoising loss alone and
are normalised to mean 1 over all timesteps: that is our choice, without which SNR+1, which spans 1
to 25,000 on the linear schedule, would be another learning rate.
"""

from collections.abc import Sequence

import torch
from torch import nn


def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, ``[B, ...]`` twice to float32 ``[B]``.

    With the noise as target (or v, the data, a flow: what the model predicts) this is the
    denoising loss (Eq. 2); with the frozen teacher's prediction the consistency loss (Eq. 4).
    """
    error = prediction.float() - target.float()
    return error.square().mean(dim=tuple(range(1, error.ndim)))


def deme_loss(
    denoising: torch.Tensor,
    consistency: torch.Tensor | None = None,
    consistency_weight: float = 1.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Eq. 5: denoising loss plus consistency loss (weight 1 in the paper), a float32 scalar.

    Args:
        denoising: [B] squared errors against the target.
        consistency: [B] squared errors against the teacher; None leaves the term out.
        weights: [B] of the denoising loss, for the re-weightings below; None: 1 everywhere.
    """
    loss = denoising if weights is None else weights * denoising
    if consistency is not None:
        loss = loss + consistency_weight * consistency
    return loss.mean()


def snr_weights(
    name: str, alphas_cumprod: torch.Tensor, min_snr_gamma: float = 5.0, p2_gamma: float = 1.0
) -> torch.Tensor:
    """Weights of the noise-prediction loss per timestep, float32 [T] of mean 1.

    With SNR = a / (1 - a) and a = ``alphas_cumprod`` [T]:

    - ``snr+1``: (SNR + 1) / SNR (Salimans & Ho 2022);
    - ``trun-snr``: max(SNR, 1) / SNR (Salimans & Ho 2022);
    - ``min-snr``: min(SNR, gamma) / SNR (Hang et al. 2023);
    - ``p2``: 1 / (1 + SNR)^gamma (Choi et al. 2022).
    """
    a = alphas_cumprod.double()
    snr = a / (1 - a)
    formulas = {
        "snr+1": lambda: (snr + 1) / snr,
        "trun-snr": lambda: snr.clamp(min=1) / snr,
        "min-snr": lambda: snr.clamp(max=min_snr_gamma) / snr,
        "p2": lambda: (1 + snr) ** -p2_gamma,
    }
    weights = formulas[name]()
    if not weights.isfinite().all():
        raise ValueError(f"{name} has no finite weight at SNR {snr[~weights.isfinite()][0]:g}")
    return (weights / weights.mean()).float()


def owners(ranges: Sequence[range]) -> torch.Tensor:
    """The index of each timestep's range, int64 [T], of ranges that tile [0, T) in order."""
    return torch.tensor([k for k, own in enumerate(ranges) for _ in own])


def balanced_weights(losses: Sequence[float], ranges: Sequence[range]) -> torch.Tensor:
    """Weights of a loss per timestep, float32 [T] of mean 1: L_k^(-1/2) in range k.

    Ours, between equal weights (power 0) and the limit of ANT-UW's learnt ones (power -1).
    L_k is the pretrained model's loss in range k of those that tile [0, T).
    """
    found = torch.tensor(losses, dtype=torch.float64)
    if not (found.isfinite() & (found > 0)).all():
        raise ValueError(
            f"the pretrained model's losses per range are {[*losses]}: no weights follow from one "
            "that is 0 or not finite; look at the model and its data"
        )
    weights = (found**-0.5)[owners(ranges)]
    return (weights / weights.mean()).float()


class UncertaintyWeighting(nn.Module):
    """Weights learnt per range of timesteps: exp(-s_k), with the task's log-variance s_k.

    Kendall et al. 2018 weigh the losses L_k of several tasks by minimising
    sum_k exp(-s_k) L_k + s_k over the model and s; Go et al. 2023 (ANT-UW) take ranges of
    timesteps as tasks. Here the model sees the weights normalised to mean 1, and s is trained by
    that sum with L_k held fixed.
    """

    def __init__(self, ranges: Sequence[range]):
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(len(ranges)))
        self.register_buffer("owner", owners(ranges), persistent=False)

    def weights(self) -> torch.Tensor:
        """float32 [T] of mean 1, free of gradients."""
        weights = torch.softmax(-self.log_variances.detach(), 0)[self.owner]
        return weights / weights.mean()

    def forward(self, denoising: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The part of the objective that trains s: [B] losses at [B] timesteps to a scalar."""
        s = self.log_variances[self.owner[timesteps]]
        return (torch.exp(-s) * denoising.detach() + s).mean()


class NashWeighting(nn.Module):
    """Weights alpha_k per range of timesteps, by Nash bargaining between the ranges.

    Navon et al. 2022 (Nash-MTL) weigh tasks by G alpha = 1 / alpha, G the scalar products of their
    gradients; Go et al. 2023 (ANT-NashMTL) take ranges of timesteps as tasks. Here the model sees
    the weights normalised to mean 1.
    """

    def __init__(self, ranges: Sequence[range]):
        super().__init__()
        self.register_buffer("alpha", torch.ones(len(ranges)))
        self.register_buffer("owner", owners(ranges), persistent=False)

    def weights(self) -> torch.Tensor:
        """float32 [T] of mean 1."""
        weights = self.alpha[self.owner]
        return weights / weights.mean()

    def bargain(self, gram: torch.Tensor) -> None:
        """New weights from G [K, K]; where none are found the old ones stay."""
        alpha = nash_weights(gram)
        if alpha.isfinite().all():
            self.alpha.copy_(alpha)


def nash_weights(gram: torch.Tensor) -> torch.Tensor:
    """The alpha > 0 of mean 1 with G alpha = c / alpha, float64 [K]; NaN where none is found.

    Damped Newton on the self-concordant alpha^T G alpha / 2 - sum_k log alpha_k, which it minimises
    (Nesterov 2004, Sec. 4.1.5).

    Args:
        gram: [K, K] scalar products of K gradients.
    """
    gram = gram.double().cpu()
    alpha = (gram := gram / gram.diagonal().mean()).diagonal().rsqrt()
    for _ in range(100):
        gradient, hessian = gram @ alpha - 1 / alpha, gram + (alpha**-2).diag()
        step, singular = torch.linalg.solve_ex(hessian, gradient)
        if singular or not step.isfinite().all():
            break
        decrement = (step @ gradient).clamp(min=0).sqrt()
        alpha = alpha - step / (1 + decrement if decrement > 0.25 else 1)
        if decrement < 1e-6:  # the step just taken squares it
            return alpha / alpha.mean()
    return torch.full_like(alpha, torch.nan)
