"""Merging models, in memory and from folders."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from deme_lib.diffusion import merged
from deme_lib.diffusion.merged import Merger, merge_experts, merge_folders
from deme_lib.diffusion.models import ModelError, load_pipeline, save_pipeline
from deme_lib.method.projection import ProjectedUNet2DModel, is_projection

WEIGHTS = [0.3, 0.6]


def projected(unet, seed):
    """An expert whose projections have left the identity."""
    expert, g = ProjectedUNet2DModel.from_stock(unet), torch.Generator().manual_seed(seed)
    for name, tensor in expert.named_parameters():
        if is_projection(name):
            tensor.data += 0.1 * torch.randn(tensor.shape, generator=g)
    return expert


@pytest.fixture
def experts(tiny_unet):
    return [projected(tiny_unet(i), i) for i in (1, 2)]


def assert_close(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_projections_merge_around_the_identity(tiny_unet, experts):
    """W = I + sum_i w_i (W_i - I); a stock base gains identity projections."""
    merged = merge_experts(tiny_unet(), experts, WEIGHTS)
    assert isinstance(merged, ProjectedUNet2DModel) and not merged.training
    names = [name for name in merged.state_dict() if is_projection(name)]
    assert len(names) == 5
    for name in names:
        matrices = [e.state_dict()[name][:, :, 0, 0] for e in experts]
        eye = torch.eye(len(matrices[0]))
        expected = eye + sum(w * (m - eye) for w, m in zip(WEIGHTS, matrices, strict=True))
        torch.testing.assert_close(merged.state_dict()[name][:, :, 0, 0], expected)


def test_candidates_of_a_search_share_one_model(tiny_unet, experts):
    merger = Merger(tiny_unet(), experts)
    start = {name: tensor.clone() for name, tensor in merger.start.items()}
    model = merger.merged([1.0, 0.0])
    assert merger.merged(WEIGHTS, into=model) is model
    assert_close(model, merger.merged(WEIGHTS))
    assert all(torch.equal(merger.start[name], tensor) for name, tensor in start.items())


@pytest.mark.parametrize("with_projections", [True, False])
def test_folders_merge_as_models_do(with_projections, tiny_unet, experts, tmp_path, monkeypatch):
    monkeypatch.setattr(merged, "PIECE", 100)  # so that tensors are cut
    if not with_projections:
        experts = [tiny_unet(1), tiny_unet(2)]
    save_pipeline(tiny_unet(), DDPMScheduler(100), tmp_path / "base")
    folders = [tmp_path / "first", tmp_path / "second"]
    for expert, folder in zip(experts, folders, strict=True):
        expert.save_pretrained(folder)
    merge_folders(tmp_path / "base", folders, WEIGHTS, tmp_path / "merged")
    pipeline = load_pipeline(tmp_path / "merged")
    assert_close(pipeline.unet, merge_experts(tiny_unet(), experts, WEIGHTS))
    assert pipeline.scheduler.config.num_train_timesteps == 100

    tiny_unet(block_out_channels=(8, 8)).save_pretrained(folders[1])
    with pytest.raises((KeyError, ValueError), match="architecture"):
        merge_folders(tmp_path / "base", folders, WEIGHTS, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("types", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_merge_has_the_wider_of_its_types(tiny_unet, tmp_path, types):
    """Task vectors of 1e-4 are lost in a bfloat16 base; here they arrive."""
    wide, narrow = (getattr(torch, name) for name in types)
    base, expert = tiny_unet().bfloat16().to(wide), tiny_unet().bfloat16().float()
    for weight in expert.parameters():
        weight += 1e-4 * weight.sign()
    expert = expert.to(narrow)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    save_pipeline(base, DDPMScheduler(), tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    merge_folders(tmp_path / "base", [tmp_path / "expert"], [0.5], tmp_path / "merged")
    loaded = UNet2DModel.from_pretrained(tmp_path / "merged" / "unet")
    for unet in (merge_experts(base, [expert], [0.5]), loaded):
        for name, found in unet.state_dict().items():
            theta, tuned = before[name].double(), expert.state_dict()[name].double()
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), (theta + tuned) / 2, rtol=1e-6, atol=1e-9)
    assert base.dtype == wide and merge_experts(base, [base], [0.5]).dtype == wide


def test_folders_in_shards_merge_and_other_files_are_named(tiny_unet, tmp_path):
    save_pipeline(tiny_unet(), DDPMScheduler(), tmp_path / "base")
    whole, shards, half, pickled = (tmp_path / name for name in ("whole", "shards", "half", "bin"))
    tiny_unet(1).save_pretrained(whole)
    tiny_unet(1).save_pretrained(shards, max_shard_size="10KB")
    tiny_unet(1).save_pretrained(half, variant="fp16")
    tiny_unet(1).save_pretrained(pickled, safe_serialization=False)
    for folder in (whole, shards):
        merge_folders(tmp_path / "base", [folder], [0.5], tmp_path / f"merged-{folder.name}")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert_close(*(load_pipeline(tmp_path / f"merged-{n}").unet for n in ("whole", "shards")))
    for folder, words in ((half, r"fp16\.safetensors"), (pickled, r"model\.bin")):
        with pytest.raises(ModelError, match=rf"{words}.*save_pretrained"):
            merge_folders(tmp_path / "base", [folder], [0.5], tmp_path / "none")


def test_nothing_to_merge_and_other_architectures_are_refused(tiny_unet, tmp_path):
    with pytest.raises(ValueError, match="nothing to merge"):
        Merger(tiny_unet(), [])
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_folders(tmp_path, [], [], tmp_path / "merged")
    with pytest.raises(KeyError, match=r"projection\.weight"):
        merge_experts(ProjectedUNet2DModel.from_stock(tiny_unet()), [tiny_unet(1)], [1.0])
    tied = tiny_unet()
    tied.mid_block.resnets[0].conv1 = tied.mid_block.resnets[1].conv1
    with pytest.raises(ValueError, match=r"mid_block.*are tied"):
        merge_experts(tied, [tiny_unet(1)], [1.0])
