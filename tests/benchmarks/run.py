"""What the library's work costs, against what it cannot avoid or what one would use instead.

``make bench`` writes figures/benchmarks.csv and .md, in 3 minutes on 2 busy cores. The sides of a
ratio take turns, so that other load falls on both.
"""

import copy
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from timeit import timeit

import numpy as np
import pandas as pd
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import mse_loss

from deme_lib import ROOT, AveragedEnsemble, RoutedEnsemble, load_pipeline, sample
from deme_lib.diffusion.merged import Merger, merge_folders
from deme_lib.diffusion.training import Training, TrainingSpec, finetune
from deme_lib.report.formats import UNKNOWN, markdown, write, write_csv

torch.set_num_threads(1)  # in the worker processes too

BATCH, IMAGES, STEPS = 64, 250, 10
RANGES = [range(k, k + 250) for k in range(0, 1000, 250)]
WEIGHTS = [0.25] * 4
FASHION8 = ROOT / "deme_lib" / "shipped" / "pretrained" / "fashion8" / "seed-0" / "pipeline"
CIFAR = {  # google/ddpm-cifar10-32: its weights' shapes
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
DIFFUSERS = "from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel"
LIBRARY = "from deme_lib import decouple, evaluate, load_pipeline, merge_experts, sample"
H200 = {  # milliseconds of us and of the other side, for the models of NOTE
    "parts": [(25.0, 18.2), (34.9, 25.5), (77.3, 67.1), (70.0, 91.8)],
    "forwards": [(91, 71), (106, 95), (295, 279), (215, 201)],
    "pipeline": [(91, 81), (106, 93), (295, 283), (215, 204)],
    "textbook": [(5.9, 38), (6.6, 26.7), (12.0, 50.3), (17.8, 97.6)],
    "copy": [(5.9, 0.03), (6.6, 0.02), (12.0, 0.05), (17.8, 0.22)],
}
NOTE = """
A ratio is the median of the repeats' ratios, whose quartiles the CSV has; in seconds of one core,
which other load hardly moves (merge_folders between runs: 2.2 to 3.2). The last is by the clock,
and load multiplies it, as the threads of one training wait for each other: on nearly idle cores it
was 1.79, at commit 85f9fcb.

On an H200: ratios (and our milliseconds) for UNets of 0.04 (fashion8), 1.05 (fashion32), 6.5 and
35.7 M parameters (CIFAR10), measured there at commit 85f9fcb, not by this run: torch 2.11, TF32
convolutions; batches of 64, 128, 128 and 64; 500 images in 10 steps, CIFAR10's 250 in 5. Clocks
varied: CIFAR10's parts, timed later, took longer than the step that they make up.
How the textbook merge was written there is not recorded.
"""


def row(what: str, against: str, ratios: Sequence[float], h200: str = "") -> dict[str, object]:
    low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    there = [f"{a / b:.3g} ({a:g})" for a, b in H200.get(h200, [])]
    line = {"what": what, "ratio": ratio, "low": low, "high": high, "against what": against}
    return line | {"repeats": len(ratios), "on an H200": " · ".join(there) or UNKNOWN}


def clock(repeats: int, *calls: Callable[[], object], timer=time.process_time) -> np.ndarray:
    """Seconds [calls, repeats], of the core or by the clock, of calls that take turns; warm."""
    turns = [[timeit(call, timer=timer, number=1) for call in calls] for _ in range(1 + repeats)]
    return np.array(turns[1:]).T


def endless(on: bool) -> Training:
    """A run with DeMe's three techniques, or with none."""
    settings = {"batch_size": BATCH, "probability": 0.3 * on, "consistency_weight": float(on)}
    spec = TrainingSpec(10**9, ("bench",), RANGES[1], 1e-4, 1e-4, **settings)
    pipe, images = load_pipeline(FASHION8), torch.randint(0, 256, (1000, 1, 8, 8)).byte()
    return finetune(pipe.unet, pipe.scheduler, images, spec, channel_projection=on, device="cpu")


def training() -> Iterator[dict]:
    run, plain = endless(True), iter(endless(False))
    student, teacher, deme = run.ema_unet().train(), load_pipeline(FASHION8).unet, iter(run)
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    (noise, noisy), timesteps = torch.randn(2, BATCH, 1, 8, 8), torch.randint(0, 1000, (BATCH,))

    def parts() -> None:
        mse_loss(student(noisy, timesteps).sample, noise).backward()
        with torch.inference_mode():
            teacher(noisy, timesteps)
        optimiser.step()
        optimiser.zero_grad()

    ours, alone, other = clock(60, lambda: next(deme), parts, lambda: next(plain))
    what, against = "DeMe's training step (fashion8)", "its forwards, backward, optimiser step"
    yield row(what, against, ours / alone, "parts")
    yield row(what, "a step without its techniques", ours / other)


def sampling() -> Iterator[dict]:
    members = [load_pipeline(FASHION8).unet.eval() for _ in WEIGHTS]
    one, averaged, noisy = members[0], AveragedEnsemble(members), torch.randn(IMAGES, 1, 8, 8)
    pipeline = DDIMPipeline(one, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    weights, empty = stack_module_state(members)[0], copy.deepcopy(one).to("meta")
    at_once = vmap(lambda state: functional_call(empty, state, (noisy, 500)).sample)
    models = one, RoutedEnsemble(members, RANGES), averaged
    with torch.inference_mode():
        ours, routed, all_four, theirs, bare, in_turn, stacked = clock(
            11,
            *(
                partial(sample, m, DDPMScheduler(), IMAGES, steps=STEPS, sampler="ddim-diffusers")
                for m in models
            ),
            partial(pipeline, IMAGES, num_inference_steps=STEPS, output_type="np"),
            partial(one, noisy, 500),
            partial(averaged, noisy, 500),
            lambda: at_once(weights).mean(0),
        )
    what = "sampling by DDIM (fashion8)"
    yield row(what, "steps × bare forward", ours / (STEPS * bare), "forwards")
    yield row(what, "diffusers' DDIMPipeline", ours / theirs, "pipeline")
    yield row("sampling a routed ensemble of 4", "one model", routed / ours)
    yield row("sampling an averaged ensemble of 4", "one model", all_four / ours)
    yield row("averaged ensemble, members in one vmap", "members in turn", stacked / in_turn)


def merging() -> Iterator[dict]:
    base, *experts = (UNet2DModel(**CIFAR).eval() for _ in range(5))
    merger, start = Merger(base, experts), base.state_dict()
    model = merger.merged(WEIGHTS)
    source, target = torch.rand(2, 3 * base.num_parameters())  # five models read, one written

    def textbook() -> None:
        pairs = [(w, expert.state_dict()) for w, expert in zip(WEIGHTS, experts, strict=True)]
        merged = {n: x + sum(w * (tuned[n] - x) for w, tuned in pairs) for n, x in start.items()}
        copy.deepcopy(base).load_state_dict(merged)

    place, first, book, copied = clock(
        5,
        lambda: merger.merged(WEIGHTS, into=model),
        lambda: Merger(base, experts).merged(WEIGHTS),
        textbook,
        lambda: target.copy_(source),
    )
    what, against = "merge in place (CIFAR10, 4 task vectors)", "textbook merge of experts"
    yield row(what, against, place / book, "textbook")
    yield row(what, "copying the same bytes", place / copied, "copy")
    yield row("first merge, to a new model (CIFAR10, 4 experts)", against, first / book)


def folders() -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        base, *experts = places = [Path(folder, str(k)) for k in range(5)]
        for place in places:
            UNet2DModel(**CIFAR).save_pretrained(place)
        files = [next(place.glob("*.safetensors")) for place in places]
        new = (Path(folder, f"merged-{k}") for k in range(6))

        def least() -> None:
            for path, to in zip(files, [Path(folder, "raw"), *[os.devnull] * 4], strict=True):
                with path.open("rb") as source, open(to, "wb") as sink:
                    shutil.copyfileobj(source, sink, 2**20)  # in pieces: at once is slower

        ours, copied = clock(5, lambda: merge_folders(base, experts, WEIGHTS, next(new)), least)
    what, against = "merge_folders (CIFAR10, 4 experts)", "reading and writing the files' bytes"
    yield row(what, against, ours / copied)


def imports() -> Iterator[dict]:
    runs = [partial(subprocess.check_call, [sys.executable, "-c", c]) for c in (LIBRARY, DIFFUSERS)]
    ours, theirs = clock(2, *runs, timer=lambda: sum(os.times()[2:4]))  # children's core-seconds
    yield row("importing the library", "importing diffusers' UNet and pipelines", ours / theirs)


def twenty_steps(threads: int) -> None:
    torch.set_num_threads(threads)
    for _ in zip(range(20), endless(True), strict=False):
        pass


def side_by_side() -> Iterator[dict]:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        calls = [lambda k=k: list(pool.map(twenty_steps, k)) for k in ([1, 1], [2])]
        two, one = clock(3, *calls, timer=time.perf_counter)
    yield row("two trainings of one thread, steps per second", "one of two threads", 2 * one / two)


def main() -> None:
    load, groups = os.getloadavg()[0], (training, sampling, merging, folders, imports, side_by_side)
    table = pd.DataFrame([line for group in groups for line in group()])
    write_csv(ROOT / "figures" / "benchmarks.csv", table)
    shown = table.assign(ratio=table["ratio"].map("{:.2f}".format)).drop(columns=["low", "high"])
    text = (
        f"{markdown(shown.astype(str))}\n\nMeasured on {os.cpu_count()} cores, with torch "
        f"{torch.__version__}, beside other work: load {load:.1f} at the start, "
        f"{os.getloadavg()[0]:.1f} at the end.\n{NOTE}"
    )
    write(ROOT / "figures" / "benchmarks.md", text)
    print(text)


if __name__ == "__main__":
    main()
