"""Losses and their re-weightings, against the formulas."""

import pytest
import torch

from deme_lib.method import objectives
from deme_lib.method.objectives import balanced_weights, deme_loss, nash_weights, snr_weights
from deme_lib.method.timesteps import split_timesteps

ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
SNR = (ALPHAS.double() / (1 - ALPHAS.double())).tolist()
BY_HAND = [
    ("snr+1", {}, [(s + 1) / s for s in SNR]),
    ("trun-snr", {}, [max(s, 1) / s for s in SNR]),
    ("min-snr", {}, [min(s, 5) / s for s in SNR]),
    ("min-snr", {"min_snr_gamma": 2}, [min(s, 2) / s for s in SNR]),
    ("p2", {}, [1 / (1 + s) for s in SNR]),
    ("p2", {"p2_gamma": 0.5}, [(1 + s) ** -0.5 for s in SNR]),
]


def test_equation_5_by_hand():
    """Weights multiply the denoising loss alone."""
    denoising, consistency = torch.tensor([1.0, 3.0]), torch.tensor([10.0, 20.0])
    assert deme_loss(denoising).item() == 2
    assert deme_loss(denoising, consistency).item() == 17
    assert deme_loss(denoising, consistency, 0.1).item() == pytest.approx(3.5)
    assert deme_loss(denoising, consistency, 1.0, torch.tensor([2.0, 0.0])).item() == 16


@pytest.mark.parametrize(("name", "gamma", "by_hand"), BY_HAND)
def test_weights_follow_their_formula_at_mean_one(name, gamma, by_hand):
    found = snr_weights(name, ALPHAS, **gamma)
    expected = torch.tensor(by_hand, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected / expected.mean(), rtol=1e-5, atol=0)
    assert found.mean().item() == pytest.approx(1, abs=1e-5)


def test_schedules_without_signal_are_refused():
    with pytest.raises(ValueError, match=r"snr\+1 has no finite weight at SNR 0"):
        snr_weights("snr+1", torch.tensor([0.9, 0.5, 0.0]))


def test_balanced_weights_are_inverse_roots_of_the_losses():
    weights = balanced_weights([0.16, 0.01], split_timesteps(2, 5))  # [0, 3), [3, 5)
    assert weights.mean().item() == pytest.approx(1)
    assert (weights / weights[0]).tolist() == pytest.approx([1, 1, 1, 4, 4])


@pytest.mark.parametrize("loss", [0.0, float("nan"), float("inf")])
def test_no_weights_follow_from_a_loss_of_zero_or_not_finite(loss):
    with pytest.raises(ValueError, match=r"losses per range are \[0\.1, .*0 or not finite"):
        balanced_weights([0.1, loss], split_timesteps(2, 5))


def test_uncertainty_weights_are_one_at_first_and_of_mean_one_after():
    weighting = objectives.UncertaintyWeighting(split_timesteps(3, 10))
    assert weighting.weights().tolist() == pytest.approx([1.0] * 10)
    with torch.no_grad():
        weighting.log_variances.copy_(torch.tensor([0.0, -1.0, 2.0]))
    weights = weighting.weights()
    assert weights.mean().item() == pytest.approx(1) and not weights.requires_grad
    ratio = (weights[9] / weights[0]).item()
    assert ratio == pytest.approx(torch.tensor(-2.0).exp().item())


def test_uncertainty_settles_where_kendall_says():
    """sum exp(-s) L + s is least at s = log L, so the weight of a task is 1 / L."""
    weighting = objectives.UncertaintyWeighting(split_timesteps(2, 10))
    optimiser = torch.optim.Adam(weighting.parameters(), 0.05)
    timesteps = torch.tensor([0, 9])
    losses = torch.tensor([0.5, 0.1], requires_grad=True)
    for _ in range(500):
        optimiser.zero_grad()
        weighting(losses, timesteps).backward()
        optimiser.step()
    assert losses.grad is None  # the model is not trained by this part
    expected = torch.tensor([0.5, 0.1]).log()
    torch.testing.assert_close(weighting.log_variances.detach(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_nash_weights_solve_the_bargain(k, scale):
    """Gradients at right angles by hand, alpha_k = 1 / |g_k|; others by G alpha = c / alpha."""
    sizes = torch.logspace(-2, 2, k, dtype=torch.float64)
    by_hand = (1 / sizes) / (1 / sizes).mean()
    torch.testing.assert_close(nash_weights(scale * (sizes**2).diag()), by_hand)
    drawn = torch.randn(k, 50, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    gram = (gradients := sizes[:, None] * drawn + drawn[0]) @ gradients.T
    alpha = nash_weights(scale * gram)
    products = gram @ alpha * alpha
    assert (alpha > 0).all()
    torch.testing.assert_close(products / products.mean(), torch.ones_like(alpha))


def test_nash_weights_of_gradients_that_are_nearly_opposed():
    r = 1 - 1e-8
    found = nash_weights(torch.tensor([[1, -r], [-r, 1]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("odd", [-1.0, 0.0, float("inf")])
def test_nash_keeps_its_weights_where_no_bargain_exists(odd):
    weighting = objectives.NashWeighting(split_timesteps(2, 10))
    weighting.bargain(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    torch.testing.assert_close(weighting.weights(), torch.tensor([4 / 3] * 5 + [2 / 3] * 5))
    weighting.bargain(torch.tensor([[1.0, odd], [odd, odd**2]]))
    torch.testing.assert_close(weighting.weights(), torch.tensor([4 / 3] * 5 + [2 / 3] * 5))
