"""What all tests share: no network, one thread, reproducible examples, one tiny UNet."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
os.environ["GIT_OPTIONAL_LOCKS"] = "0"  # records ask git for its status; never lock the index

import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import settings
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from deme_lib import ROOT

torch.set_num_threads(1)
settings.register_profile("deme", deadline=None, database=None, derandomize=True, max_examples=50)
settings.load_profile("deme")

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
}


@pytest.fixture
def preset(tmp_path):
    """A function: a file of the smoke preset with changes and a runs folder of its own."""

    def write(**changes):
        smoke = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(smoke | {"runs_dir": str(tmp_path / "runs")} | changes))
        return path

    return write


@pytest.fixture
def tiny_unet():
    """A function: ``tiny_unet(seed=0, **config)``, a stock UNet with seeded weights."""
    from diffusers import UNet2DModel

    def make(seed: int = 0, **config):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return UNet2DModel(**TINY | config).eval().requires_grad_(False)

    return make


@pytest.fixture
def noisy_batch():
    """Five noisy images [5, 1, 8, 8] and their timesteps [5], mixed over [0, 1000)."""
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return images, torch.tensor([999, 0, 250, 600, 249])


@pytest.fixture
def images():
    """Six random images, uint8 [6, 1, 8, 8]."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 1, 8, 8), generator=g).to(torch.uint8)


@pytest.fixture(scope="session")
def fashion_mnist():
    """The folder of Fashion-MNIST's four original files, where it is there."""
    folder = Path(os.environ.get("DEME_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
    if not folder.is_dir():
        pytest.skip("set DEME_FASHION_MNIST to a folder with Fashion-MNIST's four files")
    return folder


@pytest.fixture(scope="session")
def known():
    """The records of fashion8 as committed."""
    from deme_lib.report import records

    return records.read(ROOT / "figures" / "fashion8" / "records")


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A local Inception weights file of the right shape; its weights are random."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    cls = FEATURE_EXTRACTORS_REGISTRY["inception-v3-compat"]
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[cls.__module__]
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(cls, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        torch.save(cls("inception-v3-compat", ["2048"], verbose=False).state_dict(), path)
    return str(path)
