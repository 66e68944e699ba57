"""DataFrames to figures: one function per figure, one colour and marker per arm everywhere.

Nothing is read or written here; a caller shows or saves the Figure that comes back. Columns are
those of ``records.COLUMNS``.
"""

from deme_lib.report.plots.arms import ema_horizon, main, neighbours, samples, search, sweep
from deme_lib.report.plots.paper import (
    activations,
    gradient_similarity,
    landscape,
    plane,
    task_vectors,
)
from deme_lib.report.plots.training import gate, history, loss_per_timestep

__all__ = [
    "activations",
    "ema_horizon",
    "gate",
    "gradient_similarity",
    "history",
    "landscape",
    "loss_per_timestep",
    "main",
    "neighbours",
    "plane",
    "samples",
    "search",
    "sweep",
    "task_vectors",
]
