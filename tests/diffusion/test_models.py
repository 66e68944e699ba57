"""Models: built from a seed, loaded from anywhere, refused with a reason."""

import json

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file
from tiny_models import PICKLE, add_adapter, equal

from deme_lib.diffusion import models
from deme_lib.diffusion.data import PRETRAINED, content_hash, split
from deme_lib.diffusion.models import ModelError
from deme_lib.method.ensembles import AveragedEnsemble


def small(seed=0):
    return models.new_unet((1, 8, 8), [8, 16], 1, seed)


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


def test_a_new_unet_takes_the_data_s_shape(tmp_path):
    unet = models.new_unet((3, 8, 12), [8, 16, 24], 2, seed=0)
    models.save_pipeline(unet, models.new_scheduler(1000), tmp_path)
    models.check_pipeline(models.load_pipeline(tmp_path), 1000, (3, 8, 12))


def test_the_noise_schedule_is_ho_s_and_stretches():
    defaults, short = DDPMScheduler().alphas_cumprod, models.new_scheduler(250).alphas_cumprod
    torch.testing.assert_close(models.new_scheduler(1000).alphas_cumprod, defaults)
    assert len(short) == 250 and short[-1] < 1e-3 and (short.diff() < 0).all()
    assert short[124].log() == pytest.approx(defaults[499].log().item(), rel=0.15)


# loading


def test_a_stock_folder_loads_also_in_its_oldest_layout(folder, tiny_unet):
    """The oldest pipelines keep everything beside model_index.json."""
    for name in ("unet", "scheduler", "nothing"):
        pipeline = models.load_pipeline(folder)
        assert type(pipeline.unet) is UNet2DModel and equal(pipeline.unet, tiny_unet())
        assert pipeline.scheduler.config.num_train_timesteps == 100
        if (folder / name).is_dir():
            for path in (folder / name).iterdir():
                path.rename(folder / path.name)
            (folder / name).rmdir()


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_damaged_folder_is_named(folder, name):
    (folder / name).write_bytes(b"[]")
    with pytest.raises(ModelError, match=f"(?s){folder}.*save or copy"):
        models.load_pipeline(folder)


def test_a_pickle_is_not_opened(folder, tmp_path):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_text(PICKLE.format(tmp_path / "ran"))
    with pytest.raises(ModelError, match=r"(?s)unet.*save or copy"):
        models.load_pipeline(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["nobody/nothing", "./mine"])
def test_a_name_of_nothing_is_said_to_be_no_folder(name):
    with pytest.raises(ModelError, match=rf"{name}: there is no such folder, and .*`pretrained`"):
        models.load_pipeline(name)


def test_weights_that_were_saved_in_16_bits_alone_load_in_32(tiny_unet, tmp_path):
    half = DDPMPipeline(tiny_unet().half(), DDPMScheduler(100))
    half.save_pretrained(tmp_path, variant="fp16")
    assert equal(models.load_pipeline(tmp_path).unet, tiny_unet().half().float())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"conv_out.bias": None}, "do not fit, such as in conv_out.bias"),
        ({"more": torch.ones(1)}, "do not fit, such as in more"),
        ({"conv_out.bias": torch.tensor([torch.nan])}, "conv_out.bias hold NaN or infinity"),
    ],
)
def test_weights_that_are_not_all_there_or_not_finite_are_refused(folder, change, words):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file) | change
    save_file({name: w for name, w in weights.items() if w is not None}, file)
    with pytest.raises(ModelError, match=f"{folder}/unet: .*{words}"):
        models.load_pipeline(folder)


# other kinds of model


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (diffusers.EDMEulerScheduler(), "says nothing of training: take a scheduler of betas"),
        (diffusers.ScoreSdeVeScheduler(), "says nothing of training: take a scheduler of betas"),
        (diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0), "noises otherwise than its betas"),
    ],
)
def test_noise_that_is_neither_ddpm_s_nor_a_flow_s_is_named(tiny_unet, tmp_path, scheduler, words):
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"{type(scheduler).__name__} .*{words}"):
        models.load_pipeline(tmp_path)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_flow_is_taken_as_it_is_or_from_a_sampler_of_it(name):
    given = (
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if "UniPC" in name else {}
    )
    scheduler = getattr(diffusers, name)(num_train_timesteps=100, **given)
    found = models.noise_schedule(scheduler)
    assert type(found) is diffusers.FlowMatchEulerDiscreteScheduler
    assert found.config.num_train_timesteps == 100 and (found is scheduler) == (not given)


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep"])
@pytest.mark.parametrize("given", [(100,), (1000, 0.00085, 0.012, "scaled_linear")])
def test_noise_is_ddpm_s_of_a_sampler_s_betas_however_it_was_made(name, given):
    """Euler's own add_noise is not Eq. 1: a standard deviation up to 107."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(*given)
    found = models.noise_schedule(scheduler)
    assert type(found) is DDPMScheduler and found.config.num_train_timesteps == given[0]
    torch.testing.assert_close(found.alphas_cumprod, scheduler.alphas_cumprod)


def test_other_pipelines_load_and_the_experiment_names_what_it_cannot_use(tiny_unet, tmp_path):
    vq = VQModel(block_out_channels=(8,), norm_num_groups=4)
    LDMPipeline(vq, tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path)
    loaded = models.load_pipeline(tmp_path)
    assert type(loaded) is LDMPipeline and equal(loaded.unet, tiny_unet())
    with pytest.raises(ModelError, match=r"this LDMPipeline: take a pixel-space DDPM .*decouple"):
        models.check_pipeline(loaded, 1000, (1, 8, 8))
    flow = DDPMPipeline(tiny_unet(), diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ModelError, match="prediction_type: flow, where epsilon is needed"):
        models.check_pipeline(flow, 1000, (1, 8, 8))


@pytest.mark.parametrize(
    ("config", "scheduler", "words"),
    [
        ({"sample_size": (8, 12)}, {}, r"shape: \(1, 8, 12\), where \(1, 8, 8\) is needed"),
        ({"sample_size": None}, {}, "sample_size is null"),
        ({"out_channels": 2}, {}, "out_channels: 2, where 1 is needed"),
        ({"num_class_embeds": 3}, {}, "classes: 3, where None is needed: take an unconditional"),
        ({}, {"num_train_timesteps": 100}, "timesteps: 100, .*set num_train_timesteps to 100"),
        ({}, {"prediction_type": "v_prediction"}, r"v_prediction, where epsilon is needed"),
        ({}, {"rescale_betas_zero_snr": True}, "zero_snr: True: at the last timestep"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_training(tiny_unet, config, scheduler, words):
    unet = tiny_unet(**{"block_out_channels": (32, 64), "norm_num_groups": 32} | config)
    with pytest.raises(ModelError, match=words):
        models.check_pipeline(DDPMPipeline(unet, DDPMScheduler(**scheduler)), 1000, (1, 8, 8))


def test_what_is_not_one_model_is_not_saved_as_if_it_were(tiny_unet, tmp_path):
    both = AveragedEnsemble([tiny_unet(0), tiny_unet(1)])
    with pytest.raises(ModelError, match=r"AveragedEnsemble cannot be saved .*merge_experts first"):
        models.save_pipeline(both, DDPMScheduler(), tmp_path / "p")
    with pytest.raises(ValueError, match=r"under its adapters.*save_adapter"):
        unet = add_adapter(tiny_unet(), target_modules=["conv1"])
        models.save_pipeline(unet, DDPMScheduler(), tmp_path / "p")
    assert not (tmp_path / "p").exists()


# shipped models


def test_what_ships_fits_the_built_in_data_and_its_seed():
    train_hash = content_hash(
        split("fashion8", 50_000, 10_000, 10_000, split_seed=0)["train"].images
    )
    folders = sorted(PRETRAINED.glob("fashion8/seed-*"))
    assert len(folders) >= 8
    for folder in folders:
        seed = int(folder.name.removeprefix("seed-"))
        models.check_card(folder, train_hash, seed)
        models.check_pipeline(models.load_pipeline(folder / "pipeline"), 1000, (1, 8, 8))
        steps = json.loads((folder / "card.json").read_text())["steps"]
        assert f"\n{steps}," in (folder / "history.csv").read_text()
        for other in (("abd", seed), (train_hash, seed + 1)):
            with pytest.raises(ModelError, match=rf"not on {other[0]} with seed {other[1]}.*anew"):
                models.check_card(folder, *other)


def test_an_unknown_device_is_refused():
    with pytest.raises(ModelError, match=r"device=gpu.*auto, cpu or cuda"):
        models.device_of("gpu")
