"""Metrics, against closed forms and scipy."""

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from diffusers import DDPMScheduler
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


# Frechet distance


def test_frechet_agrees_with_the_formula(features):
    (m1, c1), (m2, c2) = (
        (f.values.numpy().mean(0), np.cov(f.values.numpy(), rowvar=False)) for f in features
    )
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * root)
    assert metrics.frechet(*features) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet(*features[::-1]) == pytest.approx(expected, rel=1e-6)


# each metric against its definition


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


def test_precision_and_recall_are_not_swapped():
    """One of two modes: whatever is made is real, half of what is real is not made."""
    precision, recall = metrics.precision_recall(normal(200, 2), two_modes(200))
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)


def test_of_many_references_an_evenly_spaced_part_counts(monkeypatch):
    """Sorted by class, say: the first ones alone would be another distribution."""
    reference, generated = two_modes(400), normal(200, 2)
    expected = metrics.precision_recall(generated, reference[::4])
    monkeypatch.setattr(metrics, "MANY", 100)
    assert metrics.precision_recall(generated, reference) == expected


@pytest.mark.parametrize(("count", "n", "draws"), [(100, 30, 3), (100, 30, 7), (100, 100, 2)])
def test_fresh_draws_are_disjoint_while_they_can_be(count, n, draws):
    found = metrics.fresh_draws(count, n, draws, seed=0)
    assert len(found) == draws and {len(rows.unique()) for rows in found} == {n}
    assert all(rows.min() >= 0 and rows.max() < count for rows in found)
    assert len(torch.cat(found[: count // n]).unique()) == count // n * n
    again = metrics.fresh_draws(count, n, draws, seed=0)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


# features


def test_pixels_are_the_images_and_large_ones_are_averaged(digits):
    found = metrics.extract(digits[0], "pixels")
    assert torch.equal(found.values, digits[0].flatten(1).double() / 127.5 - 1)
    assert found.values.dtype == torch.float64 and found.logits.shape == (300, 0)
    tall = digits[0].repeat_interleave(2, -2)
    for larger in (tall, tall.repeat_interleave(2, -1)):
        torch.testing.assert_close(metrics.extract(larger, "pixels").values, found.values)


class Stack(Dataset):
    """What torch-fidelity takes; a TensorDataset it does not."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i].expand(3, -1, -1)


def test_inception_from_a_local_file_agrees_with_torch_fidelity(digits, inception_weights):
    few = [images[:6] for images in digits]
    found = [metrics.extract(images, "inception", inception_weights) for images in few]
    assert found[0].values.shape == (6, 2048) and found[0].logits.shape == (6, 1008)
    expected = torch_fidelity.calculate_metrics(
        input1=Stack(few[0]),
        input2=Stack(few[1]),
        kid=True,
        isc=True,
        kid_subset_size=6,
        isc_splits=2,
        save_cpu_ram=True,  # no further processes
        feature_extractor_weights_path=inception_weights,
        cuda=False,
        cache=False,
        verbose=False,
    )
    kid, score = metrics.kid(*found, 6, 1), metrics.inception_score(found[0], 2)
    assert kid == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert score == pytest.approx(expected["inception_score_mean"], rel=1e-5)
    colour = metrics.extract(few[0].expand(-1, 3, -1, -1), "inception", inception_weights)
    torch.testing.assert_close(found[0].values, colour.values)


# refusals


def test_too_few_images_are_refused_with_their_number(features):
    with pytest.raises(MetricError, match="subsets of 1 images: give 2 to 300"):
        metrics.kid(*features, 1, 2)
    with pytest.raises(MetricError, match="subsets of 301 images: give 2 to 300"):
        metrics.kid(*features, 301, 2)
    with pytest.raises(MetricError, match="151 splits needs 302 images or more, not 300"):
        metrics.inception_score(features[0], 151)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_singular_covariance_is_warned_of():
    images = metrics.extract(torch.from_numpy(data.digits()["train"].images[:65]), "digits-a")
    with pytest.warns(UserWarning, match="of 64 images in 64 features: .* singular"):
        metrics.frechet(images[:64], images)
    with warnings.catch_warnings(action="error"):
        metrics.frechet(images, images)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e200])
def test_what_is_not_finite_has_no_frechet_distance(features, wrong):
    values = features[0].values.clone()
    values[0, 0] = wrong
    for pair in ((Features(values, values), features[1]), (features[1], Features(values, values))):
        with pytest.raises(MetricError, match="Frechet distance"):
            metrics.frechet(*pair)


@pytest.mark.parametrize(
    ("images", "name", "said"),
    [
        (
            torch.zeros(3, 8, 8).byte(),
            "pixels",
            r"tensor \[n, C, H, W\] .* not torch.uint8 \[3, 8, 8\]",
        ),
        (torch.zeros(0, 1, 8, 8).byte(), "pixels", r"not torch.uint8 \[0, 1, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8), "pixels", r"not torch.float32 .*to_uint8 of samples"),
        (
            np.zeros((2, 1, 8, 8), np.uint8),
            "pixels",
            r"not a ndarray: .*torch.from_numpy of an array",
        ),
        ([torch.zeros(1, 8, 8).byte()], "pixels", "not a list"),
        (torch.zeros(2, 3, 8, 8).byte(), "digits-a", r"takes images \(1, 8, 8\), not \(3, 8, 8\)"),
        (
            torch.zeros(2, 1, 8, 8).byte(),
            "digits",
            "no features 'digits': take inception, pixels, di",
        ),
        (torch.zeros(2, 4, 8, 8).byte(), "inception", "grey or colour, not 4 channels"),
    ],
)
def test_images_that_features_do_not_take_are_refused(images, name, said):
    with pytest.raises(MetricError, match=said):
        metrics.extract(images, name)


def test_inception_weights_that_are_none_or_would_run_code_are_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"a": Payload()}, tmp_path / "evil")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_bytes(b"not weights")
    for name in ("evil", "empty", "text"):
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
    assert found[:3] == (*expected, metrics.inception_score(pair[0], 10))
    assert (found.n, found.n_real, found.features) == (80, 300, "digits-a")
    assert evaluate(ensemble, digits[0][:70], scheduler=scheduler, steps=1, **how).n == 70
    with pytest.raises(MetricError, match=r"pass scheduler=pipeline\.scheduler"):
        evaluate(ensemble, digits[0], **how)
    with pytest.raises(MetricError, match="class probabilities, which pixels have not"):
        evaluate(images, digits[0], features="pixels", device="cpu")


def test_scores_can_be_read():
    scores = str(metrics.Scores(12.3, 0.0041, 5.61, 5000, 5000, "inception"))
    assert scores.startswith("FID 12.3, KID 0.0041, IS 5.61 (n = 5,000 to 5,000 real images, inc")
