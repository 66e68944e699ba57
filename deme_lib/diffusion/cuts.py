"""How [0, T) is cut into ranges, by name: for routing, and for training."""

from diffusers import DDPMScheduler

from deme_lib.diffusion.randomness import generator
from deme_lib.method.timesteps import split_log_snr, split_randomly, split_timesteps, widen


def routing_ranges(cut: str, n_ranges: int, scheduler: DDPMScheduler) -> list[range]:
    """Ranges that tile [0, T).

    Args:
        cut: ``uniform`` (Eq. 3), ``log-snr`` (equal falls of log-SNR), ``random`` (at random
            points, the same for all training seeds), or ``overlapping``, which routes evenly.

    Raises:
        ValueError: the cut is unknown, or leaves a range empty.
    """
    num_train_timesteps = scheduler.config.num_train_timesteps
    if cut == "log-snr":
        return split_log_snr(n_ranges, scheduler.alphas_cumprod)
    if cut == "random":
        return split_randomly(n_ranges, num_train_timesteps, generator("random cut", n_ranges))
    if cut in ("uniform", "overlapping"):
        return split_timesteps(n_ranges, num_train_timesteps)
    raise ValueError(f"no cut {cut!r}; there are uniform, log-snr, overlapping and random")


def training_ranges(cut: str, n_ranges: int, scheduler: DDPMScheduler) -> list[range]:
    """Ranges that experts train on: as routed, but wider by half at either side if overlapping."""
    ranges = routing_ranges(cut, n_ranges, scheduler)
    return widen(ranges) if cut == "overlapping" else ranges
