"""Metrics, against closed forms and scipy."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from deme_lib.diffusion import data, metrics
from deme_lib.diffusion.metrics import Features, MetricError


@pytest.fixture(scope="module")
def digits():
    """Two disjoint sets of 300 real digits, the second darkened."""
    found = torch.from_numpy(data.digits()["train"].images)
    return found[:300], (found[300:600].float() * 0.8).to(torch.uint8)


@pytest.fixture(scope="module")
def features(digits):
    return tuple(metrics.extract(images, "digits-a") for images in digits)


def gaussian(n, d, seed, mean=0.0, scale=1.0):
    values = mean + scale * torch.randn(
        n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return Features(values, values.new_empty(n, 0))


def two_modes(n):
    """N(0, I) and N(100, I) in two dimensions, sorted by mode."""
    values = torch.cat([gaussian(n, 2, 0).values, gaussian(n, 2, 1, mean=100).values])
    return Features(values, torch.empty(2 * n, 0))


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
    precision, recall = metrics.precision_recall(gaussian(200, 2, 2), two_modes(200))
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)


def test_of_many_references_an_evenly_spaced_part_counts(monkeypatch):
    """Sorted by class, say: the first ones alone would be another distribution."""
    reference, generated = two_modes(400), gaussian(200, 2, 2)
    expected = metrics.precision_recall(generated, reference[::4])
    monkeypatch.setattr(metrics, "MANY", 100)
    assert metrics.precision_recall(generated, reference) == expected


@pytest.mark.parametrize("block", [metrics.BLOCK, 64 * 7])
def test_nearest_distances_are_exactly_those_of_brute_force(digits, monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    monkeypatch.setattr(metrics, "BATCH", min(metrics.BATCH, block // 64))
    few, train = digits[0][:40], torch.cat([digits[1], digits[0][:20]])
    a, b = (images.flatten(1).long() for images in (few, train))
    squares = (a[:, None] - b[None]).square().sum(-1).amin(dim=1)
    found = metrics.nearest_distances(few, train)
    assert torch.equal((found * 127.5).square().round().long(), squares)
    assert (found[:20] == 0).all() and (found[20:] > 0.1).all()  # copies are seen as copies


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


# the floor


@pytest.mark.parametrize(("count", "n", "draws"), [(100, 30, 3), (100, 30, 7), (100, 100, 2)])
def test_fresh_draws_are_disjoint_while_they_can_be(count, n, draws):
    found = metrics.fresh_draws(count, n, draws, seed=0)
    assert len(found) == draws and {len(rows.unique()) for rows in found} == {n}
    assert all(rows.min() >= 0 and rows.max() < count for rows in found)
    assert len(torch.cat(found[: count // n]).unique()) == count // n * n
    again = metrics.fresh_draws(count, n, draws, seed=0)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


def test_the_floor_falls_as_one_over_the_number_of_images():
    """Of real images in 4 dimensions, extrapolated from 1,000 and measured on many more."""
    reference = gaussian(4000, 4, 0)
    measured = [metrics.frechet(gaussian(1000, 4, 1 + k), reference) for k in range(30)]
    extrapolated = metrics.extrapolated_floor(gaussian(1000, 4, 99), 1000, 4000, 30, seed=0)
    assert extrapolated == pytest.approx(np.mean(measured), rel=0.25)
    twice = metrics.extrapolated_floor(gaussian(1000, 4, 99), 2000, 8000, 30, seed=0)
    assert twice == pytest.approx(extrapolated / 2)


# features


def test_pixels_are_the_images_and_large_ones_are_averaged(digits):
    found = metrics.extract(digits[0], "pixels")
    assert torch.equal(found.values, digits[0].flatten(1).double() / 127.5 - 1)
    assert found.values.dtype == torch.float64 and found.logits.shape == (300, 0)
    tall = digits[0].repeat_interleave(2, -2)
    for larger in (tall, tall.repeat_interleave(2, -1)):
        torch.testing.assert_close(metrics.extract(larger, "pixels").values, found.values)


def test_inception_from_a_local_file_takes_grey_and_colour(inception_weights):
    grey = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    found = metrics.extract(grey, "inception", inception_weights)
    assert found.values.shape == (3, 2048) and found.logits.shape == (3, 1008)
    colour = metrics.extract(grey.expand(-1, 3, -1, -1), "inception", inception_weights)
    torch.testing.assert_close(found.values, colour.values)
    assert metrics.inception_score(found, 1) >= 1


# refusals


def test_kid_of_single_images_is_refused(features):
    with pytest.raises(MetricError, match="at least 2 images, not 1"):
        metrics.kid(*features, 1, 2)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e200])
def test_what_is_not_finite_has_no_frechet_distance(features, wrong):
    values = features[0].values.clone()
    values[0, 0] = wrong
    for pair in ((Features(values, values), features[1]), (features[1], Features(values, values))):
        with pytest.raises(MetricError, match="Frechet distance"):
            metrics.frechet(*pair)


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 1, 8, 8)])
def test_what_are_no_images_is_refused(shape):
    with pytest.raises(MetricError, match="uint8 images"):
        metrics.extract(torch.zeros(*shape, dtype=torch.uint8), "digits-a")


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
