"""The typed schema of all parameters: name, type, range, meaning and default, told here once."""

import hashlib
import json
import os
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deme_lib import ROOT
from deme_lib.experiment.arms import DEFAULT_ARMS, arm_of, search_of

EXECUTION = {"device", "processes", "threads", "sampling_batch", "checkpoint_every"}
EXECUTION |= {"runs_dir", "figures_dir"}
"""Parameters that change where and how fast, never what: they are in no artefact's key."""

TAKEN_FROM = {
    "kid_subset_size": ("samples", "test_images"),
    "loss_images": ("search_images", "train_images"),
    "is_splits": ("samples",),
}
"""Parameter -> those that it must not be above."""


def _of(default: Any, meaning: str, **bounds: Any) -> Any:
    return Field(default, description=meaning, **bounds)


Count = Annotated[int, Field(ge=1)]
Images = Annotated[int, Field(ge=4, le=10**7)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=-100, le=100)]
Folder = Annotated[str, Field(min_length=1)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
Channels = Annotated[int, Field(ge=8, le=2**14, multiple_of=8)]  # group norm has 8 groups
Cut = Literal["uniform", "log-snr", "overlapping", "random"]
Weighting = Literal["none", "snr+1", "trun-snr", "min-snr", "p2", "uncertainty"]


class Parameters(BaseModel):
    """Every parameter of an experiment: default, meaning, range; units in names."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    experiment: str = _of(
        "fashion8", "name of this experiment", pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60
    )

    # data: every image has one role
    dataset: Folder = _of("fashion8", "fashion8, digits, a hub id, or a local folder")
    train_images: Images = _of(50_000, "images to train on")
    search_images: Images = _of(10_000, "held-out images for searches, curves and the floor")
    test_images: Images = _of(10_000, "images no training and no search sees")
    split_seed: int = _of(0, "seed of the split", ge=0, lt=2**32)
    image_size: int = _of(0, "images padded or shrunk to this; 0: as they are", ge=0, le=4096)

    # baseline: the learning rate decays to finetune_lr, so that finetuning is not more pretraining
    pretrained: str = _of(
        "fashion8", "fashion8 (shipped), a diffusers folder, a hub id; empty: trained"
    )
    model_channels: Annotated[list[Channels], Field(min_length=1)] = _of(
        [8, 16], "UNet channels per resolution"
    )
    layers_per_block: Count = _of(1, "resnets per UNet block", le=64)
    attention: bool = _of(False, "self-attention at the lowest resolution")
    num_train_timesteps: int = _of(1000, "T of the noise schedule", ge=2, le=100_000)
    pretrain_steps: int = _of(16_000, "optimiser steps from scratch", ge=0, le=10**9)
    pretrain_lr: Positive = _of(2e-3, "decays to finetune_lr over the first 80 % of the steps")

    # finetuning, the same for experts and controls
    n_ranges: Count = _of(4, "N of Eq. 3", le=1000)
    range_cut: Cut = _of("uniform", "how [0, T) is cut into ranges")
    probability: NotNegative = _of(0.3, "p of Eq. 6", le=1)
    consistency_weight: NotNegative = _of(1.0, "weight of Eq. 4 in Eq. 5; 0: without")
    channel_projection: bool = _of(True, "channel-wise projections (Sec. 3.2)")
    finetune_steps: Count = _of(
        1000, "steps of one expert; a control on all timesteps N times", le=10**9
    )
    finetune_lr: Positive = _of(2e-4, "constant learning rate")
    batch_size: Count = _of(64, "images per optimiser step", le=2**20)
    adam_beta1: Decay = _of(0.9, "AdamW")
    adam_beta2: Decay = _of(0.999, "AdamW")
    weight_decay: NotNegative = _of(1e-2, "AdamW")
    clip_norm: Positive = _of(1.0, "gradient norm clipped to this")
    ema_decay: Decay = _of(0.995, "EMA of the weights that are judged")
    further_ema_decays: list[Decay] = _of(
        [0.0, 0.98], "shorter EMAs kept too, for arms like soup@0.98"
    )
    loss_weighting: Weighting = _of("none", "re-weighting of the arm `reweighted`")
    min_snr_gamma: Positive = _of(5.0, "of Min-SNR (Hang et al. 2023)")
    p2_gamma: Positive = _of(1.0, "of P2 weighting (Choi et al. 2022)")
    precision: Literal["no", "bf16", "fp16"] = _of("no", "autocast in training")
    seeds: Seeds = _of([0, 1, 2], "training seeds; each trains and samples everything")

    # merge: weights of the arm deme_merged; the searches have one budget
    merge_weights: Literal["uniform", "search"] | list[Weight] = _of(
        "uniform", "uniform (1/N), search, or one weight a range"
    )
    search_low: float = _of(0.0, "smallest weight")
    search_high: float = _of(1.5, "largest weight")
    search_step: Positive = _of(0.05, "weights are multiples of this")
    search_losses: Count = _of(60, "proposals scored by held-out loss", le=10**6)
    search_candidates: int = _of(8, "candidates scored by images", ge=3, le=10**4)
    search_samples: Images = _of(2000, "images per candidate, stream")
    search_streams: Count = _of(3, "noise streams of a search", le=100)

    # sampling and evaluation
    arms: Annotated[list[str], Field(min_length=2)] = _of(
        list(DEFAULT_ARMS), "arms that are judged; see arms.py"
    )
    sampling_steps: Count = _of(20, "DDIM steps")
    timestep_spacing: Literal["leading", "trailing", "linspace"] = _of("leading", "of DDIM")
    samples: Images = _of(5000, "images per arm, seed and stream")
    sampling_seeds: Seeds = _of([0], "sampling seeds: streams of noise of each training seed")
    features: str = _of(
        "fashion8-a", "fashion8-a, digits-a, ... (shipped classifiers) or inception"
    )
    second_features: str = _of("fashion8-b", "features that must rank models alike; empty: none")
    fid_reference: Literal["test", "train"] = _of(
        "test", "images that the headline FID compares with"
    )
    inception_weights: str = _of("", "local file of torch-fidelity's Inception")
    is_splits: Count = _of(10, "splits of the inception score")
    kid_subset_size: int = _of(500, "images per KID subset", ge=2)
    kid_subsets: Count = _of(20, "KID subsets", le=10**4)
    acceptance_samples: int = _of(10_000, "images of the pretrained model, halved", ge=8, le=10**7)
    loss_images: Count = _of(2000, "search images of curves, planes and searches, one draw each")
    loss_draws: Count = _of(2, "(timestep, noise) draws per test image", le=1000)
    primary_decoupling: list[str] = _of(
        ["plain_routed - all_plain", "deme_merged - all_plain", "deme_merged - soup"],
        "primary comparisons of ablation 1, named before the run",
    )
    primary_merging: list[str] = _of(
        ["deme_merged - averaged", "deme_merged - deme_routed"],
        "primary comparisons of ablation 2, named before the run",
    )
    margin: Positive = _of(0.05, "margin of interest, share of the pretrained model's excess", lt=1)
    confidence: float = _of(0.95, "level of the intervals", gt=0.5, lt=1)

    # analysis
    loss_bins: Count = _of(20, "bins of [0, T) for losses per timestep")
    gradient_bins: int = _of(20, "timesteps of the gradient similarity map", ge=2)
    plane_points: int = _of(11, "points per axis of the loss planes (Fig. 4, 6a)", ge=2, le=1001)

    # execution
    device: Literal["auto", "cpu", "cuda"] = _of("auto", "where to compute")
    processes: Count = _of(1, "processes that train and sample one model together", le=1024)
    threads: Count = _of(1, "CPU threads of one process", le=4096)
    sampling_batch: Count = _of(250, "images per denoiser call", le=2**20)
    checkpoint_every: Count = _of(500, "optimiser steps between checkpoints")
    runs_dir: Folder = _of("runs", "folder of everything made")
    figures_dir: Folder = _of("runs/figures", "folder of records, tables and figures")

    _hashes: dict[str, str] = PrivateAttr(default_factory=dict)  # of data and weights

    @field_validator("*", mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: ValidationInfo) -> Any:
        """papermill's -p hands lists over as text, and YAML a number such as 1e-5."""
        if isinstance(value, str) and cls.model_fields[info.field_name].annotation is not str:
            with suppress(json.JSONDecodeError):
                return json.loads(value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for check in (_check_model, _check_arms, _check_weights, _check_sizes):
            check(self)
        return self

    @property
    def seed(self) -> int:
        """The training seed; of several, the first."""
        return self.seeds[0]

    @property
    def usable_threads(self) -> int:
        """``threads``, but no more than this machine has cores."""
        return min(self.threads, os.cpu_count() or 1)

    def per_seed(self) -> list[Self]:
        """One experiment for every training seed."""
        return [self.model_copy(update={"seeds": [seed]}) for seed in self.seeds]

    def pick(self, *names: str) -> dict[str, Any]:
        """The named parameters, for an artefact's key."""
        return {name: getattr(self, name) for name in names}

    def results(self) -> dict[str, Any]:
        """Every parameter that can change a result."""
        return self.model_dump(exclude=EXECUTION)

    def digest(self) -> str:
        """A short hash of ``results``."""
        text = json.dumps(self.results(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _check_model(p: Parameters) -> None:
    if not p.pretrained and p.pretrain_steps < 4:
        raise ValueError("pretrain_steps must be at least 4 where nothing pretrained is named")
    for name in ("n_ranges", "sampling_steps", "loss_bins", "gradient_bins"):
        if getattr(p, name) > p.num_train_timesteps:
            raise ValueError(f"{name} is above num_train_timesteps: lower it")
    longest = max(0.0, round(1 - 4 / p.finetune_steps, 9))
    if p.ema_decay > longest:
        raise ValueError(
            f"ema_decay={p.ema_decay} averages over {1 / (1 - p.ema_decay):.0f} steps, more than a "
            f"quarter of finetune_steps={p.finetune_steps}: experts would keep some of the "
            f"pretrained weights that longer controls lose; set ema_decay to at most {longest}"
        )
    if max(p.further_ema_decays, default=-1) >= p.ema_decay:
        raise ValueError("further_ema_decays must lie below ema_decay: give others")


def _check_weights(p: Parameters) -> None:
    weights, n = p.merge_weights, p.n_ranges
    if isinstance(weights, list) and len(weights) != n:
        raise ValueError(f"merge_weights has {len(weights)} weights for n_ranges={n}: one each")
    if p.search_step > p.search_high - p.search_low:
        raise ValueError("search_step is above search_high - search_low: lower it, or swap them")
    searched = any(search_of(arm_of(a, p.further_ema_decays), weights) for a in p.arms)
    if searched and p.search_candidates < n + 1:
        raise ValueError(f"search_candidates must be at least n_ranges + 1 = {n + 1}")


def _check_arms(p: Parameters) -> None:
    for name in ("arms", "seeds", "sampling_seeds"):
        if len(set(getattr(p, name))) < len(getattr(p, name)):
            raise ValueError(f"{name} gives one twice: give each once")
    arms = [arm_of(name, p.further_ema_decays) for name in p.arms]
    if "pretrained" not in p.arms:
        raise ValueError("arms lacks pretrained, which every table compares with: add it")
    if "reweighted" in p.arms and p.loss_weighting == "none":
        raise ValueError("the arm reweighted needs a loss_weighting: name one")
    for number, name in ((1, "primary_decoupling"), (2, "primary_merging")):
        known = [arm.name for arm in arms if number in arm.ablations]
        for pair in getattr(p, name):
            names = pair.split(" - ")
            if len(names) != 2 or len(set(names)) != 2 or not set(names) <= set(known):
                raise ValueError(
                    f"{name}: {pair!r} is no comparison of ablation {number}: write 'a - b' with "
                    f"two of {', '.join(known)}, or add the arm to `arms`"
                )
    pairs = [{*pair.split(" - ")} for pair in (*p.primary_decoupling, *p.primary_merging)]
    if any(pairs.count(pair) > 1 for pair in pairs):
        raise ValueError("a primary comparison is named twice, and would count so: name it once")


def _check_sizes(p: Parameters) -> None:
    if p.acceptance_samples < p.samples:
        raise ValueError("acceptance_samples must be at least samples: lengths are ranked there")
    folder = ROOT / "deme_lib" / "shipped" / "classifiers"
    shipped = [path.stem for path in sorted(folder.glob("*.json"))]
    for name in ("features", "second_features"):
        known = [*shipped, "inception", *([""] if name == "second_features" else [])]
        if (value := getattr(p, name)) not in known:
            raise ValueError(f"{name}={value!r}: give one of {known}")
    if p.features == p.second_features:
        raise ValueError("second_features must differ from features: they check each other")
    for name, sources in TAKEN_FROM.items():
        held = p.pick(*sources)
        if (value := getattr(p, name)) > min(held.values()):
            many = " and ".join(f"{source} ({count})" for source, count in held.items())
            raise ValueError(f"{name}={value} needs as many {many}: lower it")
