"""Models: built from a seed, loaded from anywhere, refused with a reason."""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from deme_lib.diffusion import models
from deme_lib.diffusion.models import ModelError
from deme_lib.method.projection import ProjectedUNet2DModel


def small(seed=0, roundings=0):
    return models.new_unet(1, 8, [8, 16], 1, seed, roundings)


def equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def folder(tiny_unet, tmp_path):
    """A stock pipeline, saved by diffusers itself."""
    DDPMPipeline(tiny_unet(), DDPMScheduler(100)).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


# new models


def test_a_new_unet_is_a_function_of_its_seed_alone():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = small()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert equal(first, small()) and not equal(first, small(seed=1))


def test_a_new_unet_takes_the_data_s_shape():
    unet = models.new_unet(3, 16, [8, 16, 24], 2, seed=0)
    with torch.inference_mode():
        assert unet(torch.zeros(2, 3, 16, 16), 0).sample.shape == (2, 3, 16, 16)
    assert unet.config.block_out_channels == (8, 16, 24)


def test_attention_is_at_the_lowest_resolution_and_in_the_middle():
    unet = models.new_unet(1, 16, [8, 16], 1, seed=0, attention=True)
    places = {n.split(".attentions")[0] for n, _ in unet.named_modules() if ".attentions" in n}
    assert places == {"down_blocks.1", "mid_block", "up_blocks.0"}
    with torch.inference_mode():
        assert unet(torch.zeros(2, 1, 16, 16), 0).sample.shape == (2, 1, 16, 16)
    assert not any("attentions.0" in name for name, _ in small().named_modules())


@pytest.mark.parametrize("roundings", [1, 3])
def test_roundings_move_every_weight_by_units_in_the_last_place(roundings):
    for before, after in zip(small().parameters(), small(0, roundings).parameters(), strict=True):
        moved = before.detach().numpy()
        for _ in range(roundings):
            moved = np.nextafter(moved, np.float32(np.inf))
        assert (after.detach().numpy() == moved).all()
        assert (after > before).all()


def test_the_noise_schedule_is_ho_s_and_stretches():
    defaults, found = DDPMScheduler(), models.new_scheduler(1000)
    torch.testing.assert_close(found.alphas_cumprod, defaults.alphas_cumprod)
    for steps in (50, 100, 250):
        short = models.new_scheduler(steps).alphas_cumprod
        assert len(short) == steps and short[-1] < 1e-3 and (short.diff() < 0).all()
        middle = defaults.alphas_cumprod[499].log()
        assert short[steps // 2 - 1].log() == pytest.approx(middle.item(), rel=0.15)


# loading


def test_a_stock_folder_loads(folder, tiny_unet):
    pipeline = models.load_pipeline(folder)
    assert type(pipeline.unet) is UNet2DModel and equal(pipeline.unet, tiny_unet())
    assert pipeline.scheduler.config.num_train_timesteps == 100


@pytest.mark.parametrize("projected", [False, True])
def test_what_is_saved_loads_the_same(projected, tiny_unet, noisy_batch, tmp_path):
    unet = ProjectedUNet2DModel.from_stock(tiny_unet()) if projected else tiny_unet()
    with torch.no_grad():
        for weight in unet.parameters():
            weight.add_(0.01)
    models.save_pipeline(unet, DDPMScheduler(1000), tmp_path / "p")
    loaded = models.load_pipeline(tmp_path / "p").unet
    assert type(loaded) is type(unet) and equal(loaded, unet)
    with torch.inference_mode():
        assert torch.equal(loaded(*noisy_batch).sample, unet(*noisy_batch).sample)
    assert equal(models.load_unet(tmp_path / "p" / "unet"), unet)
    if not projected:
        assert equal(DDPMPipeline.from_pretrained(tmp_path / "p").unet, unet)


@pytest.mark.parametrize(
    "name, content",
    [
        ("unet/config.json", b"{"),
        ("unet/config.json", b"[]"),
        ("unet/diffusion_pytorch_model.safetensors", b"cut"),
        ("unet/diffusion_pytorch_model.safetensors", None),
        ("model_index.json", b"{"),
        ("model_index.json", None),
    ],
)
def test_a_damaged_folder_is_named(folder, name, content):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=str(folder)):
        models.load_pipeline(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"cut", None])
def test_a_damaged_unet_is_named(folder, content):
    name = "config.json" if content in (b"{", b"[]") else "diffusion_pytorch_model.safetensors"
    file = folder / "unet" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ModelError, match=str(folder / "unet")):
        models.load_unet(folder / "unet")


# fitting


def pipeline(unet, **scheduler):
    return DDPMPipeline(unet, DDPMScheduler(**{"num_train_timesteps": 1000} | scheduler))


def test_a_pipeline_that_fits_passes(tiny_unet):
    models.check_pipeline(pipeline(tiny_unet()), 1000, (1, 8, 8))
    models.check_pipeline(pipeline(tiny_unet(sample_size=(8, 16))), 1000, (1, 8, 16))


# devices


def test_a_missing_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"device=cuda.*auto or cpu"):
        models.accelerator("cuda")
    assert models.accelerator("cpu").device.type == "cpu"
