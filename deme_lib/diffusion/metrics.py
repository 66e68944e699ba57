"""Image metrics, computed by torch-fidelity on features that hold still.

Features come from a shipped classifier (``digits-a``), from raw pixels, or from torch-fidelity's
own Inception (``inception``). They are extracted once a set of images, in float64, without
torch-fidelity's cache (it is keyed by name alone, and pickled).
"""

from __future__ import annotations

import urllib.error
from dataclasses import dataclass
from pickle import UnpicklingError

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from deme_lib.diffusion import classifier

INCEPTION = "inception"
PIXELS = "pixels"
BATCH = 500  # fixed: Inception's features depend on it on GPUs
MANY = 10_000  # images, of which all pairwise distances fit into memory
PART = 2**29  # pixels of training images that distances are taken to at a time
EXACT = "donot_use_mm_for_euclid_dist"  # a copy is at distance 0
PIXEL_GRID = 8  # larger images are averaged down to this many pixels a side


class MetricError(ValueError):
    """A metric cannot be computed on what was given."""


@dataclass(frozen=True)
class Features:
    """float64 features [n, d] of n images, and class logits [n, classes] (empty for pixels)."""

    values: torch.Tensor
    logits: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows) -> Features:
        return Features(self.values[rows], self.logits[rows])


def extract(
    images: torch.Tensor, name: str, inception_weights: str = "", cuda: bool = False
) -> Features:
    """Features of uint8 images [n, C, H, W].

    Args:
        cuda: extract on the GPU.
        name: a shipped classifier, ``pixels`` or ``inception``.
        inception_weights: local file of torch-fidelity's Inception weights; empty: fetched.

    Raises:
        MetricError: the features are unknown, do not fit the images, or cannot be fetched.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise MetricError(
            f"metrics take uint8 images [n, C, H, W], not {images.dtype} {tuple(images.shape)}"
        )
    if name == INCEPTION:
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        extractor = _inception(inception_weights, cuda)
    else:
        extractor = create_feature_extractor(
            _register(name), ["features", "logits"], cuda=cuda, verbose=False
        )
        if name != PIXELS and tuple(images.shape[1:]) != extractor.model.image_shape:
            raise MetricError(
                f"the classifier {name} takes images {extractor.model.image_shape}, these are "
                f"{tuple(images.shape[1:])}: set features to one of this data, or to inception"
            )
    found = get_featuresdict_from_dataset(
        _Images(images), extractor, BATCH, cuda, save_cpu_ram=True, verbose=False
    )
    values = found["2048" if name == INCEPTION else "features"]
    logits = found["logits_unbiased" if name == INCEPTION else "logits"]
    return Features(values.double(), logits.double())


def frechet(generated: Features, reference: Features) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).

    Called FID where the features are Inception's or a classifier's, pixel distance on pixels.
    """
    for features in (generated, reference):
        if len(features) < 2:
            raise MetricError(f"a Frechet distance needs at least 2 images, got {len(features)}")
    first, second = (fid_features_to_statistics(f.values) for f in (generated, reference))
    return fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"]


def inception_score(generated: Features, splits: int) -> float:
    """exp of the mean KL divergence of class probabilities (Salimans et al. 2016), over splits.

    The order of the images is shuffled with torch-fidelity's fixed seed.
    """
    if not generated.logits.shape[1]:
        raise MetricError("IS needs class probabilities; these features have no classes")
    if len(generated) < splits:
        raise MetricError(f"IS with {splits} splits needs as many images, got {len(generated)}")
    return isc_features_to_metric(generated.logits, splits=splits)["inception_score_mean"]


def kid(generated: Features, reference: Features, subset_size: int, subsets: int) -> float:
    """Kernel inception distance (Binkowski et al. 2018), unbiased, mean over random subsets."""
    if min(len(generated), len(reference)) < subset_size:
        raise MetricError(
            f"KID with subsets of {subset_size} needs as many images; there are {len(generated)} "
            f"and {len(reference)}: lower kid_subset_size"
        )
    found = kid_features_to_metric(
        generated.values,
        reference.values,
        kid_subset_size=subset_size,
        kid_subsets=subsets,
        verbose=False,
    )
    return found["kernel_inception_distance_mean"]


def precision_recall(generated: Features, reference: Features) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), 3 neighbours, both in [0, 1].

    The cost is quadratic: of references above both ``MANY`` and the number of generated images,
    an evenly spaced part counts.
    """
    if min(len(generated), len(reference)) < 4:
        raise MetricError("precision and recall need at least 4 images")
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
    rng, half = np.random.default_rng(seed), len(features) // 2
    squares = []
    for _ in range(repeats):
        order = torch.from_numpy(rng.permutation(len(features)))
        first = frechet(features[order[:half]], reference)
        second = frechet(features[order[half : 2 * half]], reference)
        squares.append((2 * (first - second) / (first + second)) ** 2)
    return float(np.sqrt(np.mean(squares)))


def nearest_distances(
    images: torch.Tensor, train: torch.Tensor, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Euclidean distance of each uint8 image to its nearest training image, pixels in [-1, 1]."""

    def flat(part: torch.Tensor) -> torch.Tensor:
        return part.to(device).flatten(1).float() / 127.5

    rows = max(1, PART // train[0].numel())
    nearest = []
    for chunk in map(flat, images.split(BATCH)):
        distances = [
            torch.cdist(chunk, flat(part), compute_mode=EXACT).amin(dim=1)
            for part in train.split(rows)
        ]
        nearest.append(torch.stack(distances).amin(dim=0).cpu())
    return torch.cat(nearest)


class _Images(Dataset):
    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


class _Extractor(FeatureExtractorBase):
    """Features and logits under torch-fidelity's interface."""

    def __init__(self, name: str, features_list: list[str], **_):
        super().__init__(name, features_list)
        source = name.removeprefix("deme-")
        self.model = None if source == PIXELS else classifier.load(source)

    @staticmethod
    def get_provided_features_list() -> tuple[str, str]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.model is None:
            small = images.double() / 127.5 - 1
            if small.shape[-1] > PIXEL_GRID:
                small = F.adaptive_avg_pool2d(small, PIXEL_GRID)
            features, logits = small.flatten(1), small.new_empty(len(images), 0)
        else:
            features, logits = (t.double() for t in self.model(images))
        found = {"features": features, "logits": logits}
        return tuple(found[name] for name in self.features_list)


def _register(name: str) -> str:
    if name != PIXELS:
        try:
            classifier.load(name)
        except ValueError as error:
            raise MetricError(str(error)) from error
    registered = f"deme-{name}"
    if registered not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(registered, _Extractor)
    return registered


def _inception(weights: str, cuda: bool) -> FeatureExtractorBase:
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
