"""DataFrames to figures: one function per figure, one colour and marker per arm everywhere.

Nothing is read or written here; a caller shows or saves the Figure that comes back. Columns are
those of ``tables.COLUMNS``.
"""

from deme_lib.plots.arms import main, neighbours, samples, search
from deme_lib.plots.costs import cost
from deme_lib.plots.style import STYLES
from deme_lib.plots.training import (
    gradient_similarity,
    history,
    loss_per_timestep,
    plane,
    task_vectors,
)

__all__ = [
    "STYLES",
    "cost",
    "gradient_similarity",
    "history",
    "loss_per_timestep",
    "main",
    "neighbours",
    "plane",
    "samples",
    "search",
    "task_vectors",
]
