"""Eq. 8 on LoRA experts: against the sum of full differences, in float64 and by diffusers."""

import copy
import json

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file

from deme_lib import __main__ as shell
from deme_lib.diffusion import lora
from deme_lib.diffusion.lora import adapter_state, merge_adapters, save_adapter
from deme_lib.diffusion.merged import Merger, merge_experts
from deme_lib.diffusion.models import ModelError

peft = pytest.importorskip("peft")
WEIGHTS = [0.3, -0.6]
TIMES = torch.tensor([3, 700])


def text_unet():
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    )


def sd3():
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )


@pytest.fixture(params=["unet", "text_unet", "sd3", "dit"])
def family(request, tiny_unet):
    """A base, its predictions for fixed inputs, and the prefix of its adapters' files."""
    generator = torch.Generator().manual_seed(0)
    x, tokens, pooled = (
        torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (3, 12), (10,))
    )
    torch.manual_seed(0)
    make, prefix, conditions = {
        "unet": (tiny_unet, "base_model.model.", {}),
        "text_unet": (text_unet, "unet.", {"encoder_hidden_states": tokens}),
        "sd3": (
            sd3,
            "transformer.",
            {"encoder_hidden_states": tokens, "pooled_projections": pooled},
        ),
        "dit": (dit, "base_model.model.", {"class_labels": torch.tensor([1, 2])}),
    }[request.param]
    x = x[:, :1] if request.param == "unet" else x

    def predict(model):
        with torch.inference_mode():
            return model(x, timestep=TIMES, return_dict=False, **conditions)[0]

    return make().eval(), predict, prefix


def adapted(base, seed=0, name="default", **settings):
    """A copy with one more adapter, of random A and B."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "conv1", "to_out.0"]} | settings
    model, config = copy.deepcopy(base), peft.LoraConfig(**settings)
    peft.inject_adapter_in_model(config, model, name)
    model._hf_peft_config_loaded = True
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.named_parameters():
        if f".{name}." in key:
            tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    return model


def experts_of(base):
    """Two of other ranks, scalings and targets."""
    other = {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": ["to_q", "to_v", "conv2"],
    }
    return [adapted(base, 1), adapted(base, 2, **other, alpha_pattern={"to_q|conv2": 7})]


def deltas(model, name="default"):
    """Each layer's s B A, by peft."""
    layers = {n: m for n, m in model.named_modules() if name in getattr(m, "lora_A", ())}
    return {n: layer.double().get_delta_weight(name) for n, layer in layers.items()}


def test_a_merge_is_the_sum_of_full_differences(family):
    base, predict, _ = family
    experts = experts_of(base)
    merged, before = merge_experts(base, experts, WEIGHTS), predict(base)
    found, terms = predict(merged), [deltas(copy.deepcopy(e)) for e in experts]
    assert list(merged.peft_config) == ["merged"]
    assert not lora.has_adapters(base) and torch.equal(predict(base), before)
    assert (found - before).abs().max() > 1e-2
    textbook = copy.deepcopy(base)
    state = textbook.state_dict()
    summed = deltas(merged, "merged")
    assert summed.keys() == terms[0].keys() | terms[1].keys() != terms[0].keys()
    for name, delta in summed.items():
        sizes = [w * t[name] for w, t in zip(WEIGHTS, terms, strict=True) if name in t]
        torch.testing.assert_close(delta, sum(sizes), rtol=1e-5, atol=1e-6)
        state[f"{name}.weight"] += sum(sizes)
    torch.testing.assert_close(found, predict(textbook), rtol=1e-4, atol=1e-5)


def test_the_scaling_in_use_counts():
    model = text_unet()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    full = adapter_state(model)
    model.set_adapters("default", 0.25)
    quarter = adapter_state(model)
    assert all(torch.equal(quarter[k], t / 4) for k, t in full.items() if k.endswith(lora.B))


def test_the_saved_adapter_loads_with_diffusers_or_peft(family, tmp_path):
    base, predict, prefix = family
    experts = experts_of(base)
    expected, state = predict(merge_experts(base, experts, WEIGHTS)), {}
    if prefix == "base_model.model.":
        save_adapter(merge_adapters(experts, WEIGHTS), tmp_path / "merged", prefix)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "merged")
        torch.testing.assert_close(predict(loaded), expected)
        loaded.save_pretrained(tmp_path / "again")
        state = merge_adapters([tmp_path / "again"], [1.0], tmp_path / "once more")
        assert torch.equal(
            state[(name := next(iter(state)))], merge_adapters(experts, WEIGHTS)[name]
        )
        return
    folders, both = [tmp_path / "0", tmp_path / "1"], copy.deepcopy(base)
    how = {"use_safetensors": True}
    for expert, folder in zip(experts, folders, strict=True):
        expert.save_lora_adapter(folder)  # its keys have no prefix
        both.load_lora_adapter(folder, prefix=None, adapter_name=f"e{folder.name}", **how)
    merge_adapters(folders, WEIGHTS, tmp_path / "merged")
    save_adapter(merge_adapters(experts, WEIGHTS), tmp_path / "prefixed", prefix)
    both.set_adapters(["e0", "e1"], WEIGHTS)
    torch.testing.assert_close(predict(both), expected, rtol=1e-4, atol=1e-5)
    for folder, start in (("merged", None), ("prefixed", prefix.removesuffix("."))):
        loaded = copy.deepcopy(base)
        loaded.load_lora_adapter(tmp_path / folder, prefix=start, **how)
        torch.testing.assert_close(predict(loaded), expected)
        state = adapter_state(tmp_path / folder)
        assert state.keys() == merge_adapters(experts, WEIGHTS).keys()


def test_peft_s_linear_combination_is_not_eq_8(tiny_unet):
    base = tiny_unet()
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["conv1"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config, "first")
    model.add_adapter("second", config)
    sources = [adapter_state(model, name) for name in ("first", "second")]
    merged = deltas(merge_experts(base, sources, [0.5, 0.5]), "merged")
    for kind, differs in (("linear", True), ("cat", False)):
        model.add_weighted_adapter(["first", "second"], [0.5, 0.5], kind, combination_type=kind)
        for name, delta in deltas(model.base_model.model, kind).items():
            far = (delta - merged[name]).norm() / merged[name].norm()
            assert far > 0.5 if differs else far < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_stay_and_an_expert_of_weight_0_is_not_looked_at(dtype, tiny_unet):
    first, second = (
        {n: t.to(dtype) for n, t in adapter_state(expert).items()}
        for expert in experts_of(tiny_unet())
    )
    wild = {name: torch.full_like(t, torch.nan) for name, t in second.items()}
    merged = merge_adapters([first, wild, second], [0.3, 0.0, 1.0])
    for name, tensor in merged.items():
        assert tensor.dtype == dtype and tensor.isfinite().all()
        if name.endswith("lora_B.weight") and name in first:
            expected = (first[name].double() * 0.3).to(dtype)
            torch.testing.assert_close(tensor[:, :4], expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_the_shell_merges_adapters(tiny_unet, tmp_path):
    experts = experts_of(tiny_unet())
    for i, expert in enumerate(experts):
        save_adapter(adapter_state(expert), tmp_path / str(i), "base_model.model.")
    words = ["merge", "unread", *(str(tmp_path / n) for n in "01"), "-o", str(tmp_path / "merged")]
    assert shell.main([*words, "--weights", "0.5", "0.25"]) == 0
    found, expected = adapter_state(tmp_path / "merged"), merge_adapters(experts, [0.5, 0.25])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    assert json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(ModelError, match="already"):
        merge_adapters([tmp_path / "0"], [1.0], tmp_path / "merged")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "magnitude"),
        ({"lora_bias": True}, r"lora_B\.bias"),
        ({"bias": "lora_only"}, r"conv1\.base_layer\.bias"),
        ({"modules_to_save": ["conv_in"]}, r"conv_in\.weight"),
        ({"init_lora_weights": "pissa", "target_modules": ["linear_1"]}, "init_lora_weights=pissa"),
    ],
)
def test_what_is_more_than_lora_is_refused(settings, words, tiny_unet):
    with pytest.raises(ModelError, match=rf"no adapter of plain LoRA.*{words}"):
        merge_adapters([adapted(tiny_unet(), **settings)], [1.0])


def test_what_cannot_be_merged_is_told(tiny_unet, tmp_path):
    base, good = tiny_unet(), adapted(tiny_unet())
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "kohya.safetensors")
    both = {
        f"{part}.x.lora_{k}.weight": torch.zeros(4, 4) for part in ("unet", "text") for k in "AB"
    }
    told = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    save_file(both, tmp_path / "both", told)
    wider = adapted(tiny_unet(block_out_channels=(16, 16)))
    several, tuned = adapted(good, name="late"), copy.deepcopy(good)
    tuned.conv_in.weight.data += 1
    grouped = {"c.lora_A.weight": torch.zeros(4, 8), "c.lora_B.weight": torch.zeros(8, 2)}
    for source, words in (
        (tmp_path / "kohya.safetensors", "no adapter of plain LoRA.*lora_down"),
        (tmp_path / "both", r"no adapter of plain LoRA.*unet\.r"),
        (tmp_path, "has no pytorch_lora_weights"),
        ({}, "no adapter of plain LoRA"),
        (base, r"adapters are \[\]"),
        (several, r"adapters are \['default', 'late'\]"),
        (grouped, "c is a grouped convolution"),
    ):
        with pytest.raises(ModelError, match=words):
            merge_adapters([source], [1.0])
    assert adapter_state(several, "late").keys() == adapter_state(good).keys()
    for experts, weights, words in (
        ([], [], "give one or more"),
        ([good], [1.0, 2.0], "for 1 experts"),
        ([good, wider], [1.0, 1.0], r"differs in more than its rank"),
    ):
        with pytest.raises(ValueError, match=words):
            merge_adapters(experts, weights)
    with pytest.raises(ValueError, match=r"conv_in.*are finetuned beside"):
        merge_experts(base, [good, tuned], WEIGHTS)
    with pytest.raises(ValueError, match=r"another model, which has mid_block"):
        merge_experts(tiny_unet(mid_block_type=None), [adapter_state(good)], [1.0])
    with pytest.raises(ModelError, match="merge_experts takes experts that all"):
        Merger(base, [good])
