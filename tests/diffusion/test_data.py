"""Images: built in, from folders, and from nowhere."""

import gzip
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


def test_each_digit_has_one_role_and_keeps_its_label():
    """No two of the 1,797 digits are alike, so their bytes tell them apart."""
    digits = data.digits()["train"]
    labels = dict(zip(map(bytes, digits.images), digits.labels, strict=True))
    roles = split("digits", **SIZES, seed=0)
    found = [bytes(image) for role in ROLES for image in roles[role].images]
    assert len(found) == 1797 and set(found) == set(labels)
    for role, count in zip(ROLES, SIZES.values(), strict=True):
        assert roles[role].images.shape == (count, 1, 8, 8)
        assert [labels[bytes(image)] for image in roles[role].images] == roles[role].labels.tolist()


def test_the_split_is_stratified_and_a_function_of_its_seed():
    first, again, other = (split("digits", **SIZES, seed=s) for s in (3, 3, 1))
    shares = np.bincount(data.digits()["train"].labels) / 1797
    for name, role in first.items():
        assert abs(np.bincount(role.labels) - shares * len(role.labels)).max() < 2
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


def test_damaged_files_of_it_are_refused(idx_folder):
    folder = idx_folder()
    file = folder / "train-images-idx3-ubyte.gz"
    for content in (file.read_bytes()[:-20], gzip.compress(b""), b"no gzip"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"{folder}: it cannot be loaded .*parameter `datas"):
            load_images(folder)


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


def test_conversions_are_said(tmp_path, capsys):
    image_folder(tmp_path, ["a"], mode="LA")
    images = load_images(tmp_path, size=4)
    assert images.shape == (10, 3, 4, 4)
    assert "10 images [3, 4, 4] of 10 files; 10 converted from LA to RGB" in capsys.readouterr().out


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


@pytest.mark.parametrize("name", ["images.zip", "train.csv"])
def test_neither_an_archive_nor_a_table_is_a_data_set(tmp_path, name):
    (tmp_path / name).write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"neither parquet files nor images; unpack archives"):
        load_images(tmp_path)


def test_images_that_cannot_be_read_are_named(tmp_path):
    path = Path(image_folder(tmp_path / "cut", ["a"], size=32), "a", "003.png")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"003\.png cannot be read \(.*truncated.*replace or del"):
        load_images(tmp_path / "cut")
    folder = parquet(tmp_path / "null", image=[picture(0), None])
    with pytest.raises(DataError, match=r"image 1 cannot be read \(it is null\)"):
        load_images(folder)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_no_known_range_are_refused(tmp_path, kind):
    file = BytesIO()
    Image.fromarray(np.ones((8, 8), kind)).save(file, "TIFF")
    (tmp_path / "1.tiff").write_bytes(file.getvalue())
    with pytest.raises(DataError, match=r"1.tiff cannot be read \(.*32 bits.*8 or 16"):
        load_images(tmp_path)


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


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_images_keep_their_greys(tmp_path, capsys, order):
    """PIL clips 16 bits to 8; a scan of 0..65535 would come out white."""
    greys = np.linspace(0, 65535, 64).astype(order).reshape(8, 8)
    Image.fromarray(greys).save(tmp_path / "scan.tiff")
    assert abs(load_images(tmp_path)[0, 0].numpy() - greys / 257).max() <= 1
    assert "1 converted from 16 bits to their upper 8" in capsys.readouterr().out


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 3  # upside down
    picture(0).save(tmp_path / "photo.png", exif=tags)
    assert load_images(tmp_path)[0, :, -1, -1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("labels", [[-1] * 6, [None] * 6, [0, 1, 0, 1, 0, None]])
def test_labels_that_are_kept_back_count_as_none(tmp_path, labels):
    folder = parquet(tmp_path, img=[picture(i) for i in range(6)], label=labels)
    roles = split(folder, 2, 2, 2, seed=0)
    assert [role.labels.tolist() for role in roles.values()] == [[0, 0]] * 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width", "top", "left"), [(27, 29, 3, 2), (32, 20, 0, 6)])
def test_small_images_are_padded_evenly_with_black(channels, height, width, top, left):
    """An odd margin has its extra pixel above and to the left."""
    image = np.random.default_rng(0).integers(1, 256, (channels, height, width), np.uint8)
    found = data.fit(image, 32)
    assert found.shape == (channels, 32, 32) and found.dtype == np.uint8
    assert (found[:, top : top + height, left : left + width] == image).all()
    assert found.astype(int).sum() == image.astype(int).sum()
    assert data.fit(image, 0) is image


def test_large_images_are_shrunk_to_the_shorter_side_and_cut_in_the_middle():
    """Without aliasing: stripes finer than the pixels become grey."""
    ramp = np.broadcast_to(np.linspace(50, 250, 128).astype(np.uint8), (3, 64, 128)).copy()
    found = data.fit(ramp, 32)
    expected = ramp[:, :32, 32:96].reshape(3, 32, 32, 2).mean(-1)
    assert found.shape == (3, 32, 32) and abs(found - expected).max() < 2
    assert (data.fit(ramp.transpose(0, 2, 1), 32) == found.transpose(0, 2, 1)).all()
    stripes = np.zeros((1, 256, 256), np.uint8)
    stripes[..., ::2] = 255
    assert abs(data.fit(stripes, 64)[0, :, 4:-4].astype(int) - 127).max() < 12


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


def test_a_seed_that_does_not_ship_is_named():
    with pytest.raises(DataError, match=r"no pretrained model of fashion8 ships for seed 99"):
        data.shipped_pretrained("fashion8", 99)
