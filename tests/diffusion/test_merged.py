"""Merging models, in memory and from folders."""

import copy
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, PNDMScheduler
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import TOKENS, equal, shaken

from deme_lib.__main__ import main
from deme_lib.diffusion import merged
from deme_lib.diffusion.merged import Merger, merge_experts, merge_folders
from deme_lib.diffusion.models import ModelError, save_pipeline
from deme_lib.method.projection import ProjectedUNet2DModel, is_projection

WEIGHTS = [0.3, 0.6]
CONFIG = {"_class_name": "UNet2DModel", "sample_size": 8}


@pytest.fixture
def experts(tiny_unet):
    return [shaken(ProjectedUNet2DModel.from_stock(tiny_unet(i)), i) for i in (1, 2)]


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
    start = copy.deepcopy(merger.start)
    model = merger.merged([1.0, 0.0])
    assert merger.merged(WEIGHTS, into=model) is model
    assert equal(model, merger.merged(WEIGHTS)) and equal(merger.start, start)


@pytest.mark.parametrize("with_projections", [True, False])
def test_pipelines_merge_as_models_do(with_projections, tiny_unet, experts, tmp_path):
    if not with_projections:
        experts = [tiny_unet(1), tiny_unet(2)]
    scheduler = PNDMScheduler(100)
    save_pipeline(tiny_unet(), scheduler, tmp_path / "base")
    folders = [tmp_path / "first", tmp_path / "second"]
    experts[0].save_pretrained(folders[0])
    save_pipeline(experts[1], scheduler, folders[1])  # either will do
    (tmp_path / "base" / "unet" / "old.ckpt").touch()
    tiny_unet().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    if with_projections:
        with pytest.raises(ModelError, match="shards is in shards: save it in one file"):
            merge_folders(tmp_path / "shards", folders, WEIGHTS, tmp_path / "merged")
    merge_folders(tmp_path / "base", folders, WEIGHTS, tmp_path / "merged")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "merged")
    in_memory = merge_experts(tiny_unet(), experts, WEIGHTS)
    torch.testing.assert_close(pipeline.unet.state_dict(), in_memory.state_dict())
    assert type(pipeline.unet) is type(experts[0]) and type(pipeline.scheduler) is PNDMScheduler
    config = Path("scheduler", "scheduler_config.json")
    kept, found = ((tmp_path / name / config).read_bytes() for name in ("base", "merged"))
    assert kept == found and len(list((tmp_path / "merged" / "unet").iterdir())) == 2


def saved(folder, tensors, shard=10**9, **changes):
    """A model's folder of any tensors, in files of so many bytes: nothing builds the model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=shard)
    return folder


def loaded(folder):
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def tensors(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (700, 500), "a.bias": (700,), "scale": ()}
    floats = {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}
    return floats | {"ids": torch.arange(3), "mask": torch.tensor([True, False])}


F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
ALIKE = [(kind, kind) for kind in (F64, F32, F16, BF16)]
UNLIKE = [(BF16, F32), (F32, BF16)]  # task vectors of 1e-4 are lost in a bfloat16 base


@pytest.mark.parametrize(("dtype", "tuned_in"), ALIKE + UNLIKE)
@pytest.mark.parametrize("shard", [10**9, 1000])
def test_folders_are_merged_as_the_textbook_says(shard, dtype, tuned_in, tmp_path):
    weights, wide = [0.7, 0.0, -1.3], torch.promote_types(dtype, tuned_in)
    states = [tensors(0, dtype), *(tensors(k, tuned_in) for k in (1, 2, 3))]
    base = saved(tmp_path / "base", states[0], shard)
    experts = [saved(tmp_path / str(k), states[k], 10 ** (3 * k - 2)) for k in (1, 2, 3)]
    (tmp_path / "merged.tmp").mkdir()  # of somebody else
    merge_folders(base, experts, weights, tmp_path / "merged")
    assert len([*tmp_path.glob("merged*")]) == 2
    names = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert names == sorted(path.name for path in base.iterdir())
    found, eps = loaded(tmp_path / "merged"), torch.finfo(wide).eps
    for name, given in states[0].items():
        theta, *tuned = (s[name].double() for s in states)
        expected = theta + sum(w * (t - theta) for w, t in zip(weights, tuned, strict=True))
        expected = expected.to(wide) if given.is_floating_point() else given
        torch.testing.assert_close(found.pop(name), expected, rtol=eps, atol=16 * eps)
    assert not found


def test_zero_and_one_hot_weights_give_base_and_expert_to_the_bit(tmp_path):
    folders = [saved(tmp_path / str(k), tensors(k)) for k in range(3)]
    for out, (weights, k) in enumerate((([0.0, 0.0], 0), ([0.0, 1.0], 2))):
        merge_folders(folders[0], folders[1:], weights, tmp_path / f"out{out}")
        assert equal(loaded(tmp_path / f"out{out}"), tensors(k))


def test_the_shell_merges_a_transformer_s_pipeline_in_shards(tmp_path):
    """Its other parts are the base's; diffusers loads it in the type that was named."""
    models = []
    for k, folder in enumerate(("base", "first", "second")):
        torch.manual_seed(k)
        models.append(diffusers.SD3Transformer2DModel(**TOKENS, caption_projection_dim=8))
        models[-1].save_pretrained(tmp_path / folder / "transformer", max_shard_size="100KB")
    for name in ("model_index.json", "whole.ckpt", "vae/weights.safetensors"):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text("whatever")
    words = ["merge", *(str(tmp_path / n) for n in ("base", "first", "second"))]
    words += ["-o", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main(words) == 0
    assert not (tmp_path / "out" / "whole.ckpt").exists()
    assert (tmp_path / "out" / "vae" / "weights.safetensors").read_text() == "whatever"
    found = diffusers.SD3Transformer2DModel.from_pretrained(
        tmp_path / "out", subfolder="transformer", torch_dtype=torch.bfloat16
    ).state_dict()
    stored = loaded(tmp_path / "out" / "transformer")
    for name, weight in merge_experts(models[0], models[1:], [0.5, 0.5]).state_dict().items():
        torch.testing.assert_close(stored[name], weight.bfloat16())
        assert torch.equal(found[name], stored[name])
    assert main(words) == 1  # nothing is overwritten


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_a_merge_of_folders_holds_about_one_model(tmp_path):
    """Memory that no file backs. Tensors of 33 MiB: smaller ones malloc may keep when freed."""
    size = 33 * 2**20
    base, expert = (
        saved(tmp_path / str(k), {n: torch.full((size // 4,), float(k)) for n in "abc"})
        for k in range(2)
    )

    def held():
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024

    seen = [held()]
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(merge_folders, base, [expert] * 4, [0.25] * 4, tmp_path / "merged")
        while not work.done():
            seen.append(held())
            time.sleep(0.0005)
    work.result()
    assert (max(seen) - seen[0]) / (3 * size) < 1.3


@pytest.mark.parametrize(("dtype", "tuned_in"), UNLIKE)
def test_models_are_merged_in_the_wider_of_their_types(tiny_unet, dtype, tuned_in):
    base, expert = tiny_unet().to(dtype), tiny_unet(1).to(tuned_in)
    merged = merge_experts(base, [expert], [0.5]).state_dict()
    for name, tuned in expert.state_dict().items():
        expected = (base.state_dict()[name].double() + tuned.double()) / 2
        torch.testing.assert_close(merged[name], expected.float(), rtol=1e-6, atol=1e-7)
    assert base.dtype == dtype and merge_experts(base, [base], [0.5]).dtype == dtype


@pytest.mark.parametrize(
    ("tensor", "settings", "words"),
    [
        ({}, {"sample_size": 16}, "differ: sample_size 8 and 16"),
        ({}, {"_class_name": "UNet1DModel"}, "_class_name UNet2DModel and UNet1DModel"),
        ({"scale": None}, {}, r"only one of.*scale"),
        ({"ids": torch.arange(3) + 1}, {}, r"ids \(torch\.int64\) differs"),
    ],
)
def test_what_differs_is_named(tmp_path, tensor, settings, words):
    state = {n: t for n, t in (tensors(1) | tensor).items() if t is not None}
    base, other = saved(tmp_path / "base", tensors(0)), saved(tmp_path / "1", state, **settings)
    with pytest.raises((ModelError, KeyError, ValueError), match=words):
        merge_folders(base, [base, other], WEIGHTS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_defaults_that_older_files_lack_do_not_differ(tmp_path):
    base = saved(tmp_path / "base", tensors(0))
    newer = saved(tmp_path / "new", tensors(1), norm_eps=1e-05, _diffusers_version="0.1")
    merge_folders(base, [newer], [1.0], tmp_path / "out")
    with pytest.raises(ModelError, match="norm_eps 1e-05 and 1"):
        merge_folders(base, [saved(tmp_path / "3", tensors(1), norm_eps=1)], [1.0], tmp_path / "o")


def test_folders_that_cannot_be_read_are_told(tiny_unet, tmp_path):
    base, half, cut, two = (tmp_path / name for name in ("base", "half", "cut", "two"))
    tiny_unet().save_pretrained(base)
    tiny_unet(1).save_pretrained(half, variant="fp16")
    file = saved(cut, tensors(0)) / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    for part in ("transformer", "transformer_2"):
        (two / part).mkdir(parents=True)
    for folder, words in (
        (half, r"half has no diffusion_pytorch_model\.safetensors"),
        (cut, "cut: .*copy its weights"),
        (two, "has transformer and transformer_2"),
        (tmp_path, r"config\.json"),
    ):
        with pytest.raises((ModelError, OSError), match=words):
            merge_folders(base, [folder], [0.5], tmp_path / "out")


def test_models_of_other_architectures_are_refused(tiny_unet):
    with pytest.raises(ValueError, match="give one or more experts"):
        merge_experts(tiny_unet(), [], [])
    tied = tiny_unet()
    tied.mid_block.resnets[0].conv1 = tied.mid_block.resnets[1].conv1
    with pytest.raises(ValueError, match=r"mid_block.*are tied"):
        merge_experts(tied, [tiny_unet(1)], [1.0])


def test_a_merge_of_folders_is_whole_or_not_there(tmp_path, monkeypatch):
    base, expert = (saved(tmp_path / str(k), tensors(k), 1000) for k in range(2))
    with monkeypatch.context() as patch, pytest.raises(AttributeError):
        patch.delattr(merged.os, "replace")
        merge_folders(base, [expert], [0.5], tmp_path / "new" / "out")
    assert not (tmp_path / "new" / "out").exists()
    merge_folders(base, [expert], [0.5], tmp_path / "new" / "out")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_an_adapter_beside_a_model_does_not_make_its_folder_one(tmp_path):
    """But named as a file it is merged as adapters are."""
    model, name = saved(tmp_path / "model", tensors(1)), "pytorch_lora_weights.safetensors"
    adapter = {"to_q.lora_A.weight": torch.ones(2, 4), "to_q.lora_B.weight": torch.ones(4, 2)}
    save_file(adapter, model / name)
    merge_folders("unread", [model / name] * 2, [0.5, 0.5], tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / name).keys() == adapter.keys()
    merge_folders(saved(tmp_path / "base", tensors(0)), [model], [1.0], tmp_path / "out")
    assert torch.equal(loaded(tmp_path / "out")["scale"], tensors(1)["scale"])
