"""Routed and weighted ensembles (paper Eq. 7 and its rivals)."""

import copy

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import nn

from deme_lib.method.ensembles import (
    RoutedEnsemble,
    WeightedEnsemble,
    averaged_ensemble,
    output_space_merge,
)
from deme_lib.method.timesteps import split_timesteps

RANGES = split_timesteps(4, 1000)


class Denoiser(nn.Module):
    """eps(x, t) = factor x + t / 1000; remembers the timesteps it was asked for."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.asked = factor, []

    def forward(self, sample, timestep, return_dict=True):
        assert not return_dict
        assert timestep.shape == sample.shape[:1]
        self.asked += timestep.tolist()
        return (self.factor * sample + timestep.view(-1, 1, 1, 1) / 1000,)


@pytest.fixture
def experts(tiny_unet):
    return [tiny_unet(seed) for seed in range(4)]


@torch.no_grad()
def predict(denoiser, sample, timesteps):
    return denoiser(sample, timesteps).sample


def kinds(experts):
    return {
        "routed": RoutedEnsemble(experts, RANGES),
        "averaged": averaged_ensemble(experts),
        "output merge": output_space_merge(experts[0], experts, [0.1, 0.2, 0.3, 0.6]),
    }


@pytest.mark.parametrize("kind", ["routed", "averaged", "output merge"])
def test_of_equal_experts_equals_one(kind, tiny_unet, noisy_batch):
    expert = tiny_unet()
    ensemble = kinds([copy.deepcopy(expert) for _ in range(4)])[kind]
    torch.testing.assert_close(
        predict(ensemble, *noisy_batch), predict(expert, *noisy_batch), rtol=1e-4, atol=1e-5
    )


def test_routed_mixed_timesteps_equal_each_expert_on_its_own_samples(experts, noisy_batch):
    samples, timesteps = noisy_batch
    together = predict(RoutedEnsemble(experts, RANGES), samples, timesteps)
    for i, t in enumerate(timesteps.tolist()):
        alone = predict(experts[t * 4 // 1000], samples[i : i + 1], t)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_routed_asks_each_expert_for_its_own_samples_only(noisy_batch):
    """The same compute as one model: five samples, five predictions."""
    samples, timesteps = noisy_batch
    experts = [Denoiser(k) for k in range(4)]
    RoutedEnsemble(experts, RANGES)(samples, timesteps)
    assert [e.asked for e in experts] == [[0, 249], [250], [600], [999]]


@pytest.mark.parametrize("timestep", [600, torch.tensor(600), torch.tensor([600])])
@pytest.mark.parametrize("kind", ["routed", "averaged", "output merge"])
def test_one_timestep_serves_the_whole_batch(kind, timestep, experts, noisy_batch):
    samples, _ = noisy_batch
    ensemble = kinds(experts)[kind]
    expected = predict(ensemble, samples, torch.full((5,), 600))
    assert torch.equal(predict(ensemble, samples, timestep), expected)
    with torch.no_grad():
        assert torch.equal(ensemble(samples, timestep, return_dict=False)[0], expected)


def test_averaged_is_the_mean(experts, noisy_batch):
    mean = torch.stack([predict(e, *noisy_batch) for e in experts]).mean(0)
    torch.testing.assert_close(predict(averaged_ensemble(experts), *noisy_batch), mean)


def test_output_space_merge_is_eq_8_on_outputs(experts, tiny_unet, noisy_batch):
    base, weights = tiny_unet(9), [0.1, 0.0, 0.4, 0.9]
    start = predict(base, *noisy_batch)
    outputs = [predict(e, *noisy_batch) for e in experts]
    expected = start + sum(w * (o - start) for w, o in zip(weights, outputs, strict=True))
    merged = output_space_merge(base, experts, weights)
    torch.testing.assert_close(predict(merged, *noisy_batch), expected, rtol=1e-4, atol=1e-5)


def test_members_of_weight_zero_are_never_called(noisy_batch):
    members = [Denoiser(k) for k in range(3)]
    ensemble = WeightedEnsemble(members, [0.0, 1.5, 0.0])
    ensemble(*noisy_batch)
    assert [len(m.asked) for m in members] == [0, 5, 0]
    assert len(ensemble.members) == 1


def test_output_space_merge_of_weights_that_sum_to_one_does_without_the_base(noisy_batch):
    base, experts = Denoiser(9), [Denoiser(k) for k in range(3)]
    output_space_merge(base, experts, [0.7, 0.2, 0.1])(*noisy_batch)  # 0.7 + 0.2 + 0.1 < 1
    assert not base.asked
    output_space_merge(base, experts, [0.0, 0.0, 0.0])(*noisy_batch)
    assert len(base.asked) == 5


class Placed(Denoiser):
    """Remembers where it was moved to, and moves nothing."""

    def __init__(self, factor, place, fleet):
        super().__init__(factor)
        self.place, self.fleet = place, fleet
        fleet.append(self)

    def to(self, device):
        self.place = torch.device(device).type
        return self

    def forward(self, *args, **kwargs):
        assert [m for m in self.fleet if m.place == "cuda"] == [self]
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("start", ["cpu", "cuda"])
def test_the_active_device_holds_only_the_expert_at_work(start, noisy_batch):
    samples, timesteps = noisy_batch
    fleet = []
    experts = [Placed(k, start, fleet) for k in range(4)]
    ensemble = RoutedEnsemble(experts, RANGES, active_device="cuda")
    assert ensemble.device.type == "cuda"
    expected = RoutedEnsemble([Denoiser(k) for k in range(4)], RANGES)(samples, timesteps).sample
    for _ in range(2):
        assert torch.equal(ensemble(samples, timesteps).sample, expected)
    assert sorted(m.place for m in fleet) == ["cpu", "cpu", "cpu", "cuda"]


def test_numbers_of_members_must_fit(experts):
    with pytest.raises(ValueError, match="3 experts for 4 ranges"):
        RoutedEnsemble(experts[:3], RANGES)
    with pytest.raises(ValueError, match="1 weights for 4 members"):
        WeightedEnsemble(experts, [1.0])
    with pytest.raises(ValueError):
        output_space_merge(experts[0], experts, [0.5])
    for nothing in (lambda: RoutedEnsemble([], []), lambda: WeightedEnsemble(experts, [0.0] * 4)):
        with pytest.raises(ValueError, match="at least one member"):
            nothing()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_must_be_finite(bad, experts):
    with pytest.raises(ValueError, match="finite"):
        WeightedEnsemble(experts, [1.0, bad, 0.0, 0.0])


@pytest.mark.parametrize(
    ("pipeline_class", "scheduler"),
    [(DDPMPipeline, DDPMScheduler()), (DDIMPipeline, DDIMScheduler())],
    ids=["DDPM", "DDIM"],
)
@pytest.mark.parametrize("kind", ["routed", "averaged", "output merge"])
def test_samples_inside_a_diffusers_pipeline(pipeline_class, scheduler, kind, experts):
    """Images equal those of a loop written here, with the same noise."""
    ensemble = kinds(experts)[kind]
    pipeline = pipeline_class(unet=ensemble, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=6,
        output_type="np",
    ).images

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps.tolist():
        if kind == "routed":
            eps = predict(experts[t * 4 // 1000], x, t)
        else:
            outputs = [predict(e, x, t) for e in experts]
            w = [0.25] * 4 if kind == "averaged" else [1 - 1.2 + 0.1, 0.2, 0.3, 0.6]
            eps = sum(a * o for a, o in zip(w, outputs, strict=True))
        x = scheduler.step(eps, t, x, generator=generator).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert images.shape == (2, 8, 8, 1)
    assert abs(images - expected).max() < 1e-3
    assert images.std() > 0.01
