"""Imports go down the layers of the design, never up."""

import ast

import pytest

from deme_lib import ROOT

LAYERS = [
    {"timesteps", "objectives", "merging", "ensembles", "projection"},  # method
    {"randomness", "data", "idx", "models", "training", "sampling", "metrics", "classifier"}
    | {"progress", "analysis", "cuts", "weight_search", "merged", "heldout"},  # doing
    {"arms", "parameters", "store", "recipes", "stages", "records"}
    | {"sweeps", "sweep_records", "doctor"},  # experiment
    {"tables", "comparisons", "questions", "observations", "sweep_tables"}
    | {"plots", "formats", "report"},
    {"__main__"},
]
MODULES = sorted((ROOT / "deme_lib").rglob("*.py"))


def room(path):
    return path.relative_to(ROOT / "deme_lib").with_suffix("").parts[0]


def imports(path):
    """Rooms of deme_lib that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deme_lib"):
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            yield from (name for name in names if name != "ROOT")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_goes_up(path):
    if room(path) == "__init__":
        return
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    allowed = set().union(*LAYERS[: level[room(path)] + 1])
    if room(path) in LAYERS[0]:
        allowed = LAYERS[0]
    if room(path) in LAYERS[3]:
        allowed = LAYERS[3] | {"arms"}
    assert set(imports(path)) <= allowed
