"""Merging models, in memory and from folders."""

import pytest
import torch
from diffusers import DDPMScheduler

from deme_lib.diffusion import merged
from deme_lib.diffusion.merged import Merger, merge_experts, merge_folders
from deme_lib.diffusion.models import load_pipeline, save_pipeline
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


def test_nothing_to_merge_and_other_architectures_are_refused(tiny_unet, tmp_path):
    with pytest.raises(ValueError, match="nothing to merge"):
        Merger(tiny_unet(), [])
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_folders(tmp_path, [], [], tmp_path / "merged")
    with pytest.raises(KeyError, match=r"projection\.weight"):
        merge_experts(ProjectedUNet2DModel.from_stock(tiny_unet()), [tiny_unet(1)], [1.0])
