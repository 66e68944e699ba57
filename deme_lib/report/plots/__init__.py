"""DataFrames to figures: one function per figure, one colour and marker per arm everywhere.

Nothing is read or written here; a caller shows or saves the Figure that comes back. Columns are
those of ``records.COLUMNS``.
"""
# ruff: noqa: F401

from deme_lib.report.plots.arms import (
    controls,
    ema_horizon,
    gate,
    history,
    loss_per_timestep,
    main,
    neighbours,
    samples,
    sweep,
)
from deme_lib.report.plots.paper import (
    activations,
    gradient_similarity,
    landscape,
    plane,
    task_vectors,
)
