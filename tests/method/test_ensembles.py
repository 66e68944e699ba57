"""Routed and weighted ensembles (paper Eq. 7 and its rivals)."""

import copy

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import nn

from deme_lib.method.ensembles import RoutedEnsemble, WeightedEnsemble, averaged_ensemble
from deme_lib.method.timesteps import split_timesteps

RANGES = split_timesteps(4, 1000)
WEIGHTS = [0.4, -0.2, 0.0, 0.9]
KINDS = {
    "routed": lambda experts: RoutedEnsemble(experts, RANGES),
    "averaged": averaged_ensemble,
    "weighted": lambda experts: WeightedEnsemble(experts, WEIGHTS),
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


class Denoiser(nn.Module):
    """eps(x, t) = t / 1000; remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, sample, timestep, return_dict=True):
        assert not return_dict
        self.asked.append((sample, timestep))
        return (torch.zeros_like(sample) + timestep.view(-1, 1, 1, 1) / 1000,)


@pytest.fixture
def experts(tiny_unet):
    return [tiny_unet(seed) for seed in range(4)]


@torch.no_grad()
def predict(denoiser, sample, timesteps):
    return denoiser(sample, timesteps).sample


def close(first, second):
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def by_hand(kind, experts, sample, t):
    """A prediction at one timestep."""
    if kind is KINDS["routed"]:
        return predict(experts[t * 4 // 1000], sample, t)
    weights = [0.25] * 4 if kind is KINDS["averaged"] else WEIGHTS
    return sum(w * predict(e, sample, t) for w, e in zip(weights, experts, strict=True))


@kinds
def test_mixed_timesteps_equal_each_sample_on_its_own(make, experts, noisy_batch):
    together = predict(make(experts), *noisy_batch)
    for i, t in enumerate(noisy_batch[1].tolist()):
        close(together[i : i + 1], by_hand(make, experts, noisy_batch[0][i : i + 1], t))


@kinds
@pytest.mark.parametrize("timestep", [600, torch.tensor(600), torch.tensor([600])])
def test_one_timestep_serves_the_whole_batch(make, timestep, experts, noisy_batch):
    samples, _ = noisy_batch
    expected = by_hand(make, experts, samples, 600)
    close(predict(make(experts), samples, timestep), expected)
    with torch.no_grad():
        close(make(experts)(samples, timestep, return_dict=False)[0], expected)


@pytest.mark.parametrize("make", [KINDS["routed"], KINDS["averaged"]])
def test_of_equal_experts_equals_one(make, tiny_unet, noisy_batch):
    expert = tiny_unet()
    ensemble = make([copy.deepcopy(expert) for _ in range(4)])
    close(predict(ensemble, *noisy_batch), predict(expert, *noisy_batch))


def test_routed_costs_one_model(noisy_batch):
    """Each sample goes to one expert; a batch of one timestep goes there as it is, not copied."""
    samples, timesteps = noisy_batch
    experts = [Denoiser() for _ in range(4)]
    ensemble = RoutedEnsemble(experts, RANGES)
    ensemble(samples, timesteps)
    assert [e.asked[0][1].tolist() for e in experts] == [[0, 249], [250], [600], [999]]
    for timestep in (torch.tensor(600), torch.full((5,), 600)):
        ensemble(samples, timestep)
        assert experts[2].asked[-1][0] is samples
    assert [len(e.asked) for e in experts] == [1, 1, 3, 1]


def test_members_of_weight_zero_are_never_called(noisy_batch):
    members = [Denoiser() for _ in range(3)]
    ensemble = WeightedEnsemble(members, [0.0, 1.5, 0.0])
    ensemble(*noisy_batch)
    assert [len(m.asked) for m in members] == [0, 1, 0] and len(ensemble.members) == 1


@pytest.mark.parametrize(
    "ranges",
    [
        [range(0, 400), range(500, 1000)],
        [range(0, 600), range(500, 1000)],
        [range(500, 1000), range(0, 500)],
        [range(1, 500), range(500, 1000)],
        [range(0, 0), range(0, 1000)],
        [range(0, 500), range(500, 1000, 2)],
    ],
    ids=["gap", "overlap", "order", "start", "empty", "every other"],
)
def test_ranges_must_tile(ranges, experts):
    with pytest.raises(ValueError, match="must tile the timesteps in order"):
        RoutedEnsemble(experts[:2], ranges)


def test_members_and_weights_must_fit(experts):
    with pytest.raises(ValueError, match="3 experts for 4 ranges"):
        RoutedEnsemble(experts[:3], RANGES)
    with pytest.raises(ValueError, match="1 weights for 4 members"):
        WeightedEnsemble(experts, [1.0])
    with pytest.raises(ValueError, match="finite"):
        WeightedEnsemble(experts, [1.0, float("nan"), 0.0, 0.0])
    for nothing in (lambda: averaged_ensemble([]), lambda: WeightedEnsemble(experts, [0.0] * 4)):
        with pytest.raises(ValueError, match="at least one member"):
            nothing()


@pytest.mark.parametrize(
    ("pipeline_class", "scheduler"),
    [(DDPMPipeline, DDPMScheduler()), (DDIMPipeline, DDIMScheduler())],
    ids=["DDPM", "DDIM"],
)
@kinds
def test_samples_inside_a_diffusers_pipeline(pipeline_class, scheduler, make, experts):
    """Images equal those of a loop written here, with the same noise."""
    pipeline = pipeline_class(unet=make(experts), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    images = pipeline(2, generator=g, num_inference_steps=6, output_type="np").images

    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=g)
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(by_hand(make, experts, x, t), t, x, generator=g).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert images.shape == (2, 8, 8, 1) and images.std() > 0.01
    assert abs(images - expected).max() < 1e-3
