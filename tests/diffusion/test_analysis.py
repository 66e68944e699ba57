"""What the figures look at, against independent computations."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from deme_lib.diffusion import analysis
from deme_lib.diffusion.heldout import FixedNoise
from deme_lib.diffusion.randomness import generator
from deme_lib.diffusion.training import to_model_range
from deme_lib.method.projection import ProjectedUNet2DModel
from deme_lib.method.timesteps import split_timesteps

SCHEDULER = DDPMScheduler(1000)


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 1, 8, 8), generator=generator("images")).to(torch.uint8)


class Zero(nn.Module):
    def forward(self, sample, timestep, return_dict=True):
        return (torch.zeros_like(sample),)


# fixed noise


def test_errors_of_large_images_are_taken_few_at_a_time(images):
    seen = []

    class Watched(Zero):
        def forward(self, sample, timestep, return_dict=True):
            seen.append(len(sample))
            return super().forward(sample, timestep)

    large = images.repeat(1, 1, 32, 32)  # 256x256
    for pictures in (images, large):
        FixedNoise(pictures, SCHEDULER, draws=2, seed=0).errors(Watched())
    assert seen == [12, 7, 5]


@pytest.mark.parametrize("draws", [1, 7])
def test_fixed_noise_spreads_its_timesteps_evenly_and_is_a_function_of_its_seed(images, draws):
    first, again, other = (FixedNoise(images, SCHEDULER, draws, seed) for seed in (0, 0, 1))
    total = 6 * draws
    assert first.timesteps.sort().values.tolist() == [i * 1000 // total for i in range(total)]
    assert torch.equal(first.noisy, again.noisy) and torch.equal(first.timesteps, again.timesteps)
    assert not torch.equal(first.noise, other.noise)


def test_predicting_nothing_loses_the_noise(images):
    """E eps^2 = 1; and the loss is the mean over bins, weighted by their draws."""
    noise = FixedNoise(images, SCHEDULER, draws=200, seed=0)
    assert noise.loss(Zero()) == pytest.approx(noise.noise.square().mean().item())
    assert noise.loss(Zero()) == pytest.approx(1, abs=0.02)
    bins = split_timesteps(4, 1000)
    errors = noise.errors(Zero())
    assert np.mean([noise.mean_in(errors, b) for b in bins]) == pytest.approx(noise.loss(Zero()))
    inside = (noise.timesteps >= 250) & (noise.timesteps < 500)
    expected = noise.noise[inside].square().mean().item()
    assert noise.mean_in(errors, bins[1]) == pytest.approx(expected)


def test_errors_are_those_of_one_draw_at_a_time(images, tiny_unet):
    unet, noise = tiny_unet(), FixedNoise(images, SCHEDULER, draws=1, seed=0)
    with torch.no_grad():
        expected = [
            (unet(x[None], t).sample - e).square().mean()
            for x, t, e in zip(noise.noisy, noise.timesteps, noise.noise, strict=True)
        ]
    torch.testing.assert_close(noise.errors(unet), torch.stack(expected), rtol=1e-4, atol=1e-6)


# gradients


def similarity(unet, images, timesteps, seed=0):
    return analysis.gradient_similarity(unet, SCHEDULER, images, timesteps, seed)


def test_gradient_similarity_is_a_cosine(images, tiny_unet):
    unet = tiny_unet().requires_grad_(True)
    found = similarity(unet, images, [10, 500, 990, 500])
    np.testing.assert_allclose(np.diag(found), 1)
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    assert found[1, 3] == pytest.approx(1) and found[0, 2] < 0.999
    assert np.abs(found).max() <= 1 + 1e-12
    assert all(w.grad is None for w in unet.parameters())
    assert found[0, 2] != similarity(unet, images, [10, 990], seed=1)[0, 1]


def test_gradient_similarity_by_hand(images, tiny_unet):
    unet, gradients = tiny_unet().requires_grad_(True), []
    noise = torch.randn(6, 1, 8, 8, generator=generator(0, "gradients"))
    for t in (100, 800):
        a = SCHEDULER.alphas_cumprod[t]
        noisy = a.sqrt() * to_model_range(images) + (1 - a).sqrt() * noise
        unet.zero_grad()
        nn.functional.mse_loss(unet(noisy, t).sample, noise).backward()
        gradients.append(torch.cat([w.grad.flatten() for w in unet.parameters()]))
    expected = torch.cosine_similarity(*gradients, dim=0).item()
    assert similarity(unet, images, [100, 800])[0, 1] == pytest.approx(expected, abs=1e-4)


def test_gradients_leave_out_projections(images, tiny_unet):
    """A projected model whose projections are the identity has its stock model's gradients."""
    stock = tiny_unet().requires_grad_(True)
    projected = ProjectedUNet2DModel.from_stock(stock).requires_grad_(True)
    found = similarity(projected, images, [100, 800])
    np.testing.assert_allclose(found, similarity(stock, images, [100, 800]), atol=1e-5)


# activations


def differences(base, expert, images):
    own = range(250, 500)
    found = analysis.activation_differences(base, expert, SCHEDULER, images, own, seed=0)
    return {(row["block"], row["dimension"]): row for row in found}


def test_equal_models_do_not_differ(images, tiny_unet):
    found = differences(tiny_unet(), ProjectedUNet2DModel.from_stock(tiny_unet()), images)
    blocks = ["down 1", "down 2", "mid", "up 1", "up 2"]
    assert list(found) == list(itertools.product(blocks, ["channel", "spatial"]))
    for row in found.values():
        assert row["median"] == row["q95"] == row["share"] == 0


def test_activation_differences_by_hand(images, tiny_unet):
    """Doubling a block's projection adds the block's own mean output, which is the difference."""
    base, captured = tiny_unet(), {}
    expert = ProjectedUNet2DModel.from_stock(base)
    with torch.no_grad():
        expert.up_blocks[1].projection.weight.mul_(2)
    base.up_blocks[1].register_forward_hook(lambda *given: captured.update(f=given[2]))
    found = differences(base, expert, images)
    f = captured["f"].double()
    d, rms = f.mean(dim=0), f.square().mean().sqrt()
    spread = (d - d.mean()).square().sum()
    for dimension, axes, others in (("channel", (1, 2), 64), ("spatial", (0,), 8)):
        row, means = found["up 2", dimension], d.mean(dim=axes)
        assert row["count"] == means.numel() == 512 // others
        expected = analysis.quantiles((means.abs() / rms).flatten())
        assert {q: row[q] for q in expected} == pytest.approx(expected, rel=1e-4)
        share = others * (means - d.mean()).square().sum() / spread
        assert row["share"] == pytest.approx(share.item(), rel=1e-4)
    assert found["mid", "channel"]["q95"] == 0  # blocks before it are as they were


def test_a_random_step_has_the_length_asked_for(tiny_unet):
    base = tiny_unet()
    moved, again, other = (
        analysis.random_step(base, 0.5, torch.Generator().manual_seed(s)).state_dict()
        for s in (0, 0, 1)
    )
    tau = {k: moved[k].double() - w.double() for k, w in base.state_dict().items()}
    assert sum(t.square().sum() for t in tau.values()).sqrt().item() == pytest.approx(0.5, rel=1e-4)
    assert all(torch.equal(moved[k], again[k]) for k in moved)
    assert not torch.equal(moved["conv_in.weight"], other["conv_in.weight"])


def test_timesteps_come_from_the_own_range(images, tiny_unet):
    base, seen = tiny_unet(), []
    base.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    differences(base, tiny_unet(1), images)
    assert (torch.cat(seen) >= 250).all() and (torch.cat(seen) < 500).all()
    assert len(torch.cat(seen).unique()) > 1
    assert not any(module._forward_hooks for module in base.modules())  # looked at, left as it was


@pytest.mark.parametrize(("shape", "shares"), [((8, 1, 1), (1, 0)), ((1, 4, 4), (0, 1))])
def test_shares_tell_channels_from_positions(shape, shares):
    effect = torch.randn(shape, generator=generator("effect")).double().expand(8, 4, 4)
    found = [row["share"] for row in analysis._by_dimension(effect, 1.0)]
    assert found == pytest.approx(shares)


def test_shares_of_independent_noise_are_those_by_chance():
    noise = torch.randn(2000, 8, 3, 3, generator=generator("noise")).double()
    shares = [[row["share"] for row in analysis._by_dimension(d, 1.0)] for d in noise]
    assert np.mean(shares, axis=0) == pytest.approx([7 / 71, 8 / 71], rel=0.05)


# landscape


def test_the_landscape_s_centre_is_the_model(images, tiny_unet):
    unet, noise, ranges = tiny_unet(), FixedNoise(images, SCHEDULER, 8, 0), split_timesteps(2, 1000)
    before, counted = {k: w.clone() for k, w in unet.state_dict().items()}, []
    rows = analysis.landscape(unet, noise, ranges, 0.3, 3, 0, on_point=lambda: counted.append(1))
    assert len(counted) == 9 and len(rows) == 27
    assert {(row["a"], row["b"]) for row in rows} == set(
        itertools.product((-0.3, 0, 0.3), repeat=2)
    )
    centre = {row["range"]: row for row in rows if row["a"] == row["b"] == 0}
    errors = noise.errors(unet)
    assert centre[0]["loss"] == pytest.approx(noise.loss(unet), rel=1e-6)
    for k, r in enumerate(ranges, start=1):
        assert centre[k]["loss"] == pytest.approx(noise.mean_in(errors, r), rel=1e-6)
        assert (centre[k]["start"], centre[k]["stop"]) == (r.start, r.stop)
    assert all(torch.equal(before[k], w) for k, w in unet.state_dict().items())


def test_a_point_of_the_landscape_by_hand(images, tiny_unet):
    unet, noise = tiny_unet(), FixedNoise(images, SCHEDULER, 8, 0)
    rows = analysis.landscape(unet, noise, split_timesteps(1, 1000), 0.3, 3, seed=5)
    one, two = (
        analysis.filter_normalised(unet.state_dict(), generator(5, "landscape", i)) for i in (1, 2)
    )
    moved = {k: w + 0.3 * one[k] - 0.3 * two[k] for k, w in unet.state_dict().items()}
    other = tiny_unet(1)
    other.load_state_dict(moved)
    found = next(row for row in rows if row["a"] == 0.3 and row["b"] == -0.3)
    assert found["loss"] == pytest.approx(noise.loss(other), rel=1e-5)
    assert noise.loss(other) != pytest.approx(noise.loss(unet), rel=1e-4)


def test_directions_have_the_norm_of_every_filter(tiny_unet):
    base = {k: w + 0.1 for k, w in tiny_unet().state_dict().items()}
    first, again, other = (
        analysis.filter_normalised(base, generator(seed, "landscape", 1)) for seed in (0, 0, 1)
    )
    for name, weight in base.items():
        assert torch.equal(first[name], again[name])
        for w, d in zip(weight, first[name], strict=True):
            expected = w.norm().item() if weight.dim() > 1 else 0
            assert d.norm().item() == pytest.approx(expected, rel=1e-5)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


# quantiles


def test_quantiles_of_a_known_distribution():
    values = torch.arange(101)[torch.randperm(101, generator=generator("order"))]
    expected = {"q05": 5, "q25": 25, "median": 50, "q75": 75, "q95": 95}
    assert analysis.quantiles(values) == pytest.approx(expected)


def test_the_parts_of_a_task_vector_cover_it_and_have_their_own_quantiles(tiny_unet):
    unet = ProjectedUNet2DModel.from_stock(tiny_unet())
    parts = ["conv_in", "time_embedding", "down", "mid", "up", "conv_out", "projection"]
    places = {part: float(k) for k, part in enumerate(parts)}
    vector = {
        n: torch.full_like(w, places[analysis._part(n)]) for n, w in unet.state_dict().items()
    }
    found = analysis.task_vector_quantiles(vector)
    assert found == {part: dict.fromkeys(analysis.QUANTILES, k) for part, k in places.items()}
    assert analysis._part("up_blocks.0.projection.weight") == "projection"
    assert analysis._part("up_blocks.0.resnets.0.conv1.weight") == "up"
    assert analysis._part("conv_norm_out.bias") == analysis._part("conv_out.bias") == "conv_out"
