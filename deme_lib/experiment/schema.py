"""The typed schema of all parameters: name, type, range, meaning and default, told here once."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from deme_lib import ROOT
from deme_lib.experiment.arms import DEFAULT_ARMS, arm_of, search_of

EXECUTION = {
    "device",
    "threads",
    "sampling_batch",
    "checkpoint_every",
    "runs_dir",
    "figures_dir",
}
"""Parameters that change where and how fast, never what: they are in no artefact's key."""

LISTS = (
    "merge_weights",
    "model_channels",
    "further_ema_decays",
    "seeds",
    "arms",
    "sampling_seeds",
    "primary_decoupling",
    "primary_merging",
)


class Parameters(BaseModel):
    """Every parameter of an experiment. Field descriptions are the reference; units in names."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    experiment: str = Field(
        "fashion8",
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
        max_length=60,
        description="name of this experiment",
    )

    # data: every image has one role
    dataset: str = Field(
        "fashion8", min_length=1, description="fashion8, digits, a hub id, or a local folder"
    )
    train_images: int = Field(50_000, ge=1, description="images to train on")
    search_images: int = Field(
        10_000, ge=1, description="held-out images for searches, curves and the floor"
    )
    test_images: int = Field(10_000, ge=1, description="images no training and no search sees")
    split_seed: int = Field(0, ge=0, lt=2**32, description="seed of the split")
    image_size: int = Field(
        0, ge=0, le=4096, description="images padded or shrunk to this; 0: as they are"
    )

    # baseline: the learning rate decays to finetune_lr, so that finetuning is not more pretraining
    pretrained: str = Field(
        "fashion8",
        description="fashion8 (shipped), a diffusers folder, a hub id; empty: trained",
    )
    model_channels: list[int] = Field(
        [8, 16], min_length=1, description="UNet channels per resolution"
    )
    layers_per_block: int = Field(1, ge=1, le=64, description="resnets per UNet block")
    attention: bool = Field(False, description="self-attention at the lowest resolution")
    num_train_timesteps: int = Field(1000, ge=2, le=100_000, description="T of the noise schedule")
    pretrain_steps: int = Field(16_000, ge=0, le=10**9, description="optimiser steps from scratch")
    pretrain_lr: float = Field(
        2e-3, gt=0, description="decays to finetune_lr over the first 80 % of the steps"
    )

    # finetuning, the same for experts and controls
    n_ranges: int = Field(4, ge=1, le=1000, description="N of Eq. 3")
    range_cut: Literal["uniform", "log-snr", "overlapping", "random"] = Field(
        "uniform", description="how [0, T) is cut into ranges"
    )
    probability: float = Field(0.3, ge=0, le=1, description="p of Eq. 6")
    consistency_weight: float = Field(1.0, ge=0, description="weight of Eq. 4 in Eq. 5; 0: without")
    channel_projection: bool = Field(True, description="channel-wise projections (Sec. 3.2)")
    finetune_steps: int = Field(
        1000, ge=1, le=10**9, description="steps of one expert; a control on all timesteps N times"
    )
    finetune_lr: float = Field(2e-4, gt=0, description="constant learning rate")
    batch_size: int = Field(64, ge=1, le=2**20, description="images per optimiser step")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW")
    clip_norm: float = Field(1.0, gt=0, description="gradient norm clipped to this")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="EMA of the weights that are judged")
    further_ema_decays: list[float] = Field(
        [0.0, 0.98], description="shorter EMAs kept too, for arms like soup@0.98"
    )
    loss_weighting: Literal["none", "snr+1", "trun-snr", "min-snr", "p2", "uncertainty"] = Field(
        "none", description="re-weighting of the arm `reweighted`"
    )
    min_snr_gamma: float = Field(5.0, gt=0, description="of Min-SNR (Hang et al. 2023)")
    p2_gamma: float = Field(1.0, gt=0, description="of P2 weighting (Choi et al. 2022)")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="autocast in training")
    seeds: list[int] = Field(
        [0, 1, 2], min_length=1, description="training seeds; each trains and samples everything"
    )

    # merge: weights of the arm deme_merged; the searches have one strategy and one budget
    merge_weights: str | list[float] = Field(
        "uniform", description="uniform (1/N), search, or one weight a range"
    )
    search_strategy: Literal["tpe", "grid"] = Field("tpe", description="who proposes weights")
    search_low: float = Field(0.0, description="smallest weight")
    search_high: float = Field(1.5, description="largest weight")
    search_step: float = Field(0.05, gt=0, description="weights are multiples of this")
    search_losses: int = Field(60, ge=1, le=10**6, description="proposals scored by held-out loss")
    search_candidates: int = Field(8, ge=3, le=10**4, description="candidates scored by images")
    search_samples: int = Field(2000, ge=4, le=10**7, description="images per candidate, stream")
    search_streams: int = Field(3, ge=1, le=100, description="noise streams of a search")

    # sampling and evaluation
    arms: list[str] = Field(
        list(DEFAULT_ARMS), min_length=2, description="arms that are judged; see arms.py"
    )
    sampling_steps: int = Field(20, ge=1, description="DDIM steps")
    timestep_spacing: Literal["leading", "trailing", "linspace"] = Field(
        "leading", description="of DDIM"
    )
    samples: int = Field(5000, ge=4, le=10**7, description="images per arm, seed and stream")
    sampling_seeds: list[int] = Field(
        [0], min_length=1, description="sampling seeds: streams of noise of each training seed"
    )
    features: str = Field(
        "fashion8-a", description="fashion8-a, digits-a, ... (shipped classifiers) or inception"
    )
    second_features: str = Field(
        "fashion8-b", description="features that must rank models alike; empty: none"
    )
    fid_reference: Literal["test", "train"] = Field(
        "test", description="images that the headline FID compares with"
    )
    inception_weights: str = Field("", description="local file of torch-fidelity's Inception")
    is_splits: int = Field(10, ge=1, description="splits of the inception score")
    kid_subset_size: int = Field(500, ge=2, description="images per KID subset")
    kid_subsets: int = Field(20, ge=1, le=10**4, description="KID subsets")
    acceptance_samples: int = Field(
        10_000, ge=8, le=10**7, description="images of the pretrained model, halved"
    )
    loss_images: int = Field(
        2000,
        ge=1,
        description="search images of curves, planes and searches, one draw each",
    )
    loss_draws: int = Field(2, ge=1, le=1000, description="(timestep, noise) draws per test image")
    primary_decoupling: list[str] = Field(
        ["plain_routed - all_plain", "deme_merged - all_plain", "deme_merged - soup"],
        description="primary comparisons of ablation 1, named before the run",
    )
    primary_merging: list[str] = Field(
        ["deme_merged - averaged", "deme_merged - deme_routed"],
        description="primary comparisons of ablation 2, named before the run",
    )
    margin: float = Field(
        0.05, gt=0, lt=1, description="margin of interest, share of the pretrained model's excess"
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="level of the intervals")

    # analysis
    loss_bins: int = Field(20, ge=1, description="bins of [0, T) for losses per timestep")
    gradient_bins: int = Field(20, ge=2, description="timesteps of the gradient similarity map")
    plane_points: int = Field(
        11, ge=2, le=1001, description="points per axis of the loss planes (Fig. 4, 6a)"
    )

    # execution
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    threads: int = Field(1, ge=1, le=4096, description="CPU threads of one process")
    sampling_batch: int = Field(250, ge=1, le=2**20, description="images per denoiser call")
    checkpoint_every: int = Field(500, ge=1, description="optimiser steps between checkpoints")
    runs_dir: str = Field("runs", min_length=1, description="folder of everything made")
    figures_dir: str = Field(
        "runs/figures", min_length=1, description="folder of records, tables and figures"
    )

    _hashes: dict[str, str] = PrivateAttr(
        default_factory=dict
    )  # of data and weights

    @field_validator(*LISTS, mode="before")
    @classmethod
    def _list_from_text(cls, value: Any) -> Any:
        """papermill's -p hands lists over as text."""
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"is not a list: {value}") from error
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Parameters:
        for check in (_check_model, _check_seeds, _check_arms, _check_weights, _check_sizes):
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

    def per_seed(self) -> list[Parameters]:
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
    if min(p.model_channels) < 8 or any(c % 8 for c in p.model_channels):
        raise ValueError("model_channels must be multiples of 8 (group norm with 8 groups)")
    if max(p.model_channels) > 2**14:
        raise ValueError(f"model_channels={p.model_channels} is beyond any UNet: lower it")
    if p.n_ranges > p.num_train_timesteps:
        raise ValueError(f"n_ranges={p.n_ranges} is above num_train_timesteps: lower it")
    for name in ("sampling_steps", "loss_bins", "gradient_bins"):
        if getattr(p, name) > p.num_train_timesteps:
            raise ValueError(f"{name} is above num_train_timesteps: lower it")
    if 4 / (1 - p.ema_decay) > p.finetune_steps:
        raise ValueError(
            f"ema_decay={p.ema_decay} averages over {1 / (1 - p.ema_decay):.0f} steps, more than a "
            f"quarter of finetune_steps={p.finetune_steps}: experts would keep some of the "
            "pretrained weights that longer controls lose; set ema_decay to at most "
            f"{max(0.0, 1 - 4 / p.finetune_steps):.4g}"
        )
    if any(not 0 <= decay < p.ema_decay for decay in p.further_ema_decays):
        raise ValueError("further_ema_decays must lie from 0 to below ema_decay: give others")


def _check_weights(p: Parameters) -> None:
    weights, n = p.merge_weights, p.n_ranges
    if isinstance(weights, str) and weights not in ("uniform", "search"):
        raise ValueError(
            f'merge_weights={weights!r}: give "uniform", "search" or a list like [0.5, 0.5]'
        )
    if isinstance(weights, list) and len(weights) != n:
        raise ValueError(f"merge_weights has {len(weights)} weights for n_ranges={n}: one each")
    if isinstance(weights, list) and max(map(abs, weights)) > 100:
        raise ValueError(f"merge_weights={weights}: weights beyond 100 are no merge: lower them")
    if p.search_low > p.search_high:
        raise ValueError("search_low is above search_high: swap them")
    if p.search_step > p.search_high - p.search_low:
        raise ValueError("search_step is above search_high - search_low: lower it")
    searched = any(search_of(arm_of(a, p.further_ema_decays), weights) for a in p.arms)
    if searched and p.search_candidates < n + 1:
        raise ValueError(f"search_candidates must be at least n_ranges + 1 = {n + 1}")


def _check_seeds(p: Parameters) -> None:
    for name in ("seeds", "sampling_seeds"):
        seeds = getattr(p, name)
        if min(seeds) < 0 or max(seeds) >= 2**32:
            raise ValueError(f"{name} must be from 0 to 2**32 - 1, got {seeds}")
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{name} repeats a seed: seeds must be independent")


def _check_arms(p: Parameters) -> None:
    arms = [arm_of(name, p.further_ema_decays) for name in p.arms]
    if len(set(p.arms)) < len(p.arms):
        raise ValueError("arms names an arm twice: name each once")
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
    if p.kid_subset_size > min(p.samples, p.test_images):
        raise ValueError(
            f"kid_subset_size={p.kid_subset_size} needs as many samples ({p.samples}) and "
            f"test_images ({p.test_images}): lower it"
        )
    if p.is_splits > p.samples:
        raise ValueError(f"is_splits={p.is_splits} needs at least as many samples: lower it")
