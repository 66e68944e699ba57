"""The built-in data set ``fashion8``: Fashion-MNIST's 70,000 images, averaged to 8x8."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deme_lib.diffusion import idx
from deme_lib.diffusion.data import FASHION8, FASHION8_HASHES, DataError, content_hash


def make(folder: Path) -> dict[str, np.ndarray]:
    """Images uint8 [n, 1, 8, 8] and labels uint8 [n] of both parts, from the four original files.

    28 pixels a side are padded with black to 32, averaged 4x4 and rounded.

    Raises:
        DataError: the files are not there, or not the published ones.
    """
    arrays = {}
    for part in idx.FILES:
        try:
            images, labels = idx.load(folder, part)
        except idx.IdxError as error:
            raise DataError(f"{error}: copy Fashion-MNIST's four files to {folder}") from error
        padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
        side = padded.shape[-1] // 4
        means = padded.reshape(len(images), 1, side, 4, side, 4).mean(axis=(3, 5))
        arrays[f"{part}_images"] = np.round(means).astype(np.uint8)
        arrays[f"{part}_labels"] = labels.astype(np.uint8)
    if {name: content_hash(array) for name, array in arrays.items()} != FASHION8_HASHES:
        raise DataError(f"{folder} holds other images than Fashion-MNIST's: fetch its files again")
    return arrays


def write(folder: Path, file: Path = FASHION8) -> None:
    """Make the data set from a folder with the four original files and write it to ``file``."""
    arrays = make(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)
    print(f"{file}: " + ", ".join(f"{name} {h}" for name, h in FASHION8_HASHES.items()))
