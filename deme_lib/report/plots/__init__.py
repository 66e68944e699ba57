"""Records and DataFrames to figures: one function per figure, one colour and marker per arm.

Nothing is read or written here; a caller shows or saves the Figure that comes back. Columns of
DataFrames are those of ``records.COLUMNS``, of one training seed.
"""
# ruff: noqa: F401, I001

from deme_lib.report.plots.arms import cells, cost, gate, history, ladder
from deme_lib.report.plots.arms import loss_per_timestep, main, samplers, samples
from deme_lib.report.plots.method import method
from deme_lib.report.plots.paper import activations, gradient_similarity, landscape
from deme_lib.report.plots.paper import plane, task_vectors
