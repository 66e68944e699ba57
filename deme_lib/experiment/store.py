"""Artefacts addressed by what they are made from: whole or absent, made once, checked when loaded.

An artefact is a stage, which is a plain function ``stage(job, **arguments)``, with its arguments.
``make`` returns its folder ``<label>-<key>``, made if it is not there: the stage writes its files
to ``job.out``, which is renamed into place when everything is on disk. One process at a time makes
an artefact, under a lock of the operating system.
"""

import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from deme_lib import ROOT
from deme_lib.diffusion.data import hash_of
from deme_lib.diffusion.models import device_of
from deme_lib.errors import Explained

RECORD = "record.json"


class StoreError(Explained, RuntimeError):
    """A stored artefact is damaged, or cannot be named."""


@dataclass(frozen=True)
class Machine:
    """Where and how fast a stage computes, which no key holds."""

    device: str
    threads: int
    sampling_batch: int
    checkpoint_every: int
    runs_dir: str

    @property
    def store(self) -> Path:
        return ROOT / self.runs_dir / "store"


@dataclass(frozen=True)
class Job:
    """What a stage is told beside its arguments."""

    out: Path  # the folder to write
    work: Path  # one that outlives a killed process, for checkpoints
    on: Machine

    @property
    def device(self) -> torch.device:
        return device_of(self.on.device)


@dataclass(frozen=True)
class Source:
    """A name or path whose content counts in keys, and which a stage gets as it is."""

    name: str
    content: str


@dataclass(frozen=True)
class Artefact:
    """What is made: a stage and its arguments, under a readable label.

    Arguments are JSON values, ``Source``, other artefacts (they count by name and arrive as
    folders), functions (they count by their source), or lists of these.
    """

    label: str
    stage: Callable[..., None]
    arguments: dict[str, Any]
    on: Machine

    @cached_property
    def name(self) -> str:
        content = {"stage": self.stage.__name__, "version": getattr(self.stage, "version", 1)}
        content |= {name: _key(value) for name, value in self.arguments.items()}
        text = json.dumps(content, sort_keys=True)
        return f"{self.label}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def folder(self) -> Path:
        """Where it is, once it is made."""
        return self.on.store / self.name

    @property
    def record(self) -> Path:
        """The file that is there when the artefact is."""
        return self.folder / RECORD

    def upstream(self) -> list["Artefact"]:
        """The artefacts among its arguments."""
        values = [x for v in self.arguments.values() for x in (v if isinstance(v, list) else [v])]
        return [value for value in values if isinstance(value, Artefact)]


def make(wanted: Artefact | Sequence[Artefact]) -> Path | list[Path]:
    """The folder of an artefact, or of several, made with all that they need where they are not.

    Raises:
        StoreError: the folder's content is not what was made.
    """
    if not isinstance(wanted, Artefact):
        return [make(artefact) for artefact in wanted]
    if not wanted.record.is_file():
        arguments = {name: _resolved(value) for name, value in wanted.arguments.items()}
        with locked(wanted.on.store, wanted.name):
            if not wanted.record.is_file():
                _build(wanted, arguments)
    _check(wanted.folder, wanted.record.stat().st_mtime_ns)
    return wanted.folder


def _build(artefact: Artefact, arguments: dict[str, Any]) -> None:
    partial = artefact.on.store / ".partial" / artefact.name
    out, work = partial / "out", partial / "work"
    if artefact.folder.is_dir() and any(artefact.folder.iterdir()):
        raise StoreError(f"{artefact.folder} lacks its {RECORD}: delete it and run again")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    work.mkdir(exist_ok=True)
    print(f"making {artefact.name}", flush=True)
    torch.set_num_threads(artefact.on.threads)
    started, on_cuda = time.time(), artefact.on.device != "cpu" and torch.cuda.is_available()
    artefact.stage(Job(out, work, artefact.on), **arguments)
    record = {
        "label": artefact.label,
        "stage": artefact.stage.__name__,
        "arguments": {name: _key(value) for name, value in artefact.arguments.items()},
        "seconds": round(time.time() - started, 1),  # of the last part, if it was interrupted
        "content": _content(out),
        **provenance("cuda" if on_cuda else "cpu"),
    }
    (out / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True))
    for path in [*out.rglob("*"), out]:  # on disk before the rename makes it count
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    os.rename(out, artefact.folder)
    shutil.rmtree(partial, ignore_errors=True)


def _key(value: Any) -> Any:
    """What of an argument counts."""
    if isinstance(value, list):
        return [_key(x) for x in value]
    if isinstance(value, Artefact):
        return value.name
    if isinstance(value, Source):
        return value.content
    if callable(value):
        if not inspect.isfunction(value) or value.__closure__:
            raise StoreError(f"{value} holds what its source does not tell: write a plain function")
        source = inspect.getsource(value).encode()
        return f"{value.__name__} {hashlib.sha256(source).hexdigest()[:12]}"
    return value


def _resolved(value: Any) -> Any:
    """What of an argument a stage gets."""
    if isinstance(value, list):
        return [_resolved(x) for x in value]
    if isinstance(value, Artefact):
        return make(value)
    return value.name if isinstance(value, Source) else value


@cache  # once a process and change
def _check(folder: Path, _changed: int) -> None:
    try:
        expected = json.loads((folder / RECORD).read_text())["content"]
    except (ValueError, KeyError) as error:
        raise StoreError(f"{folder / RECORD} is damaged: delete {folder} and run again") from error
    if _content(folder) != expected:
        raise StoreError(
            f"{folder} does not hold what was made: a file was changed, cut or put there. Delete "
            "it and run again to make it anew"
        )


def _content(folder: Path) -> str:
    """One hash of all files of an artefact but its record."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return hash_of(sorted(files), folder)


def locked(root: Path, name: str):
    """A lock that one process at a time holds, under a name; the others wait."""
    lock = FileLock(root / ".locks" / f"{name}.lock")
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"{name}: another process is making it; waiting", flush=True)
        return lock.acquire()


@cache
def provenance(device: str) -> dict[str, Any]:
    """Git commit, whether the tree was dirty, device and versions, for records."""

    def git(*command: str) -> str:
        command = ["git", "--no-optional-locks", "-C", ROOT, *command]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    packages = ("torch", "diffusers", "accelerate", "torch-fidelity", "optuna", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "commit": git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--", "deme_lib", "params", "notebooks")),
        "device": device,
        "versions": {"python": platform.python_version(), **versions},
    }
