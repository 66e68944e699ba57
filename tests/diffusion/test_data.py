"""Images: built in, from folders, and from nowhere."""

import gzip
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from deme_lib.diffusion import data
from deme_lib.diffusion.data import DataError, fingerprint, split

SIZES = {"train_images": 1200, "search_images": 297, "test_images": 300}
ROLES = ("train", "search", "test")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def picture(i, size=8, channels=3):
    """An image that says which it is: its first pixel is i."""
    pixels = np.full((size, size, channels), 200, np.uint8)
    pixels[0, 0] = i
    return pixels.squeeze()


def image_folder(root, parts=("train", "test"), channels=3):
    """train/<label>/*.png: 0-9, 10-19; test/<label>/*.png: 20-29, 30-39."""
    for i in range(20 * len(parts)):
        path = root / parts[i // 20] / str(i // 10 % 2) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, channels=channels)).save(path)
    return str(root)


def parquet(folder, labels, images=None, part="train"):
    schema = {"img": datasets.Image(), "label": datasets.ClassLabel(2)}
    images = images or [Image.fromarray(picture(i)) for i in range(len(labels))]
    folder.mkdir(exist_ok=True)
    made = datasets.Dataset.from_dict(
        {"img": images, "label": labels}, features=datasets.Features(schema)
    )
    made.to_parquet(folder / f"{part}-00000-of-00001.parquet")
    return str(folder)


def numbers(images):
    return set(images.images[:, 0, 0, 0].tolist())


# roles


def test_each_digit_has_one_role_and_keeps_its_label():
    """No two of the 1,797 digits are alike, so their bytes tell them apart."""
    digits = data.digits()["train"]
    labels = dict(zip(map(bytes, digits.images), digits.labels, strict=True))
    roles = split("digits", **SIZES, seed=0)
    assert [len(roles[role].labels) for role in ROLES] == [1200, 297, 300]
    found = [bytes(image) for role in ROLES for image in roles[role].images]
    assert len(found) == 1797 and set(found) == set(labels)
    for role in roles.values():
        assert role.images.shape[1:] == (1, 8, 8) and role.images.dtype == np.uint8
        assert [labels[bytes(image)] for image in role.images] == role.labels.tolist()


@pytest.mark.parametrize("sizes", [SIZES, dict.fromkeys(SIZES, 100)])
def test_the_split_is_stratified_and_a_function_of_its_seed(sizes):
    first, again, other = (split("digits", **sizes, seed=s) for s in (3, 3, 1))
    shares = np.bincount(data.digits()["train"].labels) / 1797
    for name, role in first.items():
        counts = np.bincount(role.labels, minlength=10)
        assert abs(counts - shares * len(role.labels)).max() < 2
        assert (role.images == again[name].images).all()
        assert (role.images != other[name].images).any()


def test_too_many_images_names_the_parameters_of_their_part(tmp_path):
    with pytest.raises(DataError, match=r"1797 images.*train_images, search_images, test_images"):
        split("digits", 1500, 200, 98, 0)
    with pytest.raises(DataError, match=r"lower search_images, test_images"):
        split(image_folder(tmp_path), 12, 11, 10, seed=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("train", [12, 18])
def test_search_images_come_from_what_training_leaves_where_it_does(tmp_path, channels, train):
    """Of 20 train images: 12 + 6 fit into them, 18 + 6 do not."""
    roles = split(image_folder(tmp_path, channels=channels), train, 6, 8, seed=0)
    assert [roles[r].images.shape for r in ROLES] == [(n, channels, 8, 8) for n in (train, 6, 8)]
    found = {role: numbers(images) for role, images in roles.items()}
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    assert found["train"] <= set(range(20)) and found["test"] <= set(range(20, 40))
    assert found["search"] <= (set(range(20)) if train == 12 else set(range(20, 40)))
    for images in roles.values():
        assert (images.images[:, 0, 0, 0] // 10 % 2 == images.labels).all()
        assert np.bincount(images.labels).tolist() == [len(images.labels) // 2] * 2


# the built-in Fashion-MNIST


def test_its_script_makes_the_shipped_data(fashion_mnist, tmp_path, monkeypatch):
    data.write_fashion8(fashion_mnist, tmp_path / "mine.npz")
    monkeypatch.setattr(data, "FASHION8", tmp_path / "mine.npz")
    data.fashion8.__wrapped__()


def test_other_data_than_the_shipped_are_refused(idx_folder, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"other images than Fashion-MNIST's"):
        data.write_fashion8(idx_folder(), tmp_path / "mine.npz")
    with pytest.raises(DataError, match=r"copy the four files of Fashion-MNIST"):
        data.write_fashion8(tmp_path, tmp_path / "mine.npz")
    with np.load(data.FASHION8) as file:
        arrays = dict(file)
    np.savez(tmp_path / "other.npz", **arrays | {"test_labels": arrays["test_labels"][::-1]})
    del arrays["test_labels"]
    np.savez(tmp_path / "half.npz", **arrays)
    (tmp_path / "cut.npz").write_bytes(data.FASHION8.read_bytes()[:-1000])
    words = {"other": "differs from", **dict.fromkeys(("half", "cut", "no"), "cannot be read")}
    for name, said in words.items():
        monkeypatch.setattr(data, "FASHION8", tmp_path / f"{name}.npz")
        with pytest.raises(DataError, match=rf"{name}.npz {said}.*deme_lib fashion8"):
            data.fashion8.__wrapped__()


# Fashion-MNIST's own files


def test_the_four_files_and_a_parquet_copy_give_the_same_images(idx_folder, tmp_path):
    files = idx_folder()
    for part, found in data.read_idx(files).items():
        pictures = [Image.fromarray(i[0]) for i in found.images]
        copy = parquet(tmp_path / "copy", found.labels.tolist(), pictures, part)
    first, second = (split(str(f), 16, 5, 6, seed=0, image_size=32) for f in (files, copy))
    for role in ROLES:
        assert data.content_hash(first[role].images) == data.content_hash(second[role].images)
        assert (first[role].labels == second[role].labels).all()
        assert (first[role].images[:, 0, 2, 2] % 2 == first[role].labels).all()


DAMAGE = {
    "no gzip": lambda whole: whole,
    "cut gzip": lambda whole: gzip.compress(whole)[:-20],
    "empty": lambda whole: gzip.compress(b""),
    "fewer": lambda whole: gzip.compress(whole[:-784]),
    "removed": lambda whole: None,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_named_with_the_remedy(idx_folder, how):
    folder = idx_folder()
    file = folder / "train-images-idx3-ubyte.gz"
    content = DAMAGE[how](gzip.decompress(file.read_bytes()))
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{file.name}.*copy the four files.*parameter `dataset`"):
        split(str(folder), 16, 5, 6, seed=0)


# pixels and labels


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_images_keep_their_greys(tmp_path, order):
    """PIL clips 16 bits to 8; a scan of 0..65535 would come out white."""
    greys = np.linspace(0, 65535, 64).astype(order).reshape(8, 8)
    for path in Path(image_folder(tmp_path)).rglob("*.png"):
        path.unlink()
        Image.fromarray(greys).save(path.with_suffix(".tiff"))
    images = split(str(tmp_path), 12, 6, 8, seed=0)["train"].images
    assert abs(images[0, 0].astype(int) - greys / 257).max() <= 1


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_no_known_range_are_refused(tmp_path, kind):
    file = BytesIO()
    Image.fromarray(np.ones((8, 8), kind)).save(file, "TIFF")
    folder = parquet(tmp_path, [0, 1] * 3, [{"bytes": file.getvalue(), "path": None}] * 6)
    with pytest.raises(DataError, match=r"image \d cannot be read \(.*32 bits.*8 or 16"):
        split(folder, 2, 2, 2, seed=0)


@pytest.mark.parametrize("labels", [[-1] * 6, [None] * 6, [0, 1, 0, 1, 0, None]])
def test_labels_that_are_kept_back_count_as_none(tmp_path, labels):
    roles = split(parquet(tmp_path, labels), 2, 2, 2, seed=0)
    assert [role.labels.tolist() for role in roles.values()] == [[0, 0]] * 3


def test_null_and_mixed_images_are_named(tmp_path):
    with pytest.raises(DataError, match=r"image \d cannot be read \(it is null\)"):
        split(parquet(tmp_path / "null", [0, 1] * 3, [None] * 6), 2, 2, 2, seed=0)
    mixed = [Image.fromarray(picture(i, channels=1 + 2 * (i % 2))) for i in range(6)]
    with pytest.raises(DataError, match=r"image \d is .*save all as grey or colour"):
        split(parquet(tmp_path / "mixed", [0, 1] * 3, mixed), 2, 2, 2, seed=0, image_size=8)


def test_neither_an_archive_nor_a_table_is_a_data_set(tmp_path):
    (tmp_path / "images.zip").touch()
    with pytest.raises(DataError, match=r"images\.zip: name an existing folder"):
        split(str(tmp_path / "images.zip"), 1, 1, 1, seed=0)
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"no image column, only \['a', 'b'\]: give it one"):
        split(str(tmp_path / "table"), 1, 1, 1, seed=0)


def test_roles_of_different_shapes_are_refused(tmp_path):
    for path in Path(image_folder(tmp_path), "test").rglob("*.png"):
        Image.fromarray(picture(0, size=9)).save(path)
    with pytest.raises(DataError, match="the roles differ in shape"):
        split(str(tmp_path), 12, 6, 8, seed=0)
    roles = split(str(tmp_path), 12, 6, 8, seed=0, image_size=12)
    assert {role.images.shape[1:] for role in roles.values()} == {(3, 12, 12)}


# sizes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(28, 28, 2, 2), (27, 29, 3, 2), (32, 20, 0, 6)]
)
def test_small_images_are_padded_evenly_with_black(channels, height, width, top, left):
    """An odd margin has its extra pixel above and to the left."""
    image = np.random.default_rng(0).integers(1, 256, (channels, height, width), np.uint8)
    found = data.fit(image, 32)
    assert found.shape == (channels, 32, 32) and found.dtype == np.uint8
    assert (found[:, top : top + height, left : left + width] == image).all()
    assert found.astype(int).sum() == image.astype(int).sum()
    assert data.fit(image, 0) is image


@pytest.mark.parametrize("channels", [1, 3])
def test_large_images_are_shrunk_to_the_shorter_side_and_cut_in_the_middle(channels):
    ramp = np.broadcast_to(np.linspace(50, 250, 128).astype(np.uint8), (channels, 64, 128)).copy()
    found = data.fit(ramp, 32)
    expected = ramp[:, :32, 32:96].reshape(channels, 32, 32, 2).mean(-1)
    assert found.shape == (channels, 32, 32) and abs(found - expected).max() < 2
    assert (data.fit(ramp.transpose(0, 2, 1), 32) == found.transpose(0, 2, 1)).all()


def test_shrinking_does_not_alias():
    """Stripes finer than the pixels become grey."""
    stripes = np.zeros((1, 256, 256), np.uint8)
    stripes[..., ::2] = 255
    assert abs(data.fit(stripes, 64)[0, :, 4:-4].astype(int) - 127).max() < 12


# fingerprints


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
    assert make("one", b="22") != first  # in one process: a notebook's kernel outlives the files
