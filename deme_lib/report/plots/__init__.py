"""DataFrames to figures: one function per figure, one colour and marker per arm everywhere.

Nothing is read or written here; a caller shows or saves the Figure that comes back. Columns are
those of ``tables.COLUMNS``.
"""

from deme_lib.report.plots.arms import main, neighbours, samples, search
from deme_lib.report.plots.costs import cost
from deme_lib.report.plots.paper import (
    activations,
    gradient_similarity,
    landscape,
    plane,
    task_vectors,
)
from deme_lib.report.plots.style import STYLES
from deme_lib.report.plots.sweeps import sweep
from deme_lib.report.plots.training import history, loss_per_timestep

__all__ = [
    "STYLES",
    "activations",
    "cost",
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
