"""The built-in data set ``fashion8``: Fashion-MNIST's 70,000 images, averaged to 8x8."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deme_lib.diffusion.data import (
    FASHION8,
    FASHION8_HASH,
    DataError,
    Images,
    parts_hash,
    read_idx,
)


def write(folder: Path, file: Path = FASHION8) -> None:
    """Make ``file`` from a folder with the four original files.

    28 pixels a side are padded with black to 32, averaged 4x4 and rounded.

    Raises:
        DataError: the files are not there, or not the published ones.
    """
    parts = read_idx(folder)
    for part, data in parts.items():
        padded = np.pad(data.images, ((0, 0), (0, 0), (2, 2), (2, 2)))
        side = padded.shape[-1] // 4
        means = padded.reshape(len(padded), 1, side, 4, side, 4).mean(axis=(3, 5))
        parts[part] = Images(np.round(means).astype(np.uint8), data.labels)
    if parts_hash(parts) != FASHION8_HASH:
        raise DataError(f"{folder} holds other images than Fashion-MNIST's: fetch its files again")
    images = {f"{part}_images": data.images for part, data in parts.items()}
    labels = {f"{part}_labels": data.labels.astype(np.uint8) for part, data in parts.items()}
    np.savez_compressed(file, **images, **labels)
    print(f"wrote {file}")
