"""Images from the digits, from folders, and from nowhere."""

import gzip

import datasets
import numpy as np
import pytest
from PIL import Image

from deme_lib.diffusion import data, idx
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


def image_folder(root, parts=("train", "test"), per_class=10, channels=3):
    i = 0
    for part in parts:
        for label in range(2):
            folder = root / part / str(label)
            folder.mkdir(parents=True)
            for _ in range(per_class):
                Image.fromarray(picture(i, channels=channels)).save(folder / f"{i:03d}.png")
                i += 1
    return root


def numbers(images):
    return set(images.images[:, 0, 0, 0].tolist())


# digits


def test_each_digit_has_one_role():
    """No two of the 1,797 digits are alike, so their bytes tell them apart."""
    everyone = [image.tobytes() for image in data.digits().images]
    assert len(set(everyone)) == len(everyone) == 1797
    roles = split("digits", **SIZES, seed=0)
    members = [{image.tobytes() for image in roles[role].images} for role in ROLES]
    assert [len(m) for m in members] == [1200, 297, 300]
    assert set.union(*members) == set(everyone)


def test_labels_follow_their_images():
    labels = dict(zip(map(bytes, data.digits().images), data.digits().labels, strict=True))
    for role in split("digits", **SIZES, seed=0).values():
        assert role.images.shape[1:] == (1, 8, 8) and role.images.dtype == np.uint8
        assert role.labels.dtype == np.int64
        assert [labels[bytes(image)] for image in role.images] == role.labels.tolist()


@pytest.mark.parametrize("sizes", [SIZES, dict.fromkeys(SIZES, 100)])
def test_the_split_is_stratified(sizes):
    shares = np.bincount(data.digits().labels) / 1797
    for role in split("digits", **sizes, seed=3).values():
        counts = np.bincount(role.labels, minlength=10)
        assert abs(counts - shares * len(role.labels)).max() < 2


def test_the_split_is_a_function_of_its_seed():
    first, again, other = (split("digits", **SIZES, seed=s)["test"] for s in (0, 0, 1))
    assert (first.images == again.images).all() and (first.labels == again.labels).all()
    assert (first.images != other.images).any()


def test_too_many_images_names_the_parameters():
    with pytest.raises(DataError, match=r"1797 images.*train_images, search_images, test_images"):
        split("digits", 1500, 200, 98, 0)
    assert len(split("digits", 1500, 200, 97, 0)["test"].labels) == 97


# folders


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_images(tmp_path, channels):
    """train/<label>/*.png: 0-9, 10-19; test/<label>/*.png: 20-29, 30-39."""
    roles = split(str(image_folder(tmp_path, channels=channels)), 12, 6, 8, seed=0)
    assert [roles[r].images.shape for r in ROLES] == [(n, channels, 8, 8) for n in (12, 6, 8)]
    assert numbers(roles["train"]) <= set(range(20))
    held_out = numbers(roles["search"]), numbers(roles["test"])
    assert not held_out[0] & held_out[1]
    assert held_out[0] | held_out[1] <= set(range(20, 40))
    for images in roles.values():
        assert (images.images[:, 0, 0, 0] // 10 % 2 == images.labels).all()
        assert np.bincount(images.labels).tolist() == [len(images.labels) // 2] * 2


def test_a_folder_with_one_part_is_cut_in_three(tmp_path):
    roles = split(str(image_folder(tmp_path, parts=("train",))), 10, 4, 6, seed=0)
    assert set.union(*map(numbers, roles.values())) == set(range(20))
    with pytest.raises(DataError, match=r"20 images where 12 train \+ 4 search \+ 6 test"):
        split(str(tmp_path), 12, 4, 6, seed=0)


def test_too_few_test_images_names_their_parameters(tmp_path):
    with pytest.raises(DataError, match=r"lower search_images, test_images"):
        split(str(image_folder(tmp_path)), 12, 11, 10, seed=0)


def test_a_parquet_folder_like_cifar10(tmp_path):
    classes = datasets.ClassLabel(names=["airplane", "automobile"])
    schema = datasets.Features({"img": datasets.Image(), "label": classes})
    for part, start in (("train", 0), ("test", 20)):
        rows = {
            "img": [Image.fromarray(picture(i)) for i in range(start, start + 20)],
            "label": [i % 2 for i in range(20)],
        }
        made = datasets.Dataset.from_dict(rows, features=schema)
        made.to_parquet(tmp_path / f"{part}-00000-of-00001.parquet")
    roles = split(str(tmp_path), 10, 8, 12, seed=0)
    assert [roles[r].images.shape for r in ROLES] == [(n, 3, 8, 8) for n in (10, 8, 12)]
    assert numbers(roles["search"]) | numbers(roles["test"]) == set(range(20, 40))
    for images in roles.values():
        assert (images.images[:, 0, 0, 0] % 2 == images.labels).all()


def test_sizes_that_differ_between_train_and_test(tmp_path):
    for path in (image_folder(tmp_path) / "test").rglob("*.png"):
        Image.fromarray(picture(0, size=9)).save(path)
    with pytest.raises(DataError, match="train and test images differ in size"):
        split(str(tmp_path), 12, 6, 8, seed=0)


def test_sixteen_bit_images_keep_their_greys(tmp_path):
    """PIL clips 16 bits to 8; a scan of 0..65535 would come out white."""
    greys = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for path in image_folder(tmp_path).rglob("*.png"):
        Image.fromarray(greys).save(path)
    images = split(str(tmp_path), 12, 6, 8, seed=0)["train"].images
    assert abs(images[0, 0].astype(int) - greys / 257).max() <= 1


def test_a_folder_without_images(tmp_path):
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"no image column, only \['a', 'b'\]"):
        split(str(tmp_path), 1, 1, 1, seed=0)


# Fashion-MNIST's own files


@pytest.mark.parametrize("gz", [True, False])
def test_the_four_files_of_fashion_mnist(idx_folder, gz):
    roles = split(str(idx_folder(gz=gz)), 16, 5, 6, seed=0)
    assert [roles[r].images.shape for r in ROLES] == [(n, 1, 28, 28) for n in (16, 5, 6)]
    assert numbers(roles["train"]) <= set(range(20))
    held_out = numbers(roles["search"]), numbers(roles["test"])
    assert not held_out[0] & held_out[1] and set.union(*held_out) <= set(range(20, 32))
    for images in roles.values():
        assert images.images.dtype == np.uint8 and images.labels.dtype == np.int64
        assert (images.images[:, 0, 0, 0] % 2 == images.labels).all()
        assert images.images[:, 0, 1:].std() > 0


def test_the_four_files_and_their_parquet_copy_give_the_same_images(idx_folder, tmp_path):
    files = idx_folder()
    schema = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    (tmp_path / "copy").mkdir()
    for part in ("train", "test"):
        images, labels = idx.load(files, part)
        rows = {"image": [Image.fromarray(i[0]) for i in images], "label": labels.tolist()}
        made = datasets.Dataset.from_dict(rows, features=schema)
        made.to_parquet(tmp_path / "copy" / f"{part}-00000-of-00001.parquet")
    first, second = (
        split(str(folder), 16, 5, 6, seed=0, image_size=32) for folder in (files, tmp_path / "copy")
    )
    for role in ROLES:
        assert data.content_hash(first[role].images) == data.content_hash(second[role].images)
        assert (first[role].labels == second[role].labels).all()


def damaged(path, how):
    content = gzip.decompress(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "no gzip":
        path.write_bytes(content)
    elif how == "cut gzip":
        path.write_bytes(path.read_bytes()[:-20])
    elif how in ("empty", "cut header"):
        path.write_bytes(gzip.compress(content[: 10 if how == "cut header" else 0]))
    else:
        start = {"floats": bytes([0, 0, 13, 3]), "labels": bytes([0, 0, 8, 1])}.get(how)
        content = start + content[4:] if start else content[:-1]
        path.write_bytes(gzip.compress(content))


@pytest.mark.parametrize(
    "how", ["removed", "no gzip", "cut gzip", "empty", "cut header", "floats", "labels", "cut"]
)
def test_a_damaged_file_is_named_with_the_remedy(idx_folder, how):
    folder, name = idx_folder(), "train-images-idx3-ubyte.gz"
    damaged(folder / name, how)
    with pytest.raises(DataError, match=rf"{name}.*copy the four files.*parameter `dataset`"):
        split(str(folder), 16, 5, 6, seed=0)


def test_images_and_labels_must_be_as_many(idx_folder):
    folder = idx_folder()
    labels = "t10k-labels-idx1-ubyte.gz"
    (folder / labels).write_bytes((folder / labels.replace("t10k", "train")).read_bytes())
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte has 12, .* 20 entries"):
        split(str(folder), 16, 5, 6, seed=0)


# sizes


def ramp(channels, height, width):
    """Bright everywhere, brighter to the right."""
    row = np.linspace(50, 250, width).astype(np.uint8)
    return np.broadcast_to(row, (channels, height, width)).copy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(28, 28, 2, 2), (27, 29, 3, 2), (32, 20, 0, 6)]
)
def test_small_images_are_padded_evenly_with_black(channels, height, width, top, left):
    """An odd margin has its extra pixel above and to the left."""
    image = ramp(channels, height, width)
    found = data.fit(image, 32)
    assert found.shape == (channels, 32, 32) and found.dtype == np.uint8
    assert (found[:, top : top + height, left : left + width] == image).all()
    assert found.astype(int).sum() == image.astype(int).sum()


@pytest.mark.parametrize("channels", [1, 3])
def test_large_images_are_shrunk_to_the_shorter_side_and_cut_in_the_middle(channels):
    found = data.fit(ramp(channels, 64, 128), 32)
    assert found.shape == (channels, 32, 32)
    expected = ramp(channels, 1, 128)[:, :, 32:96].reshape(channels, 1, 32, 2).mean(-1)
    assert abs(found - expected).max() < 2
    upright = data.fit(ramp(channels, 64, 128).transpose(0, 2, 1), 32)
    assert (upright == found.transpose(0, 2, 1)).all()


def test_a_wide_low_image_is_cut_and_padded():
    image = ramp(1, 20, 40)
    assert (data.fit(image, 32)[0, 6:26] == image[0, :, 4:36]).all()


def test_shrinking_does_not_alias():
    """Stripes finer than the pixels become grey."""
    stripes = np.zeros((1, 256, 256), np.uint8)
    stripes[..., ::2] = 255
    assert abs(data.fit(stripes, 64)[0, :, 4:-4].astype(int) - 127).max() < 12


def test_without_a_size_images_stay_as_they_are():
    image = ramp(3, 5, 9)
    assert data.fit(image, 0) is image
    assert (data.fit(ramp(1, 8, 8), 8) == ramp(1, 8, 8)).all()


def test_any_source_has_the_size_that_is_asked_for(tmp_path, idx_folder):
    for path in (image_folder(tmp_path / "mixed") / "test").rglob("*.png"):
        Image.fromarray(picture(0, size=9)).save(path)
    for source in ("digits", str(tmp_path / "mixed"), str(idx_folder())):
        roles = split(source, 12, 5, 6, seed=0, image_size=12)
        assert {role.images.shape[2:] for role in roles.values()} == {(12, 12)}, source
    padded = split("digits", **SIZES, seed=0, image_size=10)["train"]
    plain = split("digits", **SIZES, seed=0)["train"]
    assert (padded.images[..., 1:9, 1:9] == plain.images).all()
    assert (padded.labels == plain.labels).all()


# nowhere


def test_a_data_set_out_of_reach_names_the_parameter():
    """conftest.py takes the network away."""
    with pytest.raises(DataError, match=r"nobody/nothing-here.*parameter `dataset`"):
        split("nobody/nothing-here", 1, 1, 1, seed=0)


# fingerprints


def test_fingerprints_follow_the_content(tmp_path):
    prints = set()
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)
        prints.add(fingerprint(str(tmp_path / name)))
    assert len(prints) == 2
    assert fingerprint("google/ddpm-cifar10-32") == "hub:google/ddpm-cifar10-32"
    assert fingerprint("digits") not in prints


def test_a_fingerprint_knows_the_folders_of_files(tmp_path):
    """The same names and contents, once of one part and once of two."""
    prints = []
    for name, parts in (
        ("one", ("test/a.png", "test/b.png")),
        ("two", ("test/a.png", "train/b.png")),
    ):
        for part in parts:
            path = tmp_path / name / part
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
        prints.append(fingerprint(str(tmp_path / name)))
    assert prints[0] != prints[1]
    moved = (tmp_path / "one").rename(tmp_path / "elsewhere")
    assert fingerprint(str(moved)) == prints[0]


def test_a_file_alone_has_its_name_in_its_fingerprint(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            (tmp_path / folder / name).write_text("1")
    first, again = (fingerprint(str(tmp_path / folder / "a")) for folder in ("one", "two"))
    assert first == again != fingerprint(str(tmp_path / "one" / "b"))


def test_a_folder_that_changes_changes_its_fingerprint(tmp_path):
    """Also in one process: a notebook's kernel outlives the files."""
    (tmp_path / "file").write_text("1")
    before = fingerprint(str(tmp_path))
    (tmp_path / "file").write_text("22")
    assert fingerprint(str(tmp_path)) != before
