"""Training: resumable to the bit, reproducible, and honest about failure."""

import copy
import dataclasses
import itertools
import math
import types

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from deme_lib.diffusion import training
from deme_lib.diffusion.training import (
    Training,
    TrainingError,
    TrainingSpec,
    decouple,
    draw,
    finetune,
)
from deme_lib.method.objectives import deme_loss, squared_error
from deme_lib.method.projection import ProjectedUNet2DModel

SCHEDULER = DDPMScheduler(1000)
SPEC = TrainingSpec(
    steps=6,
    purpose=(0, "expert"),
    own_range=range(0, 500),
    learning_rate=1e-3,
    final_learning_rate=1e-4,
    batch_size=4,
    probability=0.3,
)


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


def states(run):
    averages = [run.ema_unet(decay).state_dict() for decay in run.spec.further_ema_decays]
    return [run.unet.state_dict(), run.ema_unet().state_dict(), *averages]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# one telling of a finetuning run


def test_the_losses_written_out_are_the_run_s(tiny_unet, images):
    """Eq. 2 to 6 in sight, as the notebook shows them, equal the run's first loss."""
    pretrained, spec = tiny_unet(), dataclasses.replace(SPEC, consistency_weight=0.7)
    student = ProjectedUNet2DModel.from_stock(pretrained)
    with torch.no_grad():  # so that student and teacher differ
        student.mid_block.projection.weight.mul_(1.5)
    clean, noise, noisy, timesteps = draw(images, SCHEDULER, spec, step=0)
    a = SCHEDULER.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, a.sqrt() * clean + (1 - a).sqrt() * noise)
    with torch.no_grad():
        prediction, target = (m(noisy, timesteps).sample for m in (student, pretrained))
    consistency = squared_error(prediction, target)
    loss = deme_loss(squared_error(prediction, noise), consistency, 0.7)
    assert consistency.min() > 0
    run = Training(student, SCHEDULER, images, spec, pretrained, "cpu")
    assert next(iter(run)).loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_decouple_finetunes_a_copy_per_range(tiny_unet, images, weight):
    pretrained, seen = tiny_unet(), []
    before = copy.deepcopy(pretrained.state_dict())
    experts = decouple(
        DDPMPipeline(pretrained, SCHEDULER), images, n_ranges=2, steps=3, learning_rate=1e-3,
        batch_size=4, consistency_weight=weight, ema_decay=0.9, device="cpu",
        on_step=lambda *told: seen.append(told),
    )  # fmt: skip
    for k, (own, expert) in enumerate(zip((range(500), range(500, 1000)), experts, strict=True)):
        changes = {"steps": 3, "purpose": (0, "expert", k), "own_range": own, "ema_decay": 0.9}
        changes |= {"final_learning_rate": 1e-3, "consistency_weight": weight}
        spec = dataclasses.replace(SPEC, **changes)
        run = finetune(pretrained, SCHEDULER, images, spec, device="cpu")
        assert [(k, s.step, s.loss) for s in run] == seen[3 * k : 3 * k + 3]
        assert equal(run.ema_unet().state_dict(), expert.state_dict())
        assert (run.teacher is None) == (weight == 0)
    assert equal(pretrained.state_dict(), before)


def test_decouple_refuses_what_are_no_images(tiny_unet, images):
    for wrong in (images[:0], images.float(), images[0]):
        with pytest.raises(ValueError, match="images must be uint8"):
            decouple(DDPMPipeline(tiny_unet(), SCHEDULER), wrong, steps=5, learning_rate=1e-3)


# reproducible


@pytest.mark.parametrize("change", [{"purpose": (0, "other")}, {"purpose": (1, "expert")}])
def test_another_purpose_draws_otherwise(start, change):
    assert next(iter(start())).loss != next(iter(start(**change))).loss


@pytest.mark.parametrize(
    ("done", "changes"),
    [
        (2, {}),
        (3, {"further_ema_decays": (0.5, 0.9)}),
        (5, {"ema_warmup": True}),
        (6, {"dropout": 0.5}),
        (3, {"loss_weighting": "min-snr"}),
        (3, {"loss_weighting": "uncertainty", "n_tasks": 2, "own_range": range(1000)}),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(start, tiny_unet, tmp_path, done, changes):
    whole = start(teacher=tiny_unet(1), **changes)
    steps = list(whole)
    file = tmp_path / "checkpoint.safetensors"
    list(itertools.islice(start(teacher=tiny_unet(1), checkpoint=file, **changes), done))
    resumed = start(teacher=tiny_unet(1), checkpoint=file, **changes)
    saved = done // 2 * 2  # a checkpoint every other step
    assert resumed.position == saved
    assert list(resumed) == steps[saved:]
    assert all(map(equal, states(resumed), states(whole)))
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    if whole.uncertainty is not None:
        assert torch.equal(resumed.uncertainty.weights(), whole.uncertainty.weights())
        assert not torch.equal(whole.uncertainty.weights(), torch.ones(1000))
        assert whole.optimiser.param_groups[1]["lr"] == 1e-2  # the model's schedule is not its


def test_weights_of_one_change_nothing_and_others_do(start):
    flat = {"loss_weighting": "min-snr", "min_snr_gamma": 1e12}
    runs = start(), start(**flat), start(loss_weighting="p2")
    losses = [[step.loss for step in run] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] != pytest.approx(losses[0], rel=1e-2)


# what moves


@pytest.mark.parametrize("warmup", [False, True])
def test_averages_are_weighted_means_of_the_weights(start, warmup):
    """m = d m + (1 - d) theta from m = theta_1; with warm-up d rises as (1 + k) / (10 + k)."""
    run = start(ema_decay=0.9, further_ema_decays=(0.5, 0.2), ema_warmup=warmup)
    means = {}
    for k, _ in enumerate(run):
        now = [w.detach().double().clone() for w in run.unet.parameters()]
        for decay in (0.9, 0.5, 0.2):
            d = min(decay, (1 + k) / (10 + k)) if warmup else decay
            before = means.get(decay, now)
            means[decay] = [d * m + (1 - d) * w for m, w in zip(before, now, strict=True)]
    for decay, expected in means.items():
        found = run.ema_unet(None if decay == 0.9 else decay).parameters()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)
    before = copy.deepcopy(states(run))
    assert not equal(*before[:2])
    run.ema_unet().requires_grad_(False).conv_in.weight.zero_()  # a copy: the run keeps its own
    assert all(map(equal, before, states(run)))


def test_the_teacher_does_not_move(start, tiny_unet):
    teacher = tiny_unet(1).requires_grad_(True).train()
    before = copy.deepcopy(teacher.state_dict())
    run = start(teacher=teacher)
    untrained = copy.deepcopy(run.unet.state_dict())
    list(run)
    assert equal(teacher.state_dict(), before) and not equal(run.unet.state_dict(), untrained)
    assert not teacher.training
    assert all(w.grad is None and not w.requires_grad for w in teacher.parameters())


# learning rate


@pytest.mark.parametrize("steps", [1, 10, 1001])
def test_the_learning_rate_falls_from_start_to_end(steps):
    spec = dataclasses.replace(SPEC, steps=steps)
    rates, held = [spec.learning_rate_at(s) for s in range(steps + 1)], math.ceil(0.8 * steps)
    assert rates[0] == spec.learning_rate
    assert rates[held:] == pytest.approx([1e-4] * (steps + 1 - held))
    assert all(a >= b for a, b in itertools.pairwise(rates))


def test_the_optimiser_uses_the_rate_of_the_step(start):
    """AdamW's first step moves a weight by the learning rate, against its gradient's sign."""
    run = start(learning_rate=3e-4, weight_decay=0.0)
    before = run.unet.conv_in.weight.detach().clone()
    next(iter(run))
    moved = (run.unet.conv_in.weight.detach() - before).abs()
    assert moved.median().item() == pytest.approx(3e-4, rel=0.01)


# failure


def nan_weight(owner):
    """After each optimiser step, so that no loss or gradient shows it first."""

    def spoil(run):
        weights = run.parameters if owner == "unet" else run.emas[SPEC.ema_decay].shadow_params
        run.optimiser.optimizer.register_step_post_hook(lambda *_: weights[0].data.fill_(math.nan))

    return spoil


def nan_loss(run):
    run.unet.register_forward_hook(lambda _unet, _given, found: (found[0] * math.nan,))


def infinite_gradient(run):
    run.unet.conv_in.weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize("every", [1, 2], ids=["before a checkpoint", "at the end"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (nan_loss, "0-expert: the loss is nan at step 3 .*0 to 499"),
        (infinite_gradient, "norm of the gradients is (nan|inf) at step 3 .*Lower"),
        (nan_weight("unet"), "weight is not finite"),
        (nan_weight("ema"), "weight is not finite"),
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


def test_fp16_may_skip_steps_but_not_for_ever(start, monkeypatch):
    """Its scaler skips steps whose gradients overflow; a run that only skips is refused."""
    run = start(steps=training.MOST_SKIPPED + 3)
    monkeypatch.setattr(run.accelerator, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    monkeypatch.setattr(run.accelerator, "backward", lambda loss: None)
    monkeypatch.setattr(run.accelerator, "scaler", object())
    nothing = {"param_groups": [{}], "step": lambda: None, "zero_grad": lambda: None}
    monkeypatch.setattr(run, "optimiser", types.SimpleNamespace(**nothing))
    steps = []
    with pytest.raises(TrainingError, match="norm of the gradients"):
        steps.extend(step.step for step in run)
    assert len(steps) == run.position == training.MOST_SKIPPED


def test_a_checkpoint_of_another_model_is_named(start, tiny_unet, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    list(itertools.islice(start(checkpoint=file), 2))
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors.*delete it"):
        Training(tiny_unet(block_out_channels=(8, 8)), SCHEDULER, None, SPEC, checkpoint=file)


@pytest.mark.parametrize(
    ("machine", "native"), [("x86_64", False), ("x86_64", True), ("arm64", False)]
)
def test_bf16_is_refused_where_it_is_emulated(start, monkeypatch, machine, native):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    if machine == "x86_64" and not native:
        with pytest.raises(TrainingError, match="set precision to 'no'"):
            start(precision="bf16")
    else:
        assert math.isfinite(next(iter(start(precision="bf16"))).loss)
