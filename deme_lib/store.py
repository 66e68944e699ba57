"""Artefacts addressed by their recipe: whole or absent, made once, checked when loaded.

An artefact is a folder ``<label>-<key>`` of files beside a ``record.json``. It is prepared under
``.partial/`` while a lock is held, and renamed into place when everything is on disk, so that a
half-written one is never taken for a whole one; what an interrupted maker left there (checkpoints)
is found again by the next. The lock is the operating system's and dies with its process.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deme_lib import ROOT

RECORD = "record.json"


class StoreError(RuntimeError):
    """A stored artefact is missing, damaged or foreign."""


@dataclass(frozen=True)
class Recipe:
    """What an artefact is made from; its key is a hash of all of it.

    Attributes:
        stage: name of the function in ``deme_lib.stages`` that makes it.
        label: readable name, unique within an experiment.
        parameters: all parameters that the stage reads (JSON values).
        inputs: the recipes it is made from, by role.
        locations: parameters that name local files, by their paths; the key has their content.
        version: raised when the stage's results change.
        training_steps, denoiser_calls: its work, in optimiser steps and in images through a
            denoiser; for estimates of time, not in the key.
    """

    stage: str
    label: str
    parameters: dict[str, Any]
    inputs: dict[str, Recipe]
    version: int = 1
    locations: dict[str, str] = field(default_factory=dict)
    training_steps: int = 0
    denoiser_calls: int = 0

    @cached_property
    def key(self) -> str:
        content = {
            "stage": self.stage,
            "version": self.version,
            "parameters": self.parameters,
            "inputs": {role: recipe.key for role, recipe in self.inputs.items()},
        }
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        return f"{self.label}-{self.key}"


@dataclass(frozen=True)
class Artefact:
    """A stored artefact: its folder and its record."""

    path: Path
    record: dict[str, Any]

    @property
    def results(self) -> dict[str, Any]:
        """What the stage returned: small JSON values."""
        return self.record["results"]


class Store:
    """The folder of artefacts under ``runs_dir`` (relative to the repository's root)."""

    def __init__(self, runs_dir: str | Path = "runs"):
        self.root = (ROOT / runs_dir) / "store"

    def folder(self, recipe: Recipe) -> Path:
        return self.root / recipe.name

    def holds(self, recipe: Recipe) -> bool:
        return (self.folder(recipe) / RECORD).is_file()

    def missing(self, recipe: Recipe) -> list[Recipe]:
        """What must be made to have ``recipe``, upstream first; each once."""
        if self.holds(recipe):
            return []
        found: dict[str, Recipe] = {}
        for upstream in recipe.inputs.values():
            found.update((r.key, r) for r in self.missing(upstream))
        found[recipe.key] = recipe
        return list(found.values())

    def load(self, recipe: Recipe) -> Artefact:
        """Load and check an artefact.

        Raises:
            StoreError: it is missing, or a file was changed, truncated or put there by others.
        """
        folder = self.folder(recipe)
        remedy = f"delete {folder} and run again to make it anew"
        try:
            record = json.loads((folder / RECORD).read_text())
            key, files = record["key"], record["files"]
        except FileNotFoundError:
            raise StoreError(f"{recipe.name} is not in {self.root}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{folder / RECORD} is damaged ({error!r}); {remedy}") from error
        if key != recipe.key:
            raise StoreError(f"{folder} holds another artefact ({key}); {remedy}")
        found = _files(folder)
        if set(found) != set(files):
            odd = sorted(set(found) ^ set(files))
            raise StoreError(f"{folder}: missing or foreign files {odd}; {remedy}")
        for name, expected in files.items():
            if _sha256(folder / name) != expected:
                raise StoreError(f"{folder / name} was changed or truncated; {remedy}")
        return Artefact(folder, record)

    def make(
        self, recipe: Recipe, build: Callable[[Path], dict[str, Any]], device: str = "cpu"
    ) -> Artefact:
        """Load the artefact, or have ``build(folder)`` write its files and return its results."""
        if self.holds(recipe):
            return self.load(recipe)
        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with _locked(locks / f"{recipe.name}.lock", recipe.name):
            if self.holds(recipe):
                return self.load(recipe)
            if self.folder(recipe).is_dir() and any(self.folder(recipe).iterdir()):
                raise StoreError(
                    f"{self.folder(recipe)} holds files but no {RECORD}: something removed it; "
                    "delete the folder and run again"
                )
            partial = self.root / ".partial" / recipe.name
            partial.mkdir(parents=True, exist_ok=True)
            for leftover in partial.rglob("*.tmp"):
                remove(leftover)
            started = time.time()
            results = build(partial)
            record = {
                "name": recipe.name,
                "key": recipe.key,
                "stage": recipe.stage,
                "version": recipe.version,
                "parameters": recipe.parameters,
                "inputs": {role: r.name for role, r in recipe.inputs.items()},
                "results": json.loads(json.dumps(results)),
                "files": {name: _sha256(partial / name) for name in _files(partial)},
                "seconds": round(time.time() - started, 2),
                "process_peak_memory_mib": _peak_memory_mib(),
                "device": device,
                "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **provenance(),
            }
            write_text(partial / RECORD, json.dumps(record, indent=1, sort_keys=True))
            _flush(partial)
            os.rename(partial, self.folder(recipe))
        return Artefact(self.folder(recipe), record)


@cache
def provenance() -> dict[str, Any]:
    """Git commit (and whether the tree was dirty) and versions, for records."""

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", ROOT, *command], capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    packages = ("torch", "diffusers", "accelerate", "torch-fidelity", "optuna", "numpy")
    return {
        "commit": git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--", "deme_lib", "params", "notebooks")),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
    }


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def remove(path: Path) -> None:
    """Remove a file or folder that may not be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _locked(path: Path, name: str) -> FileLock:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
        lock.release()
    except Timeout:
        print(f"{name}: another process is making it; waiting", flush=True)
    return lock


def _peak_memory_mib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def _files(folder: Path) -> list[str]:
    paths = (p for p in folder.rglob("*") if p.is_file() and p != folder / RECORD)
    return sorted(str(p.relative_to(folder)) for p in paths)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Have the operating system write everything out before the rename makes it count."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
