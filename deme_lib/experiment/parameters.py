"""The typed schema of all parameters, and the checks that every way in goes through.

A parameter file is flat YAML and names only what differs from ``params/digits.yaml``, the one place
of defaults. Unknown and ill-typed parameters are errors that name the nearest right one.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deme_lib import ROOT
from deme_lib.diffusion.data import CLASSIFIERS
from deme_lib.experiment.arms import of_ablation

PRESETS = ROOT / "params"
DEFAULTS = PRESETS / "digits.yaml"

EXECUTION = {"device", "threads", "sampling_batch", "checkpoint_every", "allow_long", "runs_dir"}
"""Parameters that change where and how fast, never what: they are in no artefact's key."""

JOINED_LATER: dict[str, Any] = {
    "range_cut": "uniform",
    "loss_weighting": "none",
    "min_snr_gamma": 5.0,
    "p2_gamma": 1.0,
    "image_size": 0,
    "attention": False,
}
"""Parameters that joined when artefacts were already stored, with the value that changes nothing.
They stand in a key only where they have another value, so that what was made before stays valid."""


class ParameterError(ValueError):
    """A parameter is unknown, of the wrong type, or out of range."""


class Parameters(BaseModel):
    """Every parameter of an experiment. Field descriptions are the reference; units in names."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    experiment: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="name of this experiment")

    # data
    dataset: str = Field(min_length=1, description="digits, a hub id, or a local dataset folder")
    train_images: int = Field(ge=1, description="images to train on; FID's reference")
    search_images: int = Field(ge=1, description="held-out images that searches may look at")
    test_images: int = Field(ge=1, description="images no training and no search sees")
    split_seed: int = Field(ge=0, lt=2**32, description="seed of the split")
    image_size: int = Field(ge=0, description="images padded or shrunk to this; 0: as they are")

    # baseline
    pretrained: str = Field(description="diffusers folder or hub id; empty: train one here")
    model_channels: list[int] = Field(min_length=1, description="UNet channels per resolution")
    layers_per_block: int = Field(ge=1, description="resnets per UNet block")
    attention: bool = Field(description="self-attention at the lowest resolution")
    num_train_timesteps: int = Field(ge=2, description="T of the noise schedule")
    pretrain_steps: int = Field(ge=0, description="optimiser steps from scratch")
    pretrain_lr: float = Field(gt=0, description="decays to finetune_lr over the first 80 %")
    init_roundings: int = Field(ge=0, description="initial weights moved by this many roundings")

    # finetuning, the same for experts and controls
    n_ranges: int = Field(ge=1, description="N of Eq. 3")
    range_cut: Literal["uniform", "log-snr", "overlapping", "random"] = Field(
        description="how [0, T) is cut into ranges"
    )
    probability: float = Field(ge=0, le=1, description="p of Eq. 6")
    consistency_weight: float = Field(ge=0, description="weight of Eq. 4 in Eq. 5; 0: without")
    channel_projection: bool = Field(description="channel-wise projections (Sec. 3.2)")
    finetune_steps: int = Field(ge=1, description="steps of one expert; controls get N times this")
    finetune_lr: float = Field(gt=0, description="constant learning rate")
    batch_size: int = Field(ge=1, description="images per optimiser step")
    adam_beta1: float = Field(ge=0, lt=1, description="AdamW")
    adam_beta2: float = Field(ge=0, lt=1, description="AdamW")
    weight_decay: float = Field(ge=0, description="AdamW")
    clip_norm: float = Field(gt=0, description="gradient norm clipped to this")
    ema_decay: float = Field(ge=0, lt=1, description="EMA of the weights")
    loss_weighting: Literal["none", "snr+1", "trun-snr", "min-snr", "p2", "uncertainty"] = Field(
        description="adds an arm to ablation 1: all timesteps, loss re-weighted so"
    )
    min_snr_gamma: float = Field(gt=0, description="of Min-SNR (Hang et al. 2023)")
    p2_gamma: float = Field(gt=0, description="of P2 weighting (Choi et al. 2022)")
    precision: Literal["no", "bf16", "fp16"] = Field(description="autocast in training")
    seeds: list[int] = Field(min_length=1, description="training seeds; each trains everything")

    # merge
    merge_weights: str | list[float] = Field(description="uniform, search, or one weight a range")
    search_strategy: Literal["tpe", "grid"] = Field(description="who proposes weights by loss")
    search_low: float = Field(description="smallest weight")
    search_high: float = Field(description="largest weight")
    search_step: float = Field(gt=0, description="weights are multiples of this")
    search_losses: int = Field(ge=1, description="proposals scored by held-out loss")
    search_candidates: int = Field(ge=3, description="candidates scored by images")
    search_samples: int = Field(ge=4, description="images per candidate")

    # sampling and evaluation
    sampling_steps: int = Field(ge=1, description="DDIM steps")
    timestep_spacing: Literal["leading", "trailing", "linspace"] = Field(description="of DDIM")
    samples: int = Field(ge=4, description="images per sampling seed and arm")
    sampling_seeds: list[int] = Field(min_length=2, description="independent sampling seeds")
    features: str = Field(description="digits-a, fashion-a, ... (shipped classifiers) or inception")
    second_features: str = Field(description="features that must rank models alike; empty: none")
    inception_weights: str = Field(description="local file of torch-fidelity's Inception weights")
    is_splits: int = Field(ge=1, description="splits of the inception score")
    kid_subset_size: int = Field(ge=2, description="images per KID subset")
    kid_subsets: int = Field(ge=1, description="KID subsets")
    acceptance_samples: int = Field(ge=8, description="images of the pretrained model, halved")
    loss_draws: int = Field(ge=1, description="fixed (timestep, noise) draws per held-out image")
    primary_decoupling: list[str] = Field(description="primary, ablation 1")
    primary_merging: list[str] = Field(description="primary, ablation 2")
    confidence: float = Field(gt=0, lt=1, description="level of the paired t intervals")

    # analysis
    loss_bins: int = Field(ge=1, description="bins of [0, T) for losses per timestep")
    gradient_bins: int = Field(ge=2, description="timesteps of the gradient similarity map")
    plane_points: int = Field(ge=2, description="points per axis of the loss planes (Fig. 4, 6a)")

    # execution
    device: Literal["auto", "cpu", "cuda"] = Field(description="where to compute")
    threads: int = Field(ge=1, description="CPU threads of one process")
    sampling_batch: int = Field(ge=1, description="images per denoiser call")
    checkpoint_every: int = Field(ge=1, description="optimiser steps between checkpoints")
    allow_long: bool = Field(description="go on where the estimate exceeds two hours")
    runs_dir: str = Field(min_length=1, description="folder of everything made")

    @field_validator(
        "merge_weights",
        "model_channels",
        "seeds",
        "sampling_seeds",
        "primary_decoupling",
        "primary_merging",
        mode="before",
    )
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
        weights, n = self.merge_weights, self.n_ranges
        if not self.pretrained and self.pretrain_steps < 4:
            raise ValueError("pretrain_steps must be at least 4 where nothing pretrained is named")
        if n > self.num_train_timesteps:
            raise ValueError(
                f"n_ranges={n} is above num_train_timesteps={self.num_train_timesteps}: lower it"
            )
        if isinstance(weights, str) and weights not in ("uniform", "search"):
            raise ValueError(
                f'merge_weights={weights!r}: give "uniform", "search" or a list like [0.5, 0.5]'
            )
        if isinstance(weights, list) and len(weights) != n:
            raise ValueError(f"merge_weights has {len(weights)} weights for n_ranges={n}: one each")
        for name in ("seeds", "sampling_seeds"):
            seeds = getattr(self, name)
            if min(seeds) < 0 or max(seeds) >= 2**32:
                raise ValueError(f"{name} must be from 0 to 2**32 - 1, got {seeds}")
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"{name} repeats a seed: seeds must be independent")
        if self.sampling_steps > self.num_train_timesteps:
            raise ValueError("sampling_steps is above num_train_timesteps: lower it")
        for number, pairs in ((1, self.primary_decoupling), (2, self.primary_merging)):
            arms = [arm.name for arm in of_ablation(number, self.loss_weighting)]
            for pair in pairs:
                if len(names := set(pair.split(" - "))) != 2 or not names <= set(arms):
                    raise ValueError(
                        f"{pair!r} is no comparison of ablation {number}: write 'a - b' with two "
                        f"of {', '.join(arms)}"
                    )
        if max(self.loss_bins, self.gradient_bins) > self.num_train_timesteps:
            raise ValueError("loss_bins or gradient_bins is above num_train_timesteps: lower it")
        if self.search_low > self.search_high:
            raise ValueError("search_low is above search_high: swap them")
        if self.search_step > self.search_high - self.search_low:
            raise ValueError("search_step is above search_high - search_low: lower it")
        if self.acceptance_samples < self.samples:
            raise ValueError(
                "acceptance_samples must be at least samples: lengths are ranked there"
            )
        shipped = [path.stem for path in sorted(CLASSIFIERS.glob("*.json"))]
        for name in ("features", "second_features"):
            known = [*shipped, "inception", *([""] if name == "second_features" else [])]
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r}: give one of {known}")
        if self.features == self.second_features:
            raise ValueError("second_features must differ from features: they check each other")
        if 4 / (1 - self.ema_decay) > self.finetune_steps:
            raise ValueError(
                f"ema_decay={self.ema_decay} averages over {1 / (1 - self.ema_decay):.0f} steps, "
                f"more than a quarter of finetune_steps={self.finetune_steps}: experts would keep "
                "some of the pretrained weights that longer controls lose; set ema_decay to at "
                f"most {max(0.0, 1 - 4 / self.finetune_steps):.4g}"
            )
        if self.search_candidates < n + 1:
            raise ValueError(f"search_candidates must be at least n_ranges + 1 = {n + 1}")
        if self.kid_subset_size > min(self.samples, self.test_images):
            raise ValueError(
                f"kid_subset_size={self.kid_subset_size} needs as many samples "
                f"({self.samples}) and test_images ({self.test_images}): lower it"
            )
        if self.is_splits > self.samples:
            raise ValueError(f"is_splits={self.is_splits} needs at least as many samples: lower it")
        if min(self.model_channels) < 8 or any(c % 8 for c in self.model_channels):
            raise ValueError("model_channels must be multiples of 8 (group norm with 8 groups)")
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

    def pick_changed(self, *names: str) -> dict[str, Any]:
        """Those of the named ``JOINED_LATER`` parameters that change something, for a key."""
        return {n: v for n, v in self.pick(*names).items() if v != JOINED_LATER[n]}

    def folder_name(self) -> str:
        """The experiment's name; with a digest where a parameter differs from its file."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]
        return self.experiment if self.is_preset() else f"{self.experiment}-{digest}"

    def is_preset(self) -> bool:
        """Whether every parameter equals the file ``params/<experiment>.yaml``."""
        path = PRESETS / f"{self.experiment}.yaml"
        return path.is_file() and load(path) == self


def check(values: dict[str, Any], source: str) -> Parameters:
    """Overlay ``values`` on the defaults and check everything.

    Raises:
        ParameterError: naming the parameter, what is wrong, and what to do.
    """
    for name in values:
        if name not in Parameters.model_fields:
            raise ParameterError(f"{source}: unknown parameter {name!r}{_nearest(name)}")
    try:
        return Parameters(**{**_read_yaml(DEFAULTS), **values})
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(e)}" for e in error.errors())
        raise ParameterError(f"{source}:\n{problems}") from None


def load(path: str | Path, **overrides: Any) -> Parameters:
    """Read a parameter file; relative paths count from the working directory, then the root.

    Raises:
        ParameterError: the file is missing, is no flat YAML mapping, or holds a bad parameter.
    """
    return check({**read(path), **overrides}, str(path))


def read(path: str | Path) -> dict[str, Any]:
    """What a parameter or sweep file holds, unchecked."""
    found = next((p for p in (Path(path), ROOT / path) if p.is_file()), None)
    if found is None:
        presets = ", ".join(sorted(str(p.relative_to(ROOT)) for p in PRESETS.rglob("*.yaml")))
        raise ParameterError(f"no parameter file {path}; there are {presets}")
    return _read_yaml(found)


def from_notebook(namespace: dict[str, Any]) -> Parameters:
    """Check the parameters of a notebook, whoever set them: its cell, papermill, or a person.

    papermill injects every key of ``-f`` into every notebook and only warns of unknown ones, so
    the names are read from the cells that were run (IPython's ``In``).

    Args:
        namespace: the notebook's ``globals()``.
    """
    fields, cells = set(Parameters.model_fields), []
    for source in namespace.get("In", []):
        names = _names_set_by(source)
        known = fields & set(names)
        if known:  # a cell that was edited and run again replaces what it said before
            cells = [c for c in cells if not fields & set(c) or not fields & set(c) <= known]
        cells.append(names)
    names = [name for cell in cells for name in cell if name in namespace]
    return check({name: namespace[name] for name in names}, "this notebook")


def _names_set_by(source: str) -> list[str]:
    """Names that a cell sets as parameters: none, unless it is a parameters cell.

    That is papermill's injected cell, or one that assigns a literal to a known parameter. Where a
    cell does other things as well, only the known names in it are parameters.
    """
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    try:
        statements = ast.parse("\n".join(lines)).body
    except SyntaxError:
        return []
    assignments = [s for s in statements if isinstance(s, ast.Assign | ast.AnnAssign) and s.value]
    names = {name: s for s in assignments for name in _targets(s)}
    known = [name for name in names if name in Parameters.model_fields]
    if source.startswith("# Parameters"):
        return list(names)
    if not any(_is_literal(names[name].value) for name in known):
        return []
    return list(names) if len(assignments) == len(statements) else known


def _targets(statement: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError):
        return False
    return True


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        values = yaml.safe_load(text)
        twice = _given_twice(yaml.compose(text, yaml.SafeLoader))
    except (yaml.YAMLError, ValueError) as error:
        raise ParameterError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise ParameterError(f"{path} must be a flat list of `name: value` lines")
    if twice:
        raise ParameterError(f"{path} gives {twice[0]!r} twice: delete one of its lines")
    return values


def _given_twice(node: yaml.Node | None) -> list[str]:
    """Names that a mapping sets more than once; YAML would silently take the last."""
    names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    return [name for name in names if names.count(name) > 1]


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, Parameters.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "; see params/digits.yaml for all of them"


def _explain(error: Any) -> str:
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    name, value = error["loc"][0], error["input"]
    problem = error["msg"].removeprefix("Value error, ")
    text = f"{name}={value!r}: {problem} ({Parameters.model_fields[name].description})"
    if isinstance(value, str) and "e" in value.lower() and _is_number(value):
        text += f"; YAML reads {value} as text, write {float(value)!r}"
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
