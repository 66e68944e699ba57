"""The typed schema of all parameters: name, type, range, meaning and default, told here once."""

import difflib
import hashlib
import json
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

from deme_lib.diffusion.data import CLASSIFIERS
from deme_lib.diffusion.sampling import SAMPLERS
from deme_lib.experiment.arms import ARMS, DEFAULT, DEFAULT_ARMS, Arm, label

EXECUTION = {"device", "threads", "sampling_batch", "checkpoint_every"}
EXECUTION |= {"runs_dir", "figures_dir", "seeds", "again"}
"""Parameters that change where, how fast and how many trainings, never what one of them gives."""

ANALYSIS = {"base", "exploratory", "confirmation_seeds", "margin", "confidence"}
"""Parameters that change how records are read, and not what is recorded."""

OF_CELLS = {"n_ranges", "probability", "consistency_weight", "channel_projection", "finetune_lr"}
OF_CELLS |= {"batch_size", "adam_beta1", "adam_beta2", "weight_decay", "clip_norm", "final_lr"}
OF_CELLS |= {"loss_weighting", "min_snr_gamma", "p2_gamma", "precision", "merge_weights", "arms"}
OF_CELLS |= {"ema_fraction", "sampler", "sampling_steps"}
"""Parameters that a cell may set: finetuning, merging, sampling, what is judged; not how long."""

ALONE = [{"cell": DEFAULT}]
FEATURES = (*sorted(path.stem for path in CLASSIFIERS.glob("*.json")), "inception")


def _of(default: Any, meaning: str, **bounds: Any) -> Any:
    return Field(default, description=meaning, **bounds)


Count = Annotated[int, Field(ge=1)]
Images = Annotated[int, Field(ge=4, le=10**7)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=-100, le=100)]
Folder = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[list[Seed], Field(min_length=1)]
Channels = Annotated[int, Field(ge=8, le=2**14, multiple_of=8)]  # group norm has 8 groups
Weighting = Literal["none", "snr+1", "trun-snr", "min-snr", "p2", "uncertainty", "nash"]


class Parameters(BaseModel):
    """Every parameter of an experiment: default, meaning, range; units in names."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    experiment: str = _of(
        "fashion8", "name of this experiment", pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60
    )

    # data: every image has one role
    dataset: Folder = _of("fashion8", "fashion8, digits, a hub id, or a local folder")
    train_images: Images = _of(50_000, "images to train on")
    search_images: Images = _of(10_000, "held-out images for the search, curves and the floor")
    test_images: Images = _of(10_000, "images no training and no search sees")
    split_seed: Seed = _of(0, "seed of the split")
    image_size: int = _of(0, "images padded or shrunk to this; 0: as they are", ge=0, le=4096)

    # baseline: the learning rate decays to finetune_lr, so that finetuning is not more pretraining
    pretrained: str = _of(
        "fashion8", "fashion8 (shipped), a diffusers folder, a hub id; empty: trained here"
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
    probability: NotNegative = _of(0.3, "p of Eq. 6", le=1)
    consistency_weight: NotNegative = _of(1.0, "weight of Eq. 4 in Eq. 5; 0: without")
    channel_projection: bool = _of(True, "channel-wise projections (Sec. 3.2)")
    total_steps: Count = _of(
        4000, "optimiser steps of all experts together; a control has as many", le=10**9
    )
    finetune_lr: Positive = _of(2e-4, "learning rate at the start")
    final_lr: NotNegative = _of(0.0, "learning rate at the end, reached by a cosine")
    batch_size: Count = _of(64, "images per optimiser step", le=2**20)
    adam_beta1: Decay = _of(0.9, "AdamW")
    adam_beta2: Decay = _of(0.999, "AdamW")
    weight_decay: NotNegative = _of(1e-2, "AdamW")
    clip_norm: Positive = _of(1.0, "gradient norm clipped to this")
    ema_fraction: NotNegative = _of(
        0.05, "share of a run's steps that the EMA of its weights averages over; 0: no EMA", le=0.25
    )
    loss_weighting: Weighting = _of("none", "re-weighting of the arm `reweighted`")
    min_snr_gamma: Positive = _of(5.0, "of Min-SNR (Hang et al. 2023)")
    p2_gamma: Positive = _of(1.0, "of P2 weighting (Choi et al. 2022)")
    precision: Literal["no", "bf16", "fp16"] = _of("no", "autocast in training")
    seeds: Seeds = _of([*range(16)], "training seeds")

    # merge: weights of the arm deme_merged
    merge_weights: Literal["uniform", "search"] | list[Weight] = _of(
        "uniform", "uniform (1/N), search (by FID), or one weight a range"
    )
    search_low: float = _of(0.0, "smallest weight that a search tries", le=0)
    search_high: float = _of(1.5, "largest weight that a search tries", ge=0.5)
    search_trials: int = _of(40, "merges that a search scores", ge=3, le=10**4)
    search_samples: Images = _of(2000, "images of each")

    # sampling and evaluation
    arms: Annotated[list[str], Field(min_length=1)] = _of(
        list(DEFAULT_ARMS), "arms that are judged beside the pretrained model; see arms.py"
    )
    cells: Annotated[list[dict[str, Any]], Field(min_length=1)] = _of(
        ALONE, "variants judged side by side: a name, what it sets, paper's FIDs"
    )
    base: str = _of("pretrained", "row that a table's differences are taken to")
    sampler: Literal[SAMPLERS] = _of(SAMPLERS[0], "how images are drawn, see sampling.py")
    sampling_steps: Count = _of(20, "denoiser calls an image")
    samples: Images = _of(5000, "images per row, training seed and sampling seed")
    sampling_seeds: Seeds = _of([0], "sampling seeds: streams of noise of each training seed")
    features: Literal[FEATURES] = _of("fashion8-a", "a shipped classifier's, or inception")
    second_features: Literal[*FEATURES, ""] = _of("fashion8-b", "of a second FID; empty: none")
    fid_reference: Literal["test", "train"] = _of("test", "images that the FID compares with")
    inception_weights: str = _of("", "local file of torch-fidelity's Inception")
    is_splits: Count = _of(10, "splits of the inception score")
    kid_subset_size: int = _of(500, "images per KID subset", ge=2)
    kid_subsets: Count = _of(20, "KID subsets", le=10**4)
    loss_images: Count = _of(2000, "search images of curves and planes, one draw each")
    loss_draws: Count = _of(2, "(timestep, noise) draws per test image", le=1000)
    primary_decoupling: list[str] = _of(
        [
            "plain_routed - all_plain",
            "plain_routed - soup",
            "deme_merged - all_plain",
            "deme_merged - soup",
        ],
        "comparisons of ablation 1 named before the run",
    )
    primary_merging: list[str] = _of(
        ["deme_merged - averaged", "deme_merged - deme_routed"],
        "comparisons of ablation 2 named before the run",
    )
    exploratory: list[str] = _of(
        [
            "balanced - all_plain",
            "last_expert - all_plain",
            "soup - all_plain",
            "plain_routed - balanced",
            "plain_routed - last_expert",
            "deme_routed - all_plain",
            "deme_routed - plain_routed",
            "deme_merged - plain_routed",
        ],
        "further comparisons, uncorrected",
    )
    confirmation_seeds: list[Seed] = _of(
        [8, 9, 10, 11, 12, 13, 14, 15],
        "training seeds that verdicts are drawn on, none: all; by default of fashion8 alone",
    )
    margin: Positive = _of(0.05, "margin of interest, share of the pretrained model's excess", lt=1)
    confidence: float = _of(0.95, "level of the intervals", gt=0.5, lt=1)

    # analysis
    loss_bins: Count = _of(20, "bins of [0, T) for losses per timestep")
    gradient_bins: int = _of(20, "timesteps of the gradient similarity map", ge=2)
    plane_points: int = _of(
        11, "points per axis of the loss planes (Fig. 4, 6a), odd", ge=3, le=999
    )

    # execution
    device: Literal["auto", "cpu", "cuda"] = _of("auto", "where to compute")
    threads: Count = _of(1, "CPU threads of one process", le=4096)
    sampling_batch: Count = _of(250, "images per denoiser call", le=2**20)
    checkpoint_every: Count = _of(500, "optimiser steps between checkpoints")
    again: list[Seed] = _of([], "training seeds recorded anew, from the store where it has them")
    runs_dir: Folder = _of("runs", "folder of everything made")
    figures_dir: Folder = _of("runs/figures", "folder of records, tables and figures")

    _sources: dict[str, Any] = PrivateAttr(default_factory=dict)  # content, looked at once

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
        if "confirmation_seeds" not in self.model_fields_set and self.experiment != "fashion8":
            self.__dict__["confirmation_seeds"] = []  # nobody has looked at the others
        for check in (_check_model, _check_arms, _check_sizes, _check_cells, _check_comparisons):
            check(self)
        return self

    @property
    def seed(self) -> int:
        """The training seed; of several, the first."""
        return self.seeds[0]

    def looks_at(self, seed: int) -> bool:
        """Whether a training seed is the one whose models the paper's figures look at."""
        return seed == min(self.seeds) and self.cells == ALONE

    def per_seed(self) -> list[Self]:
        """One experiment for every training seed."""
        return [self.model_copy(update={"seeds": [seed]}) for seed in self.seeds]

    def per_cell(self) -> dict[str, Self]:
        """Cell -> this experiment with what the cell sets."""
        if self.cells == ALONE:
            return {DEFAULT: self}
        alone = {"cells": ALONE, "base": "pretrained", "exploratory": [], "again": []}
        alone |= {"primary_decoupling": [], "primary_merging": []}
        found = {}
        for cell in self.cells:
            own = {name: value for name, value in cell.items() if name in OF_CELLS}
            found[cell["cell"]] = Parameters(**self.model_dump() | alone | own)
            found[cell["cell"]]._sources = self._sources
        return found

    def rows(self) -> dict[tuple[str, str], tuple[Arm, Self]]:
        """(cell, arm) -> the arm and its cell's parameters, in the order of the table."""
        found = {(DEFAULT, "pretrained"): (ARMS["pretrained"], self)}
        drawn = ("sampler", "sampling_steps")
        for cell, q in self.per_cell().items():
            for arm in (ARMS[name] for name in q.arms):
                shared = not arm.family and self.pick(*drawn) == q.pick(*drawn)
                found.setdefault((DEFAULT if shared else cell, arm.name), (arm, q))
        return found

    def pick(self, *names: str) -> dict[str, Any]:
        """The named parameters, as a stage's keyword arguments."""
        return {name: getattr(self, name) for name in names}

    def results(self) -> dict[str, Any]:
        """Every parameter that can change a result."""
        return self.model_dump(exclude=EXECUTION)

    def digest(self) -> str:
        """A short hash of ``results``."""
        text = json.dumps(self.results(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def unknown(name: str, known: Any, what: str) -> str:
    """What to say of a name that is not known: the nearest one, or all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(known))}"
    return f"unknown {what} {name!r}; {hint}"


def _check_model(p: Parameters) -> None:
    if not p.pretrained and p.pretrain_steps < 1:
        raise ValueError("pretrain_steps must be at least 1 where nothing pretrained is named")
    for name in ("n_ranges", "sampling_steps", "loss_bins", "gradient_bins"):
        if getattr(p, name) > p.num_train_timesteps:
            raise ValueError(f"{name} is above num_train_timesteps: lower it")
    if p.total_steps % p.n_ranges:
        raise ValueError(
            f"total_steps={p.total_steps} cannot be shared evenly by n_ranges={p.n_ranges} "
            "experts: give a multiple"
        )
    weights = p.merge_weights
    if isinstance(weights, list) and len(weights) != p.n_ranges:
        raise ValueError(
            f"merge_weights has {len(weights)} weights for n_ranges={p.n_ranges}: one each"
        )
    if p.search_high < 1 / p.n_ranges:
        raise ValueError(f"search_high must reach 1/N = {1 / p.n_ranges:.3g}: raise it")
    if p.plane_points % 2 == 0:
        raise ValueError("plane_points must be odd, so that the pretrained model is one: add 1")


def _check_arms(p: Parameters) -> None:
    for name in ("arms", "seeds", "sampling_seeds"):
        if len(set(getattr(p, name))) < len(getattr(p, name)):
            raise ValueError(f"{name} gives one twice: give each once")
    if odd := sorted({*p.again} - {*p.seeds}):
        raise ValueError(f"again names {odd}, which are not in seeds={p.seeds}: add them there")
    for name in p.arms:
        if name not in ARMS:
            raise ValueError(unknown(name, ARMS, "arm"))
    if p.cells == ALONE and "reweighted" in p.arms and p.loss_weighting == "none":
        raise ValueError("the arm reweighted needs a loss_weighting: name one")


def _check_sizes(p: Parameters) -> None:
    if p.features == p.second_features:
        raise ValueError("second_features must differ from features: they check each other")
    if 2 * p.is_splits > p.samples:
        raise ValueError(f"is_splits={p.is_splits} needs {2 * p.is_splits} samples: lower it")
    most = {"kid_subset_size": ("samples", "test_images")}
    most["loss_images"] = ("search_images", "train_images")
    most["n_ranges"], most["loss_bins"] = ("loss_images",), ("test_images",)  # a draw in each
    for name, sources in most.items():
        held = p.pick(*sources)
        if (value := getattr(p, name)) > min(held.values()):
            many = " and ".join(f"{source} ({count})" for source, count in held.items())
            raise ValueError(f"{name}={value} needs as many {many}: lower it")


def _check_cells(p: Parameters) -> None:
    if p.cells == ALONE:
        return
    names = [cell.get("cell") for cell in p.cells]
    if not all(isinstance(n, str) and n and " / " not in n and " - " not in n for n in names):
        raise ValueError(f"every cell needs a name without ' / ' and ' - ' in `cell`: {names}")
    if len(set(names)) < len(names):
        raise ValueError(f"cells give a name twice: {names}")
    for cell in p.cells:
        for name in cell.keys() - OF_CELLS - {"cell", "paper"}:
            what = f"parameter of cell {cell['cell']!r}"
            raise ValueError(unknown(name, OF_CELLS | {"paper"}, what))
    try:
        rows = p.rows()
    except ValueError as error:
        problems = [e["msg"] for e in error.errors()] if hasattr(error, "errors") else [error]
        raise ValueError(f"a cell does not fit: {problems[0]}") from error
    for cell in p.cells:
        paper = cell.get("paper", {})
        known = {arm for name, arm in rows if name == cell["cell"]}
        typed = isinstance(paper, dict) and all(type(x) in (int, float) for x in paper.values())
        if not typed or not paper.keys() <= known:
            told = f"{{arm of a row of this cell: FID}}, of {', '.join(sorted(known))}"
            raise ValueError(f"paper of cell {cell['cell']!r} must be {told}")


def _check_comparisons(p: Parameters) -> None:
    """Rows that are named must be there; of the defaults, those count that are."""
    known = [label(cell, arm) for cell, arm in p.rows()]
    if p.base not in known:
        raise ValueError(unknown(p.base, known, "row in base"))
    pairs = []
    for name in ("primary_decoupling", "primary_merging", "exploratory"):
        for pair in getattr(p, name) if name in p.model_fields_set else ():
            a, _, b = pair.partition(" - ")
            if a == b or not {a, b} <= {*known}:
                raise ValueError(
                    f"{name}: {pair!r} is no comparison of this experiment: write 'a - b' with two "
                    f"of {', '.join(known)}"
                )
            pairs.append({a, b})
    if any(pairs.count(pair) > 1 for pair in pairs):
        raise ValueError("a comparison is named twice, and would count so: name it once")
