"""Metrics: against closed forms, scipy, and torch-fidelity's own front door."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity

from deme_lib.diffusion import data, metrics
from deme_lib.diffusion.metrics import Features, MetricError


@pytest.fixture(scope="module")
def digits():
    """Two disjoint sets of 300 real digits, the second darkened."""
    found = torch.from_numpy(data.digits().images)
    return found[:300], (found[300:600].float() * 0.8).to(torch.uint8)


@pytest.fixture(scope="module")
def features(digits):
    return tuple(metrics.extract(images, "digits-a") for images in digits)


def gaussian(n, d, seed, mean=0.0, scale=1.0):
    values = mean + scale * torch.randn(
        n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return Features(values, values.new_empty(n, 0))


# Frechet distance


def test_frechet_of_gaussians_with_known_moments():
    """|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) = d (2^2 + (3 - 1)^2) for N(2, 9 I), N(0, I)."""
    found = metrics.frechet(gaussian(40_000, 3, 0, mean=2, scale=3), gaussian(40_000, 3, 1))
    assert found == pytest.approx(3 * (4 + 4), rel=0.03)


def test_frechet_agrees_with_the_formula(features):
    (m1, c1), (m2, c2) = (
        (f.values.numpy().mean(0), np.cov(f.values.numpy(), rowvar=False)) for f in features
    )
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * root)
    assert metrics.frechet(*features) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet(*features[::-1]) == pytest.approx(expected, rel=1e-6)


def test_a_set_is_at_no_distance_from_itself(features):
    generated, reference = features
    scale = metrics.frechet(generated, reference)
    shuffled = generated[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert abs(metrics.frechet(generated, shuffled)) < 1e-6 * scale
    assert metrics.precision_recall(generated, generated) == (1.0, 1.0)
    assert abs(metrics.kid(generated, generated, 300, 1)) < metrics.kid(
        generated, reference, 300, 1
    )


# torch-fidelity itself


def test_all_metrics_agree_with_torch_fidelity(digits, features):
    expected = torch_fidelity.calculate_metrics(
        input1=metrics._Images(digits[0]),
        input2=metrics._Images(digits[1]),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        feature_extractor="deme-digits-a",
        kid_subset_size=100,
        kid_subsets=5,
        isc_splits=3,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    generated, reference = features
    precision, recall = metrics.precision_recall(generated, reference)
    found = {
        "frechet_inception_distance": metrics.frechet(generated, reference),
        "kernel_inception_distance_mean": metrics.kid(generated, reference, 100, 5),
        "inception_score_mean": metrics.inception_score(generated, 3),
        "precision": precision,
        "recall": recall,
    }
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-5)


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
    reference = Features(
        torch.cat([gaussian(200, 2, 0).values, gaussian(200, 2, 1, mean=100).values]),
        torch.empty(400, 0),
    )
    precision, recall = metrics.precision_recall(gaussian(200, 2, 2), reference)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)


def test_nearest_distances_are_those_of_brute_force(digits):
    few, train = digits[0][:40], digits[1]
    train = torch.cat([train, few[:20]])
    a, b = (images.flatten(1).double() / 127.5 for images in (few, train))
    expected = (a[:, None] - b[None]).square().sum(-1).sqrt().min(dim=1).values
    found = metrics.nearest_distances(few, train).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found[:20] < 1e-4).all() and (found[20:] > 0.1).all()  # copies are seen as copies


def test_nearest_distances_do_not_depend_on_how_many_images_fit(digits, monkeypatch):
    few, train = digits[0][:40], digits[1]
    expected = metrics.nearest_distances(few, train)
    monkeypatch.setattr(metrics, "PART", 64 * 7)  # seven images at a time
    assert torch.equal(metrics.nearest_distances(few, train), expected)


def test_of_many_references_an_evenly_spaced_part_counts(monkeypatch):
    """Sorted by class, say: the first ones alone would be another distribution."""
    reference = Features(
        torch.cat([gaussian(400, 2, 0).values, gaussian(400, 2, 1, mean=100).values]),
        torch.empty(800, 0),
    )
    generated, whole = gaussian(200, 2, 2), Features(reference.values[::4], torch.empty(200, 0))
    expected = metrics.precision_recall(generated, whole)
    monkeypatch.setattr(metrics, "MANY", 100)
    assert metrics.precision_recall(generated, reference) == expected
    assert expected[1] == pytest.approx(0.5, abs=0.05)


def test_halves_difference():
    """Nothing to tell apart: 0. Halves that differ only by chance: more images, less of it."""
    reference = gaussian(2000, 2, 0)
    constant = Features(torch.full((20, 2), 3.0).double(), torch.empty(20, 0))
    assert metrics.halves_difference(constant, reference, 3, seed=0) == pytest.approx(0, abs=1e-9)
    few, many = (
        metrics.halves_difference(gaussian(n, 2, 1, mean=1), reference, 20, seed=0)
        for n in (40, 4000)
    )
    assert 0 < many < few / 3
    assert many == metrics.halves_difference(gaussian(4000, 2, 1, mean=1), reference, 20, seed=0)


# features


def test_pixels_are_the_images_and_large_ones_are_averaged(digits):
    found = metrics.extract(digits[0], "pixels")
    assert torch.equal(found.values, digits[0].flatten(1).double() / 127.5 - 1)
    assert found.values.dtype == torch.float64 and found.logits.shape == (300, 0)
    doubled = digits[0].repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(metrics.extract(doubled, "pixels").values, found.values)


def test_features_of_an_image_do_not_depend_on_the_others(digits, features):
    torch.testing.assert_close(
        metrics.extract(digits[0][7:9], "digits-a").values,
        features[0].values[7:9],
        rtol=1e-4,
        atol=1e-5,
    )
    again = metrics.extract(digits[0], "digits-a")  # a second registration is no error
    assert torch.equal(again.values, features[0].values)
    assert torch.equal(again.logits, features[0].logits)
    assert len(again[:5]) == 5 and torch.equal(again[:5].logits, again.logits[:5])


# refusals


def test_too_few_images_are_refused(features):
    one, reference = features[0][:1], features[1]
    for call, words in (
        (lambda: metrics.frechet(one, reference), "at least 2 images, got 1"),
        (lambda: metrics.frechet(reference, one), "at least 2 images, got 1"),
        (lambda: metrics.inception_score(features[0][:9], 10), "10 splits.*got 9"),
        (lambda: metrics.kid(features[0][:9], reference, 10, 2), "9 and 300.*kid_subset_size"),
        (lambda: metrics.kid(reference, features[0][:9], 10, 2), "300 and 9.*kid_subset_size"),
        (lambda: metrics.precision_recall(features[0][:3], reference), "at least 4"),
        (lambda: metrics.precision_recall(reference, features[0][:3]), "at least 4"),
    ):
        with pytest.raises(MetricError, match=words):
            call()
    assert math.isfinite(metrics.frechet(features[0][:2], reference))
    metrics.precision_recall(features[0][:4], reference)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 1, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
    ],
    ids=["float", "no channels", "none"],
)
def test_only_uint8_images_are_taken(images):
    with pytest.raises(MetricError, match="uint8 images"):
        metrics.extract(images, "digits-a")


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 8)])
def test_images_that_do_not_fit_the_classifier_are_refused(shape):
    with pytest.raises(MetricError, match="digits-a"):
        metrics.extract(torch.zeros(4, *shape, dtype=torch.uint8), "digits-a")


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_unreadable_inception_weights_are_refused(digits, tmp_path, content):
    file = tmp_path / "inception.pth"
    file.write_bytes(content)
    with pytest.raises(MetricError, match="inception_weights"):
        metrics.extract(digits[0], "inception", inception_weights=str(file))
    with pytest.raises(MetricError, match="inception_weights"):
        metrics.extract(digits[0], "inception", inception_weights=str(tmp_path / "absent"))


def test_inception_from_a_local_file_takes_grey_and_colour(inception_weights):
    grey = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    found = metrics.extract(grey, "inception", inception_weights)
    assert found.values.shape == (3, 2048)
    assert found.logits.shape == (3, 1008)
    colour = metrics.extract(grey.expand(-1, 3, -1, -1), "inception", inception_weights)
    assert torch.equal(found.values, colour.values)
    assert metrics.inception_score(found, 1) >= 1


def test_weights_that_would_run_code_are_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"a": Payload()}, tmp_path / "evil.pth")
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(MetricError, match="inception_weights"):
        metrics.extract(images, "inception", str(tmp_path / "evil.pth"))
    assert not (tmp_path / "pwned").exists()
