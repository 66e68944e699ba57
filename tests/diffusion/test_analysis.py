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

SCHEDULER = DDPMScheduler(1000)


# gradients


def similarity(unet, images, timesteps, seed=0):
    return analysis.gradient_similarity(unet, SCHEDULER, images, timesteps, seed)


def test_gradient_similarity_by_hand(images, tiny_unet):
    unet, gradients = tiny_unet().requires_grad_(True), []
    noise = torch.randn(6, 1, 8, 8, generator=generator(0, "gradients"))
    found = similarity(unet, images, [100, 800, 100])
    assert all(w.grad is None for w in unet.parameters())
    for t in (100, 800):
        a = SCHEDULER.alphas_cumprod[t]
        noisy = a.sqrt() * to_model_range(images) + (1 - a).sqrt() * noise
        unet.zero_grad()
        nn.functional.mse_loss(unet(noisy, t).sample, noise).backward()
        gradients.append(torch.cat([w.grad.flatten() for w in unet.parameters()]))
    expected = torch.cosine_similarity(*gradients, dim=0).item()
    assert found[0, 1] == pytest.approx(expected, abs=1e-4) and expected < 0.999
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    np.testing.assert_allclose([*np.diag(found), found[0, 2]], 1)


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


def test_activation_differences_by_hand(images, tiny_unet):
    """Doubling a block's projection adds the block's own mean output, which is the difference."""
    base, captured = tiny_unet(), {}
    expert = ProjectedUNet2DModel.from_stock(base)
    with torch.no_grad():
        expert.up_blocks[1].projection.weight.mul_(2)
    base.up_blocks[1].register_forward_hook(lambda *given: captured.update(f=given[2]))
    found = differences(base, expert, images)
    f = captured["f"].double()
    blocks = ["down 1", "down 2", "mid", "up 1", "up 2"]
    assert list(found) == list(itertools.product(blocks, ["channel", "spatial"]))
    d, rms = f.mean(dim=0), f.square().mean().sqrt()
    spread = (d - d.mean()).square().sum()
    for dimension, axes, others in (("channel", (1, 2), 64), ("spatial", (0,), 8)):
        row, means = found["up 2", dimension], d.mean(dim=axes)
        assert row["count"] == means.numel() == 512 // others
        expected = analysis.quantiles((means.abs() / rms).flatten())
        assert {q: row[q] for q in expected} == pytest.approx(expected, rel=1e-4)
        share = others * (means - d.mean()).square().sum() / spread
        assert row["share"] == pytest.approx(share.item(), rel=1e-4)
    for block in blocks[:4]:  # those before it are as they were
        assert found[block, "channel"]["q95"] == found[block, "spatial"]["share"] == 0


def test_a_random_step_has_the_length_asked_for(tiny_unet):
    base, (moved, other) = (
        tiny_unet(),
        (analysis.random_step(tiny_unet(), 0.5, generator(seed)).state_dict() for seed in (0, 1)),
    )
    tau = {k: moved[k].double() - w.double() for k, w in base.state_dict().items()}
    assert sum(t.square().sum() for t in tau.values()).sqrt().item() == pytest.approx(0.5, rel=1e-4)
    assert not torch.equal(moved["conv_in.weight"], other["conv_in.weight"])


def test_timesteps_come_from_the_own_range(images, tiny_unet):
    base, seen = tiny_unet(), []
    hook = base.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    differences(base, tiny_unet(1), images)
    hook.remove()
    assert (torch.cat(seen) >= 250).all() and (torch.cat(seen) < 500).all()
    assert len(torch.cat(seen).unique()) > 1
    assert not any(module._forward_hooks for module in base.modules())  # looked at, left as it was


# landscape


def test_a_plane_by_hand(images, tiny_unet):
    """Its centre is the model, a corner the model moved along both directions."""
    unet, noise = tiny_unet(), FixedNoise(images, SCHEDULER, 8, 0)
    start = {k: w.clone() for k, w in unet.state_dict().items()}
    one, two = (analysis.filter_normalised(start, generator(5, "landscape", i)) for i in (1, 2))
    drawn = analysis.over_plane(unet, [one, two], [-0.3, 0, 0.3], noise)
    found = {(a, b): errors for a, b, errors in drawn}
    assert all(torch.equal(start[k], w) for k, w in unet.state_dict().items())
    assert list(found) == list(itertools.product((-0.3, 0, 0.3), repeat=2))
    other = tiny_unet()
    other.load_state_dict({k: w + 0.3 * one[k] - 0.3 * two[k] for k, w in start.items()})
    for model, place in ((unet, (0, 0)), (other, (0.3, -0.3))):
        torch.testing.assert_close(found[place], noise.errors(model))
    assert noise.loss(other) != pytest.approx(noise.loss(unet), rel=1e-4)


def test_directions_have_the_norm_of_every_filter(tiny_unet):
    """Counters and masks, which some models hold, stay, and biases too."""
    base = tiny_unet().state_dict()
    base |= {"counter": torch.tensor(3), "mask": torch.ones(2, 2, dtype=torch.bool)}
    first, other = (analysis.filter_normalised(base, generator(seed)) for seed in (0, 1))
    for name, weight in base.items():
        if weight.dim() > 1 and weight.is_floating_point():
            norms = [some.flatten(1).norm(dim=1).double() for some in (first[name], weight)]
            torch.testing.assert_close(*norms)
        else:
            assert not first[name].any() and first[name].shape == weight.shape
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_the_parts_of_a_task_vector_have_their_own_quantiles():
    parts = {"conv_in.weight": "conv_in", "time_embedding.linear_1.bias": "time_embedding"}
    parts |= {"down_blocks.1.resnets.0.conv1.weight": "down", "mid_block.resnets.0.bias": "mid"}
    parts |= {"up_blocks.0.resnets.0.conv1.weight": "up", "conv_norm_out.bias": "conv_out"}
    parts |= {"conv_out.bias": "conv_out", "up_blocks.0.projection.weight": "projection"}
    places = {part: float(k) for k, part in enumerate(parts.values())}
    vector = {name: torch.full((3, 4), places[part]) for name, part in parts.items()}
    found = analysis.task_vector_quantiles(vector)
    assert found == {part: dict.fromkeys(analysis.QUANTILES, k) for part, k in places.items()}
