"""Artefacts addressed by their recipe: whole or absent, made once, checked when loaded.

An artefact is a folder ``<label>-<key>`` of files beside a ``record.json``. It is prepared under
``.partial/`` while a lock is held, and renamed into place when everything is on disk, so that a
half-written one is never taken for a whole one; what an interrupted maker left there (checkpoints)
is found again by the next, and goes only after the rename. The lock is the operating system's and
dies with its process.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from deme_lib import ROOT

RECORD = "record.json"
CHECKPOINT, HISTORY = WORKING = ("checkpoint.safetensors", "history.json")
"""Files that a stage resumes from, in its folder beside what it makes; no part of the artefact."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
NO_MEMORY = ("out of memory", "not enough memory", "allocate memory")


class StoreError(RuntimeError):
    """A stored artefact is missing, damaged or foreign."""


class ResourceError(RuntimeError):
    """Disk, memory or the right to write gave out; what was made so far is intact."""


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

    def __post_init__(self):
        if not re.fullmatch(r"\w[\w.-]*", self.label):
            raise StoreError(
                f"{self.label!r} cannot name a folder of the store: use letters, digits, - and _"
            )

    @cached_property
    def key(self) -> str:
        inputs = {role: recipe.key for role, recipe in self.inputs.items()}
        return _key(self.stage, self.version, self.parameters, inputs)

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
        """Load and check an artefact, and remove what a maker killed at the very end left there."""
        artefact = self.check(recipe)
        _tidy(artefact.path)
        return artefact

    def check(self, recipe: Recipe) -> Artefact:
        """``load`` that changes nothing.

        Raises:
            StoreError: it is missing, a file was changed, truncated or put there by others, or the
                record is not of this recipe.
        """
        folder = self.folder(recipe)
        remedy = f"delete {folder} and run again to make it anew"
        try:
            record = json.loads((folder / RECORD).read_text())
            key, files, told = record["key"], record["files"], _key_of(record)
            whole = record.get("checksum") in (None, _checksum(record))  # None: made before it was
        except FileNotFoundError:
            raise StoreError(
                f"{recipe.name} is not in {self.root}: `python -m deme_lib make {recipe.label}` "
                "makes it"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{folder / RECORD} is damaged ({error!r}); {remedy}") from error
        if key != recipe.key:
            raise StoreError(f"{folder} holds another artefact ({key}); {remedy}")
        if told != recipe.key or not whole:
            raise StoreError(f"{folder / RECORD} was changed since it was written; {remedy}")
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
        with explained(recipe.name, self.root):
            locks = self.root / ".locks"
            locks.mkdir(parents=True, exist_ok=True)
            with _locked(locks / f"{recipe.name}.lock", recipe.name):
                if self.holds(recipe):
                    return self.load(recipe)
                return self._make(recipe, build, device)

    def _make(self, recipe: Recipe, build: Callable, device: str) -> Artefact:
        folder, partial = self.folder(recipe), self.root / ".partial" / recipe.name
        if folder.is_dir() and any(folder.iterdir()):
            raise StoreError(
                f"{folder} holds files but no {RECORD}: something removed it; delete the folder "
                "and run again"
            )
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
            "results": results,
            "files": {name: _sha256(partial / name) for name in _files(partial)},
            "seconds": round(time.time() - started, 2),
            "process_peak_memory_mib": _peak_memory_mib(),
            "device": device,
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **provenance(),
        }
        record = json.loads(json.dumps(record, sort_keys=True))
        record["checksum"] = _checksum(record)
        write_text(partial / RECORD, json.dumps(record, indent=1, sort_keys=True))
        _flush(partial)
        os.rename(partial, folder)
        _tidy(folder)
        return Artefact(folder, record)


@contextmanager
def explained(what: str, root: Path) -> Iterator[None]:
    """Turn the machine's refusals while making ``what`` under ``root`` into one clear message.

    Raises:
        ResourceError: a full disk, a folder that cannot be written, or memory that ran out.
    """
    try:
        yield
    except (OSError, MemoryError, SafetensorError, RuntimeError) as error:
        remedy = _remedy(error, root)
        if remedy is None:
            raise
        raise ResourceError(
            f"{what} was not made: {remedy}. What was made so far is kept: run again to go on"
        ) from error


def _remedy(error: Exception, root: Path) -> str | None:
    """What failed and what to do, where the machine is at fault."""
    text = " ".join(str(error).split())[:200]
    number = getattr(error, "errno", None)
    if found := re.search(r"os error (\d+)", text):  # safetensors hands the number on as text
        number = int(found.group(1))
    if number in FULL:
        return f"no room left for it in {root} ({text}); free some disk space"
    refused = number in READ_ONLY and _is_within(getattr(error, "filename", None), root)
    if refused or (isinstance(error, OSError) and not root.is_dir()):
        return f"cannot write to {root} ({text}); set runs_dir to a folder that you may write to"
    memory = isinstance(error, MemoryError) or number == errno.ENOMEM
    if memory or any(words in text.lower() for words in NO_MEMORY):
        return (
            f"memory ran out ({text}); lower sampling_batch (changes no result) or batch_size, or "
            "run fewer jobs at once (CORES=1)"
        )
    return None


def _is_within(path: Any, root: Path) -> bool:
    """Whether an error is about the store: its path lies there, or it names none."""
    if not isinstance(path, str | bytes | os.PathLike):
        return True
    return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(os.path.abspath(root))


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


def _key(stage: str, version: int, parameters: dict, inputs: dict[str, str]) -> str:
    """The hash of what an artefact is made from; ``inputs`` are keys by role."""
    content = {"stage": stage, "version": version, "parameters": parameters, "inputs": inputs}
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _key_of(record: dict[str, Any]) -> str:
    """The key that a record's own content gives: an edited one gives another."""
    inputs = {role: name.rpartition("-")[2] for role, name in record["inputs"].items()}
    return _key(record["stage"], record["version"], record["parameters"], inputs)


def _checksum(record: dict[str, Any]) -> str:
    """Hash of a record without its checksum."""
    content = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tidy(folder: Path) -> None:
    """Remove what a whole artefact no longer needs; a kill may have come before that."""
    for name in WORKING:
        remove(folder / name)


def _peak_memory_mib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def _files(folder: Path) -> list[str]:
    """Names of an artefact's files, without its record and what a stage resumes from."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise StoreError(f"{path} is a link and may change with its target; delete {folder}")
    besides = {folder / name for name in (RECORD, *WORKING)}
    paths = (p for p in folder.rglob("*") if p.is_file() and p not in besides)
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
