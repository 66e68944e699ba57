"""One job in several processes: the first makes the artefacts, the others help with the long parts.

A launcher, accelerate's or torch's own, starts them and ends all when one fails.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from functools import cache

import torch
import yaml
from torch import distributed

from deme_lib.errors import Explained
from deme_lib.experiment.schema import Parameters


class ProcessError(Explained, RuntimeError):
    """Processes could not be started, or one of them failed."""


def rank() -> int:
    """This process's number in its job; 0 leads."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes a launcher started for this job."""
    return int(os.environ.get("WORLD_SIZE", 1))


def tell(name: str | None = None) -> str | None:
    """Word from the leading process to the others: what all make now, None when all is made."""
    word = [name]
    if count() > 1:
        distributed.broadcast_object_list(word, group=_patient())
    return word[0]


@cache
def _patient() -> distributed.ProcessGroup:
    """Where processes wait for hours, at no cost: gloo sleeps, on any device."""
    return distributed.new_group(backend="gloo", timeout=timedelta(days=365))


def check(p: Parameters) -> None:
    """Refuse more processes than there are GPUs, where there are any."""
    gpus = torch.cuda.device_count() if p.device != "cpu" else 0
    if 0 < gpus < p.processes:
        raise ProcessError(
            f"processes={p.processes}, but torch sees {gpus} CUDA devices: lower processes"
        )


def launch(names: Sequence[str], p: Parameters) -> None:
    """Have artefacts made by ``p.processes`` processes, started by one that is none of them.

    Raises:
        ProcessError: ``check`` refuses them, or one failed.
    """
    check(p)
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={p.processes}"]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(p.model_dump(), file)
        file.flush()
        running = subprocess.Popen(
            [sys.executable, "-m", *launcher, "-m", "deme_lib", "make", *names, "-f", file.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        reasons, killed = [], False
        try:
            for line in running.stdout:  # so that a notebook shows it
                print(line, end="", flush=True)
                reasons += re.findall(r"\w+Error: .*", line)  # also after a bar
                killed |= "Signal 9 (SIGKILL)" in line
        except BaseException:  # such as a cell that is interrupted
            running.terminate()
            raise
    if running.wait():
        reason = reasons[0] if reasons else "the lines above say why"
        if killed:
            reason = "it was killed, as when memory runs out: lower processes or sampling_batch"
        raise ProcessError(f"one of {p.processes} processes failed: {reason}")
