"""Routed and averaged ensembles (paper Eq. 7 and its rival)."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import nn

from deme_lib.method.ensembles import AveragedEnsemble, RoutedEnsemble
from deme_lib.method.timesteps import split_timesteps

RANGES = split_timesteps(4, 1000)
KINDS = {"routed": lambda experts: RoutedEnsemble(experts, RANGES), "averaged": AveragedEnsemble}
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
    return torch.stack([predict(expert, sample, t) for expert in experts]).mean(0)


@kinds
@pytest.mark.parametrize("timesteps", [None, 600, torch.tensor(600), torch.tensor([600])])
def test_every_sample_is_predicted_as_on_its_own(make, timesteps, experts, noisy_batch):
    samples, mixed = noisy_batch
    timesteps = mixed if timesteps is None else timesteps
    together = predict(make(experts), samples, timesteps)
    for i, t in enumerate(torch.as_tensor(timesteps).expand(len(samples)).tolist()):
        close(together[i : i + 1], by_hand(make, experts, samples[i : i + 1], t))


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


@pytest.mark.parametrize(
    "ranges",
    [
        [range(0, 400), range(500, 1000)],
        [range(0, 600), range(500, 1000)],
        [range(500, 1000), range(0, 500)],
        [range(0, 0), range(0, 1000)],
    ],
    ids=["gap", "overlap", "order", "empty"],
)
def test_ranges_must_tile(ranges, experts):
    with pytest.raises(ValueError, match="must tile the timesteps in order"):
        RoutedEnsemble(experts[:2], ranges)


def test_members_must_fit(experts):
    with pytest.raises(ValueError, match="3 experts for 4 ranges"):
        RoutedEnsemble(experts[:3], RANGES)
    with pytest.raises(ValueError, match="at least one member"):
        AveragedEnsemble([])


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
