"""Wrong inputs of every kind: each is refused with its name and a remedy, and nothing changes."""

import contextlib
import hashlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import TINY as UNET
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import save_file
from test_stages import TINY

from deme_lib import ROOT
from deme_lib.__main__ import main
from deme_lib.diffusion import data, metrics, models, sampling
from deme_lib.diffusion.data import DataError
from deme_lib.diffusion.merged import merge_experts
from deme_lib.diffusion.metrics import MetricError
from deme_lib.diffusion.models import ModelError
from deme_lib.diffusion.training import Training, TrainingError, TrainingSpec, decouple
from deme_lib.experiment import parameters, recipes, stages
from deme_lib.experiment.parameters import ParameterError
from deme_lib.experiment.store import CHECKPOINT, Recipe, Store, StoreError
from deme_lib.method.ensembles import RoutedEnsemble, WeightedEnsemble, averaged_ensemble
from deme_lib.method.timesteps import split_timesteps
from deme_lib.report import render


class CommandFailed(Exception):
    """What a failing command wrote to stderr."""


@dataclass
class Place:
    """Where a row plays: a prepared run folder, and a folder of its own."""

    runs: Path
    own: Path

    def preset(self, **changes):
        values = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text()) | TINY
        values |= {"runs_dir": str(self.runs)} | changes
        return self.file("mine.yaml", yaml.safe_dump(values))

    def file(self, name, content=""):
        path = self.own / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def pipeline(self, **kwargs):
        DDPMPipeline(unet(), DDPMScheduler(1000)).save_pretrained(self.own / "model", **kwargs)
        return self.own / "model"

    def images(self, sizes):
        for i, size in enumerate(sizes):
            path = self.own / "images" / "train" / "0" / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((size, size), i, np.uint8)).save(path)
        return self.own / "images"


def unet(seed=0, **config):
    torch.manual_seed(seed)
    return UNet2DModel(**UNET | config).eval()


def images(*shape, dtype=torch.uint8):
    return torch.zeros(*(shape or (4, 1, 8, 8)), dtype=dtype)


def pixels(count):
    shape = (count, 1, 8, 8)
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    return metrics.extract(noise.to(torch.uint8), metrics.PIXELS)


def split(source, count=1):
    return data.split(str(source), count, 1, 1, 0)


def command(*arguments):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
    assert "Traceback" not in errors.getvalue()
    if code:
        raise CommandFailed(errors.getvalue())


ROWS = []


def row(name, error, *words):
    def add(function):
        ROWS.append(pytest.param(function, error, words, id=name))
        return function

    return add


def parameter(values, *words):
    """A row for a parameter file with one wrong value."""
    name = ", ".join(f"{k}={v!r}" for k, v in values.items())
    row(name, ParameterError, *words)(lambda place: parameters.check(values, "mine.yaml"))


def file(name, text, *words):
    """A row for a file that is no parameter file."""
    row(f"file: {name}", ParameterError, "bad.yaml", *words)(
        lambda place: parameters.load(place.file("bad.yaml", text))
    )


parameter({"n_rangs": 4}, "n_rangs", "did you mean 'n_ranges'")
parameter({"finetune_lr": "1e-4"}, "finetune_lr", "write 0.0001")
parameter({"precision": False}, "precision", "'no', 'bf16' or 'fp16'")
parameter({"device": "gpu"}, "device", "'auto', 'cpu' or 'cuda'")
parameter({"experiment": "../up"}, "experiment", "match pattern")
parameter({"runs_dir": ""}, "runs_dir", "at least 1 character")
parameter({"split_seed": 2**32}, "split_seed", "less than 4294967296")
parameter({"features": "digits-z"}, "features='digits-z'", "'digits-a', 'digits-b'", "inception")
parameter({"features": ""}, "features=''", "give one of")
parameter({"second_features": "digits-a"}, "second_features", "must differ")
parameter({"merge_weights": "median"}, "merge_weights", '"uniform", "search" or a list')
parameter({"merge_weights": "[1, 2"}, "merge_weights", "is not a list")
parameter({"merge_weights": [0.5]}, "merge_weights", "1 weights for n_ranges=4: one each")
parameter({"merge_weights": [math.nan] * 4}, "merge_weights", "finite")
parameter({"primary_merging": ["merged"]}, "'merged'", "write 'a - b'")
parameter({"model_channels": [12]}, "model_channels", "multiples of 8")
parameter({"ema_decay": 0.9999}, "ema_decay", "at most 0.996")
parameter({"kid_subset_size": 999}, "kid_subset_size", "lower it")
parameter({"is_splits": 5000}, "is_splits", "lower it")
parameter({"search_low": 3.0}, "search_low", "swap")
parameter({"search_step": 9.0}, "search_step", "lower it")
parameter({"search_candidates": 4}, "search_candidates", "at least n_ranges + 1 = 5")
parameter({"sampling_steps": 2000}, "sampling_steps", "lower it")
parameter({"loss_bins": 2000}, "loss_bins", "lower it")
parameter({"acceptance_samples": 8}, "acceptance_samples", "at least samples")
parameter({"n_ranges": 2000, "search_candidates": 2001}, "n_ranges", "lower it")
parameter({"pretrain_steps": 3}, "pretrain_steps", "at least 4")

file("empty", "", "flat list")
file("nested", "finetuning:\n  n_ranges: 4\n", "unknown parameter 'finetuning'", "did you mean")
file("a list", "- 1\n", "flat list of `name: value` lines")
file("twice", "n_ranges: 2\nn_ranges: 4\n", "'n_ranges' twice", "delete one")
file("no text", b"\xff\xfe", "not valid YAML")
file("code", "n_ranges: !!python/object/apply:os.getcwd []\n", "not valid YAML", "python/object")


@row("file: a folder", ParameterError, "bad.yaml", "there are params/")
def _(place):
    (place.own / "bad.yaml").mkdir()
    parameters.load(place.own / "bad.yaml")


# models


@row("pipeline: no folder", ModelError, "no folder /nowhere", "existing", "`pretrained`")
def _(place):
    models.load_pipeline("/nowhere")


@row("pipeline: a file", ModelError, "model.ckpt", "existing diffusers folder")
def _(place):
    models.load_pipeline(place.file("model.ckpt"))


@row("pipeline: hub, offline", ModelError, "nobody/nothing", "copy that repository")
def _(place):
    models.load_pipeline("nobody/nothing")


@row("pipeline: empty folder", ModelError, "config.json", "copy it there")
def _(place):
    models.load_pipeline(place.own)


@row("pipeline: cut weights", ModelError, "unet", "save or copy")
def _(place):
    file = place.pipeline() / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    models.load_pipeline(place.own / "model")


@row("pipeline: weights of another shape", ModelError, "unet", "save or copy")
def _(place):
    config = place.pipeline() / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_per_block": 2}))
    models.load_pipeline(place.own / "model")


@row("pipeline: foreign class", ModelError, "UNet2DConditionModel", "works on UNet2DModel")
def _(place):
    config = place.pipeline() / "unet" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"_class_name": "UNet2DConditionModel"})
    )
    models.load_pipeline(place.own / "model")


@row("pipeline: with code", ModelError, "scheduler.py", "delete it")
def _(place):
    place.pipeline()
    mark = place.own / "ran"
    place.file("model/scheduler/scheduler.py", f"open({str(mark)!r}, 'w')")
    try:
        models.load_pipeline(place.own / "model")
    finally:
        assert not mark.exists()


@row("pipeline: a pickle that runs code", ModelError, "unet", "save or copy")
def _(place):
    class Payload:
        def __reduce__(self):
            return (open, (str(place.own / "ran"), "w"))

    folder = place.pipeline(safe_serialization=False)
    torch.save({"a": Payload()}, folder / "unet" / "diffusion_pytorch_model.bin")
    try:
        models.load_pipeline(folder)
    finally:
        assert not (place.own / "ran").exists()


@row("model: too many halvings", ModelError, "8 pixels", "fewer model_channels")
def _(place):
    models.new_unet(1, 8, [8] * 5, 1, 0)


def misfit(name, *words, unet_config=None, **scheduler):
    def check(place):
        pipeline = DDPMPipeline(unet(**unet_config or {}), DDPMScheduler(1000, **scheduler))
        models.check_pipeline(pipeline, 1000, (1, 8, 8))

    row(f"pipeline: {name}", ModelError, *words)(check)


misfit("v-prediction", "v_prediction", "take an epsilon", prediction_type="v_prediction")
misfit("learned variance", "2 out", "as many out as in", unet_config={"out_channels": 2})
misfit("classes", "class-conditional", "unconditional", unet_config={"num_class_embeds": 2})
misfit("size", "(1, 16, 16)", "(1, 8, 8)", "take a model", unet_config={"sample_size": 16})


@row("pipeline: another T", ModelError, "100 timesteps", "set num_train_timesteps to 100")
def _(place):
    models.check_pipeline(DDPMPipeline(unet(), DDPMScheduler(100)), 1000, (1, 8, 8))


# images


@row("data: no folder", DataError, "no folder /nowhere", "existing", "`dataset`")
def _(place):
    split("/nowhere")


@row("data: a file", DataError, "images.zip", "name an existing folder")
def _(place):
    split(place.file("images.zip"))


@row("data: hub, offline", DataError, "nobody/nothing", "copy it to a folder")
def _(place):
    split("nobody/nothing")


@row("data: empty folder", DataError, "bad", "It should hold parquet files, or images")
def _(place):
    (place.own / "bad").mkdir()
    split(place.own / "bad")


@row("data: a script", DataError, "script", "no code")
def _(place):
    mark = place.own / "ran"
    place.file("script/script.py", f"import datasets\nopen({str(mark)!r}, 'w')\n")
    try:
        split(place.own / "script")
    finally:
        assert not mark.exists()


@row("data: no images", DataError, "no image column", "['a', 'b']", "give it one")
def _(place):
    place.file("table/train.csv", "a,b\n1,2\n")
    split(place.own / "table")


@row("data: too few", DataError, "4 images", "lower train_images, search_images")
def _(place):
    split(place.images([8] * 4), count=9)


@row("data: sizes", DataError, "(1, 9, 9)", "make them alike")
def _(place):
    split(place.images([8, 9, 8, 9]), count=2)


@row("data: unreadable image", DataError, "cannot be read", ".png", "replace it")
def _(place):
    for path in place.images([8] * 3).rglob("*.png"):
        path.write_bytes(path.read_bytes()[:40])
    split(place.own / "images")


@row("data: another size than the model's", ModelError, "(1, 8, 8)", "take a model or a data set")
def _(place):
    p = parameters.load(
        place.preset(), dataset=str(place.images([16] * 60)), train_images=40, allow_long=True
    )
    p = p.model_copy(update={"pretrained": str(place.pipeline()), "runs_dir": str(place.own)})
    stages.make(recipes.baseline(p), p)


# metrics


def metric(name, *words):
    return row(f"metric: {name}", MetricError, *words)


@metric("float images", "torch.float32", "uint8 images [n, C, H, W]")
def _(place):
    metrics.extract(images(dtype=torch.float32), "digits-a")


@metric("no images", "(0, 1, 8, 8)", "take uint8 images")
def _(place):
    metrics.extract(images(0, 1, 8, 8), "digits-a")


@metric("images of another size", "(1, 16, 16)", "digits-a", "set features")
def _(place):
    metrics.extract(images(4, 1, 16, 16), "digits-a")


@metric("unknown features", "digits-z", "there are digits-a")
def _(place):
    metrics.extract(images(), "digits-z")


@metric("absent Inception", "nowhere.pth", "`inception_weights`")
def _(place):
    metrics.extract(images(), "inception", str(place.own / "nowhere.pth"))


@metric("KID subset", "subsets of 9", "lower kid_subset_size")
def _(place):
    metrics.kid(pixels(4), pixels(4), 9, 1)


@metric("one image", "at least 2 images, got 1")
def _(place):
    metrics.frechet(pixels(1), pixels(4))


@metric("IS of pixels", "needs class probabilities")
def _(place):
    metrics.inception_score(pixels(4), 1)


@metric("precision of three", "at least 4 images")
def _(place):
    metrics.precision_recall(pixels(3), pixels(4))


# combining, sampling, training


@row("merge: weights", ValueError, "1 merge weights for 2 experts", "give one an expert")
def _(place):
    merge_experts(unet(), [unet(1), unet(2)], [0.5])


@row("merge: no experts", ValueError, "nothing to merge", "at least one expert")
def _(place):
    merge_experts(unet(), [], [])


@row("merge: nan", ValueError, "nan", "must be finite")
def _(place):
    merge_experts(unet(), [unet(1)], [math.nan])


@row("merge: another architecture", ValueError, "conv_in.weight", "different architectures")
def _(place):
    merge_experts(unet(), [unet(1, in_channels=3, out_channels=1)], [1.0])


@row("ensemble: ranges", ValueError, "2 experts for 3 ranges", "give one a range")
def _(place):
    RoutedEnsemble([unet(), unet()], split_timesteps(3, 1000))


@row("ensemble: weights", ValueError, "1 weights for 2 members", "give one each")
def _(place):
    WeightedEnsemble([unet(), unet()], [1.0])


@row("ensemble: nobody", ValueError, "at least one member")
def _(place):
    averaged_ensemble([])


@row("timesteps: no ranges", ValueError, "n_ranges=0", "choose between 1 and 1000")
def _(place):
    split_timesteps(0, 1000)


@row("sampling: no images", ValueError, "count=0", "give 1 or more")
def _(place):
    sampling.sample(unet(), DDPMScheduler(1000), 0, steps=2, purpose=("x", 0))


@row("decouple: no steps", ValueError, "steps=0", "give another")
def _(place):
    pipeline = DDPMPipeline(unet(), DDPMScheduler(1000))
    decouple(pipeline, images(), steps=0, learning_rate=1e-3, device="cpu")


@row("decouple: no images", ValueError, "images must be uint8", "(0, 1, 8, 8)")
def _(place):
    pipeline = DDPMPipeline(unet(), DDPMScheduler(1000))
    decouple(pipeline, images(0, 1, 8, 8), steps=5, learning_rate=1e-3)


def train(checkpoint):
    spec = TrainingSpec(2, ("x",), range(1000), 1e-3, 1e-3, 2)
    list(Training(unet(), DDPMScheduler(1000), images(), spec, None, "cpu", checkpoint))


@row("checkpoint: cut", TrainingError, CHECKPOINT, "delete it")
def _(place):
    train(place.file(CHECKPOINT, b"cut"))


@row("checkpoint: of another model", TrainingError, CHECKPOINT, "delete it")
def _(place):
    save_file({"unet.other": torch.zeros(1)}, place.own / CHECKPOINT, {"position": "1"})
    train(place.own / CHECKPOINT)


# stored artefacts, command lines


@row("store: a label that leaves", StoreError, "'../up'", "use letters")
def _(place):
    Recipe("data", "../up", {}, {})


@row("store: nothing there", StoreError, "nothing-", "deme_lib make nothing")
def _(place):
    Store(place.runs).load(Recipe("data", "nothing", {}, {}))


@row("readme: no tables", FileNotFoundError, "ablation1.md", "deme_lib render")
def _(place):
    render.update_readme(place.file("README.md"), place.own)


def line(name, *words, arguments):
    row(f"command: {name}", CommandFailed, *words)(lambda place: command(*arguments(place)))


line("nothing", "required: command", arguments=lambda place: [])
line("unknown", "invalid choice: 'mkae'", "'make'", arguments=lambda place: ["mkae"])
line("no label", "required:", arguments=lambda place: ["make"])
line("no file", "nowhere.yaml", "there are", arguments=lambda _: ["list", "-f", "nowhere.yaml"])
line("render nothing", "metrics.csv", "papermill", arguments=lambda p: ["render", p.own])
line("readme of nothing", "ablation1.md", "render", arguments=lambda p: ["readme", p.own])
line(
    "unknown label",
    "expert-9of2",
    "has data",
    arguments=lambda place: ["make", "expert-9of2", "-f", place.preset()],
)
line(
    "a label that leaves",
    "../up",
    "has data",
    arguments=lambda place: ["make", "../up", "-f", place.preset()],
)


@row("command: a runs folder below a file", CommandFailed, "ResourceError", "set runs_dir")
def _(place):
    runs = place.file("file") / "runs"
    command("make", "data", "-f", place.preset(runs_dir=str(runs)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder that holds data and a pretrained model."""
    folder = tmp_path_factory.mktemp("runs")
    p = parameters.load("params/smoke.yaml", **TINY | {"runs_dir": str(folder)})
    stages.make(recipes.baseline(p), p)
    return folder


def snapshot(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("function", "error", "words"), ROWS)
def test_a_wrong_input_is_named_with_its_remedy(
    function, error, words, runs, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = snapshot(runs)
    with pytest.raises(error) as caught:
        function(Place(runs, tmp_path))
    message = " ".join(str(caught.value).split())
    assert not [word for word in words if word not in message], message
    assert snapshot(runs) == before


def test_there_are_fifty_of_them():
    assert len(ROWS) >= 50
