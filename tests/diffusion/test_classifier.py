"""The shipped classifiers are what their cards say."""

import json
import os

import pytest
import torch

from deme_lib.diffusion import classifier, data
from deme_lib.experiment.parameters import load

NAMES = ("digits-a", "digits-b")
FILES = os.environ.get("FASHION_MNIST")  # a folder with the four original files


FASHION = ("fashion-a", "fashion-b")


@pytest.fixture(scope="module")
def roles():
    defaults = load("params/digits.yaml")
    sizes = (defaults.train_images, defaults.search_images, defaults.test_images)
    return data.split("digits", *sizes, defaults.split_seed)


@pytest.fixture(scope="module")
def test_images(roles):
    return roles["test"]


@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_the_truth(name, roles, test_images):
    card = json.loads((data.CLASSIFIERS / f"{name}.json").read_text())
    assert card["train_hash"] == data.content_hash(roles["train"].images)
    assert card["test_images"] == len(test_images.labels)
    assert classifier.accuracy(classifier.load(name), test_images) == card["test_accuracy"]


@pytest.mark.parametrize("name", NAMES)
def test_features_are_bounded_and_alone_decide_the_class(name, test_images):
    model = classifier.load(name)
    features, logits = model(torch.from_numpy(test_images.images))
    assert features.shape == (300, 64) and logits.shape == (300, 10)
    assert features.abs().max() < 1
    assert features.std(0).min() > 0.01  # none is constant
    assert torch.equal(model.head(features), logits)


def test_it_is_frozen_and_blind_to_the_rest_of_the_batch(test_images):
    model = classifier.load("digits-a")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    images = torch.from_numpy(test_images.images)
    torch.testing.assert_close(model(images[:3])[0], model(images)[0][:3])


def test_the_two_are_different_judges(test_images):
    images = torch.from_numpy(test_images.images)
    a, b = (classifier.load(name)(images)[0] for name in NAMES)
    assert not torch.allclose(a, b, atol=0.1)


def test_accuracy_counts(test_images):
    class Constant(torch.nn.Module):
        def forward(self, images):
            return None, torch.eye(10)[3].expand(len(images), 10)

    expected = (test_images.labels == 3).mean()
    assert classifier.accuracy(Constant(), test_images) == pytest.approx(expected)


def test_an_unknown_classifier_names_the_shipped_ones():
    with pytest.raises(ValueError, match=r"digits-c.*digits-a, digits-b, fashion-a.*inception"):
        classifier.load("digits-c")


# larger images


@pytest.mark.parametrize(("size", "features"), [(8, 64), (16, 64), (32, 64), (28, 196), (9, 100)])
def test_images_of_any_size_have_few_features(size, features):
    model = classifier.Classifier(3, size, 5)
    found, logits = model(torch.zeros(2, 3, size, size, dtype=torch.uint8))
    assert found.shape == (2, features) and logits.shape == (2, 5)


@pytest.mark.parametrize("name", FASHION)
def test_the_fashion_classifiers_fit_their_preset(name):
    card, preset = classifier.card_of(name), load("params/fashion.yaml")
    assert card["train_images"] == preset.train_images
    assert card["test_images"] == preset.test_images
    assert card["split_seed"] == preset.split_seed
    assert card["size"] == preset.image_size
    assert card["test_accuracy"] > 0.85
    images = torch.randint(0, 256, (50, 1, 32, 32), dtype=torch.uint8)
    features, logits = classifier.load(name)(images)
    assert features.shape == (50, 64) and logits.shape == (50, 10)
    assert features.abs().max() < 1


@pytest.mark.skipif(not FILES, reason="FASHION_MNIST names no folder of the original files")
def test_the_fashion_cards_tell_the_truth():
    preset = load("params/fashion.yaml")
    sizes = (preset.train_images, preset.search_images, preset.test_images)
    roles = data.split(FILES, *sizes, preset.split_seed, preset.image_size)
    for name in FASHION:
        card = classifier.card_of(name)
        assert card["train_hash"] == data.content_hash(roles["train"].images)
        assert classifier.accuracy(classifier.load(name), roles["test"]) == pytest.approx(
            card["test_accuracy"], abs=1e-3
        )


def test_training_writes_a_classifier_and_its_card(roles, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 3)
    monkeypatch.setattr(classifier, "EPOCHS", 0)
    monkeypatch.setattr(data, "CLASSIFIERS", tmp_path)
    classifier.train("mine", roles, 0, tmp_path)
    for letter in "ab":
        card = classifier.card_of(f"mine-{letter}")
        assert (card["dataset"], card["steps"], card["size"]) == ("mine", 3, 8)
        model = classifier.load(f"mine-{letter}")
        assert classifier.accuracy(model, roles["test"]) == card["test_accuracy"]
