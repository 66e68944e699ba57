"""The shipped classifiers are what their cards say."""

import json

import pytest
import torch

from deme_lib import classifier, data
from deme_lib.parameters import load

NAMES = ("digits-a", "digits-b")


@pytest.fixture(scope="module")
def test_images():
    defaults = load("params/digits.yaml")
    sizes = (defaults.train_images, defaults.search_images, defaults.test_images)
    return data.split("digits", *sizes, defaults.split_seed)["test"]


@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_the_truth(name, test_images):
    card = json.loads((data.CLASSIFIERS / f"{name}.json").read_text())
    assert card["fingerprint"] == data.fingerprint("digits")
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
    with pytest.raises(ValueError, match=r"digits-c.*digits-a, digits-b.*inception"):
        classifier.load("digits-c")
