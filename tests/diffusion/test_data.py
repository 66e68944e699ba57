"""Images: built in, from folders, and from nowhere."""

import os
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from deme_lib.diffusion import data
from deme_lib.diffusion.data import DataError, fingerprint, load_images, split

SIZES = {"train_images": 1200, "search_images": 297, "test_images": 300}
ROLES = ("train", "search", "test")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def picture(i, size=8, mode="RGB"):
    """An image that says which it is: its first pixel is i."""
    pixels = np.full((size, size), 200, np.uint8)
    pixels[0, 0] = i
    return Image.fromarray(pixels).convert(mode)


def encoded(image):
    """A picture as the bytes of a PNG file, an array as those of a TIFF file."""
    file, array = BytesIO(), isinstance(image, np.ndarray)
    (Image.fromarray(image) if array else image).save(file, "TIFF" if array else "PNG")
    return file.getvalue()


def image_folder(root, parts=("train/0", "train/1", "test/0", "test/1"), **how):
    """Ten images in each of the folders: 0 to 9 in the first, and so on."""
    for i in range(10 * len(parts)):
        path = root / parts[i // 10] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, **how).save(path)
    return str(root)


def parquet(folder, part="train", **columns):
    """A parquet file of columns of PIL pictures, and of ``label``."""
    kinds = {name: datasets.Image() for name in columns} | {"label": datasets.ClassLabel(2)}
    columns = {"label": [0, 1] * (len(next(iter(columns.values()))) // 2)} | columns
    folder.mkdir(exist_ok=True)
    kinds = datasets.Features({name: kinds[name] for name in columns})
    made = datasets.Dataset.from_dict(columns, features=kinds)
    made.to_parquet(folder / f"{part}-00000-of-00001.parquet")
    return str(folder)


def numbers(images):
    return set(images[:, 0, 0, 0].tolist())


# roles


def test_each_digit_has_one_role_by_a_stratified_split_that_its_seed_decides():
    """No two of the 1,797 digits are alike, so their bytes tell them apart."""
    digits = data.digits()["train"]
    labels = dict(zip(map(bytes, digits.images), digits.labels, strict=True))
    roles, again, other = (split("digits", **SIZES, seed=s) for s in (3, 3, 1))
    found = [bytes(image) for role in ROLES for image in roles[role].images]
    assert len(found) == 1797 and set(found) == set(labels)
    for (name, role), count in zip(roles.items(), SIZES.values(), strict=True):
        assert role.images.shape == (count, 1, 8, 8)
        assert [labels[bytes(image)] for image in role.images] == role.labels.tolist()
        assert abs(np.bincount(role.labels) - np.bincount(digits.labels) / 1797 * count).max() < 2
        assert (role.images == again[name].images).all()
        assert (role.images != other[name].images).any()


def test_too_many_images_names_the_parameters_of_their_part(tmp_path):
    with pytest.raises(DataError, match=r"1797 images.*train_images, search_images, test_images"):
        split("digits", 1500, 200, 98, 0)
    with pytest.raises(DataError, match=r"lower search_images, test_images"):
        split(image_folder(tmp_path), 12, 11, 10, seed=0)


@pytest.mark.parametrize("train", [12, 18])
def test_search_images_come_from_what_training_leaves_where_it_does(tmp_path, train):
    """Of 20 train images: 12 + 6 fit into them, 18 + 6 do not."""
    roles = split(image_folder(tmp_path), train, 6, 8, seed=0)
    assert [roles[r].images.shape for r in ROLES] == [(n, 3, 8, 8) for n in (train, 6, 8)]
    found = {role: numbers(images.images) for role, images in roles.items()}
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    assert found["train"] <= set(range(20)) and found["test"] <= set(range(20, 40))
    assert found["search"] <= (set(range(20)) if train == 12 else set(range(20, 40)))
    for role in roles.values():
        assert (role.images[:, 0, 0, 0] // 10 % 2 == role.labels).all()


# Fashion-MNIST


def test_the_shipped_data_are_fashion_mnist_s(fashion_mnist):
    for part, original in data.read_idx(fashion_mnist).items():
        padded = np.pad(original.images, ((0, 0), (0, 0), (2, 2), (2, 2)))
        means = padded.reshape(-1, 1, 8, 4, 8, 4).mean(axis=(3, 5))
        assert (np.round(means) == data.fashion8()[part].images).all()
        assert (original.labels == data.fashion8()[part].labels).all()


def test_the_four_files_and_a_parquet_copy_give_the_same_images(idx_folder, tmp_path):
    files = idx_folder()
    for part, found in data.read_idx(files).items():
        pictures = [Image.fromarray(i[0]) for i in found.images]
        copy = parquet(tmp_path / "copy", part, image=pictures, label=found.labels.tolist())
    first, second = (split(str(f), 16, 5, 6, seed=0, image_size=32) for f in (files, copy))
    for role in ROLES:
        assert data.content_hash(first[role].images) == data.content_hash(second[role].images)
        assert (first[role].labels == second[role].labels).all()
        assert (first[role].images[:, 0, 2, 2] % 2 == first[role].labels).all()


# what is taken, and what is said of it


@pytest.mark.parametrize(
    ("folders", "taken", "said"),
    [
        (["train", "cat"], range(20), "20 images [3, 8, 8] of 20 files, classes cat, train"),
        (["Train/a", "Valid/a"], range(10), "20 files, part train (left: 10 of validation)"),
        (["a", "b/c"], range(20), "20 files, classes a, c"),
    ],
)
def test_a_class_may_be_called_train_and_parts_may_be_capital(
    tmp_path, capsys, folders, taken, said
):
    images = load_images(image_folder(tmp_path / "photos [2024]", folders))
    assert images.dtype == torch.uint8 and numbers(images) == set(taken)
    assert said in capsys.readouterr().out


def test_linked_folders_count_and_captions_and_hidden_files_do_not(tmp_path, capsys):
    image_folder(tmp_path / "far", ["b"])
    image_folder(tmp_path / "photos", ["a"])
    before = fingerprint(str(tmp_path / "photos"))
    (tmp_path / "photos" / "b").symlink_to(tmp_path / "far" / "b")
    for name in ("a/000.txt", "._1.png", "metadata.csv"):
        (tmp_path / "photos" / name).write_text("a photo of a cat")
    assert len(load_images(tmp_path / "photos")) == 20
    assert "20 images [3, 8, 8] of 22 files, classes a, b" in capsys.readouterr().out
    assert fingerprint(str(tmp_path / "photos")) != before


def test_of_two_image_columns_the_one_called_image_is_taken(tmp_path, capsys):
    masks, images = ([picture(i + k) for i in range(4)] for k in (0, 100))
    folder = parquet(tmp_path / "x", mask=masks, image=images)
    assert numbers(load_images(folder)) == set(range(100, 104))
    assert "1 parquet files, column image of label, mask, image" in capsys.readouterr().out


def test_replaced_parquet_of_equal_time_and_size_is_read_again(tmp_path):
    for start in (0, 100):
        folder = parquet(tmp_path / "photos [x]", image=[picture(start + i) for i in range(4)])
        os.utime(next(Path(folder).iterdir()), (1e9, 1e9))
        assert numbers(load_images(folder)) == set(range(start, start + 4))


# refusals


@pytest.mark.parametrize("name", ["my-images", "runs/my-images", "./mine", "a/b/c", "~/x", "x.zip"])
def test_a_name_of_nothing_is_said_to_be_no_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("x.zip").touch()
    with pytest.raises(DataError, match=rf"{name}: there is no such folder, and as a hub id"):
        load_images(name)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("images.zip", b"", "neither parquet files nor images; unpack archives"),
        ("train.csv", b"a,b", "neither parquet files nor images"),
        ("train-images-idx3-ubyte.gz", b"no gzip", "it cannot be loaded .*Fashion-MNIST's four"),
        ("1.png", encoded(picture(0, 32))[:-30], r"1.png cannot be read \(.*truncated.*replace or"),
        ("1.tiff", encoded(np.ones((8, 8), np.float32)), "1.tiff .* 32 bits and no known range"),
        ("1.tiff", encoded(np.ones((8, 8), np.int32)), "1.tiff .* 32 bits and no known range"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_images(tmp_path)


def test_a_null_image_is_named(tmp_path):
    folder = parquet(tmp_path, image=[picture(0), None])
    with pytest.raises(DataError, match=r"image 1 cannot be read \(it is null\)"):
        load_images(folder)


def test_images_of_different_kinds_are_refused(tmp_path):
    for mode in ("L", "RGB"):
        picture(0, mode=mode).save(tmp_path / f"{mode}.png")
    with pytest.raises(DataError, match=r"RGB.png is \(3, 8, 8\).*save all as grey or colour"):
        load_images(tmp_path, 8)
    for path in Path(image_folder(tmp_path / "x"), "test").rglob("*.png"):
        picture(0, size=9).save(path)
    with pytest.raises(DataError, match="the roles differ in shape"):
        split(str(tmp_path / "x"), 12, 6, 8, seed=0)
    roles = split(str(tmp_path / "x"), 12, 6, 8, seed=0, image_size=12)
    assert {role.images.shape[1:] for role in roles.values()} == {(3, 12, 12)}


# pixels and labels


SCAN = np.linspace(0, 65535, 64).astype("<u2").reshape(8, 8)
BITS = "; 1 converted from 16 bits to their upper 8"
UPSIDE_DOWN = Image.Exif()
UPSIDE_DOWN[0x0112] = 3


@pytest.mark.parametrize(
    ("image", "how", "expected", "said"),
    [  # PIL would clip 16 bits to 8: a scan of 0..65535 would come out white
        (Image.fromarray(SCAN), {}, SCAN[None] >> 8, BITS),
        (Image.fromarray(SCAN.astype(">u2")), {}, SCAN[None] >> 8, BITS),
        (
            picture(7, mode="L"),
            {"exif": UPSIDE_DOWN},
            np.asarray(picture(7))[None, ::-1, ::-1, 0],
            "",
        ),
        (
            picture(7, mode="LA"),
            {},
            np.asarray(picture(7)).transpose(2, 0, 1),
            "; 1 converted from LA to RGB",
        ),
    ],
)
def test_pixels_are_kept_and_conversions_said(tmp_path, capsys, image, how, expected, said):
    image.save(tmp_path / "1.tiff", **how)
    assert (load_images(tmp_path)[0].numpy() == expected).all()
    assert capsys.readouterr().out.endswith(f"8] of 1 files{said}\n")


@pytest.mark.parametrize("labels", [[-1] * 6, [None] * 6, [0, 1, 0, 1, 0, None]])
def test_labels_that_are_kept_back_count_as_none(tmp_path, labels):
    folder = parquet(tmp_path, img=[picture(i) for i in range(6)], label=labels)
    roles = split(folder, 2, 2, 2, seed=0)
    assert [role.labels.tolist() for role in roles.values()] == [[0, 0]] * 3


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_padded_evenly_with_black_or_shrunk_and_cut_in_the_middle(channels):
    """An odd margin has its extra pixel above and to the left; stripes too fine become grey."""
    image = np.random.default_rng(0).integers(1, 256, (channels, 27, 20), np.uint8)
    expected = np.pad(image, ((0, 0), (3, 2), (6, 6)))
    assert (data.fit(image, 32) == expected).all() and data.fit(image, 0) is image
    ramp = np.broadcast_to(np.linspace(50, 250, 128).astype(np.uint8), (channels, 64, 128)).copy()
    expected = ramp[:, :32, 32:96].reshape(channels, 32, 32, 2).mean(-1)
    assert abs(data.fit(ramp, 32) - expected).max() < 2
    ramp[..., ::2], ramp[..., 1::2] = 0, 255
    assert abs(data.fit(ramp, 16)[..., 2:-2].astype(int) - 127).max() < 12


# what a name stands for


def test_fingerprints_follow_the_content_and_the_names_in_a_folder(tmp_path):
    def make(folder, **files):
        for name, content in files.items():
            path = tmp_path / folder / name.replace("_", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return fingerprint(str(tmp_path / folder))

    first = make("one", a="1", b="1")
    assert make("two", a="1", b="1") == first
    others = [make("3", a="1", c="1"), make("4", a="1", b="2"), make("5", sub_a="1", b="1")]
    assert len({first, *others}) == 4
    files = {name: fingerprint(str(tmp_path / name)) for name in ("one/a", "two/a", "one/b")}
    assert files["one/a"] == files["two/a"] != files["one/b"]
    assert fingerprint("owner/name") == "hub:owner/name"
    assert fingerprint("digits") != fingerprint("fashion8")
