"""Ranges of timesteps, routing and the draw of training timesteps (paper Eq. 3, 6 and 7).

Ranges are counted from 0. The paper counts them from 1 in Eq. 3 and from 0 in Eq. 7; integer
bounds ``ceil(k T / N)`` make the two agree also where N does not divide T.
"""

import itertools
from collections.abc import Sequence

import torch


def split_timesteps(n_ranges: int, num_train_timesteps: int) -> list[range]:
    """Eq. 3: cut [0, T) into N adjacent, equal ranges, in order; N is in 1..T."""
    if not 1 <= n_ranges <= num_train_timesteps:
        raise ValueError(
            f"n_ranges={n_ranges} cannot cut {num_train_timesteps} timesteps: "
            f"choose between 1 and {num_train_timesteps}"
        )
    bounds = [-(-k * num_train_timesteps // n_ranges) for k in range(n_ranges + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def check_tiling(ranges: Sequence[range]) -> None:
    """Refuse ranges that do not follow each other from 0 on, none empty, without gap or overlap."""
    starts = [0, *(r.stop for r in ranges)]
    for r, start in zip(ranges, starts, strict=False):
        if not r or r != range(start, r.stop):
            raise ValueError(
                f"{list(ranges)} must tile the timesteps in order: give a range from {start} on "
                f"instead of {r}"
            )


def route(timesteps: torch.Tensor, ranges: Sequence[range]) -> torch.Tensor:
    """Eq. 7: the index of the range that holds each timestep, int64 in [0, N).

    Args:
        timesteps: any shape, in [0, T); where they are floats T, all noise, is of the last range.
        ranges: adjacent ranges that tile [0, T) in order.
    """
    if timesteps.numel():
        low, high, end = timesteps.min().item(), timesteps.max().item(), ranges[-1].stop
        last = isinstance(high, float) and high == end
        if low < ranges[0].start or not (high < end or last):
            raise ValueError(f"timesteps from {low} to {high} leave [{ranges[0].start}, {end})")
    bounds = timesteps.new_tensor([r.start for r in ranges[1:]])
    return torch.bucketize(timesteps.contiguous(), bounds, right=True)


def draw_timesteps(
    batch_size: int,
    own_range: range,
    num_train_timesteps: int,
    probability: float,
    generator: torch.Generator,
    continuous: bool = False,
) -> torch.Tensor:
    """Eq. 6: from the own range with probability 1 - p, from all of [0, T) with probability p.

    The coin is tossed for every sample; the published reference code tosses it for a batch.
    They are [batch_size] on the CPU, int64; or if ``continuous``, as in flow matching, float32:
    multiples of 1 / 1024, which are exact.
    """
    parts = 1024 if continuous else 1
    start, stop, end = (parts * t for t in (own_range.start, own_range.stop, num_train_timesteps))
    own = torch.randint(start, stop, (batch_size,), generator=generator)
    anywhere = torch.randint(0, end, (batch_size,), generator=generator)
    leave = torch.rand(batch_size, generator=generator) < probability
    timesteps = torch.where(leave, anywhere, own)
    return timesteps / parts if continuous else timesteps
