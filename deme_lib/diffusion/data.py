"""Images: two built-in data sets, a folder of one's own, or any Hugging Face data set.

Images are uint8 ``[n, C, H, W]``; models see them as float32 in [-1, 1].
"""

import glob
import gzip
import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from deme_lib import ROOT
from deme_lib.errors import Explained

SHIPPED = ROOT / "deme_lib" / "shipped"
CLASSIFIERS = SHIPPED / "classifiers"
PRETRAINED = SHIPPED / "pretrained"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
PARTS = dict.fromkeys(("train", "training"), "train")  # names of folders and files -> parts
PARTS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
PARTS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")


class DataError(Explained, RuntimeError):
    """Images cannot be had, or are not what is needed."""


@dataclass(frozen=True)
class Images:
    """uint8 images [n, C, H, W], or files or PIL pictures not yet read, and int64 labels [n]."""

    images: np.ndarray | Sequence
    labels: np.ndarray  # 0 where there is none


def load_images(source: str | Path, size: int = 0) -> torch.Tensor:
    """All images of a source, or of its train part, as uint8 [n, C, H, W].

    One printed line says what was found.

    Args:
        source: as for ``split``.
        size: height and width to ``fit`` the images to; 0: as they are, all of one shape.

    Raises:
        DataError: the images cannot be found, read or stacked.
    """
    pictures = next(iter(_load(str(source)).values())).images
    return torch.from_numpy(_read(pictures, range(len(pictures)), size, source))


def split(
    source: str,
    train_images: int,
    search_images: int,
    test_images: int,
    split_seed: int,
    image_size: int = 0,
) -> dict[str, Images]:
    """Load a data set and give each image one role: ``train``, ``search`` or ``test``.

    Of a data set with a test part, test images come from there, and search images from what
    training leaves of the other part; where that is too little they come from the test part too.
    A data set with one part is cut in three. Cuts are stratified by label. The writers of the
    digits are shared between the roles: the files do not name them.

    Args:
        source: ``digits``, ``fashion8``, a hub id, or a folder: Fashion-MNIST's four files,
            parquet, or images in folders of classes, under train/ and test/ where there are parts.
        image_size: height and width to ``fit`` the images to; 0: as they are.
    """
    sizes, roles = {"train": train_images, "search": search_images, "test": test_images}, {}
    parts = _load(source)
    for part, names in _parts_to_roles(parts, train_images + search_images).items():
        pictures, labels = parts[part].images, parts[part].labels
        chosen = _cut(labels, {name: sizes[name] for name in names}, split_seed, source)
        for name, rows in chosen.items():
            roles[name] = Images(_read(pictures, rows, image_size, source), labels[rows])
    return roles


def check_images(images: object) -> None:
    """DataError: not a uint8 tensor [n, C, H, W] of one image or more."""
    tensor = isinstance(images, torch.Tensor)
    if not tensor or images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        kind = f"{images.dtype} {list(images.shape)}" if tensor else f"a {type(images).__name__}"
        raise DataError(
            f"images must be a torch.uint8 tensor [n, C, H, W] of 0..255, not {kind}: "
            "load_images makes one of a folder, torch.from_numpy of an array, to_uint8 of samples"
        )


# what a name stands for


def local_folder(source: str) -> Path | None:
    """``source`` as an existing folder, from the working directory or the repository's root."""
    return next((p for p in (Path(source), ROOT / source) if source and p.is_dir()), None)


def is_local(source: str) -> bool:
    """Whether ``source`` is a folder or file of this machine, rather than a name."""
    return source not in BUILT_IN and bool(local_folder(source) or Path(source).is_file())


def fingerprint(source: str) -> str:
    """Hash of a data set's or model's content, with the paths in a folder; of a hub id its name."""
    if source in BUILT_IN:
        return content_hash(np.concatenate([p.images for p in BUILT_IN[source]().values()]))
    if not is_local(source):
        return f"hub:{source}"
    path = local_folder(source) or Path(source)
    return hash_of(_files(path), path if path.is_dir() else path.parent)


def hash_of(files: Sequence[Path], folder: Path) -> str:
    """One hash of files and of their paths below a folder."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    """All files of a folder in order, none hidden, of linked folders too; a file is alone."""
    files, seen = [path] if path.is_file() else [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        new = os.path.realpath(folder) not in seen  # each folder once, wherever links lead
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if new and not name.startswith("."))
        files += [Path(folder, name) for name in names if new and not name.startswith(".")]
    return sorted(files, key=str)


def content_hash(array: np.ndarray) -> str:
    """Hash of a uint8 array, such as images [n, C, H, W]: the same wherever they come from."""
    return hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()[:16]


def classifier_hash(name: str) -> str:
    """Hash of a shipped classifier's weights; of other features (Inception's) their name."""
    weights = CLASSIFIERS / f"{name}.safetensors"
    return fingerprint(str(weights)) if weights.is_file() else name


def shipped_pretrained(name: str, seed: int) -> Path:
    """The folder of a shipped model (``pipeline``, ``history.csv``, ``card.json``) of a seed."""
    folder = PRETRAINED / name / f"seed-{seed}"
    if not folder.is_dir():
        raise DataError(
            f"no pretrained {name} of training seed {seed} ships: take seeds of "
            f'{folder.parent}, or set `pretrained: ""` to train anew'
        )
    return folder


# sources


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

    28 pixels a side were padded with black to 32, averaged 4x4 and rounded.
    """
    with np.load(SHIPPED / "datasets" / "fashion8.npz") as file:
        return {
            part: Images(file[f"{part}_images"], file[f"{part}_labels"].astype(np.int64))
            for part in ("train", "test")
        }


BUILT_IN = {"digits": digits, "fashion8": fashion8}


def read_idx(folder: Path) -> dict[str, Images]:
    """``train`` and ``test`` of Fashion-MNIST's four gzipped files, such as Debian packages."""
    parts = {}
    for part, begin in (("train", "train"), ("test", "t10k")):
        labels = gzip.decompress((folder / f"{begin}-labels-idx1-ubyte.gz").read_bytes())[8:]
        pixels = gzip.decompress((folder / f"{begin}-images-idx3-ubyte.gz").read_bytes())[16:]
        images = np.frombuffer(pixels, np.uint8).reshape(len(labels), 1, 28, 28)
        parts[part] = Images(images, np.frombuffer(labels, np.uint8).astype(np.int64))
    return parts


def _load(source: str) -> dict[str, Images]:
    """A source's parts, unread, the train part first; prints what they are."""
    if source in BUILT_IN:
        return BUILT_IN[source]()
    folder = local_folder(os.path.expanduser(source))
    try:
        parts, found = _load_folder(folder) if folder else _load_dataset(source)
    except Exception as error:  # the datasets library raises dozens of types, its HTTP client's too
        taken = "" if folder else "there is no such folder, and as a hub id "
        raise DataError(
            f"{source}: {taken}it cannot be loaded ({type(error).__name__}: {str(error)[:200]}): "
            "name in the parameter `dataset` a folder of images, of parquet files or of "
            "Fashion-MNIST's four files, or with a network a hub id"
        ) from error
    counts = ", ".join(f"{len(part.labels):,} {name}" for name, part in parts.items())
    print(f"{source}: {counts} images of {found}")
    if len(parts) > 1 and "train" not in parts:
        raise DataError(f"{source} has the parts {', '.join(parts)}: name the folder of one")
    return dict(sorted(parts.items(), key=lambda part: part[0] != "train"))


def _load_folder(folder: Path) -> tuple[dict[str, Images], str]:
    """Its parts and words on them. Folders of images are classes, pictures beside them left out.

    The names of the folders that a file is in say its part, of parquet its own name's words too,
    where they do so for every file; beside train/ and test/ other folders are left out.
    """
    files = _files(folder)
    if any(f.name.endswith("-ubyte.gz") for f in files):
        return read_idx(folder), "Fashion-MNIST's four files"
    tables = [f for f in files if f.suffix == ".parquet"]
    pictures = [f for f in files if f.suffix.lower() in SUFFIXES]
    taken = tables or [f for f in pictures if f.parent != folder] or pictures
    if not taken:
        raise ValueError("it holds neither parquet files nor images; unpack archives")
    groups: dict[str, list[Path]] = {}
    for file in taken:
        words = [name.lower() for name in file.relative_to(folder).parts[:-1]]
        words += re.split("[^a-z]+", file.name.lower()) if tables else []
        part = next((PARTS[word] for word in words if word in PARTS), "no part")
        groups.setdefault(part, []).append(file)
    if {"train", "no part"} <= groups.keys() and (tables or len(groups) > 2):
        beside = groups.pop("no part")
        warnings.warn(f"{beside[0]} is in no part: {len(beside)} files left out", stacklevel=2)
    elif "no part" in groups:
        groups = {"train": taken}  # classes, one of which may be "train"
    if tables:
        return _load_dataset(str(folder), groups)
    classes, parts = sorted({f.parent.name for mine in groups.values() for f in mine}), {}
    for part, mine in groups.items():
        parts[part] = Images(mine, np.searchsorted(classes, [f.parent.name for f in mine]))
    return parts, f"{len(files):,} files, folders {', '.join(classes[:10])}"


def _load_dataset(
    source: str, files: dict[str, list[Path]] | None = None
) -> tuple[dict[str, Images], str]:
    """Parts of parquet files, or of a hub id, by the library ``datasets``, and words on them."""
    import datasets

    if files:  # by content, where the library's own cache goes by time of change
        cached = str(Path(datasets.config.HF_DATASETS_CACHE) / fingerprint(source))
        names = {part: [glob.escape(str(f)) for f in found] for part, found in files.items()}
        loaded = datasets.load_dataset("parquet", data_files=names, cache_dir=cached)
    else:
        loaded = datasets.load_dataset(source)
    features = next(iter(loaded.values())).features
    columns, classes = (
        [name for name, feature in features.items() if isinstance(feature, kind)]
        for kind in (datasets.Image, datasets.ClassLabel)
    )
    if not columns:
        raise ValueError(f"it has no image column, only {sorted(features)}")
    column, parts = "image" if "image" in columns else columns[0], {}
    for part, data in loaded.items():  # a label that is kept back is None, or -1
        labels = [max(0, x or 0) for x in data[classes[0]]] if classes else [0] * len(data)
        parts[part] = Images(data[column], np.array(labels, np.int64))
    return parts, f"column {column} of {', '.join(features)}"


# roles


def _parts_to_roles(parts: dict, train_and_search: int) -> dict[str, tuple[str, ...]]:
    train, *others = parts
    held_out = next((p for p in ("test", "validation") if p in others), None)
    if held_out is None:
        return {train: ("train", "search", "test")}
    if train_and_search <= len(parts[train].labels):
        return {train: ("train", "search"), held_out: ("test",)}
    return {train: ("train",), held_out: ("search", "test")}


def _cut(labels: np.ndarray, sizes: dict[str, int], seed: int, source: str) -> dict:
    """Disjoint stratified subsets of these sizes, as indices."""
    from sklearn.model_selection import train_test_split

    if sum(sizes.values()) > len(labels):
        asked = " + ".join(f"{size} {name}_images" for name, size in sizes.items())
        raise DataError(f"{source} has {len(labels)} images for {asked}: lower these parameters")
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


# pixels


def _read(pictures: Sequence, rows: Sequence[int], size: int, source: str | Path) -> np.ndarray:
    """uint8 images [n, C, H, W], each fitted to ``size``."""
    if not isinstance(size, (int, np.integer)) or size < 0:
        raise DataError(f"a size of {size!r}: give pixels a side, or 0 for images as they are")
    images = None
    for k, i in enumerate(map(int, rows)):
        name = pictures[i] if isinstance(pictures, list) else f"{source}: image {i}"
        try:
            image = fit(_pixels(pictures[i]), size)
        except Exception as error:  # whatever the image decoder raises
            raise DataError(f"{name} cannot be read ({error}): replace or delete it") from error
        if images is None:
            images = np.empty((len(rows), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            shapes = f"{image.shape}, not {images.shape[1:]} as the first"
            raise DataError(f"{name} is {shapes}: give a size, and save all as grey or all as RGB")
        images[k] = image
    return images


def _pixels(picture: np.ndarray | Path | Image.Image) -> np.ndarray:
    """uint8 [C, H, W]: grey stays grey, all else becomes RGB; warns where something is lost."""
    if isinstance(picture, np.ndarray):
        return picture
    if isinstance(picture, Path):
        with Image.open(picture) as file:
            picture = ImageOps.exif_transpose(file)
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits and no known range, 8 or 16 are taken")
    if picture.mode.startswith("I;16"):  # convert() would clip at 255
        warnings.warn("of 16 bits the upper 8 are taken", stacklevel=2)
        return (np.asarray(picture) >> 8).astype(np.uint8)[None]
    if picture.has_transparency_data:
        warnings.warn("transparent pixels show the colour beneath, in RGB", stacklevel=2)
    picture = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    return np.atleast_3d(picture).transpose(2, 0, 1)


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
    square = picture.crop((left, top, left + size, top + size))  # black outside
    return np.atleast_3d(square).transpose(2, 0, 1)
