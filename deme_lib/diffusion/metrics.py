"""Image metrics, computed by torch-fidelity on features that hold still.

Features come from a shipped classifier (``digits-a``), from raw pixels, or from torch-fidelity's
own Inception (``inception``). They are extracted once a set of images, in float64, without
torch-fidelity's cache (it is keyed by name alone, and pickled).
"""

import urllib.error
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Self

import numpy as np
import torch
from torch.nn import functional as F
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.utils import create_feature_extractor

from deme_lib.diffusion import classifier
from deme_lib.errors import Explained

INCEPTION = "inception"
PIXELS = "pixels"
BATCH = 500  # fixed: Inception's features depend on it on GPUs
MANY = 10_000  # images, of which all pairwise distances fit into memory
BLOCK = 2**24  # float64 numbers held at a time while distances are taken
PIXEL_GRID = 8  # larger images are averaged down to this many pixels a side


class MetricError(Explained, ValueError):
    """A metric cannot be computed on what was given."""


@dataclass(frozen=True)
class Features:
    """float64 features [n, d] of n images, and class logits [n, classes] (empty for pixels)."""

    values: torch.Tensor
    logits: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows) -> Self:
        return Features(self.values[rows], self.logits[rows])

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        return cls(torch.cat([p.values for p in parts]), torch.cat([p.logits for p in parts]))


@torch.no_grad()
def extract(
    images: torch.Tensor, name: str, inception_weights: str = "", cuda: bool = False
) -> Features:
    """Features of uint8 images [n, C, H, W].

    Args:
        name: a shipped classifier, ``pixels`` or ``inception``.
        inception_weights: local file of torch-fidelity's Inception weights; empty: fetched.

    Raises:
        MetricError: the images are of another type, or the features cannot be fetched.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise MetricError(
            f"metrics take uint8 images [n, C, H, W], not {images.dtype} {tuple(images.shape)}"
        )
    device = "cuda" if cuda else "cpu"
    if name == PIXELS:
        network = _pixels
    elif name == INCEPTION:
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        network = _inception(inception_weights, cuda)
    else:
        network = classifier.load(name).to(device)
    batches = [network(batch.to(device)) for batch in images.split(BATCH)]
    return Features(*(torch.cat(part).double().cpu() for part in zip(*batches, strict=True)))


def frechet(generated: Features, reference: Features) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).

    Called FID where the features are Inception's or a classifier's, pixel distance on pixels.
    """
    first, second = (fid_features_to_statistics(f.values) for f in (generated, reference))
    try:
        found = fid_statistics_to_metric(first, second, verbose=False)
        distance = found["frechet_inception_distance"]
    except np.linalg.LinAlgError:  # of NaN or infinity
        distance = np.nan
    if not np.isfinite(distance):
        raise MetricError("a Frechet distance needs features whose squares are finite numbers")
    return distance


def inception_score(generated: Features, splits: int) -> float:
    """exp of the mean KL divergence of class probabilities (Salimans et al. 2016), over splits.

    The order of the images is shuffled with torch-fidelity's fixed seed.
    """
    return isc_features_to_metric(generated.logits, splits=splits)["inception_score_mean"]


def kid(generated: Features, reference: Features, subset_size: int, subsets: int) -> float:
    """Kernel inception distance (Binkowski et al. 2018), unbiased, mean over random subsets."""
    if subset_size < 2:
        raise MetricError(f"KID needs subsets of at least 2 images, not {subset_size}")
    sizes = {"kid_subset_size": subset_size, "kid_subsets": subsets}
    found = kid_features_to_metric(generated.values, reference.values, **sizes, verbose=False)
    return found["kernel_inception_distance_mean"]


def precision_recall(generated: Features, reference: Features) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), 3 neighbours, both in [0, 1].

    The cost is quadratic: of references above both ``MANY`` and the number of generated images,
    an evenly spaced part counts.
    """
    count = min(len(reference), max(len(generated), MANY))
    rows = torch.arange(count) * len(reference) // count
    found = prc_features_to_metric(
        generated.values, reference.values[rows], save_cpu_ram=count > MANY, verbose=False
    )
    return found["precision"], found["recall"]


def halves_difference(features: Features, reference: Features, repeats: int, seed: int) -> float:
    """How still a Frechet distance holds: rms relative difference of two random halves.

    Over ``repeats`` random halvings of one model's images, |d1 - d2| / mean(d1, d2).
    """
    squares = []
    for halves in _halvings(features, repeats, seed):
        first, second = (frechet(half, reference) for half in halves)
        squares.append((2 * (first - second) / (first + second)) ** 2)
    return float(np.sqrt(np.mean(squares)))


def fresh_draws(count: int, n: int, draws: int, seed: int) -> list[torch.Tensor]:
    """Indices [n] of ``draws`` draws of n out of ``count`` real images, disjoint where possible.

    Of images that no model saw: their FID to the reference is the floor, a perfect model's.
    """
    rng, order = np.random.default_rng(seed), []
    while len(order) < draws:
        order += np.split(rng.permutation(count)[: count // n * n], count // n)
    return [torch.from_numpy(rows) for rows in order[:draws]]


def extrapolated_floor(real: Features, n: int, m: int, repeats: int, seed: int) -> float:
    """The floor at n images against m, where the data has no n fresh ones: c (1/n + 1/m).

    Both sets' means and covariances err by O(1/n) and O(1/m), and so does their FID, whose bias
    is linear in 1/n (Chong and Forsyth 2020). c comes from random halves of h real images each,
    whose FID is c (1/h + 1/h); it holds for h, n and m well above the number of features.
    """
    found = [frechet(*halves) for halves in _halvings(real, repeats, seed)]
    return float(np.mean(found)) * (len(real) // 2) / 2 * (1 / n + 1 / m)


def _halvings(features: Features, repeats: int, seed: int) -> Iterator[tuple[Features, Features]]:
    rng, half = np.random.default_rng(seed), len(features) // 2
    for _ in range(repeats):
        order = torch.from_numpy(rng.permutation(len(features)))
        yield features[order[:half]], features[order[half : 2 * half]]


def nearest_distances(images: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """Euclidean distance of each uint8 image to its nearest training image, pixels in [-1, 1].

    Squares of whole numbers are exact in float64: a copy is at distance 0.
    """
    rows = max(1, BLOCK // max(BATCH, train[0].numel()))
    nearest = []
    for few in images.flatten(1).split(min(BATCH, rows)):
        parts = train.flatten(1).split(rows)
        found = [torch.cdist(few.double(), part.double()).amin(1) for part in parts]
        nearest.append(torch.stack(found).amin(0))
    return torch.cat(nearest) / 127.5


def _pixels(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    small = images.double() / 127.5 - 1
    if max(small.shape[-2:]) > PIXEL_GRID:
        small = F.adaptive_avg_pool2d(small, PIXEL_GRID)
    return small.flatten(1), small.new_empty(len(images), 0)


def _inception(weights: str, cuda: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    try:
        if weights:  # torch-fidelity unpickles: have torch refuse anything but tensors first
            torch.load(weights, weights_only=True)
        return create_feature_extractor(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            cuda=cuda,
            feature_extractor_weights_path=weights or None,
            verbose=False,
        )
    except (urllib.error.URLError, OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise MetricError(
            f"cannot load Inception's weights ({error}). With a network torch-fidelity fetches "
            "weights-inception-2015-12-05-6726825d.pth from its GitHub releases; without, name a "
            "local copy in the parameter `inception_weights`"
        ) from error
