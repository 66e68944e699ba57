"""What each preset costs, from this repository's records, counted FLOPs and assumed devices.

    .venv/bin/python tests/benchmarks/scale.py      writes figures/scale.md (also: make readme)

Work and sizes come from the recipes, CPU times from the committed timing.csv, FLOPs from models on
the meta device, which compute nothing.
"""

from dataclasses import asdict, dataclass
from functools import cache
from math import ceil, prod

import pandas as pd
import torch
from diffusers import UNet2DModel
from run import CIFAR, LARGE
from torch.utils.flop_counter import FlopCounterMode

from deme_lib import ROOT
from deme_lib.diffusion.models import new_unet
from deme_lib.experiment import parameters, recipes, sweeps
from deme_lib.experiment.schema import Parameters
from deme_lib.experiment.store import CALL_S, STEP_S, Recipe
from deme_lib.report.formats import UNKNOWN, markdown, number, write

recipes.fingerprint = cache(recipes.fingerprint)  # of data and weights: looked at once
SEEDS, DEVICES, NODE = [0, 1, 2], 100, 8
MEASURED = ROOT / "figures" / "fashion8-full" / "records"
SHAPES = {"fashion8": (1, 8, 8), "digits": (1, 8, 8), "fashion": (1, 32, 32)}
"""Images of the data sets that are trained on here; of the others the pretrained model tells."""
LSUN = CIFAR | {  # google/ddpm-ema-church-256 and -bedroom-256: 113.7 M parameters
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
PRETRAINED = {"google/ddpm-cifar10-32": CIFAR, "billion": LARGE}


@dataclass(frozen=True)
class Device:
    """Assumed, not measured: an H100-class GPU, its links and its node.

    Attributes:
        full, half: FLOP/s of dense TF32 and of bf16 or fp16.
        used: share of them that a UNet reaches.
        step_s: least seconds of an optimiser step, however small the model (kernel launches).
        call_s: least seconds of a denoiser call of one image among many.
        memory, inside, between, storage: bytes; bytes/s to a GPU of the node, of another node,
            and to the run folder.
    """

    full: float = 495e12
    half: float = 990e12
    used: float = 0.2
    step_s: float = 0.025
    call_s: float = 50e-6
    memory: float = 80e9
    inside: float = 300e9
    between: float = 40e9
    storage: float = 2e9


@dataclass(frozen=True)
class Model:
    """A denoiser's parameters and the FLOPs of one image through it (2 per multiply-add)."""

    shape: tuple[int, int, int]
    size: int
    flops: float


@cache
def model_of(pretrained: str, shape: tuple, channels: tuple, layers: int, attention: bool) -> Model:
    with torch.device("meta"):
        if config := LSUN if "-256" in pretrained else PRETRAINED.get(pretrained):
            unet = UNet2DModel(**config)
            shape = (3, config["sample_size"], config["sample_size"])
        else:
            unet = new_unet(shape, list(channels), layers, seed=0, attention=attention)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.empty(1, *shape), 0)
    return Model(shape, sum(p.numel() for p in unet.parameters()), counter.get_total_flops())


def model(p: Parameters) -> Model:
    shape = SHAPES.get(p.dataset.split("/")[-1].replace("_mnist", ""))
    return model_of(p.pretrained, shape, (*p.model_channels,), p.layers_per_block, p.attention)


def step_flops(recipe: Recipe, m: Model) -> float:
    """Forward and backward are three forwards, a teacher (Eq. 4) is one more."""
    teacher = recipe.parameters.get("consistency_weight", 0) > 0
    return recipe.parameters["batch_size"] * (3 + teacher) * m.flops


@cache
def core_rates() -> tuple[float, float, float]:
    """FLOP/s of one core in training and in sampling, and other core-seconds a training seed."""
    file = "params/fashion8-full.yaml"
    m, plan = model(parameters.load(file)), {r.label: r for r, _ in sweeps.plan(file).values()}
    paths = sorted(MEASURED.glob("*/timing.csv"))
    rows = pd.concat(map(pd.read_csv, paths), ignore_index=True)
    training = rows[rows["training_steps"] > 0]
    sampling = rows[rows["artefact"].str.startswith("images-")]
    steps = zip(training["artefact"], training["training_steps"], strict=True)
    worked = sum(count * step_flops(plan[name], m) for name, count in steps)
    called = sampling["denoiser_calls"].sum() * m.flops
    others = rows.drop(training.index.union(sampling.index))["core_seconds"].sum()
    return (
        worked / training["core_seconds"].sum(),
        called / sampling["core_seconds"].sum(),
        others / len(paths),
    )


class Costs:
    """Seconds and bytes of a plan.

    Args:
        plan: recipes of an experiment with their parameters, as ``sweeps.plan`` gives them.
        gpu: what it runs on; without, one core as measured on fashion8.
    """

    def __init__(self, plan: sweeps.Plan, gpu: Device | None):
        self.plan, self.gpu = plan, gpu
        self.p = next(iter(plan.values()))[1]
        self.model = model(self.p)
        self.weights = 4 * self.model.size
        self.step_s, self.call_s = self.rates()
        self.seconds = sum(map(self.time, self.recipes()))
        if not gpu:  # metrics, curves and maps, which count neither steps nor calls
            self.seconds += core_rates()[2] * len({q.seed for _, q in plan.values()})
        self.stored = sum(map(self.size, self.recipes()))
        self.moved = self.stored + sum(
            self.size(r) for recipe in self.recipes() for r in recipe.inputs.values()
        )

    def recipes(self) -> list[Recipe]:
        return [recipe for recipe, _ in self.plan.values()]

    def rates(self) -> tuple[float, float]:
        """Seconds of an optimiser step without teacher, and of an image through the denoiser."""
        step, call = 3 * self.p.batch_size * self.model.flops, self.model.flops
        if not self.gpu:
            training, sampling, _ = core_rates()
            return step / training, call / sampling
        g = self.gpu
        training = g.used * (g.full if self.p.precision == "no" else g.half)
        return max(g.step_s, step / training), max(g.call_s, call / (g.used * g.full))

    def time(self, recipe: Recipe, devices: int = 1) -> float:
        """Seconds of a recipe whose batches and images are shared out over a node's devices."""
        teacher = 4 / 3 if recipe.parameters.get("consistency_weight") else 1
        step = teacher * self.step_s / devices + (self.exchange(devices) if devices > 1 else 0)
        return recipe.training_steps * step + recipe.denoiser_calls * self.call_s / devices

    def exchange(self, devices: int, between: bool = False) -> float:
        """Seconds of the all-reduce of a step's gradients, in a ring."""
        link = self.gpu.between if between else self.gpu.inside
        return 2 * (devices - 1) / devices * self.weights / link

    def size(self, recipe: Recipe) -> float:
        """Bytes of an artefact: weights, images and features; tables are small."""
        p, stage = self.p, recipe.stage
        if stage == "finetune":
            along = recipe.parameters["checkpoints"]
            return self.weights * (1 + len(p.further_ema_decays) + along * (along > 1))
        if stage == "images":
            return p.samples * len(p.sampling_seeds) * prod(self.model.shape)
        if stage == "reference":  # float64, measured for the shipped classifiers
            images = p.train_images + p.search_images + p.test_images
            return images * (8 * (2048 + 1008) if p.features == "inception" else 1700)
        return self.weights * {"train_baseline": 3, "load_baseline": 1, "merged": 1}.get(stage, 0)

    def chain(self, devices: int = 1) -> tuple[float, str]:
        """Seconds of the longest chain of artefacts that wait for each other, and its longest."""

        @cache
        def until(name: str) -> tuple[float, float, str]:
            recipe = self.plan[name][0]
            before = [until(r.name) for r in recipe.inputs.values()]
            start, most, longest = max(before, default=(0.0, 0.0, ""))
            own = self.time(recipe, devices)
            return (start + own, *max((own, recipe.label), (most, longest)))

        seconds, _, longest = max(map(until, self.plan))
        return seconds, longest


def plan_of(p: Parameters) -> sweeps.Plan:
    found: sweeps.Plan = {}
    for q in p.per_seed():
        for recipe in recipes.everything(q, looks=q.seed == p.seed).values():
            found.setdefault(recipe.name, (recipe, q))
    return found


def tables(p: Parameters, file: str) -> sweeps.Plan:
    """A preset and the five sweeps on it, each under the seeds of ``p``."""
    found, total = plan_of(p), p.n_ranges * p.finetune_steps
    for path in sorted((ROOT / "params" / "sweeps").glob("*.yaml")):
        sweep = sweeps.load(path)
        for cell in sweep.cells:
            n = cell.set.get("n_ranges", p.n_ranges)
            steps, candidates = total // n, max(p.search_candidates, n + 1)
            fit = {"finetune_steps": steps, "ema_decay": min(p.ema_decay, 1 - 4 / steps)}
            fit |= {"arms": ["pretrained", *sweep.arms], "search_candidates": candidates}
            fit |= {"seeds": p.seeds, "pretrained": p.pretrained, "precision": p.precision}
            named = {"primary_decoupling": [], "primary_merging": []}
            for q in parameters.load(file, **cell.set | fit | named).per_seed():
                for name, recipe in recipes.everything(q, looks=False).items():
                    found.setdefault(name, (recipe, q))
    return found


def row(file: str) -> dict[str, str]:
    """A preset as its file has it, and all tables under three seeds."""
    p = parameters.load(file)
    gpu = Device() if p.device == "cuda" else None
    one, m = Costs(plan_of(p), gpu), model(p)
    seeds = p.model_copy(update={"seeds": SEEDS})
    every = None if p.experiment == "smoke" else Costs(tables(seeds, file), gpu)
    hours, rate = one.seconds / 3600, one.moved / one.seconds
    return {
        "file": f"[`{p.experiment}`](../{file})",
        "hours of one": "GPU" if gpu else "core",
        "parameters, M": number(m.size / 1e6),
        "GFLOP a call": number(m.flops / 1e9),
        "step, ms": number(1e3 * one.step_s),
        "call, ms": number(1e3 * one.call_s),
        "hours": number(hours),
        "longest chain, hours": number(one.chain()[0] / 3600),
        "stored, GB": number(one.stored / 1e9),
        "network, MB/s": number(rate / 1e6),
        "all tables, hours": number(every.seconds / 3600) if every else UNKNOWN,
        "all tables, stored, GB": number(every.stored / 1e9) if every else UNKNOWN,
        "`time=`": f"{ceil(max(1.0, one.step_s / STEP_S, one.call_s / CALL_S))}",
    }


def large() -> str:
    """A denoiser of a billion parameters on many devices, and where it stops scaling."""
    file, g = "params/cifar.yaml", Device()
    p = parameters.load(file, pretrained="billion", precision="bf16", seeds=SEEDS)
    c = Costs(tables(p, file), g)
    hours, (alone, longest), (shared, _) = c.seconds / 3600, c.chain(), c.chain(NODE)
    held = c.weights * (6 + len(p.further_ema_decays))
    step, busy = c.step_s / NODE, c.moved / (c.seconds / DEVICES)
    return f"""\
Google's CIFAR10 UNet made {number(c.model.size / 1e9)} B parameters wide (as in `make bench`), the
work of `cifar` with all five sweeps and three seeds, trained in bf16: {number(hours)} GPU-hours,
{number(c.stored / 1e12)} TB stored, {number(c.moved / 1e12)} TB written and read.

1. **Time.** {DEVICES} devices would need {number(hours / DEVICES)} hours if work could be cut at
   will. With one device a job the longest chain takes {number(alone / 3600)} hours, most of it
   `{longest}`: this is the first bottleneck. {NODE} devices a job (batches and images shared out)
   make it {number(shared / 3600)} hours, and the devices stay busy.
2. **Network.** A step's gradients are {number(c.weights / 1e9)} GB. Their all-reduce takes
   {number(1e3 * c.exchange(NODE))} ms inside a node, beside {number(1e3 * step)} ms of computing on
   {NODE} devices, and {number(1e3 * c.exchange(NODE, between=True))} ms between nodes: a job stays
   inside one node, or accumulates gradients over larger batches.
3. **Memory.** Weights, gradients, AdamW's two moments, {1 + len(p.further_ema_decays)} EMAs and
   the teacher are {number(held / 1e9)} of {number(g.memory / 1e9)} GB, before activations. Above
   about twice the size, shard them (FSDP through accelerate), EMAs in host memory first.
4. **Storage.** Over those {number(hours / DEVICES)} hours {number(busy / 1e6)} MB/s, of an assumed
   {number(g.storage / 1e6)}: no bottleneck. `further_ema_decays: []` keeps one copy of a model, not
   {1 + len(p.further_ema_decays)}.
"""


def document() -> str:
    files = sorted(path.name for path in (ROOT / "params").glob("*.yaml"))
    table = pd.DataFrame([row(f"params/{name}") for name in files])
    full = Costs(plan_of(parameters.load("params/fashion8-full.yaml")), None)
    timed = pd.concat(map(pd.read_csv, MEASURED.glob("*/timing.csv")))["core_seconds"].sum()
    training, sampling, _ = core_rates()
    assumed = pd.DataFrame(
        [[name, f"{value:g}"] for name, value in asdict(Device()).items()],
        columns=["assumed of a GPU", "value"],
    )
    return f"""\
# What it costs, and what stops it first

Computed by [scale.py](../tests/benchmarks/scale.py), not run, except where "measured" is said.
Work and sizes are the recipes', FLOPs are counted (two a multiply-add). Core-hours take the rates
measured in [fashion8-full's records](fashion8-full/records), {number(training / 1e9)} GFLOP/s a
core in training and {number(sampling / 1e9)} in sampling; for that file itself they give
{number(full.seconds / 3600)} core-hours, {number(timed / 3600)} were measured. GPU-hours rest on
the assumptions below and leave out metrics, which the presets' first lines estimate. Larger models
use a core better than this small one, so that those of `digits` are an upper bound.

"Longest chain" is what no number of devices shortens while a job has one. "Network" is all that is
written to and read from the run folder, over the hours of one device. "All tables" are the preset
and the five sweeps, under three seeds. `time=` is what to give Snakemake's config until the run
folder holds records to estimate from ([params/](../params/README.md#on-a-cluster)).

{markdown(table)}

{markdown(assumed)}

`full` and `half` are FLOP/s of dense TF32 and of bf16 or fp16, `used` the share that a UNet
reaches, `step_s` and `call_s` the least seconds of a step and of an image's call (kernel launches),
`memory` bytes, `inside`, `between` and `storage` bytes a second to a GPU of the same node, to
another node and to the run folder.

## A billion parameters on {DEVICES} devices

{large()}"""


if __name__ == "__main__":
    write(ROOT / "figures" / "scale.md", document())
