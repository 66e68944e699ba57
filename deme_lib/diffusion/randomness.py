"""Every random draw is a function of what it is for, never of what was drawn before.

So data, timesteps and noise of a training step depend on (seed, step), and the noise of an image
on (seed, index): batch size and resumption change nothing.
"""

import zlib

import numpy as np
import torch


def seed_of(*purpose: int | str) -> int:
    """A 63-bit seed from words and integers in [0, 2**32), independent between purposes.

    Purposes must not differ by trailing zeros alone: numpy's SeedSequence pads with them.
    """
    entropy = [zlib.crc32(p.encode()) if isinstance(p, str) else int(p) for p in purpose]
    high, low = np.random.SeedSequence(entropy).generate_state(2, np.uint32).tolist()
    return (high << 32 | low) >> 1


def generator(*purpose: int | str) -> torch.Generator:
    """A fresh CPU generator for one purpose: ``generator(seed, "expert", 2, step)``."""
    return torch.Generator().manual_seed(seed_of(*purpose))
