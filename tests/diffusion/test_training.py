"""Training: resumable to the bit, reproducible, and honest about failure."""

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler
from tiny_models import CALL, SPEC, equal, same

from deme_lib.diffusion import decouple as decoupling
from deme_lib.diffusion import training
from deme_lib.diffusion.decouple import decouple
from deme_lib.diffusion.denoisers import ArgumentError
from deme_lib.diffusion.models import ModelError, load_unet
from deme_lib.diffusion.training import Training, TrainingError, draw, finetune
from deme_lib.method.ensembles import RoutedEnsemble
from deme_lib.method.objectives import nash_weights, squared_error

SCHEDULER = DDPMScheduler(1000)


@pytest.fixture
def start(tiny_unet, images):
    """A function: a run from the same weights, ``start(steps=9, checkpoint=..., ...)``."""

    def make(teacher=None, checkpoint=None, checkpoint_every=2, dropout=0.0, **changes):
        unet = tiny_unet().requires_grad_(True)
        for module in unet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        spec = dataclasses.replace(SPEC, **changes)
        return Training(unet, SCHEDULER, images, spec, teacher, "cpu", checkpoint, checkpoint_every)

    return make


@pytest.fixture
def call(tiny_unet, images):
    """A function: ``decouple`` with few steps, of two ranges."""

    def make(unet=None, scheduler=SCHEDULER, **changes):
        unet = (unet or tiny_unet()).requires_grad_(True)
        return decouple(DDPMPipeline(unet, scheduler), **CALL | {"images": images} | changes)

    return make


def states(run):
    return [run.model.state_dict(), run.ema_unet().state_dict()]


# an expert a range


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_decouple_finetunes_a_copy_per_range(tiny_unet, images, call, weight, capsys):
    pretrained = tiny_unet()
    before = copy.deepcopy(pretrained.state_dict())
    given = {"channel_projection": bool(weight), "consistency_weight": weight, "ema_decay": 0.9}
    experts = call(pretrained, progress=True, **given)
    shown = capsys.readouterr().err
    assert "expert 0, t 0 to 499: 100%" in shown and "expert 1, t 500 to 999: 100%" in shown
    for k, own in enumerate((range(500), range(500, 1000))):
        changes = {"steps": 3, "purpose": (0, "expert", k), "own_range": own, "ema_decay": 0.9}
        changes |= {"final_learning_rate": 0.0, "consistency_weight": weight}
        spec = dataclasses.replace(SPEC, **changes)
        how = {"channel_projection": bool(weight), "device": "cpu"}
        list(run := finetune(pretrained, SCHEDULER, images, spec, **how))
        assert same([run.ema_unet()], [experts[k]]) and (run.teacher is None) == (weight == 0)
    assert equal(pretrained, before)
    assert same(call(pretrained, ranges=[1, 0], **given), experts[::-1])
    assert not capsys.readouterr().err


def test_in_jupyter_a_full_bar_is_taken_away(call, monkeypatch, capsys):
    """It would stand in the notebook for ever, and on stderr it would be red."""
    monkeypatch.setenv("JPY_SESSION_NAME", "01.ipynb")
    call(ranges=[0], progress=True)
    shown = capsys.readouterr()
    assert "expert 0" in shown.out and shown.out.split("\r")[-2].isspace() and not shown.err


# what is refused before training


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": np.zeros((6, 1, 8, 8), np.uint8)}, r"images: ndarray, give a torch\.Tensor"),
        ({"images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8)}, r"images: \(0, 1, 8, 8\)"),
        ({"images": torch.tensor(3.0)}, r"images: \(\), give a torch\.Tensor"),
        ({"images": torch.zeros(6, 1, 8, 8).long()}, r"images are torch\.int64"),
        ({"steps": 0}, "steps\n.*greater than 0"),
        ({"learning_rate": math.nan}, "learning_rate\n.*finite"),
        ({"probability": 1.1}, "probability\n.*less than or equal to 1"),
        ({"precision": "half"}, "precision\n.*'no', 'bf16' or 'fp16'"),
        ({"precision": "fp16", "device": "cpu"}, "fp16 trains on a GPU alone"),
        ({"ranges": [0, 2]}, r"ranges=\[0, 2\]: give some of 0 to 1"),
        ({"ranges": []}, r"ranges=\[\]: give some of 0 to 1"),
        ({"n_ranges": 1001}, "n_ranges=1001"),
        ({"checkpoint_every": 0}, "checkpoint_every=0: give 1 or more"),
    ],
)
def test_what_cannot_be_trained_with_is_named(call, changes, words):
    with pytest.raises(ValueError, match=words):
        call(**changes)


def test_models_that_cannot_be_trained_are_named(tiny_unet, images, call):
    with pytest.raises(ModelError, match=r"fails on \(1, 7, 7\).*halve"):
        call(tiny_unet(sample_size=7), images=images[..., :7, :7])
    tied = tiny_unet()
    tied.mid_block.resnets[0].conv1 = tied.mid_block.resnets[1].conv1
    with pytest.raises(ValueError, match=r"mid_block.*tied"):
        call(tied)


# reproducible


@pytest.mark.parametrize("change", [{"purpose": (0, "other")}, {"purpose": (1, "expert")}])
def test_another_purpose_draws_otherwise(start, change):
    assert next(iter(start())).loss != next(iter(start(**change))).loss


@pytest.mark.parametrize(
    ("done", "changes"),
    [
        (2, {}),
        (5, {"ema_warmup": True}),
        (6, {"dropout": 0.5}),
        (3, {"loss_weighting": "min-snr"}),
        (3, {"loss_weighting": "uncertainty", "n_tasks": 2, "own_range": range(1000)}),
        (3, {"loss_weighting": "nash", "n_tasks": 2, "own_range": range(1000), "batch_size": 16}),
        (3, {"loss_weighting": "distilled"}),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    start, tiny_unet, tmp_path, monkeypatch, done, changes
):
    monkeypatch.setattr(training, "NASH_EVERY", 2)
    whole = start(teacher=tiny_unet(1), **changes)
    steps = list(whole)
    file = tmp_path / "checkpoint.safetensors"
    stopped = start(teacher=tiny_unet(1), checkpoint=file, **changes)
    for step in itertools.islice(stopped, done):
        stopped.history.append(step._asdict())
    resumed = start(teacher=tiny_unet(1), checkpoint=file, **changes)
    saved = done // 2 * 2  # a checkpoint every other step, before the caller sees it
    assert resumed.position == saved
    assert resumed.history == [step._asdict() for step in steps[: saved - 1]]
    assert list(resumed) == steps[saved:]
    assert all(map(equal, states(resumed), states(whole)))
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    assert whole.optimiser.param_groups[0]["lr"] == whole.spec.learning_rate_at(5)  # of the last
    if whole.learnt is not None:
        assert torch.equal(resumed.learnt.weights(), whole.learnt.weights())
        assert not torch.equal(whole.learnt.weights(), torch.ones(1000))
    if changes.get("loss_weighting") == "uncertainty":
        assert whole.optimiser.param_groups[1]["lr"] == 1e-2  # the model's schedule is not its


@pytest.mark.parametrize(
    ("place", "calls"),
    [((Training, "_step"), 6), ((decoupling.os, "replace"), 5)],
    ids=["steps", "renamings"],
)
def test_a_stopped_decouple_goes_on_where_it_was(call, tmp_path, monkeypatch, place, calls):
    """Before each of its steps, of its renamings: it ends the same, and trains nothing twice."""
    true, whole = getattr(*place), call()
    for n in range(calls + 1):
        given, left = {"folder": tmp_path / str(n), "checkpoint_every": 2}, iter(range(n))

        def stop(*args, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return true(*args)

        with monkeypatch.context() as patch:
            patch.setattr(*place, stop)
            if n < calls:
                with pytest.raises(KeyboardInterrupt):
                    call(**given)
            else:
                call(**given)
        assert same(call(**given), whole)
    monkeypatch.setattr(decoupling, "finetune", None)
    assert same(call(**given), whole)
    assert same([load_unet(given["folder"] / "expert-1")], whole[1:])


def test_a_folder_of_another_call_is_refused(call, tiny_unet, images, tmp_path):
    call(folder=tmp_path, ranges=[1])
    call(folder=tmp_path, ranges=[0])
    for name, changes in {
        '"steps": 4': {"steps": 4},
        "consistency_weight": {"consistency_weight": 0.5},
        "channel_projection": {"channel_projection": False},
        "model": {"unet": tiny_unet(1)},
        "noise_schedule": {"scheduler": DDPMScheduler(beta_end=0.01)},
        "noise": {"scheduler": DDPMScheduler(prediction_type="sample")},
        "images": {"images": images.flip(0)},
    }.items():
        with pytest.raises(ArgumentError, match=rf"another call, without .*{name}.*empty folder"):
            call(folder=tmp_path, **changes)


# what moves


def test_weights_of_one_change_nothing_and_others_do(start):
    flat = {"loss_weighting": "min-snr", "min_snr_gamma": 1e12}
    runs = start(), start(**flat), start(loss_weighting="p2")
    losses = [[step.loss for step in run] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] != pytest.approx(losses[0], rel=1e-2)


def test_a_distilled_copy_learns_its_teacher_and_not_the_noise(start, tiny_unet, images):
    """Taught by what it is, its loss is 0; by another model, it comes nearer to that one."""
    spec = {"loss_weighting": "distilled", "weight_decay": 0.0}
    assert next(iter(start(tiny_unet(), **spec))).loss == 0
    losses = [step.loss for step in start(tiny_unet(1), steps=60, **spec)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    own = tiny_unet().requires_grad_(True)
    for refused in (
        lambda: start(**spec),
        lambda: start(tiny_unet(1), **spec, consistency_weight=0.0),
        lambda: finetune(own, SCHEDULER, images, dataclasses.replace(SPEC, **spec), device="cpu"),
    ):
        with pytest.raises(ArgumentError, match="needs a teacher"):
            refused()
    with pytest.raises(ArgumentError, match="the teacher holds what is trained"):
        Training(own, SCHEDULER, images, SPEC, RoutedEnsemble([own], [range(1000)]), "cpu")


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_nash_bargains_by_the_gradients_of_each_range(start, monkeypatch, scale):
    """The same weights from one backward pass a range, whatever scales an fp16 loss."""
    spec = {"loss_weighting": "nash", "n_tasks": 2, "own_range": range(1000), "batch_size": 16}
    run, twin = start(**spec), start(**spec)
    batch = draw(run.data[0], run.scheduler, run.spec, 0)
    losses = squared_error(twin.model(batch.noisy, batch.timesteps).sample, batch.target)
    gradients = []
    for own in (batch.timesteps < 500, batch.timesteps >= 500):
        twin.model.zero_grad()
        losses[own].mean().backward(retain_graph=True)
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters]))
    gram = torch.stack(gradients).double()
    monkeypatch.setattr(run, "scaler", SimpleNamespace(get_scale=lambda: scale))
    next(iter(run))
    expected = nash_weights(gram @ gram.T).float()
    torch.testing.assert_close(run.learnt.alpha, expected, rtol=1e-4, atol=0)
    assert abs(expected[0] - 1) > 0.01
    for wrong in ({"batch_size": 15}, {"own_range": range(999)}):
        with pytest.raises(ArgumentError, match="all timesteps, by batches of 16"):
            start(**spec | wrong)


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_a_weighted_mean_of_the_weights(start, warmup):
    """m = d m + (1 - d) theta from m = theta_1; with warm-up d rises as (1 + k) / (10 + k)."""
    run, mean = start(ema_decay=0.9, ema_warmup=warmup), None
    for k, _ in enumerate(run):
        now = [w.detach().double().clone() for w in run.model.parameters()]
        d = min(0.9, (1 + k) / (10 + k)) if warmup else 0.9
        mean = [d * m + (1 - d) * w for m, w in zip(mean or now, now, strict=True)]
    for found, expected in zip(run.ema_unet().parameters(), mean, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    before = copy.deepcopy(states(run))
    assert not equal(*before)
    run.ema_unet().requires_grad_(False).conv_in.weight.zero_()  # a copy: the run keeps its own
    assert all(map(equal, before, states(run)))


def test_the_teacher_does_not_move(start, tiny_unet):
    teacher = tiny_unet(1).requires_grad_(True).train()
    before = copy.deepcopy(teacher.state_dict())
    run = start(teacher=teacher)
    untrained = copy.deepcopy(run.model.state_dict())
    list(run)
    assert equal(teacher, before) and not equal(run.model, untrained)
    assert not teacher.training
    assert all(w.grad is None and not w.requires_grad for w in teacher.parameters())


@pytest.mark.parametrize("steps", [1, 10, 1001])
def test_the_learning_rate_falls_from_start_to_end(steps):
    spec = dataclasses.replace(SPEC, steps=steps, held=0.2)
    rates, held = [spec.learning_rate_at(s) for s in range(steps + 1)], math.ceil(0.8 * steps)
    assert rates[0] == spec.learning_rate
    assert rates[held:] == pytest.approx([1e-4] * (steps + 1 - held))
    assert all(a >= b for a, b in itertools.pairwise(rates))


def test_what_is_frozen_stays_and_checkpointing_too(tiny_unet, images):
    pretrained = tiny_unet()
    pretrained.conv_out.requires_grad_(True)
    pretrained.enable_gradient_checkpointing()
    run = finetune(pretrained, SCHEDULER, images, SPEC, device="cpu")
    trained = {name for name in run.trained if "projection" not in name}
    assert trained == {"conv_out.weight", "conv_out.bias"} and len(run.trained) == 2 + 5
    assert run.model.is_gradient_checkpointing
    list(itertools.islice(run, 2))
    assert equal(
        {n: t for n, t in run.ema_unet().state_dict().items() if n not in run.trained},
        {n: t for n, t in pretrained.state_dict().items() if n not in run.trained},
    )


def test_the_caller_s_process_stays_as_it_was(start, call):
    """Its random numbers, also with dropout, and its own Accelerator."""
    own = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    run = start(dropout=0.5)
    state = torch.random.get_rng_state()
    list(run)
    assert torch.equal(torch.random.get_rng_state(), state)
    call(ranges=[0])
    assert (own.mixed_precision, own.gradient_accumulation_steps) == ("bf16", 3)
    assert Accelerator(cpu=True, mixed_precision="bf16").state is not None


def test_latents_may_carry_a_graph(call, tiny_unet):
    latents = (torch.rand(6, 1, 8, 8) * torch.ones(1, requires_grad=True)).exp()
    assert len(call(images=latents, ranges=[0])) == 1


# failure


def nan_weight(run):
    """After the optimiser's step, so that no loss or gradient shows it first."""
    weight = run.parameters[0].data
    run.optimiser.optimizer.register_step_post_hook(lambda *_: weight.fill_(math.nan))


def nan_loss(run):
    run.model.register_forward_hook(lambda _unet, _given, found: (found[0] * math.nan,))


def infinite_gradient(run):
    run.model.conv_in.weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize("every", [1, 2], ids=["before a checkpoint", "at the end"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (nan_loss, "0-expert: the loss is nan at step 3 .*0 to 499"),
        (infinite_gradient, "norm of the gradients is (nan|inf) at step 3 .*Lower"),
        (nan_weight, "weight is not finite"),
    ],
)
def test_what_is_not_finite_never_replaces_what_is(start, tmp_path, every, spoil, words):
    """Of three steps two are kept, and the third goes wrong."""
    file = tmp_path / "checkpoint.safetensors"
    run = start(checkpoint=file, checkpoint_every=every, steps=3)
    taken = iter(run)
    next(taken), next(taken)
    kept = file.read_bytes()
    spoil(run)
    with pytest.raises(TrainingError, match=words):
        list(taken)
    assert file.read_bytes() == kept and start(checkpoint=file).position == 2


def test_fp16_may_skip_steps_while_its_scale_can_fall(start, monkeypatch):
    run, scales = start(), [2.0**16, 1.0, 2.0**-20]
    run.scaler, own = SimpleNamespace(get_scale=lambda: scales.pop(0)), run.accelerate.accelerator
    monkeypatch.setattr(own, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(TrainingError, match="norm of the gradients is inf at step 3"):
        list(run)


def test_a_checkpoint_of_another_model_is_named(start, tiny_unet, images, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    list(itertools.islice(start(checkpoint=file), 2))
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors.*other weights.*delete it"):
        other = tiny_unet(layers_per_block=2).requires_grad_(True)
        Training(other, SCHEDULER, images, SPEC, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors is damaged.*delete it"):
        start(checkpoint=file)
