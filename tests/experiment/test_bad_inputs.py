"""Wrong inputs, one of a kind: refused with culprit and remedy."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from conftest import TINY as UNET
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from deme_lib.__main__ import main
from deme_lib.diffusion import data, models
from deme_lib.diffusion.data import DataError
from deme_lib.diffusion.models import ModelError
from deme_lib.diffusion.training import decouple
from deme_lib.experiment import parameters
from deme_lib.experiment.parameters import ParameterError
from deme_lib.experiment.store import HISTORY, StoreError, read_json


class CommandFailed(Exception):
    """What a failing command wrote to stderr."""


@dataclass
class Place:
    """Where a row plays: a folder of its own."""

    own: Path

    def file(self, name, content=""):
        path = self.own / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def pipeline(self, **kwargs):
        DDPMPipeline(unet(), DDPMScheduler(1000)).save_pretrained(self.own / "model", **kwargs)
        return self.own / "model"


def unet():
    return UNet2DModel(**UNET).eval()


def split(source, count=1):
    return data.split(str(source), count, 1, 1, 0)


def fits(scheduler):
    models.check_pipeline(DDPMPipeline(unet(), scheduler), 1000, (1, 8, 8))


def command(*arguments):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(a) for a in arguments])
    assert "Traceback" not in errors.getvalue()
    if code:
        raise CommandFailed(errors.getvalue())


ROWS = []


def row(name, error, *words):
    def add(function):
        ROWS.append(pytest.param(function, error, words, id=name))
        return function

    return add


FILES = {
    "an integer as text": ("samples: 1e3", "samples=1000.0", "valid integer"),
    "an octal": ("samples: 0100", "YAML reads 0100 as 64", "write it in digits"),
    "a bare no": ("precision: no", "precision", "'no', 'bf16' or 'fp16'", "needs quotes"),
    "a path for a name": ("experiment: ../up", "experiment", "match pattern"),
    "a long name": (f"experiment: {'x' * 300}", "experiment", "at most 60 characters"),
    "a huge number": (f"batch_size: {10**30}", "batch_size", "less than or equal to"),
    "weights beyond reason": ("merge_weights: [1.0e+30, 1, 1, 1]", "merge_weights", "equal to 100"),
    "too few weights": ("merge_weights: [0.5]", "1 weights for n_ranges=4", "one each"),
    "unknown features": ("features: digits-z", "features='digits-z'", "'digits-a'", "inception"),
    "no comparison": ("primary_merging: [merged]", "'merged'", "write 'a - b'"),
    "a list": ("- 1", "bad.yaml", "flat list of `name: value` lines"),
    "twice": ("n_ranges: 2\nn_ranges: 4", "'n_ranges' twice", "delete one"),
    "no text": (b"\xff\xfe", "bad.yaml", "not valid YAML"),
}
for name, (text, *words) in FILES.items():
    row(f"file: {name}", ParameterError, *words)(
        lambda place, text=text: parameters.load(place.file("bad.yaml", text))
    )
row("file: none", ParameterError, "there are params/")(lambda place: parameters.load(""))


# models


def pipeline(name, *words):
    return row(f"pipeline: {name}", ModelError, *words)


for source in ("/nowhere", "nobody/nothing"):
    pipeline(source, source, "`pretrained`")(lambda _, source=source: models.load_pipeline(source))
pipeline("empty folder", "model_index.json", "save or copy")(
    lambda place: models.load_pipeline(place.own)
)
pipeline("another T", "100 timesteps", "set num_train_timesteps to 100")(
    lambda _: fits(DDPMScheduler(100))
)
pipeline("v-prediction", "v_prediction", "take an epsilon")(
    lambda _: fits(DDPMScheduler(1000, prediction_type="v_prediction"))
)


@pipeline("with code", "scheduler.py", "delete it")
def _(place):
    mark = place.own / "ran"
    place.pipeline()
    place.file("model/scheduler/scheduler.py", f"open({str(mark)!r}, 'w')")
    try:
        models.load_pipeline(place.own / "model")
    finally:
        assert not mark.exists()


@pipeline("a pickle that runs code", "unet", "save or copy")
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


# images and metrics


def images(name, *words):
    return row(f"data: {name}", DataError, *words)


for source in ("params/images", "nobody/nothing"):
    images(source, source, "`dataset`")(lambda place, source=source: split(source))
images("a file", "images.zip", "name an existing folder")(
    lambda place: split(place.file("images.zip"))
)
images("no images", "no image column", "['a', 'b']", "give it one")(
    lambda place: split(place.file("table/train.csv", "a,b\n1,2\n").parent)
)
row("decouple: no images", ValueError, "images must be uint8", "(0, 1, 8, 8)")(
    lambda _: decouple(
        DDPMPipeline(unet(), DDPMScheduler(1000)),
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
        steps=5,
        learning_rate=1e-3,
    )
)
row("history: cut", StoreError, HISTORY, "delete")(
    lambda place: read_json(place.file(HISTORY, "[{"))
)


def line(name, *words):
    return row(f"command: {name}", CommandFailed, *words)


line("no file", "nowhere.yaml", "there are")(lambda _: command("list", "-f", "nowhere.yaml"))
line("a preset for a sweep", "smoke.yaml is no sweep", "params/sweeps")(
    lambda place: command("sweep", "-f", "params/smoke.yaml")
)
line("unknown label", "expert-9of2", "jobs are")(
    lambda place: command("make", "expert-9of2", "-f", "params/smoke.yaml")
)
line("render nothing", "no record", "make reproduce")(lambda place: command("render", place.own))


@pytest.mark.parametrize(("function", "error", "words"), ROWS)
def test_a_wrong_input_is_named_with_its_remedy(function, error, words, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(error) as caught:
        function(Place(tmp_path))
    message = " ".join(str(caught.value).split())
    assert not [word for word in words if word not in message], message
