"""Eq. 8 on LoRA experts: against the sum of full differences, in float64 and by diffusers."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import add_adapter, family_of

from deme_lib.__main__ import main
from deme_lib.diffusion.lora import B, adapter_state, merge_adapters, save_adapter
from deme_lib.diffusion.merged import merge_experts
from deme_lib.diffusion.models import ModelError

WEIGHTS = [0.3, -0.6]
FIRST = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "conv1", "to_out.0"]}
SECOND = {"r": 3, "lora_alpha": 5, "target_modules": ["to_q", "to_v", "conv2"]}
SECOND |= {"use_rslora": True, "alpha_pattern": {"to_q|conv2": 7}}


@pytest.fixture(params=["labelled", "stable_diffusion", "dit", "sd3"])
def family(request):
    return family_of(request.param)


def adapted(base, *args, **settings):
    return add_adapter(copy.deepcopy(base), *args, **FIRST | settings)


def experts_of(base):
    """Two of other ranks, scalings and targets."""
    return [adapted(base, 1), adapted(base, 2, **SECOND)]


def deltas(model, name="default"):
    """Each layer's s B A, by peft."""
    layers = {n: m for n, m in model.named_modules() if name in getattr(m, "lora_A", ())}
    return {n: layer.double().get_delta_weight(name) for n, layer in layers.items()}


def test_a_merge_is_the_sum_of_full_differences(family):
    base, experts = family.model, experts_of(family.model)
    before, merged = family.predicted(base), merge_experts(base, experts, WEIGHTS)
    found, terms = family.predicted(merged), [deltas(copy.deepcopy(e)) for e in experts]
    assert list(merged.peft_config) == ["merged"] and (found - before).abs().max() > 1e-2
    assert torch.equal(family.predicted(base), before)
    textbook = copy.deepcopy(base)
    state, summed = textbook.state_dict(), deltas(merged, "merged")
    assert summed.keys() == terms[0].keys() | terms[1].keys() != terms[0].keys()
    for name, delta in summed.items():
        sizes = [w * t[name] for w, t in zip(WEIGHTS, terms, strict=True) if name in t]
        torch.testing.assert_close(delta, sum(sizes), rtol=1e-5, atol=1e-6)
        state[f"{name}.weight"] += sum(sizes)
    torch.testing.assert_close(found, family.predicted(textbook), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_on_a_narrow_base_the_merged_adapter_is_float32_or_wider(tiny_unet, dtype):
    states = [
        {name: tensor.to(dtype) for name, tensor in adapter_state(expert).items()}
        for expert in experts_of(tiny_unet())
    ]
    merged = merge_experts(tiny_unet().bfloat16(), states, WEIGHTS)
    held = {name: p for name, p in merged.named_parameters() if ".lora_" in name}
    assert {p.dtype for p in held.values()} == {torch.promote_types(dtype, torch.float32)}
    for name, tensor in merge_adapters(states, WEIGHTS).items():
        own = held[name.replace(".weight", ".merged.weight")]
        assert tensor.dtype == dtype and torch.equal(own, tensor.to(own))
    assert merged.dtype == torch.bfloat16
    found = merged(torch.zeros(1, 1, 8, 8).bfloat16(), torch.tensor(5)).sample
    assert found.dtype == torch.bfloat16


def test_the_scaling_in_use_counts():
    model = add_adapter(family_of("stable_diffusion").model)
    full = adapter_state(model)
    model.set_adapters("default", 0.25)
    quarter = adapter_state(model)
    assert all(torch.equal(quarter[k], t / 4) for k, t in full.items() if k.endswith(B))


@pytest.mark.parametrize("name", ["stable_diffusion", "sd3"])
def test_saved_adapters_load_with_diffusers(name, tmp_path):
    family, how = family_of(name), {"use_safetensors": True}
    base, experts, folders = family.model, experts_of(family.model), [tmp_path / k for k in "01"]
    expected, both = family.predicted(merge_experts(base, experts, WEIGHTS)), copy.deepcopy(base)
    for expert, folder in zip(experts, folders, strict=True):
        expert.save_lora_adapter(folder)  # its keys have no prefix
        both.load_lora_adapter(folder, prefix=None, adapter_name=f"e{folder.name}", **how)
    both.set_adapters(["e0", "e1"], WEIGHTS)
    torch.testing.assert_close(family.predicted(both), expected, rtol=1e-4, atol=1e-5)
    merged = merge_adapters(folders, WEIGHTS)
    for prefix in (None, family.part):
        save_adapter(merged, folder := tmp_path / f"to {prefix}", f"{prefix}." if prefix else "")
        loaded = copy.deepcopy(base)
        loaded.load_lora_adapter(folder, prefix=prefix, **how)
        torch.testing.assert_close(family.predicted(loaded), expected)
        found = adapter_state(folder)
        assert all(torch.equal(found[key], tensor) for key, tensor in merged.items())


def test_merged_adapters_of_peft_s_load_with_peft(tiny_unet, tmp_path):
    base, first = tiny_unet(), peft.LoraConfig(**FIRST, init_lora_weights=False)
    expert = peft.get_peft_model(copy.deepcopy(base), first)
    expert.save_pretrained(tmp_path / "0")
    words = ["merge", "unread", *[str(tmp_path / "0")] * 2, "-o", str(tmp_path / "merged")]
    assert main([*words, "--weights", "0.5", "0.25", "--dtype", "float64"]) == 0
    assert {t.dtype for t in adapter_state(tmp_path / "merged").values()} == {torch.float64}
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "merged")
    merged = merge_experts(base, [expert] * 2, [0.5, 0.25])
    given = torch.ones(1, 1, 8, 8), torch.tensor(5)
    torch.testing.assert_close(loaded(*given).sample, merged(*given).sample, check_dtype=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "magnitude"),
        ({"lora_bias": True}, r"lora_B\.bias"),
        ({"bias": "lora_only"}, r"conv1\.base_layer\.bias"),
        ({"modules_to_save": ["conv_in"]}, r"conv_in\.weight"),
    ],
)
def test_what_is_more_than_lora_is_refused(settings, words, tiny_unet):
    with pytest.raises(ModelError, match=rf"no adapter of plain LoRA.*{words}"):
        merge_adapters([adapted(tiny_unet(), **settings)], [1.0])


def test_what_cannot_be_merged_is_told(tiny_unet, tmp_path):
    base, good = tiny_unet(), adapted(tiny_unet())
    kohya, both = tmp_path / "kohya.safetensors", tmp_path / "both.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, kohya)
    parts = [f"{part}.x.lora_{k}.weight" for part in ("unet", "text") for k in "AB"]
    told = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    save_file({name: torch.zeros(4, 4) for name in parts}, both, told)
    several = add_adapter(copy.deepcopy(good), name="late", **FIRST)
    for source, words in (
        (kohya, "no adapter of plain LoRA.*lora_down"),
        (both, r"no adapter of plain LoRA.*unet\.r"),
        (base, r"adapters are \[\]"),
        (several, r"adapters are \['default', 'late'\]"),
    ):
        with pytest.raises(ModelError, match=words):
            merge_adapters([source], [1.0])
    with pytest.raises(FileNotFoundError, match="pytorch_lora_weights"):
        merge_adapters([tmp_path], [1.0])
    assert adapter_state(several, "late").keys() == adapter_state(good).keys()
    wider = adapted(tiny_unet(block_out_channels=(16, 16)))
    with pytest.raises(ValueError, match="differs in more than its rank"):
        merge_adapters([good, wider], WEIGHTS)
    with pytest.raises(ValueError, match="another model, which has mid_block"):
        merge_experts(tiny_unet(mid_block_type=None), [adapter_state(good)], [1.0])
