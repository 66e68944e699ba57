"""Images: two built-in data sets, Fashion-MNIST's own files, or any Hugging Face data set.

Images are uint8 ``[n, C, H, W]``; models see them as float32 in [-1, 1].
"""

import gzip
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from deme_lib import ROOT
from deme_lib.errors import Explained

SHIPPED = ROOT / "deme_lib" / "shipped"
CLASSIFIERS = SHIPPED / "classifiers"
PRETRAINED = SHIPPED / "pretrained"
FASHION8 = SHIPPED / "datasets" / "fashion8.npz"  # made by write_fashion8
FASHION8_HASH = "1c375ee39707c337"
IDX = {"train": "train", "test": "t10k"}  # part -> how the names of its two files begin


class DataError(Explained, RuntimeError):
    """Images cannot be had, or are not what the experiment needs."""


@dataclass(frozen=True)
class Images:
    """uint8 images [n, C, H, W] and int64 labels [n] (all 0 where any is missing)."""

    images: np.ndarray
    labels: np.ndarray


# what a name stands for


def local_folder(source: str) -> Path | None:
    """``source`` as an existing folder, from the working directory or the repository's root."""
    return next((p for p in (Path(source), ROOT / source) if source and p.is_dir()), None)


def is_local(source: str) -> bool:
    """Whether ``source`` is a folder or file of this machine, rather than a name."""
    found = local_folder(source) is not None or Path(source).is_file()
    return found and source not in BUILT_IN


def is_lost(source: str) -> bool:
    """Whether ``source`` looks like a path, which no hub id does, but leads to no folder."""
    path = source.startswith(("/", ".", "~")) or source.endswith("/") or source.count("/") > 1
    beside = "/" in source and local_folder(source.rpartition("/")[0]) is not None
    return (path or beside or Path(source).is_file()) and local_folder(source) is None


def fingerprint(source: str) -> str:
    """Hash of what stands behind a data set or pretrained model, for artefact keys.

    Built-in and local data are hashed by content (a folder's with the paths in it), hub ids by
    name.
    """
    if source in BUILT_IN:
        return parts_hash(BUILT_IN[source]())
    if not is_local(source):
        return f"hub:{source}"
    path = local_folder(source) or Path(source)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return _content_hash(path.parent if path.is_file() else path, tuple(stats))


@cache  # by size and time of change, so that a file is read once a process and change
def _content_hash(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.sha256()
    for name, *_ in files:
        total.update(f"{Path(name).relative_to(folder).as_posix()}\0".encode())
        with open(name, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def shipped_pretrained(name: str, seed: int) -> Path:
    """The folder of a shipped pretrained model, such as ``fashion8``, of a training seed.

    It holds ``pipeline``, the earlier ``snapshot-4`` and ``snapshot-2`` (a quarter and half of the
    steps), ``history.csv`` and ``card.json``.
    """
    folder = PRETRAINED / name / f"seed-{seed}"
    if not folder.is_dir():
        seeds = sorted(int(f.name.removeprefix("seed-")) for f in PRETRAINED.glob(f"{name}/seed-*"))
        raise DataError(
            f"no pretrained model of {name} ships for seed {seed}, only for seeds {seeds}: take "
            'those, or set `pretrained: ""` to train anew'
        )
    return folder


def classifier_hash(name: str) -> str:
    """Hash of a shipped classifier's weights; of other features (Inception's) their name."""
    weights = CLASSIFIERS / f"{name}.safetensors"
    return fingerprint(str(weights)) if weights.is_file() else name


def parts_hash(parts: dict[str, Images]) -> str:
    """Hash of a whole data set."""
    total = hashlib.sha256()
    for part in parts.values():
        total.update(part.images.tobytes() + part.labels.tobytes())
    return total.hexdigest()[:16]


def content_hash(array: np.ndarray) -> str:
    """Hash of a uint8 array, such as images [n, C, H, W]: the same wherever they come from."""
    return hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()[:16]


# built-in data and Fashion-MNIST's own files


@cache
def digits() -> dict[str, Images]:
    """scikit-learn's 1,797 digits, 8x8, 17 grey levels spread over 0..255; one part."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images / 16 * 255).astype(np.uint8)[:, None]
    return {"train": Images(images, data.target.astype(np.int64))}


@cache
def fashion8() -> dict[str, Images]:
    """Fashion-MNIST at 8x8: 60,000 images in ``train``, 10,000 in ``test``, ten classes.

    Raises:
        DataError: the file is not the one that was shipped.
    """
    remedy = "install the package again, or run python -m deme_lib fashion8 FOLDER"
    try:
        with np.load(FASHION8) as file:
            parts = {
                part: Images(file[f"{part}_images"], file[f"{part}_labels"].astype(np.int64))
                for part in IDX
            }
    except (OSError, ValueError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        raise DataError(f"{FASHION8} cannot be read ({error}): {remedy}") from error
    if parts_hash(parts) != FASHION8_HASH:
        raise DataError(f"{FASHION8} differs from the data that were shipped: {remedy}")
    return parts


BUILT_IN = {"digits": digits, "fashion8": fashion8}


def write_fashion8(folder: Path, file: Path = FASHION8) -> None:
    """Make the built-in ``fashion8`` from a folder with Fashion-MNIST's four files.

    28 pixels a side are padded with black to 32, averaged 4x4 and rounded.

    Raises:
        DataError: the files are not there, or not the published ones.
    """
    parts, arrays = read_idx(folder), {}
    for part, data in parts.items():
        padded = np.pad(data.images, ((0, 0), (0, 0), (2, 2), (2, 2)))
        means = padded.reshape(-1, 1, 8, 4, 8, 4).mean(axis=(3, 5))
        parts[part] = Images(np.round(means).astype(np.uint8), data.labels)
        arrays[f"{part}_images"] = parts[part].images
        arrays[f"{part}_labels"] = data.labels.astype(np.uint8)
    if parts_hash(parts) != FASHION8_HASH:
        raise DataError(f"{folder} holds other images than Fashion-MNIST's: fetch its files again")
    np.savez_compressed(file, **arrays)


def read_idx(folder: Path) -> dict[str, Images]:
    """``train`` and ``test`` of Fashion-MNIST's four gzipped files.

    Raises:
        DataError: a file is missing or damaged.
    """
    parts = {}
    for part, begin in IDX.items():
        path = folder / f"{begin}-labels-idx1-ubyte.gz"
        try:
            labels = np.frombuffer(gzip.decompress(path.read_bytes())[8:], np.uint8)
            path = folder / f"{begin}-images-idx3-ubyte.gz"
            pixels = np.frombuffer(gzip.decompress(path.read_bytes())[16:], np.uint8)
            images = pixels.reshape(len(labels), 1, 28, 28)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(
                f"{path} cannot be read ({error}): copy the four files of Fashion-MNIST "
                f"(train-images-idx3-ubyte.gz and so on) to {folder} again, or name the hub id "
                "zalando-datasets/fashion_mnist in the parameter `dataset`"
            ) from error
        parts[part] = Images(images, labels.astype(np.int64))
    return parts


# roles


def split(
    source: str,
    train_images: int,
    search_images: int,
    test_images: int,
    seed: int,
    image_size: int = 0,
) -> dict[str, Images]:
    """Load a data set and give each image one role: ``train``, ``search`` or ``test``.

    Of a data set with a test part, test images come from there, and search images from what
    training leaves of the other part; where that is too little they come from the test part too.
    A data set with one part is cut in three. Cuts are stratified by label. The writers of the
    digits are shared between the roles: the files do not name them.

    Args:
        source: ``digits``, ``fashion8``, a hub id, or a folder: Fashion-MNIST's four files,
            parquet, or images.
        image_size: height and width to ``fit`` the images to; 0: as they are.

    Raises:
        DataError: the data cannot be reached, cannot be read, or holds too few images.
    """
    sizes = {"train": train_images, "search": search_images, "test": test_images}
    roles, parts = {}, _load(source)
    for part, names in _parts_to_roles(parts, train_images + search_images).items():
        labels, image_at = parts[part]
        chosen = _cut(labels, {name: sizes[name] for name in names}, seed, source)
        for name, rows in chosen.items():
            roles[name] = Images(_read(image_at, rows, image_size, source), labels[rows])
    shapes = {name: images.images.shape[1:] for name, images in roles.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"{source}: the roles differ in shape: {shapes}; make them alike")
    return roles


def _parts_to_roles(parts: dict, train_and_search: int) -> dict[str, tuple[str, ...]]:
    train = "train" if "train" in parts else next(iter(parts))
    held_out = next((p for p in ("test", "validation") if p in parts and p != train), None)
    if held_out is None:
        return {train: ("train", "search", "test")}
    if train_and_search <= len(parts[train][0]):
        return {train: ("train", "search"), held_out: ("test",)}
    return {train: ("train",), held_out: ("search", "test")}


def _cut(labels: np.ndarray, sizes: dict[str, int], seed: int, source: str) -> dict:
    """Disjoint stratified subsets of these sizes, as indices."""
    from sklearn.model_selection import train_test_split

    if sum(sizes.values()) > len(labels):
        asked = " + ".join(f"{size} {name}" for name, size in sizes.items())
        lower = ", ".join(f"{name}_images" for name in sizes)
        raise DataError(
            f"{source} holds {len(labels)} images where {asked} are asked for: lower {lower}"
        )
    left, subsets = np.arange(len(labels)), {}
    for name, size in sizes.items():
        subsets[name] = left
        if size < len(left):
            _, counts = np.unique(labels[left], return_counts=True)
            possible = counts.min() >= 2 and len(counts) <= min(size, len(left) - size)
            stratify = labels[left] if possible else None
            subsets[name], left = train_test_split(
                left, train_size=size, stratify=stratify, random_state=seed
            )
    return subsets


# reading


Part = tuple[np.ndarray, Callable[[int], np.ndarray]]
"""int64 labels [n], and a function from an index to its uint8 image [C, H, W]."""


def _load(source: str) -> dict[str, Part]:
    folder = local_folder(source)
    if source in BUILT_IN:
        parts = BUILT_IN[source]()
    elif folder and any(folder.glob("*-idx[13]-ubyte.gz")):
        parts = read_idx(folder)
    else:
        return {name: _part(data, source) for name, data in _load_dataset(source).items()}
    return {name: (part.labels, part.images.__getitem__) for name, part in parts.items()}


def _load_dataset(source: str):
    import datasets

    folder = local_folder(source)
    if is_lost(source):
        raise DataError(
            f"there is no folder {source}: name an existing folder of images or parquet files, or "
            "a hub id, in the parameter `dataset`"
        )
    try:
        return datasets.load_dataset(str(folder or source))
    except Exception as error:  # the library raises dozens of types, its HTTP client's too
        raise DataError(
            f"cannot load the data set {source} ({type(error).__name__}: {str(error)[:200]}): name "
            "in the parameter `dataset` a folder of parquet files, or of images sorted into train/ "
            "and test/, and no code, or with a network a hub id"
        ) from error


def _part(data, source: str) -> Part:
    import datasets

    images, labels = (
        [name for name, feature in data.features.items() if isinstance(feature, kind)]
        for kind in (datasets.Image, datasets.ClassLabel)
    )
    if not images:
        raise DataError(f"{source} has no image column, only {sorted(data.features)}: give it one")
    found = list(data[labels[0]]) if labels else [None]
    if any(x is None or x < 0 for x in found):  # -1: how hubs mark labels that are kept back
        found = [0] * len(data)
    return np.array(found, np.int64), lambda i: _pixels(data[i][images[0]])


def _read(image_at: Callable, indices: np.ndarray, size: int, source: str) -> np.ndarray:
    """uint8 images [n, C, H, W], each fitted to ``size``."""
    images = None
    for k, i in enumerate(indices.tolist()):
        try:
            image = fit(image_at(i), size)
        except Exception as error:  # whatever the image decoder raises
            raise DataError(f"{source}: image {i} cannot be read ({error}): replace it") from error
        if images is None:
            images = np.empty((len(indices), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            alike = len(image) == images.shape[1]
            remedy = "make them alike, or set image_size" if alike else "save all as grey or colour"
            raise DataError(
                f"{source}: image {i} is {image.shape}, the first is {images.shape[1:]}: {remedy}"
            )
        images[k] = image
    return images


def _pixels(picture: Image.Image | None) -> np.ndarray:
    """uint8 [C, H, W]: grey stays grey, 16 bits keep their upper 8, all else becomes RGB."""
    if picture is None:
        raise ValueError("it is null")
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits and no known range, 8 or 16 are taken")
    if picture.mode.startswith("I;16"):  # convert() would clip at 255
        return (np.asarray(picture) >> 8).astype(np.uint8)[None]
    return _channels_first(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """A uint8 image [C, H, W] as a square of ``size`` pixels a side; 0: as it is.

    Shrunk until its shorter side fits, then cut or padded with black evenly on both sides.
    """
    if not size:
        return image
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    shrink = max(1.0, min(picture.size) / size)
    if shrink > 1:
        shape = [round(side / shrink) for side in picture.size]
        picture = picture.resize(shape, Image.Resampling.BICUBIC)  # antialiased
    left, top = ((side - size) // 2 for side in picture.size)
    return _channels_first(picture.crop((left, top, left + size, top + size)))  # black outside


def _channels_first(picture: Image.Image) -> np.ndarray:
    array = np.asarray(picture)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
