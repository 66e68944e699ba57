"""Decouple, then merge, on models of your own: what to import; torch loads when it is used."""

import importlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository: relative paths of presets, runs and figures count from here."""

_HOMES = {
    "load_pipeline": "diffusion.models",
    "load_images": "diffusion.data",
    "decouple": "diffusion.decouple",
    "merge_experts": "diffusion.merged",
    "merge_folders": "diffusion.merged",
    "RoutedEnsemble": "method.ensembles",
    "AveragedEnsemble": "method.ensembles",
    "sample": "diffusion.sampling",
    "evaluate": "diffusion.metrics",
    "save_pipeline": "diffusion.models",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"deme_lib has no {name!r}; it exports {', '.join(_HOMES)}")
    return getattr(importlib.import_module(f"deme_lib.{_HOMES[name]}"), name)
