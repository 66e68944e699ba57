"""The shipped classifiers are what their cards say."""

import pytest
import torch

from deme_lib.diffusion import classifier, data

SEARCH = {"digits": 297, "fashion": 5000, "fashion8": 10_000}  # decides which images are left
NAMES = sorted(path.stem for path in data.CLASSIFIERS.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_the_truth(name, request):
    """Features are bounded, none is constant, and they alone decide the class."""
    card, model = classifier.card_of(name), classifier.load(name)
    source, size = card["dataset"], 0
    sizes = card["train_images"], SEARCH[source], card["test_images"]
    if source not in data.BUILT_IN:
        source, size = str(request.getfixturevalue("fashion_mnist")), card["size"]
    roles = data.split(source, *sizes, card["split_seed"], size)
    assert card["train_hash"] == data.content_hash(roles["train"].images)
    accuracy = classifier.accuracy(model, roles["test"])
    assert accuracy == pytest.approx(card["test_accuracy"], abs=2 / card["test_images"])
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    features, logits = model(torch.from_numpy(roles["test"].images[:300]))
    assert features.shape == (300, 64) and logits.shape == (300, 10)
    assert features.abs().max() < 1 and features.std(0).min() > 0.01
    assert torch.equal(model.head(features), logits)


def test_training_writes_a_classifier_and_its_card(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 3)
    monkeypatch.setattr(classifier, "EPOCHS", 0)
    monkeypatch.setattr(data, "CLASSIFIERS", tmp_path)
    roles = data.split("digits", 1200, 297, 300, 0, image_size=9)
    classifier.train("mine", roles, 0, tmp_path)
    for letter in "ab":
        card, model = classifier.card_of(f"mine-{letter}"), classifier.load(f"mine-{letter}")
        assert (card["dataset"], card["size"]) == ("mine", 9)
        found = classifier.accuracy(model, roles["test"])
        assert found == pytest.approx(card["test_accuracy"], abs=1 / 300)
