"""Images: built in, from folders, and from nowhere."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from deme_lib.diffusion import data
from deme_lib.diffusion.data import DataError, fingerprint, load_images, split

SIZES = {"train": 1200, "search": 297, "test": 300}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def picture(i, size=8, mode="RGB"):
    """An image that says which it is: its first pixel is i."""
    pixels = np.full((size, size), 200, np.uint8)
    pixels[0, 0] = i
    return Image.fromarray(pixels).convert(mode)


def image_folder(root, parts=("train/0", "train/1", "test/0", "test/1")):
    """Ten images in each of the folders: 0 to 9 in the first, and so on."""
    for i in range(10 * len(parts)):
        path = root / parts[i // 10] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return str(root)


def parquet(folder, part="train", **columns):
    """A parquet file of columns of PIL pictures, and of ``label``."""
    kinds = {name: datasets.Image() for name in columns} | {"label": datasets.ClassLabel(2)}
    columns.setdefault("label", [0, 1] * (len(next(iter(columns.values()))) // 2))
    folder.mkdir(exist_ok=True)
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    made.to_parquet(folder / f"{part}-00000-of-00001.parquet")
    return str(folder)


def numbers(images):
    return set(images[:, 0, 0, 0].tolist())


# roles


def test_each_digit_has_one_role_by_a_stratified_split_that_its_seed_decides():
    """No two of the 1,797 digits are alike, so their bytes tell them apart."""
    digits = data.digits()["train"]
    labels = dict(zip(map(bytes, digits.images), digits.labels, strict=True))
    roles, again, other = (split("digits", *SIZES.values(), split_seed=s) for s in (3, 3, 1))
    found = [bytes(image) for role in roles.values() for image in role.images]
    assert len(found) == 1797 and set(found) == set(labels)
    for name, count in SIZES.items():
        images = roles[name].images
        assert images.shape == (count, 1, 8, 8)
        assert [labels[bytes(image)] for image in images] == roles[name].labels.tolist()
        share = np.bincount(digits.labels) / 1797 * count
        assert abs(np.bincount(roles[name].labels) - share).max() < 2
        assert (images == again[name].images).all() and (images != other[name].images).any()
    with pytest.raises(DataError, match=r"1797 images for 1500 train_images \+ 200 search_.*lower"):
        split("digits", 1500, 200, 98, 0)


@pytest.mark.parametrize("train", [12, 18])
def test_search_images_come_from_what_training_leaves_where_it_does(tmp_path, train):
    """Of 20 train images: 12 + 6 fit into them, 18 + 6 do not."""
    roles = split(image_folder(tmp_path), train, 6, 8, split_seed=0)
    assert [role.images.shape for role in roles.values()] == [(n, 3, 8, 8) for n in (train, 6, 8)]
    found = {role: numbers(images.images) for role, images in roles.items()}
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    assert found["train"] <= set(range(20)) and found["test"] <= set(range(20, 40))
    assert found["search"] <= (set(range(20)) if train == 12 else set(range(20, 40)))
    for role in roles.values():
        assert (role.images[:, 0, 0, 0] // 10 % 2 == role.labels).all()


def test_a_class_is_the_same_one_in_every_part(tmp_path):
    folder = image_folder(tmp_path, ["train/cat", "train/dog", "test/dog"])
    roles = split(folder, 16, 4, 10, split_seed=0)
    assert roles["test"].labels.tolist() == [1] * 10 and set(roles["train"].labels) == {0, 1}


# Fashion-MNIST


def test_the_shipped_data_are_fashion_mnist_s(fashion_mnist):
    for part, original in data.read_idx(fashion_mnist).items():
        padded = np.pad(original.images, ((0, 0), (0, 0), (2, 2), (2, 2)))
        means = padded.reshape(-1, 1, 8, 4, 8, 4).mean(axis=(3, 5))
        assert (np.round(means) == data.fashion8()[part].images).all()
        assert (original.labels == data.fashion8()[part].labels).all()


# what is taken, and what is said of it


@pytest.mark.parametrize(
    ("folders", "taken", "said"),
    [
        (["train", "cat"], 20, "20 train images of 20 files, folders cat, train"),
        (["bullet train", "test tube"], 20, "20 train images of 20 files, folders bullet train"),
        (["Train/a", "Valid/a"], 10, "10 train, 10 validation images of 20 files, folders a"),
        (["train", "test", "."], 10, "10 test, 10 train images of 30 files"),  # ten beside parts
    ],
)
def test_folders_are_parts_where_they_are_for_every_file(tmp_path, capsys, folders, taken, said):
    """A class may be called train; capitals do not matter."""
    images = load_images(image_folder(tmp_path / "photos [2024]", folders))
    assert images.dtype == torch.uint8 and numbers(images) == set(range(taken))
    assert said in capsys.readouterr().out


def test_linked_folders_count_once_and_captions_and_what_is_hidden_do_not(tmp_path):
    image_folder(tmp_path / "far", ["b"])
    photos = Path(image_folder(tmp_path / "photos", ["a", ".ipynb_checkpoints"]))
    before = fingerprint(str(photos))
    (photos / "b").symlink_to(tmp_path / "far" / "b")
    (photos / "c").symlink_to(photos / "a")
    (photos / "a" / "loop").symlink_to(photos)
    for name in ("a/000.txt", "._1.png", "metadata.csv"):
        (photos / name).write_text("a photo of a cat")
    assert len(load_images(photos)) == 20 and fingerprint(str(photos)) != before


def test_parts_without_a_train_part_are_named(tmp_path):
    with pytest.raises(DataError, match=r"has the parts test, validation: name the folder of one"):
        load_images(image_folder(tmp_path, ["val", "test"]))


def test_a_size_that_is_none_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a size of '8': give pixels a side, or 0"):
        load_images(image_folder(tmp_path, ["a"]), "8")


def test_of_two_image_columns_the_one_called_image_is_taken_as_it_now_is(tmp_path, capsys):
    """The library's own cache takes a replaced file of equal time and size for the old one."""
    for start in (0, 100):
        masks, images = ([picture(start + i + k) for i in range(4)] for k in (50, 0))
        folder = parquet(tmp_path / "photos [x]", mask=masks, image=images)
        os.utime(next(Path(folder).iterdir()), (1e9, 1e9))
        assert numbers(load_images(folder)) == set(range(start, start + 4))
    assert "4 train images of column image of mask, image, label" in capsys.readouterr().out


def test_a_folder_beside_train_and_test_is_left_out(tmp_path, monkeypatch):
    """Else test images would be trained on."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for i, part in enumerate(("train", "test", "extra")):
        (tmp_path / "mine" / part).mkdir(parents=True)
        for k in range(4):
            picture(4 * i + k).save(tmp_path / "mine" / part / f"{k}.png")
    with pytest.warns(UserWarning, match=r"extra.*is in no part: 4 files left out"):
        assert numbers(load_images("~/mine")) == set(range(4))


@pytest.mark.parametrize("label", [-1, None])
def test_labels_that_are_kept_back_are_0(tmp_path, label):
    folder = parquet(tmp_path, image=[picture(i) for i in range(6)], label=[label] * 6)
    roles = split(folder, 2, 2, 2, split_seed=0)
    assert [role.labels.tolist() for role in roles.values()] == [[0, 0]] * 3


# refusals


@pytest.mark.parametrize("name", ["my-images", "runs/my-images", "./mine", "~/x"])
def test_a_name_of_nothing_is_said_to_be_no_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    words = rf"(?s){name}: there is no such folder, and as a hub id .*parameter `dataset`"
    with pytest.raises(DataError, match=words):
        load_images(name)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("images.zip", b"", "neither parquet files nor images; unpack archives"),
        ("train-images-idx3-ubyte.gz", b"no gzip", "it cannot be loaded .*Fashion-MNIST's four"),
        ("1.png", b"\x89PNG", r"1.png cannot be read .*replace or delete it"),
        ("1.pgm", b"P5 1 1 65535 00", "1.pgm .* 32 bits and no known range"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_images(tmp_path)


def test_images_of_different_kinds_are_refused(tmp_path):
    for mode in ("L", "RGB"):
        picture(0, mode=mode).save(tmp_path / f"{mode}.png")
    with pytest.raises(DataError, match=r"RGB.png is \(3, 8, 8\), not \(1, 8, 8\).*give a size"):
        load_images(tmp_path)


# pixels


SCAN = np.linspace(0, 65535, 64).astype("<u2").reshape(8, 8)
GREY = np.asarray(picture(7, mode="L"))[None]


@pytest.mark.parametrize(
    ("image", "expected"),
    [  # PIL would clip 16 bits to 8: a scan of 0..65535 would come out white
        (Image.fromarray(SCAN), SCAN[None] >> 8),
        (Image.fromarray(SCAN.astype(">u2")), SCAN[None] >> 8),
        (picture(7, mode="LA"), GREY.repeat(3, axis=0)),
    ],
)
def test_what_is_lost_in_pixels_is_said(tmp_path, image, expected):
    image.save(tmp_path / "1.tiff")
    with pytest.warns(UserWarning, match="of 16 bits the upper 8|transparent pixels show"):
        assert (load_images(tmp_path)[0].numpy() == expected).all()


def test_images_are_turned_as_their_files_say(tmp_path):
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    picture(7, mode="L").save(tmp_path / "1.tiff", exif=upside_down)
    assert (load_images(tmp_path)[0].numpy() == GREY[:, ::-1, ::-1]).all()


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
    folders, found = [{"a": 1, "b": 1}] * 2 + [{"a": 1, "c": 1}, {"a": 1, "b": 2}, {"x/a": 1}], []
    for k, files in enumerate(folders):
        for name, content in files.items():
            path = tmp_path / str(k) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(content))
        found.append(fingerprint(str(tmp_path / str(k))))
    assert found[0] == found[1] and len(set(found)) == 4
    assert fingerprint(str(tmp_path / "0" / "a")) == fingerprint(str(tmp_path / "1" / "a"))
    assert fingerprint("owner/name") == "hub:owner/name"
