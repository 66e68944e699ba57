"""Image metrics, computed by torch-fidelity on features that hold still.

Features come from a shipped classifier (``digits-a``), from raw pixels, or from torch-fidelity's
own Inception (``inception``). They are extracted once a set of images, in float64, without
torch-fidelity's cache (it is keyed by name alone, and pickled).
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.nn import functional as F
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.utils import create_feature_extractor

from deme_lib.diffusion import classifier
from deme_lib.diffusion.data import CLASSIFIERS, check_images
from deme_lib.diffusion.models import device_of
from deme_lib.diffusion.progress import bar
from deme_lib.diffusion.sampling import SAMPLERS, sample
from deme_lib.errors import Explained

INCEPTION = "inception"
PIXELS = "pixels"
BATCH = 500  # fixed: Inception's features depend on it on GPUs
SPLITS = 10  # of Inception Scores
MANY = 10_000  # images, of which all pairwise distances fit into memory
PIXEL_GRID = 8  # larger images are averaged down to this many pixels a side


class MetricError(Explained, ValueError):
    """A metric cannot be computed on what was given."""


class Scores(NamedTuple):
    """What ``evaluate`` found: of n images, against n_real real ones, in ``features``."""

    fid: float
    kid: float
    inception_score: float
    n: int
    n_real: int
    features: str

    def __str__(self) -> str:
        scores = f"FID {self.fid:.4g}, KID {self.kid:.2g}, IS {self.inception_score:.3g}"
        return f"{scores} (n = {self.n:,} to {self.n_real:,} real images, {self.features} features)"


def evaluate(
    generated: torch.Tensor | nn.Module,
    real: torch.Tensor,
    *,
    scheduler: DDPMScheduler | None = None,
    n: int | None = None,
    sampler: str = SAMPLERS[0],
    steps: int = 20,
    features: str = INCEPTION,
    inception_weights: str = "",
    seed: int = 0,
    device: str = "auto",
    batch_size: int = 250,
) -> Scores:
    """FID, KID and Inception Score of images, or of what a denoiser samples, against real images.

    FID falls with n: compare like with like. KID is the mean of 100 subsets of at most 1,000
    images, IS of 10 splits.

    Args:
        generated: uint8 [n, C, H, W], or a denoiser, of which a copy samples ``n`` images in
            ``steps`` steps of a ``sampler`` (see ``sampling_scheduler``); by default as many as
            there are real ones, 5,000 at most.
        real: uint8 [n_real, C, H, W].
        scheduler: the denoiser's noise schedule, ``load_pipeline(...).scheduler``.
        features: ``inception``, or a shipped classifier such as ``fashion8-a``.
        inception_weights: as in ``extract``.
        seed: of the sampled noise.

    Raises:
        DataError, MetricError: a metric cannot be had of these images.
        SamplingError: the denoiser's images are not finite.
    """
    where, sampled = device_of(device), isinstance(generated, nn.Module)
    how = features, inception_weights, where.type == "cuda"
    if sampled and scheduler is None:
        raise MetricError("a denoiser needs its scheduler: pass scheduler=pipeline.scheduler")
    reference = extract(real, *how)
    if sampled:
        n = min(len(real), 5000) if n is None else n
        denoiser = copy.deepcopy(generated).eval().to(where)
        drawn = {"sampler": sampler, "steps": steps, "purpose": ("sample", seed)}
        with bar(n, "sampling", "image") as progress:
            drawn |= {"batch_size": batch_size, "device": where, "on_batch": progress.update}
            generated = sample(denoiser, scheduler, n, **drawn)
    found = extract(generated, *how)
    return Scores(
        fid=frechet(found, reference),
        kid=kid(found, reference, min(1000, len(found), len(reference)), subsets=100),
        inception_score=inception_score(found, splits=SPLITS),
        n=len(found),
        n_real=len(reference),
        features=features,
    )


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
    """
    check_images(images)
    device = "cuda" if cuda else "cpu"
    if name == PIXELS:
        network = _pixels
    elif name == INCEPTION:
        if images.shape[1] not in (1, 3):
            raise MetricError(f"{INCEPTION} takes images of 1 or 3 channels, not {images.shape[1]}")
        images, network = images.expand(-1, 3, -1, -1), _inception(inception_weights, cuda)
    else:
        network = _classifier(name, images.shape[1:]).to(device)
    batches = [network(batch.to(device)) for batch in images.split(BATCH)]
    return Features(*(torch.cat(part).double().cpu() for part in zip(*batches, strict=True)))


def frechet(generated: Features, reference: Features) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).

    Called FID where the features are Inception's or a classifier's, pixel distance on pixels.
    Warns where a covariance is singular, of as many images as features or fewer.
    """
    n, dimension = min(len(generated), len(reference)), generated.values.shape[1]
    if n <= dimension:
        warnings.warn(
            f"a Frechet distance of {n} images in {dimension} features: their covariance is "
            f"singular and the distance far too large; take many more than {dimension} images",
            stacklevel=2,
        )
    if not all(f.values.square().isfinite().all() for f in (generated, reference)):
        raise MetricError("a Frechet distance needs features whose squares are finite numbers")
    fitted = (fid_features_to_statistics(f.values) for f in (generated, reference))
    return fid_statistics_to_metric(*fitted, verbose=False)["frechet_inception_distance"]


def inception_score(generated: Features, splits: int) -> float:
    """exp of the mean KL divergence of class probabilities (Salimans et al. 2016), over splits.

    The order of the images is shuffled with torch-fidelity's fixed seed.
    """
    if not generated.logits.shape[1]:
        raise MetricError("an Inception Score needs class probabilities, which pixels have not")
    if 2 * splits > len(generated):  # of single images it is 1 whatever they show
        raise MetricError(
            f"an Inception Score of {splits} splits needs {2 * splits} images or more, not "
            f"{len(generated)}"
        )
    return isc_features_to_metric(generated.logits, splits=splits)["inception_score_mean"]


def kid(generated: Features, reference: Features, subset_size: int, subsets: int) -> float:
    """Kernel inception distance (Binkowski et al. 2018), unbiased, mean over random subsets."""
    most = min(len(generated), len(reference))
    if not 2 <= subset_size <= most:
        raise MetricError(f"KID of subsets of {subset_size} images: give 2 to {most}, all of them")
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


def fresh_draws(count: int, n: int, draws: int, seed: int) -> list[torch.Tensor]:
    """Indices [n] of ``draws`` draws of n out of ``count`` real images, disjoint where possible.

    Of images that no model saw: their FID to the reference is the floor, a perfect model's.
    """
    rng, order = np.random.default_rng(seed), []
    while len(order) < draws:
        order += np.split(rng.permutation(count)[: count // n * n], count // n)
    return [torch.from_numpy(rows) for rows in order[:draws]]


def _pixels(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    small = images.double() / 127.5 - 1
    if max(small.shape[-2:]) > PIXEL_GRID:
        small = F.adaptive_avg_pool2d(small, PIXEL_GRID)
    return small.flatten(1), small.new_empty(len(images), 0)


def _classifier(name: str, shape: Sequence[int]) -> nn.Module:
    names = sorted(file.stem for file in CLASSIFIERS.glob("*.json"))
    if name not in names:
        raise MetricError(f"no features {name!r}: take {INCEPTION}, {PIXELS}, {', '.join(names)}")
    card = classifier.card_of(name)
    taken = [card["channels"], card["size"], card["size"]]
    if list(shape) != taken:
        raise MetricError(f"{name} takes images {taken}, not {list(shape)}: take {INCEPTION}")
    return classifier.load(name)


def _inception(weights: str, cuda: bool) -> nn.Module:
    try:
        if weights:  # torch-fidelity unpickles: have torch refuse anything but tensors first
            torch.load(weights, weights_only=True)
        names = "inception-v3-compat", ["2048", "logits_unbiased"]
        file = {"feature_extractor_weights_path": weights or None}
        return create_feature_extractor(*names, cuda=cuda, **file, verbose=False)
    except Exception as error:  # of the network, of the file, of what is in it
        raise MetricError(
            f"cannot load Inception's weights ({error}). With a network torch-fidelity fetches "
            "weights-inception-2015-12-05-6726825d.pth from its GitHub releases; without, name a "
            "local copy in the parameter `inception_weights`"
        ) from error
