"""Five families of tiny random models, trained, merged and sampled through diffusers' pipelines."""

import copy
import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import CALL, FAMILIES, LORA, NONE, SPEC, add_adapter, equal, family_of, rows, same

from deme_lib import ROOT, decouple, merge_experts
from deme_lib.diffusion import denoisers, lora
from deme_lib.diffusion.denoisers import ArgumentError
from deme_lib.diffusion.models import ModelError
from deme_lib.diffusion.training import Training, draw, finetune
from deme_lib.method.ensembles import AveragedEnsemble, RoutedEnsemble, WithAdapter
from deme_lib.method.timesteps import split_timesteps

RANGES = split_timesteps(2, 1000)
PLAIN = {"channel_projection": False}
kinds = pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])


@pytest.fixture(params=FAMILIES)
def family(request):
    return family_of(request.param)


@pytest.fixture
def text():
    """The family of text-conditional UNets."""
    return family_of("stable_diffusion")


def decoupled(family, **changes):
    given = CALL | family.how | {"drop": 0.5}
    return decouple(family.pipeline, family.data, **given | changes)


def state(model):
    return copy.deepcopy(model.state_dict() if isinstance(model, torch.nn.Module) else model)


def by_hand(family, batch):
    """x_t and what is to be predicted, in closed form."""
    t = batch.timesteps.view(-1, *(1,) * (batch.clean.ndim - 1))
    if "FlowMatch" in type(family.pipeline.scheduler).__name__:
        return (1 - t / 1000) * batch.clean + t / 1000 * batch.noise, batch.noise - batch.clean
    a = family.pipeline.scheduler.alphas_cumprod[t]
    targets = {
        "sample": batch.clean,
        "epsilon": batch.noise,
        "v_prediction": a.sqrt() * batch.noise - (1 - a).sqrt() * batch.clean,
    }
    noisy = a.sqrt() * batch.clean + (1 - a).sqrt() * batch.noise
    return noisy, targets[family.pipeline.scheduler.config.prediction_type]


# one step


@kinds
def test_the_first_loss_written_out_is_the_run_s(family, adapted):
    """Also that nothing but the draw drops labels: else student and teacher would differ."""
    model, spec = family.model, dataclasses.replace(SPEC, drop=0.5, consistency_weight=2.0)
    pretrained = copy.deepcopy(model)
    if adapted:
        add_adapter(model)
    student = copy.deepcopy(model)
    run = finetune(model, family.pipeline.scheduler, family.data, spec, device="cpu", **family.how)
    batch = draw(family.data, run.scheduler, spec, 0, family.conditioning, family.null)
    noisy, target = by_hand(family, batch)
    torch.testing.assert_close(noisy, batch.noisy)
    given = dict(zip(family.conditioning, batch.conditions, strict=True))
    with torch.no_grad():
        found, taught = (
            family.predict(m, noisy, batch.timesteps, given)[:, : noisy.shape[1]]
            for m in (student, pretrained)
        )
    loss = (found - target).square().mean() + 2 * (found - taught).square().mean()
    assert next(iter(run)).loss == pytest.approx(loss.item(), rel=1e-4)
    assert (found != taught).any() == adapted


def test_conditions_are_dropped_by_the_step_s_own_coin():
    """Those that have a null row; the rest of the draw stays."""
    family, spec = family_of("sd3"), dataclasses.replace(SPEC, batch_size=1000)
    given = (3, family.conditioning, family.null)
    whole, some, again = (
        draw(family.data, DDPMScheduler(), dataclasses.replace(spec, drop=drop), *given)
        for drop in (0.0, 0.3, 0.3)
    )
    assert all(map(torch.equal, whole[:5], some[:5]))
    assert all(map(torch.equal, some.conditions, again.conditions))
    (prompts, pooled), (kept, same) = some.conditions, whole.conditions
    dropped = (prompts != kept).flatten(1).any(1)
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.05)
    assert (prompts[dropped] == NONE).all() and torch.equal(pooled, same)


# decouple, merge, sample


def test_three_steps_change_every_expert_and_nothing_else(family):
    before = state(family.model)
    experts = decoupled(family, **PLAIN)
    assert equal(family.model, before) and not equal(*experts)
    for expert in experts:
        assert type(expert) is type(family.model) and not expert.training
        moved = [(w != before[n]).any() for n, w in expert.named_parameters()]
        assert sum(moved) / len(moved) > 0.6
    merged = merge_experts(family.model, experts, [0.5, 0.5])
    same = RoutedEnsemble([merged] * 2, RANGES, family.scale)
    routed = RoutedEnsemble(experts, RANGES, family.scale)
    models = family.model, merged, AveragedEnsemble(experts), routed
    found = [family.sampled(model) for model in models]
    assert len({tuple(x.flatten().tolist()) for x in found}) == 4
    assert all(x.isfinite().all() and x.shape == found[0].shape for x in found)
    assert torch.equal(found[1], family.sampled(same))


def test_an_adapter_s_steps_change_it_alone_and_its_files_are_routed(family, tmp_path):
    pretrained, model = copy.deepcopy(family.model), add_adapter(family.model)
    model.train()
    before, modes = state(model), [m.training for m in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.warns(UserWarning, match="no channel projections"):
        experts = decoupled(family, folder=tmp_path)
    assert equal(model, before) and modes == [m.training for m in model.modules()]
    assert trainable == [p.requires_grad for p in model.parameters()]
    start, members, textbook = lora.adapter_state(model), [], []
    model.eval()
    for k, expert in enumerate(experts):
        file, name = tmp_path / f"expert-{k}", f"e{k}"
        assert equal(lora.adapter_state(file), expert)
        assert all((expert[name] != tensor).any() for name, tensor in start.items())
        if hasattr(family.pipeline, "load_lora_weights"):
            family.pipeline.load_lora_weights(file, adapter_name=name)
        else:
            set_peft_model_state_dict(add_adapter(model, name=name, lora_alpha=2), expert, name)
        members.append(WithAdapter(model, name))
        textbook.append(copy.deepcopy(pretrained))
        for a in [key for key in expert if key.endswith(lora.A)]:
            module = a.removesuffix(lora.A)
            delta = expert[module + lora.B] @ expert[a]
            textbook[-1].get_submodule(module).weight.data += delta
    found, expected = (
        family.sampled(RoutedEnsemble(m, RANGES, family.scale)) for m in (members, textbook)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# stopped, narrow


@kinds
def test_a_stopped_run_goes_on_to_the_bit(family, adapted, tmp_path, monkeypatch):
    if adapted:
        add_adapter(family.model)
    given = PLAIN | {"checkpoint_every": 1}
    whole, step, left = decoupled(family, **given), Training._step, iter(range(5))

    def stopping(run, number):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(run, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_step", stopping)
        decoupled(family, **given, folder=tmp_path)
    with safe_open(tmp_path / "expert-1.safetensors", "pt") as file:
        held = {k.removeprefix("model.") for k in file.keys() if k.startswith("model.")}  # noqa: SIM118
    assert held == {name for name, p in family.model.named_parameters() if p.requires_grad}
    resumed = decoupled(family, **given, folder=tmp_path)
    assert same(resumed, whole)


@kinds
def test_narrow_models_train_float32_masters(family, adapted):
    """A base of bfloat16 stays it below an adapter, and a full copy becomes float32."""
    if adapted:
        add_adapter(family.model)
    before = state(family.model.to(torch.bfloat16))
    tensors = state(decoupled(family, ranges=[0], **PLAIN, learning_rate=1e-6)[0])
    assert equal(family.model, before)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
    start = lora.adapter_state(family.model) if adapted else before
    moved = [(tensors[name] != start[name].float()).float().mean() for name in start]
    assert sum(moved) / len(moved) > 0.6
    assert family.sampled(family.model).isfinite().all()


# what is refused, before the first step

PROMPTS = "encoder_hidden_states"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conditioning": {PROMPTS: rows(5, 12)[:4]}}, r"\(4, 5, 12\), give a .*a row for each"),
        ({"conditioning": {PROMPTS: [1] * 6}}, "list, give a .*Tensor of a row for each"),
        ({"conditioning": {PROMPTS: rows(5, 12) * torch.nan}}, f"{PROMPTS} hold NaN or infinity"),
        ({"conditioning": {}, "null": {}, "drop": 0}, rf"fails .* conditions \[\]: .*{PROMPTS}"),
        ({"conditioning": {"x": rows(5, 12)}, "null": {}, "drop": 0}, r"fails .*\['x'\]"),
        ({"null": {}}, r"null rows {}, drop=0\.5: give rows"),
        ({"null": {"x": NONE}}, r"null rows {'x': \(5, 12\)}"),
        ({"null": {PROMPTS: NONE[None]}}, r"rows {.*: \(1, 5, 12\)}.* of {.*: \(5, 12\)}"),
        ({"predict": lambda m, x, t, c: x[:, :3]}, r"\(1, 3, 8, 8\) for data of \(1, 4, 8, 8\)"),
        ({"channel_projection": True}, "has no channel projections .*channel_projection=False"),
    ],
)
def test_what_does_not_fit_is_named(text, changes, words):
    with pytest.raises((ArgumentError, ModelError, ValueError), match=words):
        decoupled(text, **changes)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: m.requires_grad_(False), r"trained \[\]"),
        (lambda m: m.requires_grad_(True), r"\['default'\], beside them \['conv_in"),
        (lambda m: m.disable_adapters(), r"active are \[\]"),
        (lambda m: m.fuse_lora(), r"active are \[\]"),
        (lambda m: m.add_adapter(LoraConfig(**LORA, use_dora=True), "b"), "no adapter of plain"),
        (
            lambda m: [m.add_adapter(LoraConfig(**LORA), "b"), m.set_adapters(["default", "b"])],
            r"active are \['b', 'default'\]",
        ),
    ],
    ids=["frozen", "base", "disabled", "fused", "dora", "two"],
)
def test_an_adapter_that_would_not_be_trained_alone_is_named(text, spoil, words):
    spoil(add_adapter(text.model))
    with pytest.raises((ArgumentError, ModelError), match=words):
        decoupled(text, **PLAIN)


def test_a_pipeline_of_nothing_to_train_is_named(text):
    text.model.requires_grad_(False)
    with pytest.raises(ArgumentError, match="all is frozen: give the model an adapter"):
        decoupled(text)
    with pytest.raises(ArgumentError, match="adapters and projections do not mix"):
        add_adapter(text.model)
        decoupled(text, channel_projection=True)
    ensemble = AveragedEnsemble([text.model])
    with pytest.raises(ArgumentError, match="unet is AveragedEnsemble: give it one"):
        decouple(SimpleNamespace(unet=ensemble, scheduler=DDPMScheduler()), text.data, **CALL)


def test_experts_of_another_adapter_or_predict_are_not_taken(text, tmp_path):
    how = PLAIN | {"folder": tmp_path}
    add_adapter(text.model)
    first = decoupled(text, **how)
    assert same(decoupled(text, **how), first)
    with pytest.raises(ArgumentError, match=r"another call, without .*predict"):
        decoupled(text, **how, predict=lambda m, x, t, c: denoisers.predict(m, x, t, c))
    halved = how | {"folder": tmp_path / "halved"}
    decoupled(text, **halved, predict=lambda m, x, t, c: denoisers.predict(m, x, t, c))
    with pytest.raises(ArgumentError, match=r"another call, without .*predict"):
        decoupled(text, **halved, predict=lambda m, x, t, c: denoisers.predict(m, x, t, c) / 2)
    text.model.set_adapters("default", 0.25)
    with pytest.raises(ArgumentError, match=r"another call, without .*settings"):
        decoupled(text, **how)


# on a CUDA device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", list(FAMILIES)[:4], indirect=True)
def test_captured_steps_are_the_eager_ones(family, tmp_path):
    """Of all but Flux, whose ids are copied from the CPU here."""
    spec = dataclasses.replace(SPEC, drop=0.5)
    given = (family.model, family.pipeline.scheduler, family.data, spec)
    how = family.how | PLAIN | {"device": "cuda"}
    eager = finetune(*given, **how, cuda_graphs=False)
    losses = [step.loss for step in eager]
    file = {"checkpoint": tmp_path / "checkpoint.safetensors", "checkpoint_every": 3}
    captured = finetune(*given, **how, **file)
    assert [step.loss for step in captured] == pytest.approx(losses, rel=1e-4)
    resumed = finetune(*given, **how, **file)
    assert resumed.position == 6
    for run in (captured, resumed):
        pairs = zip(run.ema_unet().parameters(), eager.ema_unet().parameters(), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


# the examples of notebooks/README.md


def test_the_examples_run_as_they_are_printed(tmp_path, monkeypatch):
    """On tiny models in place of the hub's, three steps, and files of six rows."""
    text = (ROOT / "notebooks" / "README.md").read_text()
    section = text.partition("\n## Which models\n")[2].partition("\n## ")[0]
    printed = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    kinds = {"diffusion-v1-4": "stable_diffusion", "diffusion-3": "sd3", "DiT": "dit"}
    monkeypatch.setattr(
        "deme_lib.diffusion.models.load_pipeline",
        lambda source: next(family_of(kinds[k]).pipeline for k in kinds if k in source),
    )
    monkeypatch.chdir(tmp_path)
    latents, prompts = rows(4, 8, 8), rows(5, 12)
    save_file({"latents": latents}, "latents.safetensors")
    save_file({"captions": prompts, "empty": NONE}, "captions.safetensors")
    given = {"latents": latents, "prompts": prompts, "pooled": rows(16)}
    save_file(given, "sd3.safetensors")
    save_file({"latents": latents, "labels": torch.arange(len(latents))}, "dit.safetensors")
    few = printed.replace("20_000", "3").replace("steps=2000", "steps=3, batch_size=2")
    names = {}
    exec(few.replace("(**prompt)", "(**prompt, num_inference_steps=2)"), names)
    assert len(names["experts"]) == len(names["adapters"]) == 4
    assert sorted(path.name for path in tmp_path.glob("*/expert-*")) == [
        f"expert-{k}" for k in (0, 0, 1, 1, 2, 2, 3, 3)
    ]
    assert names["image"].size == (8, 8)
