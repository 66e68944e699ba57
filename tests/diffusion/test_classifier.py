"""The shipped classifiers are what their cards say."""

from functools import cache

import pytest
import torch

from deme_lib.diffusion import classifier, data

SEARCH = {"digits": 297, "fashion": 5000, "fashion8": 10_000}  # decides which images are left
NAMES = sorted(path.stem for path in data.CLASSIFIERS.glob("*.json"))


@pytest.fixture(scope="module")
def roles_of(request):
    """A function: the roles of the data set that a classifier is of."""

    @cache
    def make(name):
        card, built_in = classifier.card_of(f"{name}-a"), name in data.BUILT_IN
        source = name if built_in else str(request.getfixturevalue("fashion_mnist"))
        sizes = (card["train_images"], SEARCH[name], card["test_images"])
        return data.split(source, *sizes, card["split_seed"], 0 if built_in else card["size"])

    return make


@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_the_truth(name, roles_of):
    """Features are bounded, none is constant, and they alone decide the class."""
    card, model = classifier.card_of(name), classifier.load(name)
    roles = roles_of(card["dataset"])
    assert card["train_hash"] == data.content_hash(roles["train"].images)
    accuracy = classifier.accuracy(model, roles["test"])
    assert accuracy == pytest.approx(card["test_accuracy"], abs=2 / card["test_images"])
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    features, logits = model(torch.from_numpy(roles["test"].images[:300]))
    assert features.shape == (300, 64) and logits.shape == (300, 10)
    assert features.abs().max() < 1 and features.std(0).min() > 0.01
    assert torch.equal(model.head(features), logits)


@pytest.mark.parametrize(("size", "features"), [(8, 64), (32, 64), (9, 100)])
def test_images_of_any_size_have_few_features(size, features):
    model = classifier.Classifier(3, size, 5)
    found, logits = model(torch.zeros(2, 3, size, size, dtype=torch.uint8))
    assert found.shape == (2, features) and logits.shape == (2, 5)


def test_training_writes_a_classifier_and_its_card(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 3)
    monkeypatch.setattr(classifier, "EPOCHS", 0)
    monkeypatch.setattr(data, "CLASSIFIERS", tmp_path)
    roles = data.split("digits", 1200, 297, 300, 0)
    classifier.train("mine", roles, 0, tmp_path)
    for letter in "ab":
        card = classifier.card_of(f"mine-{letter}")
        assert (card["dataset"], card["steps"], card["size"]) == ("mine", 3, 8)
        found = classifier.accuracy(classifier.load(f"mine-{letter}"), roles["test"])
        assert found == pytest.approx(card["test_accuracy"], abs=1 / 300)
