"""The small frozen classifiers whose features and class probabilities stand in for Inception.

Their features are the tanh of a spatial bottleneck: bounded, since raw ReLU features proved too
heavy-tailed for a Frechet distance of a few thousand images, they keep the place of a stroke, and
the head reads the class from nothing else. ``train`` makes the shipped weights again.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from deme_lib.diffusion import data

SEEDS = {"a": 0, "b": 1}
STEPS = 1500  # at least; larger data sets are seen EPOCHS times
EPOCHS = 6
BATCH = 128
WIDTH = 32  # channels


class Classifier(nn.Module):
    """uint8 images [B, C, S, S] to bounded features [B, d] and logits [B, classes].

    Every doubling of S above 8 adds a stage that halves the image, so that d = 64 for 8, 16, 32.
    """

    def __init__(self, channels: int, size: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.norm1 = nn.GroupNorm(8, WIDTH)
        halvings = max(1, (size // 8).bit_length())
        self.shrink = nn.Sequential()
        for _ in range(1, halvings):
            convolution = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, stride=2)
            self.shrink.append(nn.Sequential(convolution, nn.GroupNorm(8, WIDTH), nn.SiLU()))
        self.conv2 = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, stride=2)
        self.norm2 = nn.GroupNorm(8, 2 * WIDTH)
        self.bottleneck = nn.Conv2d(2 * WIDTH, 4, 1)
        side = -(-size // 2**halvings)
        self.head = nn.Sequential(nn.Linear(4 * side**2, 128), nn.SiLU(), nn.Linear(128, classes))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float() / 127.5 - 1
        x = self.shrink(F.silu(self.norm1(self.conv1(x))))
        x = F.silu(self.norm2(self.conv2(x)))
        features = torch.tanh(self.bottleneck(x).flatten(1))  # in (-1, 1)
        return features, self.head(features)


def load(name: str) -> Classifier:
    """A shipped classifier, frozen, such as ``digits-a``."""
    card = card_of(name)
    model = Classifier(card["channels"], card["size"], card["classes"])
    model.load_state_dict(load_file(data.CLASSIFIERS / f"{name}.safetensors"))
    return model.eval().requires_grad_(False)


def card_of(name: str) -> dict[str, Any]:
    """What a shipped classifier was trained on, and how well it does on the test images."""
    return json.loads((data.CLASSIFIERS / f"{name}.json").read_text())


def accuracy(model: Classifier, images: data.Images) -> float:
    """Share of images classified rightly."""
    with torch.inference_mode():
        batches = torch.from_numpy(images.images).split(500)
        predicted = torch.cat([model(batch)[1].argmax(1) for batch in batches])
    return (predicted == torch.from_numpy(images.labels)).float().mean().item()


def train(name: str, roles: dict[str, data.Images], split_seed: int, folder: Path) -> None:
    """Train ``<name>-a`` and so on of ``SEEDS`` on ``data.split``'s roles; write weights, cards."""
    images, labels = (torch.from_numpy(x) for x in vars(roles["train"]).values())
    shape = {"channels": images.shape[1], "size": images.shape[2], "classes": int(labels.max()) + 1}
    steps = max(STEPS, EPOCHS * len(images) // BATCH)
    torch.set_num_threads(1)
    for letter, seed in SEEDS.items():
        torch.manual_seed(seed)
        model = Classifier(**shape)
        optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
        for _ in range(steps):
            i = torch.randint(len(labels), (BATCH,))
            loss = F.cross_entropy(model(_augment(images[i]))[1], labels[i], label_smoothing=0.1)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        card = {"dataset": name, "train_hash": data.content_hash(roles["train"].images), **shape}
        card |= {"split_seed": split_seed, "train_images": len(labels)}
        card |= {"test_images": len(roles["test"].labels)}
        card["test_accuracy"] = accuracy(model.eval(), roles["test"])
        folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), folder / f"{name}-{letter}.safetensors")
        (folder / f"{name}-{letter}.json").write_text(json.dumps(card, indent=1) + "\n")
        print(f"{name}-{letter}: {card['test_accuracy']:.1%} of {card['test_images']} test images")


def _augment(images: torch.Tensor) -> torch.Tensor:
    """Shift by up to one pixel, add a little noise; stays in 0..255."""
    size = images.shape[-1]
    dy, dx = torch.randint(0, 3, (2,)).tolist()
    shifted = F.pad(images.float(), (1, 1, 1, 1))[..., dy : dy + size, dx : dx + size]
    return (shifted + 13 * torch.randn_like(shifted)).clamp(0, 255)
