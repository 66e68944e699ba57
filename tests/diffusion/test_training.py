"""Training: resumable to the bit, reproducible, and honest about failure."""

import copy
import dataclasses
import itertools
import math
import types

import pytest
import torch
from diffusers import DDPMScheduler

from deme_lib.diffusion import training
from deme_lib.diffusion.training import Training, TrainingError, TrainingSpec, to_model_range

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
def images():
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (12, 1, 8, 8), generator=g).to(torch.uint8)


@pytest.fixture
def start(tiny_unet, images):
    """A function: a run from the same weights, ``start(steps=9, checkpoint=..., ...)``."""

    def make(teacher=None, checkpoint=None, checkpoint_every=2, **changes):
        unet = tiny_unet().requires_grad_(True)
        spec = dataclasses.replace(SPEC, **changes)
        return Training(unet, SCHEDULER, images, spec, teacher, "cpu", checkpoint, checkpoint_every)

    return make


def states(run):
    return run.unet.state_dict(), run.ema_unet().state_dict()


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# reproducible


def test_the_same_run_twice_is_identical_whatever_was_drawn_before(start):
    first, second = start(), start()
    steps = list(first)
    torch.randn(7)
    assert list(second) == steps
    assert [s.step for s in steps] == list(range(1, 7))
    assert all(map(equal, states(first), states(second)))


@pytest.mark.parametrize("change", [{"purpose": (0, "other")}, {"purpose": (1, "expert")}])
def test_another_purpose_draws_otherwise(start, change):
    assert next(iter(start())).loss != next(iter(start(**change))).loss


@pytest.mark.parametrize("done", [2, 3, 5])
def test_interrupted_and_resumed_equals_uninterrupted(start, tiny_unet, tmp_path, done):
    whole = start(teacher=tiny_unet(1))
    steps = list(whole)
    file = tmp_path / "checkpoint.safetensors"
    list(itertools.islice(start(teacher=tiny_unet(1), checkpoint=file), done))
    resumed = start(teacher=tiny_unet(1), checkpoint=file)
    saved = done // 2 * 2  # a checkpoint every other step
    assert resumed.position == saved
    assert list(resumed) == steps[saved:]
    assert all(map(equal, states(resumed), states(whole)))
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("name", ["min-snr", "uncertainty"])
def test_a_weighted_run_resumes_exactly(start, tmp_path, name):
    changes = {"loss_weighting": name, "n_tasks": 2, "own_range": range(0, 1000)}
    whole, file = start(**changes), tmp_path / "checkpoint.safetensors"
    steps = list(whole)
    list(itertools.islice(start(checkpoint=file, **changes), 3))
    resumed = start(checkpoint=file, **changes)
    assert resumed.position == 2 and list(resumed) == steps[2:]
    assert all(map(equal, states(resumed), states(whole)))
    if name == "uncertainty":
        assert torch.equal(resumed.uncertainty.weights(), whole.uncertainty.weights())
        assert not torch.equal(whole.uncertainty.weights(), torch.ones(1000))
        assert whole.optimiser.param_groups[1]["lr"] == 1e-2  # the model's schedule is not its


def test_weights_of_one_change_nothing_and_others_do(start):
    plain, flat, p2 = (
        start(),
        start(loss_weighting="min-snr", min_snr_gamma=1e12),
        start(loss_weighting="p2"),
    )
    losses = [[step.loss for step in run] for run in (plain, flat, p2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] != pytest.approx(losses[0], rel=1e-2)


def test_a_finished_run_has_nothing_left_to_do(start, tmp_path):
    first = start(checkpoint=tmp_path / "c")
    list(first)
    again = start(checkpoint=tmp_path / "c")
    assert list(again) == []
    assert all(map(equal, states(again), states(first)))


# what moves


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_is_a_weighted_mean_of_the_weights(start, warmup):
    """m = d m + (1 - d) theta from m = theta_1; with warm-up d rises as (1 + k) / (10 + k)."""
    run, mean = start(ema_decay=0.9, ema_warmup=warmup), None
    for k, _ in enumerate(run):
        now = [w.detach().double().clone() for w in run.unet.parameters()]
        decay = (1 + k) / (10 + k) if warmup else 0.9
        mean = (
            now
            if mean is None
            else [decay * m + (1 - decay) * w for m, w in zip(mean, now, strict=True)]
        )
    raw, ema = states(run)
    for found, expected in zip(run.ema_unet().parameters(), mean, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert not equal(raw, ema)


def test_asking_for_ema_weights_changes_nothing(start):
    run = start()
    next(iter(run))
    before = copy.deepcopy(states(run))
    with torch.no_grad():
        for weight in run.ema_unet().parameters():
            weight.zero_()
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


def test_the_teacher_counts_with_its_weight(start, tiny_unet):
    """At the first step the loss is (Eq. 2) + weight * (Eq. 4): linear in the weight."""
    losses = [next(iter(start(teacher=tiny_unet(1), consistency_weight=w))).loss for w in (0, 1, 3)]
    assert losses[0] == pytest.approx(next(iter(start())).loss)
    assert losses[1] > losses[0]
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)


def test_training_reduces_the_loss(start):
    losses = [s.loss for s in start(steps=150, batch_size=12, final_learning_rate=1e-3)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


# learning rate


@pytest.mark.parametrize("steps", [1, 2, 10, 1001])
def test_the_learning_rate_falls_from_start_to_end(steps):
    spec = dataclasses.replace(SPEC, steps=steps)
    rates = [spec.learning_rate_at(s) for s in range(steps + 1)]
    assert rates[0] == spec.learning_rate
    assert rates[math.ceil(0.8 * steps) :] == pytest.approx(
        [1e-4] * (steps + 1 - math.ceil(0.8 * steps))
    )
    assert all(a >= b for a, b in itertools.pairwise(rates))


def test_equal_rates_are_constant():
    spec = dataclasses.replace(SPEC, final_learning_rate=SPEC.learning_rate)
    assert {spec.learning_rate_at(s) for s in range(spec.steps)} == {SPEC.learning_rate}


def test_the_optimiser_uses_the_rate_that_is_reported(start):
    """AdamW's first step moves a weight by the learning rate, against its gradient's sign."""
    run = start(learning_rate=3e-4, weight_decay=0.0)
    before = run.unet.conv_in.weight.detach().clone()
    step = next(iter(run))
    moved = (run.unet.conv_in.weight.detach() - before).abs()
    assert step.learning_rate == 3e-4
    assert moved.median().item() == pytest.approx(3e-4, rel=0.01)


def test_at_a_rate_of_zero_nothing_moves(start):
    """Of 5 steps, the last is beyond 80 %."""
    run = start(steps=5, final_learning_rate=0.0)
    steps = iter(run)
    next(steps), next(steps), next(steps)
    states_after = []
    for _ in steps:
        states_after.append(copy.deepcopy(run.unet.state_dict()))
    assert equal(*states_after) and run.spec.learning_rate_at(4) == 0


# failure


def test_a_loss_that_is_not_finite_stops_the_run(start, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.safetensors"
    run = start(checkpoint=file)
    steps = iter(run)
    next(steps), next(steps), next(steps)
    kept = file.read_bytes()
    with torch.no_grad():
        run.unet.conv_out.bias.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"0-expert: the loss is nan at step 4 .*0 to 499"):
        next(steps)
    assert file.read_bytes() == kept
    assert start(checkpoint=file).position == 2


def test_a_diverging_run_stops(start):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step 2"):
        list(start(learning_rate=1e30, final_learning_rate=1e30))


def test_a_gradient_that_is_not_finite_stops_the_run(start, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.safetensors"
    run = start(checkpoint=file)
    steps = iter(run)
    next(steps), next(steps)
    kept, before = file.read_bytes(), copy.deepcopy(run.unet.state_dict())
    run.unet.conv_in.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"norm of the gradients is (nan|inf) at step 3.*Lower"):
        next(steps)
    assert equal(run.unet.state_dict(), before) and file.read_bytes() == kept


def test_fp16_may_skip_steps_but_not_for_ever(start, monkeypatch):
    """Its scaler skips steps whose gradients overflow; a run that only skips is refused."""
    run = start(steps=training.MOST_SKIPPED + 3)
    monkeypatch.setattr(run.accelerator, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    monkeypatch.setattr(run.accelerator, "backward", lambda loss: None)
    monkeypatch.setattr(run.accelerator, "scaler", object())
    monkeypatch.setattr(
        run,
        "optimiser",
        types.SimpleNamespace(param_groups=[{}], step=lambda: None, zero_grad=lambda: None),
    )
    steps = []
    with pytest.raises(TrainingError, match="norm of the gradients"):
        steps.extend(step.step for step in run)
    assert len(steps) == run.position == training.MOST_SKIPPED


@pytest.mark.parametrize("at", [1, 5], ids=["before a checkpoint", "at the end"])
@pytest.mark.parametrize("which", ["unet", "ema"])
def test_weights_that_are_not_finite_never_replace_good_ones(start, tmp_path, at, which):
    file = tmp_path / "checkpoint.safetensors"
    run = start(checkpoint=file, checkpoint_every=2 if at == 1 else 5)
    steps = iter(run)
    for _ in range(at):
        next(steps)
    kept = file.read_bytes() if file.exists() else None
    original = run._step

    def step(number):
        loss = original(number)
        weights = list(run.unet.parameters()) if which == "unet" else run.emas[run.spec.ema_decay].shadow_params
        with torch.no_grad():
            weights[0].fill_(math.nan)
        return loss

    run._step = step
    with pytest.raises(TrainingError, match=rf"weight is not finite at step {at + 1} .*0 to 499"):
        list(steps)
    assert (file.read_bytes() if file.exists() else None) == kept


def test_a_checkpoint_of_another_model_is_named(start, tiny_unet, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    list(itertools.islice(start(checkpoint=file), 2))
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors.*delete it"):
        Training(tiny_unet(block_out_channels=(8, 8)), SCHEDULER, None, SPEC, checkpoint=file)


def test_the_model_range_is_minus_one_to_one():
    values = to_model_range(torch.tensor([0, 255], dtype=torch.uint8))
    assert values.tolist() == [-1, 1] and values.dtype == torch.float32
