"""Artefacts addressed by their recipe: whole or absent, made once, checked when loaded.

An artefact is a folder ``<label>-<key>`` of files beside a ``record.json``. It is prepared under
``.partial/`` while a lock is held, and renamed into place when everything is on disk, so that a
half-written one is never taken for a whole one; what an interrupted maker keeps in ``working/``
(checkpoints) is found again by the next, and goes only after the rename. The lock is the operating
system's and dies with its process. A checksum of the record covers its results and the hashes of
all files.
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deme_lib import ROOT
from deme_lib.errors import Explained

RECORD = "record.json"
WORKING = "working"
"""Folder of what a stage resumes from, beside what it makes; no part of the artefact."""
CHECKPOINT, HISTORY = f"{WORKING}/checkpoint.safetensors", f"{WORKING}/history.json"

STEP_S, CALL_S = 0.04, 1.5e-4
"""Seconds of a training step of 64 8x8 images (0.16 M parameters) and of one image through that
model, on one core; for estimates before anything was recorded."""

NO_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_DISK |= {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
NO_MEMORY = ("out of memory", "not enough memory", "allocate memory")


class StoreError(Explained, RuntimeError):
    """A stored artefact is missing, damaged or foreign."""


class ResourceError(Explained, RuntimeError):
    """Disk, memory or the right to write gave out; what was made so far is intact."""


@dataclass(frozen=True)
class Recipe:
    """What an artefact is made from; its key is a hash of stage, version, parameters and inputs.

    Attributes:
        stage: name of the function in ``deme_lib.experiment.stages`` that makes it.
        label: readable name, unique within an experiment.
        parameters: all parameters that the stage reads (JSON values).
        inputs: the recipes it is made from, by role.
        locations: parameters that name local files, by their paths; the key has their content.
        version: raised when the stage's results change.
        training_steps, denoiser_calls: its work, in optimiser steps and in images through a
            denoiser, for estimates of time.
        job: name of the group of stages that share a process.
    """

    stage: str
    label: str
    parameters: dict[str, Any]
    inputs: dict[str, "Recipe"]
    version: int = 1
    locations: dict[str, str] = field(default_factory=dict)
    training_steps: int = 0
    denoiser_calls: int = 0
    job: str = ""

    @cached_property
    def key(self) -> str:
        content = {"stage": self.stage, "version": self.version, "parameters": self.parameters}
        content["inputs"] = {role: recipe.key for role, recipe in self.inputs.items()}
        return _hash(content)[:12]

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
        self.root = ROOT / runs_dir / "store"

    def folder(self, recipe: Recipe) -> Path:
        return self.root / recipe.name

    def partial(self, recipe: Recipe) -> Path:
        """Where an artefact is prepared."""
        return self.root / ".partial" / recipe.name

    def holds(self, recipe: Recipe) -> bool:
        return (self.folder(recipe) / RECORD).is_file()

    def missing(self, *wanted: Recipe) -> list[Recipe]:
        """What must be made to have them, upstream first; each once."""
        found: dict[str, Recipe] = {}
        for recipe in wanted:
            if not self.holds(recipe):
                upstream = self.missing(*recipe.inputs.values())
                found |= {r.name: r for r in [*upstream, recipe]}
        return list(found.values())

    def load(self, recipe: Recipe) -> Artefact:
        """Load and check an artefact; nothing changes.

        Raises:
            StoreError: it is missing, or its record or a file was changed, cut, or put there.
        """
        folder = self.folder(recipe)
        if not self.holds(recipe):
            raise StoreError(
                f"{recipe.name} is not in {self.root}: `python -m deme_lib make {recipe.label}` "
                "makes it"
            )
        remedy = f"delete {folder} and run again to make it anew"
        record = read_json(folder / RECORD)
        if record.get("checksum") != _checksum(record):
            raise StoreError(f"{folder / RECORD} was changed since it was written; {remedy}")
        if odd := {name for name, _ in record["files"].items() ^ _files(folder).items()}:
            raise StoreError(f"{folder}: changed, missing or foreign: {sorted(odd)}; {remedy}")
        return Artefact(folder, record)

    def make(
        self, recipe: Recipe, build: Callable[[Path], dict[str, Any]], device: str = "cpu"
    ) -> Artefact:
        """Load the artefact, or have ``build(folder)`` write its files and return its results.

        Raises:
            ResourceError: a full disk, a folder that cannot be written, or memory that ran out.
        """
        if self.holds(recipe):
            return self.load(recipe)
        try:
            with locked(self.root, recipe.name):
                if not self.holds(recipe):
                    return self._make(recipe, build, device)
            return self.load(recipe)
        except Exception as error:
            if not (remedy := _remedy(error, self.root)):
                raise
            raise ResourceError(
                f"{recipe.name} was not made: {remedy}. What was made so far is kept: run again to "
                "go on"
            ) from error

    def _make(self, recipe: Recipe, build: Callable, device: str) -> Artefact:
        folder, partial = self.folder(recipe), self.partial(recipe)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise StoreError(f"{folder} lacks its {RECORD}: delete it and run again")
        _keep_working(partial)
        resumed = any((partial / WORKING).iterdir())
        started, cpu = time.time(), sum(os.times()[:4])
        results = build(partial)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        told = ("name", "stage", "version", "parameters", "training_steps", "denoiser_calls")
        record = {
            **{name: getattr(recipe, name) for name in told},
            "inputs": {role: r.name for role, r in recipe.inputs.items()},
            "results": results,
            "files": _files(partial),
            "seconds": round(time.time() - started, 2),
            "core_seconds": round(sum(os.times()[:4]) - cpu, 2),
            "resumed": resumed,  # then these are of the last part
            "process_peak_memory_mib": peak // (2**20 if sys.platform == "darwin" else 2**10),
            "device": device,
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **provenance(),
        }
        record = json.loads(json.dumps(record))
        record["checksum"] = _checksum(record)
        (partial / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True))
        _flush(partial)
        os.rename(partial, folder)
        shutil.rmtree(folder / WORKING, ignore_errors=True)  # the artefact counts already
        return Artefact(folder, record)


def rates(store: Store, data: str) -> tuple[float, float]:
    """Seconds of an optimiser step and of one image through a denoiser.

    Medians over what the store holds of the data artefact called ``data``, so that models of other
    sizes do not count, made in one go.
    """
    found: dict[str, list[float]] = {"training_steps": [], "denoiser_calls": []}
    for path in store.root.glob(f"*/{RECORD}"):
        with suppress(StoreError):  # whoever loads that one is told
            record = read_json(path)
            if record.get("resumed") or record["inputs"].get("data") != data:
                continue
            for work, seconds in found.items():
                if record.get(work):
                    seconds.append(record["seconds"] / record[work])
    return tuple(
        statistics.median(seconds or [otherwise])
        for seconds, otherwise in zip(found.values(), (STEP_S, CALL_S), strict=True)
    )


def read_json(path: Path, kind: type = dict) -> Any:
    """What a record, or a file that a stage resumes from, holds.

    Raises:
        StoreError: it is cut, not JSON or not of this ``kind``; its folder must go.
    """
    try:
        if isinstance(found := json.loads(path.read_text()), kind):
            return found
        raise ValueError(f"it holds no {kind.__name__}")
    except ValueError as error:
        raise StoreError(
            f"{path} is damaged ({error}); delete {path.parent} and run again to make it anew"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _remedy(error: Exception, root: Path) -> str | None:
    """What failed and what to do, where the machine is at fault."""
    if isinstance(error, Explained):
        return None
    text, number = " ".join(str(error).split())[:200], getattr(error, "errno", None)
    if found := re.search(r"os error (\d+)", text):  # safetensors hands the number on as text
        number = int(found.group(1))
    place = Path(getattr(error, "filename", None) or root)
    if number in NO_DISK and (place.is_relative_to(root) or root.is_relative_to(place)):
        return (
            f"cannot write to {root} ({text}); free some disk space, or set runs_dir to a folder "
            "that you may write to"
        )
    memory = isinstance(error, MemoryError) or number == errno.ENOMEM
    if memory or any(words in text.lower() for words in NO_MEMORY):
        return (
            f"memory ran out ({text}); lower sampling_batch (changes no result), batch_size or "
            "model_channels, or run fewer jobs at once (CORES=1)"
        )
    return None


@cache
def provenance() -> dict[str, Any]:
    """Git commit (and whether the tree was dirty) and versions, for records."""

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", ROOT, *command], capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "commit": git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--", "deme_lib", "params", "notebooks")),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    packages = ("torch", "diffusers", "accelerate", "torch-fidelity", "optuna", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version()} | found


def locked(root: Path, name: str) -> AbstractContextManager:
    """One process at a time, under a name in the store's root."""
    lock = FileLock(root / ".locks" / f"{name}.lock")
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"{name}: another process is making it; waiting", flush=True)
        return lock.acquire()


def _keep_working(partial: Path) -> None:
    """A folder to build in, where of all from before only what a stage resumes from is left."""
    (partial / WORKING).mkdir(parents=True, exist_ok=True)
    for path in partial.iterdir():
        if path.is_dir() and path.name != WORKING:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksum(record: dict[str, Any]) -> str:
    """Hash of a record, and so of the hashes of its files, without itself."""
    return _hash({name: value for name, value in record.items() if name != "checksum"})


def _files(folder: Path) -> dict[str, str]:
    """Hashes of an artefact's files by name, without its record and what a stage resumes from."""
    found = {}
    for place, folders, names in os.walk(folder):
        if Path(place) == folder and WORKING in folders:
            folders.remove(WORKING)  # its maker may be deleting it
        for path in (Path(place) / name for name in names):
            name = str(path.relative_to(folder))
            if name != RECORD:
                with open(path, "rb") as file:
                    found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _flush(folder: Path) -> None:
    """Have the operating system write everything out before the rename makes it count."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
