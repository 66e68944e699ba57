"""Metrics, against closed forms and scipy."""

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from diffusers import DDPMScheduler
from tiny_models import PICKLE
from torch.utils.data import Dataset

from deme_lib.diffusion import data, metrics
from deme_lib.diffusion.metrics import Features, MetricError, evaluate
from deme_lib.diffusion.sampling import sample
from deme_lib.method.ensembles import AveragedEnsemble


@pytest.fixture(scope="module")
def digits():
    """Two disjoint sets of 300 real digits, the second darkened."""
    found = torch.from_numpy(data.digits()["train"].images)
    return found[:300], (found[300:600].float() * 0.8).to(torch.uint8)


@pytest.fixture(scope="module")
def features(digits):
    return tuple(metrics.extract(images, "digits-a") for images in digits)


def normal(n, seed, mean=0.0):
    """N(mean, I) in two dimensions."""
    values = mean + torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).double()
    return Features(values, values.new_empty(n, 0))


def two_modes(n):
    return Features.joined([normal(n, 0), normal(n, 1, mean=100)])


# each metric against its definition


def test_frechet_agrees_with_the_formula(features):
    (m1, c1), (m2, c2) = (
        (f.values.numpy().mean(0), np.cov(f.values.numpy(), rowvar=False)) for f in features
    )
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * root)
    assert metrics.frechet(*features) == pytest.approx(expected, rel=1e-6)


def test_inception_score_of_sure_and_unsure_classifiers():
    sure = Features(torch.zeros(100, 1).double(), 100 * torch.eye(10).repeat(10, 1).double())
    unsure = Features(sure.values, torch.zeros(100, 10).double())
    assert metrics.inception_score(sure, 1) == pytest.approx(10)
    assert metrics.inception_score(unsure, 2) == pytest.approx(1)


def test_kid_is_the_unbiased_mmd_of_a_cubic_kernel(features):
    """With subsets of the whole set there is one subset, in some order."""
    x, y = (f.values for f in features)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_off_diagonal(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    expected = mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y))
    expected -= 2 * kernel(x, y).mean()
    assert metrics.kid(*features, 300, 2) == pytest.approx(expected.item(), rel=1e-5)


def test_precision_and_recall_are_not_swapped(monkeypatch):
    """One of two modes: whatever is made is real, half of what is real is not made."""
    precision, recall = metrics.precision_recall(normal(200, 2), two_modes(200))
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)
    # of many references, which may be sorted by class, an evenly spaced part counts
    expected = metrics.precision_recall(normal(200, 2), two_modes(400)[::4])
    monkeypatch.setattr(metrics, "MANY", 100)
    assert metrics.precision_recall(normal(200, 2), two_modes(400)) == expected


def test_fresh_draws_are_disjoint_while_they_can_be():
    found = metrics.fresh_draws(100, 30, 7, seed=0)
    assert len(found) == 7 and {len(rows.unique()) for rows in found} == {30}
    assert all(rows.min() >= 0 and rows.max() < 100 for rows in found)
    assert len(torch.cat(found[:3]).unique()) == 90


# features


def test_pixels_are_the_images_and_large_ones_are_averaged(digits):
    found = metrics.extract(digits[0], "pixels")
    assert torch.equal(found.values, digits[0].flatten(1).double() / 127.5 - 1)
    assert found.values.dtype == torch.float64 and found.logits.shape == (300, 0)
    tall = digits[0].repeat_interleave(2, -2)
    for larger in (tall, tall.repeat_interleave(2, -1)):
        torch.testing.assert_close(metrics.extract(larger, "pixels").values, found.values)


class Stack(list, Dataset):
    """What torch-fidelity takes; a TensorDataset it does not."""


def test_inception_from_a_local_file_agrees_with_torch_fidelity(digits, inception_weights):
    grey = [images[:6] for images in digits]
    colour = [images.expand(-1, 3, -1, -1) for images in grey]
    found = [metrics.extract(images, "inception", inception_weights) for images in grey]
    again = metrics.extract(colour[0], "inception", inception_weights)
    torch.testing.assert_close(found[0].values, again.values)
    how = {"kid": True, "kid_subset_size": 6, "isc": True, "isc_splits": 2, "cuda": False}
    how |= {"feature_extractor_weights_path": inception_weights, "cache": False, "verbose": False}
    how |= {"save_cpu_ram": True}  # no further processes
    first, second = map(Stack, colour)
    expected = torch_fidelity.calculate_metrics(input1=first, input2=second, **how)
    kid, score = metrics.kid(*found, 6, 1), metrics.inception_score(found[0], 2)
    assert kid == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert score == pytest.approx(expected["inception_score_mean"], rel=1e-5)


# refusals


def test_too_few_images_are_refused_with_their_number(features):
    for size in (1, 301):
        with pytest.raises(MetricError, match=f"subsets of {size} images: give 2 to 300"):
            metrics.kid(*features, size, 2)
    with pytest.raises(MetricError, match="151 splits needs 302 images or more, not 300"):
        metrics.inception_score(features[0], 151)


def test_a_singular_covariance_is_warned_of(features):
    first = features[0]
    with pytest.warns(UserWarning, match="of 64 images in 64 features: .* singular"):
        metrics.frechet(first[:64], first)
    with warnings.catch_warnings(action="error"):
        metrics.frechet(first[:65], first)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e200])
def test_what_is_not_finite_has_no_frechet_distance(features, wrong):
    for pair in ((features[0], normal(300, 0, wrong)), (normal(300, 0, wrong), features[0])):
        with pytest.raises(MetricError, match="Frechet distance"):
            metrics.frechet(*pair)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(3, 8, 8).byte(), r"tensor \[n, C, H, W\] .* not torch.uint8 \[3, 8, 8\]"),
        (torch.zeros(0, 1, 8, 8).byte(), r"not torch.uint8 \[0, 1, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8), r"not torch.float32 .*to_uint8 of samples"),
        (np.zeros((2, 1, 8, 8), np.uint8), "not a ndarray: .*torch.from_numpy of an array"),
    ],
)
def test_what_is_no_stack_of_images_is_refused(images, said):
    with pytest.raises(data.DataError, match=said):
        metrics.extract(images, "pixels")


def test_features_of_other_images_are_refused():
    for name, said in (
        ("digits-a", r"takes images \[1, 8, 8\], not \[4, 8, 8\]: take inception"),
        ("x", "no f.* 'x': take inception"),
        ("inception", "1 or 3 channels, not 4"),
    ):
        with pytest.raises(MetricError, match=said):
            metrics.extract(torch.zeros(2, 4, 8, 8).byte(), name)


def test_inception_weights_that_are_none_or_would_run_code_are_refused(tmp_path):
    (tmp_path / "evil").write_text(PICKLE.format(tmp_path / "pwned"))
    (tmp_path / "empty").write_bytes(b"")
    for name in ("evil", "empty", "none"):
        with pytest.raises(MetricError, match="inception_weights"):
            metrics.extract(torch.zeros(2, 3, 8, 8).byte(), "inception", str(tmp_path / name))
    assert not (tmp_path / "pwned").exists()


# all at once


def test_evaluate_takes_a_denoiser_and_leaves_it_as_it_was(digits, tiny_unet):
    ensemble, scheduler = AveragedEnsemble([tiny_unet(0), tiny_unet(1)]).train(), DDPMScheduler()
    how = {"features": "digits-a", "device": "cpu"}
    found = evaluate(ensemble, digits[0], scheduler=scheduler, n=80, steps=2, seed=3, **how)
    assert ensemble.training
    images = sample(ensemble.eval(), scheduler, 80, steps=2, purpose=("sample", 3))
    assert found == evaluate(images, digits[0], **how)
    pair = [metrics.extract(some, "digits-a") for some in (images, digits[0])]
    expected = metrics.frechet(*pair), metrics.kid(*pair, 80, 100)
    assert found == (*expected, metrics.inception_score(pair[0], 10), 80, 300, "digits-a")
    assert str(found).endswith(" (n = 80 to 300 real images, digits-a features)")
    with pytest.raises(MetricError, match=r"pass scheduler=pipeline\.scheduler"):
        evaluate(ensemble, digits[0], **how)
    with pytest.raises(MetricError, match="class probabilities, which pixels have not"):
        evaluate(images, digits[0], features="pixels", device="cpu")
