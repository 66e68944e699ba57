"""What the figures look at: losses, gradients, activations, task vectors, the loss landscape."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from deme_lib.diffusion.denoisers import to_model_range
from deme_lib.diffusion.heldout import BATCH, FixedNoise, batch_of
from deme_lib.diffusion.randomness import generator
from deme_lib.method.merging import State, merge
from deme_lib.method.objectives import squared_error
from deme_lib.method.projection import blocks_of, is_projection

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
PARTS = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up", "conv_norm_out": "conv_out"}


def gradient_similarity(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: torch.Tensor,
    timesteps: Sequence[int],
    seed: int,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Fig. 1a: cosine similarity between the gradients of the denoising loss at timesteps.

    The gradient at a timestep is the mean over all ``images`` (uint8 [n, C, H, W]) with the same
    noise at every timestep; ``seed`` draws that noise. It leaves out projections, so that a
    merged model is seen in the pretrained model's coordinates. Float64 [t, t] of t timesteps.
    """
    clean = to_model_range(images)
    noise = torch.randn(clean.shape, generator=generator(seed, "gradients"))
    batch = batch_of(64, clean)
    weights = [w for n, w in unet.to(device).named_parameters() if not is_projection(n)]
    rows = []
    for t in timesteps:
        total = torch.zeros(sum(w.numel() for w in weights), dtype=torch.float64)
        for x, e in zip(clean.split(batch), noise.split(batch), strict=True):
            noisy = scheduler.add_noise(x, e, torch.full((len(x),), int(t))).to(device)
            loss = squared_error(unet(noisy, t, return_dict=False)[0], e.to(device)).sum()
            gradient = torch.autograd.grad(loss, weights)
            total += torch.cat([g.flatten() for g in gradient]).double().cpu()
        rows.append(total / total.norm())
    stacked = torch.stack(rows)
    return (stacked @ stacked.T).numpy()


def quantiles(values: torch.Tensor) -> dict[str, float]:
    """5, 25, 50, 75 and 95 % quantiles."""
    found = np.quantile(values.double().numpy(), list(QUANTILES.values()))
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def task_vector_quantiles(vector: State) -> dict[str, dict[str, float]]:
    """Fig. 6b: quantiles of a task vector's values per part of the UNet."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in vector.items():
        first = name.split(".")[0]
        part = "projection" if is_projection(name) else PARTS.get(first, first)
        parts.setdefault(part, []).append(tensor.flatten())
    return {part: quantiles(torch.cat(tensors)) for part, tensors in parts.items()}


@torch.inference_mode()
def activation_differences(
    base: UNet2DModel,
    expert: UNet2DModel,
    scheduler: DDPMScheduler,
    images: torch.Tensor,
    own_range: range,
    seed: int,
    device: torch.device | str = "cpu",
) -> list[dict]:
    """Fig. 2: where the blocks' outputs change by finetuning, per channel and per position.

    D [C, H, W] is expert minus base, averaged over ``images`` (uint8 [n, C, H, W]), each noised at
    a timestep drawn from ``own_range``; both models see the same inputs. Two rows a block have the
    quantiles of |mean of D| per channel ("channel") or position ("spatial") over the root mean
    square of the base's output, and the share of D's variance that these means explain. A
    convolution changes all positions alike: compare that share with the one of ``random_step``.
    """
    g = generator(seed, "activations")
    clean = to_model_range(images)
    noise = torch.randn(clean.shape, generator=g)
    timesteps = torch.randint(own_range.start, own_range.stop, (len(images),), generator=g)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    difference, square, batch = {}, {}, batch_of(BATCH, noisy)
    for x, t in zip(noisy.split(batch), timesteps.split(batch), strict=True):
        before, after = (_block_outputs(m.to(device), x.to(device), t) for m in (base, expert))
        for block, f in before.items():
            difference[block] = difference.get(block, 0) + (after[block] - f).sum(dim=0)
            square[block] = square.get(block, 0) + f.square().mean(dim=(1, 2, 3)).sum().item()
    return [
        {"block": block, **row}
        for block, total in difference.items()
        for row in _by_dimension(total / len(images), (square[block] / len(images)) ** 0.5)
    ]


def _block_outputs(unet: UNet2DModel, x: torch.Tensor, timesteps: torch.Tensor) -> State:
    """The hidden state after every block, and its projection where it has one, in float64."""
    outputs = {}
    with ExitStack() as hooks:
        for name, block in blocks_of(unet).items():

            def keep(_block, _inputs, output, name=name):  # runs after the projection's own hook
                hidden = output[0] if isinstance(output, tuple) else output
                outputs[name] = hidden.double().cpu()

            hooks.callback(block.register_forward_hook(keep).remove)
        unet(x, timesteps.to(x.device))
    return outputs


def _by_dimension(difference: torch.Tensor, rms: float) -> Iterator[dict]:
    """Two-way decomposition of [C, H, W] into main effects of channels and of positions."""
    d = difference.flatten(start_dim=1)  # [C, H W]
    centred = d - d.mean()
    variance = centred.square().mean().item()
    for dimension, over in (("channel", 1), ("spatial", 0)):
        means, effects = d.mean(dim=over), centred.mean(dim=over)
        yield {
            "dimension": dimension,
            "count": len(means),
            **quantiles(means.abs() / rms),
            "share": effects.square().mean().item() / variance if variance else 0.0,
        }


def random_step(unet: UNet2DModel, norm: float, g: torch.Generator) -> UNet2DModel:
    """A copy whose weights moved by ``norm`` in a random, filter-normalised direction."""
    base, moved = unet.state_dict(), copy.deepcopy(unet)
    direction = filter_normalised(base, g)
    length = sum(d.square().sum().item() for d in direction.values()) ** 0.5
    moved.load_state_dict(merge(base, [direction], [norm / length]))
    return moved


def over_plane(
    model: nn.Module, vectors: Sequence[State], axis: Sequence[float], noise: FixedNoise
) -> Iterator[tuple[float, float, torch.Tensor]]:
    """a, b, and errors under fixed noise of theta + a v_1 + b v_2, for all a and b of an axis."""
    base, moved = model.state_dict(), copy.deepcopy(model).eval()
    for a, b in itertools.product(axis, axis):
        moved.load_state_dict(merge(base, vectors, [a, b]))
        yield a, b, noise.errors(moved, model.device)


def filter_normalised(base: State, g: torch.Generator) -> State:
    """A random direction whose filters have the norms of ``base``'s; 0 for all that has none."""
    direction = {}
    for name, weight in base.items():
        d = torch.zeros(weight.shape, dtype=torch.float64)
        if weight.dim() > 1 and weight.is_floating_point():
            filters = d.normal_(generator=g).flatten(1)  # a view [filters, the rest]
            norms = weight.cpu().double().flatten(1).norm(dim=1, keepdim=True)
            filters *= norms / filters.norm(dim=1, keepdim=True)
        direction[name] = d.to(weight.device)
    return direction
