"""The idx files of MNIST and Fashion-MNIST, gzipped or plain.

Two zero bytes, the type of the numbers (8: uint8), how many dimensions, their sizes as big-endian
uint32, then the numbers.
"""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
UINT8 = 8


class IdxError(ValueError):
    """A file is missing, or not what an idx file is."""


def is_folder(folder: Path) -> bool:
    """Whether a folder holds any of the four files."""
    names = [name for pair in FILES.values() for name in pair]
    return any(_path(folder, name).is_file() for name in names)


def load(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 1, H, W] and labels int64 [n] of the part ``train`` or ``test``.

    Raises:
        IdxError: naming the file.
    """
    names = FILES[part]
    images, labels = read(_path(folder, names[0]), 3), read(_path(folder, names[1]), 1)
    if len(images) != len(labels):
        raise IdxError(f"{folder}: {names[0]} has {len(images)}, {names[1]} {len(labels)} entries")
    return images[:, None], labels.astype(np.int64)


def read(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of a file."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise IdxError(f"{path} cannot be read ({error})") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, UINT8, dimensions]) or len(content) < start:
        raise IdxError(f"{path} is no idx file of uint8 with {dimensions} dimensions")
    shape = np.frombuffer(content[4:start], ">u4").tolist()
    if len(content) - start != prod(shape):
        raise IdxError(f"{path} should hold {prod(shape)} numbers, it has {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _path(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.is_file() else folder / f"{name}.gz"
