"""Training and merge utilities behind the notebooks of the Decouple-Then-Merge companion."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository: relative paths of presets, runs and figures count from here."""
