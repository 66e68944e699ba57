"""What the library's work costs, as ratios to what it cannot avoid or to what else one would use.

    make bench                                          every group but ``large``: about 5 minutes
    .venv/bin/python tests/benchmarks/run.py GROUP ...  these groups; rows of the others are kept

What is compared takes turns, once a repeat, in one process and one thread; a row holds the median
over repeats of a repeat's ratio. Models have random weights. Linux only: memory is read in /proc.
"""

import argparse
import copy
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from diffusers import DDIMPipeline, UNet2DModel
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import mse_loss
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from deme_lib import ROOT
from deme_lib.diffusion.merged import WEIGHTS, Merger, merge_experts, merge_folders
from deme_lib.diffusion.models import new_scheduler, new_unet
from deme_lib.diffusion.sampling import ddim_scheduler, sample
from deme_lib.diffusion.training import Training, TrainingSpec, draw, finetune
from deme_lib.experiment import sweeps
from deme_lib.method.ensembles import AveragedEnsemble, RoutedEnsemble
from deme_lib.method.merging import merge
from deme_lib.method.timesteps import split_timesteps
from deme_lib.report.formats import markdown, number, save, write, write_csv

N = 4
MEAN = [1 / N] * N
CIFAR = {  # google/ddpm-cifar10-32: 35.7 M parameters
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
LARGE = CIFAR | {"block_out_channels": (704, 1408, 1408, 1408)}  # 1.08 B parameters
TINY = CIFAR | {"block_out_channels": (32, 32, 32, 32)}
SIZES = [8, 16], [16, 32]  # channels of the default preset's UNet, and twice as wide
BATCH, STEPS = 250, 10
SPEC = TrainingSpec(10**9, (0, "bench"), range(250, 500), 1e-4, 1e-4, batch_size=64)
SCHEDULER = new_scheduler(1000)
IMPORT_UNET = "from diffusers import UNet2DModel"


def clock(repeats: int, *calls: Callable[[], object], warm: int = 1) -> np.ndarray:
    """Seconds [repeats, calls] of calls that take turns, after ``warm`` turns not counted."""
    seconds = np.empty((warm + repeats, len(calls)))
    for turn in seconds:
        for k, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            turn[k] = time.perf_counter() - start
    return seconds[warm:]


def row(what: str, against: str, ratios: Sequence[float], goal: str = "") -> dict[str, object]:
    """A line of the table; ``goal`` is such as "≤ 1.05", or empty where none was set."""
    ratio, bound = float(np.median(ratios)), float(goal[1:] or "nan")
    met = {"≤": ratio <= bound, "≥": ratio >= bound}.get(goal[:1])
    met = {True: "yes", False: "no", None: ""}[met]
    values = {"ratio": ratio, "goal": goal, "met": met, "against": against}
    return {"what": what, **values, "repeats": len(ratios), "points": ""}


def workers(count: int) -> ProcessPoolExecutor:
    """Fresh processes of one thread, which import this file."""
    return ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,))


def merging(repeats: int) -> Iterator[dict]:
    """Eq. 8 in memory."""
    base, *experts = (UNet2DModel(**CIFAR).eval() for _ in range(N + 1))
    states = [expert.state_dict() for expert in experts]
    merger = Merger(base, experts)
    model, start = merger.merged(MEAN), merger.start
    source, target = torch.rand(2, (N + 2) // 2 * base.num_parameters())  # N + 1 reads, one write

    def differences() -> list[dict]:
        return [{name: state[name] - start[name] for name in start} for state in states]

    def textbook(vectors: list[dict]) -> None:
        scaled = [{n: w * t for n, t in v.items()} for w, v in zip(MEAN, vectors, strict=True)]
        merged = {name: start[name] + sum(s[name] for s in scaled) for name in start}
        copy.deepcopy(base).load_state_dict(merged)

    place, copied, whole, part, ours = clock(
        repeats,
        lambda: merger.merged(MEAN, into=model),
        lambda: target.copy_(source),
        lambda: textbook(differences()),
        lambda: textbook(merger.vectors),
        lambda: merge_experts(base, experts, MEAN),
    ).T
    about = f"{N} experts, {base.num_parameters() / 1e6:.1f} M parameters"
    yield row(f"merge in place ({about})", "copying the same bytes", place / copied, "≤ 1.6")
    yield row("textbook way, differences included", "merge in place", whole / place, "≥ 7")
    yield row("textbook way, differences included", "copying the same bytes", whole / copied)
    yield row("textbook way, from task vectors", "merge in place", part / place, "≥ 7")
    yield row("merge_experts", "textbook way, differences included", ours / whole, "≤ 1")


def folders(repeats: int) -> Iterator[dict]:
    """Eq. 8 from folders to a pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        yield from folders_of(CIFAR, torch.float32, Path(folder), repeats)


def large(_repeats: int) -> Iterator[dict]:
    """The same once with a thousand million parameters: 17 GB of disk, some minutes."""
    for dtype in (torch.bfloat16, torch.float32):
        with tempfile.TemporaryDirectory() as folder:
            yield from folders_of(LARGE, dtype, Path(folder), 1)


def folders_of(config: dict, dtype: torch.dtype, folder: Path, repeats: int) -> Iterator[dict]:
    job, seen = family(folder / "model", config, dtype, files=N if repeats > 1 else 1), []
    files = [place / WEIGHTS for place in (job[0] / "unet", *job[1])]

    def raw() -> None:
        for file in files[1:]:
            file.read_bytes()
        (folder / "raw").write_bytes(files[0].read_bytes())

    with workers(1) as pool:
        tiny = family(folder / "tiny", TINY, dtype)  # as many tensors, hardly any bytes
        pool.submit(merge_folders, *tiny).result()  # imports
        status = Path(f"/proc/{pool.submit(os.getpid).result()}/status")

        def watched() -> None:
            work = pool.submit(merge_folders, *job)
            while not work.done():
                seen.append(anonymous_bytes(status))
                time.sleep(0.002)
            work.result()

        before = anonymous_bytes(status)
        ours, least, fixed = clock(
            repeats,
            watched,
            raw,
            lambda: pool.submit(merge_folders, *tiny).result(),
            warm=int(repeats > 1),
        ).T
    extra = np.array([max(seen) - before])
    sizes = [tensor.numel() for tensor in shapes(config).parameters()]
    what = f"merge_folders ({sum(sizes) / 1e6:,.1f} M parameters, {dtype})".replace("torch.", "")
    bound = f"≤ {1 + N * max(sizes) / sum(sizes):.2f}"  # one model and one tensor of each expert
    against = "reading and writing the files' bytes"
    yield row(what, against, ours / least, "≤ 1.3")
    yield row(f"{what}, less tensors of hardly any bytes", against, (ours - fixed) / least)
    yield row(f"{what}, time", "1 s", ours)
    yield row(f"{what}, peak memory", "one model", extra / (sum(sizes) * dtype.itemsize), bound)
    yield row(f"{what}, peak memory", "1 GiB", extra / 2**30)


def shapes(config: dict) -> UNet2DModel:
    with torch.device("meta"):
        return UNet2DModel(**config)


def family(folder: Path, config: dict, dtype: torch.dtype, files: int = N) -> tuple:
    """What ``merge_folders`` is given: a pretrained pipeline and N experts of random weights.

    Args:
        files: experts that are written; the others are further names of the last one's file.
    """
    unet, base, experts = shapes(config), folder / "base", [folder / f"{k}" for k in range(N)]
    SCHEDULER.save_pretrained(base / "scheduler")
    for k, place in enumerate((base / "unet", *experts)):
        unet.save_config(place)
        if k > files:
            (place / WEIGHTS).hardlink_to(experts[files - 1] / WEIGHTS)
            continue
        weights = {n: torch.rand(t.shape, dtype=dtype) for n, t in unet.state_dict().items()}
        save_file(weights, place / WEIGHTS)
    return base, experts, MEAN, folder / "merged"


def anonymous_bytes(status: Path) -> int:
    """Memory of a process that holds no pages of files, from its /proc/PID/status."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1])


def start_up(repeats: int) -> Iterator[dict]:
    """From a command to its first line of work."""

    def python(*words: str) -> str:
        return subprocess.run([sys.executable, *words], capture_output=True, text=True).stderr

    def core_seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python("-c", code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return sum(after[:2]) - sum(before[:2])  # user and system

    for word in ("list", "--help"):
        command = ("-m", "deme_lib", word)
        torch_too = re.search(r"\| +torch$", python("-X", "importtime", *command), re.MULTILINE)
        about = "imports torch" if torch_too else "without torch"
        seconds = clock(repeats, partial(python, *command))[:, 0]
        yield row(f"python -m deme_lib {word} ({about})", "1 s", seconds, "≤ 1")
    job = "import deme_lib.experiment.stages"
    codes = job, f"{job}, deme_lib.report.plots, papermill, ipykernel.kernelapp", IMPORT_UNET
    job, notebook, unet = np.median([[core_seconds(c) for c in codes] for _ in range(2)], axis=0)
    yield row("importing the stages, core-seconds", "1 s", [job])
    yield row("importing the stages, core-seconds", "importing diffusers' UNet", [job / unet])
    files = (ROOT / "figures" / "fashion8" / "records").glob("*/timing.csv")
    stages = sum(pd.read_csv(file)["core_seconds"].sum() for file in files)
    plan = sweeps.plan(ROOT / "params" / "fashion8.yaml", recorded=False).values()
    starts = len({recipe.job for recipe, _ in plan}) * job + 6 * notebook
    what, against = "imports of all jobs and notebooks of fashion8", "imports and recorded stages"
    yield row(what, f"{against}, core-seconds", [starts / (starts + stages)], "≤ 0.1")


def training(repeats: int, device: str) -> Iterator[dict]:
    """A step of DeMe with teacher and projections."""
    for channels in SIZES:
        step, *alone = step_and_parts(channels, device)
        seconds = clock(20 * repeats, step, *alone)
        what, against = f"training step {tuple(channels)}", "its forwards, backward, optimiser step"
        yield row(what, against, seconds[:, 0] / seconds[:, 1:].sum(1), "≤ 1.05")


def step_and_parts(channels: list[int], device: str) -> tuple[Callable[[], object], ...]:
    """A training step, and alone: student forward and backward, teacher forward, optimiser step."""
    steps, other = iter(new_run(channels, device)), new_run(channels, device)
    drawn = draw(other.images, SCHEDULER, SPEC, 0)
    noise, noisy, timesteps = (x.to(other.accelerator.device) for x in drawn[1:])
    optimiser = torch.optim.AdamW(other.unet.parameters(), lr=1e-4, fused=True)

    def student() -> None:
        optimiser.zero_grad()
        mse_loss(other.unet(noisy, timesteps, return_dict=False)[0], noise).backward()

    @torch.inference_mode()
    def teacher() -> None:
        other.teacher(noisy, timesteps, return_dict=False)

    return lambda: next(steps), student, teacher, optimiser.step


def new_run(channels: list[int], device: str) -> Training:
    images = torch.randint(0, 256, (1000, 1, 8, 8), dtype=torch.uint8)
    return finetune(
        new_unet((1, 8, 8), channels, 1, seed=0), SCHEDULER, images, SPEC, device=device
    )


def sampling(repeats: int, device: str) -> Iterator[dict]:
    """DDIM with one model, with ensembles, and with diffusers' pipeline."""
    for channels in SIZES:
        members = unets(N, channels, device)
        pipeline = DDIMPipeline(members[0], ddim_scheduler(SCHEDULER, STEPS, "leading"))
        pipeline.set_progress_bar_config(disable=True)
        noisy = torch.randn(BATCH, 1, 8, 8, device=device)
        averaged = AveragedEnsemble(members)
        bare, ours, theirs, routed, all_four, one_by_one, stacked = clock(
            repeats,
            partial(forwards, members[0], noisy),
            sampler(members[0], device=device),
            partial(pipeline, BATCH, num_inference_steps=STEPS, output_type="np"),
            sampler(RoutedEnsemble(members, split_timesteps(N, 1000)), device=device),
            sampler(averaged, device=device),
            partial(forwards, averaged, noisy),
            partial(forwards, batched(members), noisy),
        ).T
        about = f" {tuple(channels)}"
        yield row(f"sampling{about}", "steps × bare forward", ours / bare, "≤ 1.05")
        yield row(f"sampling{about}", "diffusers' DDIMPipeline", ours / theirs, "≤ 1")
        yield row(f"routed ensemble of {N}{about}", "sampling one model", routed / ours, "≤ 1.05")
        yield row(f"averaged ensemble of {N}{about}", f"{N} models", all_four / (N * ours))
        yield row(f"averaged ensemble of {N}{about}, vmap", "one by one", stacked / one_by_one)


def unets(count: int, channels: list[int], device: str = "cpu") -> list[UNet2DModel]:
    return [new_unet((1, 8, 8), channels, 1, seed).eval().to(device) for seed in range(count)]


@torch.inference_mode()
def forwards(unet: UNet2DModel, noisy: torch.Tensor) -> None:
    for _ in range(STEPS):
        unet(noisy, 500, return_dict=False)


def batched(members: list[UNet2DModel]) -> Callable:
    """The averaged ensemble with all members in one call."""
    weights, empty = stack_module_state(members), copy.deepcopy(members[0]).to("meta")

    def predict(noisy: torch.Tensor, timestep: int, **options) -> torch.Tensor:
        def one(*state: dict) -> torch.Tensor:
            return functional_call(empty, state, (noisy, timestep), options)[0]

        return vmap(one)(*weights).mean(0)

    return predict


def sampler(denoiser: nn.Module, images: int = BATCH, steps: int = STEPS, device: str = "cpu"):
    settings = {"purpose": (0,), "batch_size": BATCH, "device": device}
    return partial(sample, denoiser, SCHEDULER, images, steps=steps, **settings)


def denoiser(repeats: int) -> Iterator[dict]:
    """A forward's share of the rate of matrix products, and which operators take its time."""
    left, right = torch.rand(2, 1024, 1024)
    for channels in SIZES:
        (unet,), noisy = unets(1, channels), torch.randn(BATCH, 1, 8, 8)
        last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
        few = [partial(forwards, unet, torch.randn(b, 1, 8, 8)) for b in (BATCH // 5, BATCH)]
        with FlopCounterMode(display=False) as counter:
            unet(noisy, 500)
        work = STEPS * counter.get_total_flops()
        product, small, ours, other = clock(
            repeats, lambda: left @ right, *few, partial(forwards, last, noisy)
        ).T
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            few[1]()
        spent = {e.key: e.self_cpu_time_total / 1e6 for e in seen.key_averages()}
        rate, about = 2 * 1024**3 / product, f"forward {tuple(channels)}"
        yield row(about, "rate of matrix products", work / ours / rate, "≥ 0.6")
        alone = work / spent["aten::mkldnn_convolution"] / rate
        yield row(f"{about}, convolutions alone", "rate of matrix products", alone)
        for name in sorted(spent, key=spent.get)[:-4:-1]:
            yield row(f"{about}, {name}", "all operators", [spent[name] / sum(spent.values())])
        yield row(f"{about}, channels last", "channels first", other / ours)
        yield row(f"{about}, batches of {BATCH // 5}", f"of {BATCH}, per image", 5 * small / ours)


def side_by_side(repeats: int) -> Iterator[dict]:
    """Two trainings of one thread each against one of two threads."""
    with workers(2) as pool:
        list(pool.map(steps_per_second, [1, 1], SIZES))
        for channels in SIZES:
            ratios = [
                sum(pool.map(steps_per_second, [1, 1], [channels] * 2))
                / pool.submit(steps_per_second, 2, channels).result()
                for _ in range(min(repeats, 3))
            ]
            what, against = f"two trainings {tuple(channels)} of one thread", "one of two threads"
            yield row(f"{what}, steps per second", against, ratios, "≥ 1")


def steps_per_second(threads: int, channels: list[int]) -> float:
    torch.set_num_threads(threads)
    steps, count = iter(new_run(channels, "cpu")), 0
    next(steps)
    start = time.perf_counter()
    while time.perf_counter() - start < 2:
        next(steps)
        count += 1
    return count / (time.perf_counter() - start)


def growth(repeats: int) -> Iterator[dict]:
    """The exponent a of cost = c size^a, for time and for the memory of tensors."""

    def merge_of(millions: int, n: int) -> Callable[[], object]:
        states = ({k: torch.rand(2**18) for k in range(4 * millions)} for _ in range(n + 2))
        base, out, *vectors = states
        return partial(merge, base, vectors, [1 / n] * n, out=out)

    def routed(n: int, width: int = 8) -> Callable[[], object]:
        return sampler(RoutedEnsemble(unets(n, [width, 2 * width]), split_timesteps(n, 1000)))

    def one(images: int = BATCH, steps: int = STEPS) -> Callable[[], object]:
        return sampler(unets(1, SIZES[0])[0], images, steps)

    experts, parameters = (1, 2, 4), "parameters of a model"
    of_width = {unets(1, [w, 2 * w])[0].num_parameters(): w for w in (8, 16, 32)}
    cases = [
        ("merge in place", parameters, {m * 2**20: partial(merge_of, m, N) for m in (2, 8, 32)}),
        ("merge in place", "experts", {n: partial(merge_of, 8, n) for n in experts}),
        ("routed sampling", parameters, {p: partial(routed, N, w) for p, w in of_width.items()}),
        ("routed sampling", "experts", {n: partial(routed, n) for n in experts}),
        ("sampling", "images", {n: partial(one, n) for n in (125, 250, 500)}),
        ("sampling", "steps", {n: partial(one, steps=n) for n in (5, 10, 20)}),
    ]
    for what, by, builds in cases:
        seconds = clock(repeats, *(build() for build in builds.values()))
        memory = np.array(
            [[peak_bytes(lambda build=build: build()()) for build in builds.values()]]
        )
        for cost, found in (("seconds", seconds), ("MiB", memory / 2**20)):
            exponents = np.polyfit(np.log(list(builds)), np.log(found).T, 1)[0].round(4)
            flat = cost == "seconds" and (what, by) == ("routed sampling", "experts")
            line = row(f"{what}, {cost}: exponent", by, exponents, "≤ 0.05" if flat else "≤ 1.1")
            points = zip(builds, np.median(found, axis=0), strict=True)
            yield line | {"points": " ".join(f"{size}:{value:.4g}" for size, value in points)}


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that tensors made in ``call`` hold at once, models included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = seen.profiler.kineto_results.events()
    return np.cumsum([e.nbytes() for e in events if e.name() == "[memory]"]).max()


def cost_growth(table: pd.DataFrame) -> Figure:
    """What ``growth`` measured: a panel for each cost and each size that it grows with."""
    table = table[table["points"] != ""]
    points = table.assign(points=table["points"].str.split()).explode("points")
    points[["size", "value"]] = points["points"].str.split(":", expand=True).astype(float)
    points[["what", "cost"]] = points["what"].str.split(", |:", expand=True)[[0, 1]]
    about = points["what"] + points["ratio"].map(", exponent {:.2f}".format)
    grid = sns.FacetGrid(
        points.assign(about=about),
        col="against",
        row="cost",
        sharex="col",
        sharey="row",
        height=2.6,
        margin_titles=True,
    )
    grid.map_dataframe(sns.lineplot, "size", "value", "about", marker="o")
    grid.set(xscale="log", yscale="log")
    for (_, by), ax in grid.axes_dict.items():
        ax.margins(y=0.35)
        ax.legend(fontsize=7, loc="upper center")
        ax.set_xticks(points.loc[points["against"] == by, "size"].unique())
        ax.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
        ax.xaxis.set_minor_locator(NullLocator())
    grid.set_titles(row_template="{row_name}", col_template="{col_name}").set_axis_labels("", "")
    return grid.figure


GROUPS = {
    group.__name__: group
    for group in (
        merging,
        folders,
        large,
        start_up,
        training,
        denoiser,
        sampling,
        side_by_side,
        growth,
    )
}


def measured(name: str, repeats: int, machine: str) -> Iterator[dict]:
    """Rows of a group, with the ratio on a CUDA GPU where there is one."""
    by_device = name in ("training", "sampling")
    rows = GROUPS[name](repeats, "cpu") if by_device else GROUPS[name](repeats)
    gpu = GROUPS[name](repeats, "cuda") if by_device and torch.cuda.is_available() else ()
    for line, other in zip_longest(rows, gpu):
        cuda = number(other["ratio"]) if other else "not measured"
        yield {"group": name, **line, "cuda": cuda, "machine": machine}


def this_machine() -> str:
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU"
    allocator = Path(os.environ.get("LD_PRELOAD", "")).name or "glibc"
    return (
        f"{processor[1] if processor else 'unknown CPU'} ({os.cpu_count()} cores), {gpu}, torch "
        f"{torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} "
        f"thread, {torch.backends.cpu.get_cpu_capability()}, {allocator}, load at the start "
        f"{os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "figures", help="folder of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = options.groups or [name for name in GROUPS if name != "large"]
    path, machine = options.out / "benchmarks.csv", this_machine()
    table = pd.DataFrame([r for name in wanted for r in measured(name, options.repeats, machine)])
    if path.is_file():
        old = pd.read_csv(path, keep_default_na=False)
        table = pd.concat([old[~old["group"].isin(wanted)], table])
    table = table.sort_values("group", key=lambda g: g.map(list(GROUPS).index), kind="stable")
    table = table.fillna({"points": ""})
    write_csv(path, table)
    if "growth" in wanted:
        save(cost_growth(table), options.out / "cost_growth.png")
    shown = table.assign(ratio=table["ratio"].map(number), repeats=table["repeats"].map(str))
    heads = {"against": "against what", "cuda": "on a CUDA GPU"}
    shown = shown.drop(columns=["group", "machine", "points"]).rename(columns=heads)
    groups = table.groupby("machine", sort=False)["group"].unique().map(", ".join)
    where = [f"Measured on {machine}: {names}." for machine, names in groups.items()]
    text = "\n\n".join([*where, markdown(shown)]) + "\n"
    write(options.out / "benchmarks.md", text)
    print(text)


if __name__ == "__main__":
    main()
