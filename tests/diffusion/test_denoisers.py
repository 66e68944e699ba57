"""Five families of tiny random models, trained, merged and sampled through diffusers' pipelines."""

import copy
import dataclasses
import re
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from deme_lib import ROOT, decouple, merge_experts
from deme_lib.diffusion import denoisers, lora
from deme_lib.diffusion.denoisers import ArgumentError
from deme_lib.diffusion.heldout import FixedNoise
from deme_lib.diffusion.models import ModelError
from deme_lib.diffusion.training import Training, TrainingSpec, draw, finetune
from deme_lib.method.ensembles import AveragedEnsemble, RoutedEnsemble, WithAdapter
from deme_lib.method.timesteps import split_timesteps

SPEC = TrainingSpec(
    steps=3,
    purpose=(0, "expert", 0),
    own_range=range(500),
    learning_rate=1e-3,
    final_learning_rate=1e-3,
    batch_size=4,
    probability=0.3,
)
RANGES, TARGETS = split_timesteps(2, 1000), ["to_q", "to_v"]
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS)
N, CALL = 6, {"n_ranges": 2, "steps": 3, "learning_rate": 1e-3, "batch_size": 4, "device": "cpu"}


def rows(*shape):
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(len(shape)))


def vae():
    return AutoencoderKL(
        block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8
    )


def labelled():
    """A class-conditional UNet2DModel that predicts the image."""
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=3,
    )
    pipeline = SimpleNamespace(unet=unet, scheduler=DDPMScheduler(prediction_type="sample"))
    labels, images = torch.arange(N) % 2, (rows(1, 8, 8) * 50 + 128).clamp(0, 255).byte()
    return {
        "pipeline": pipeline,
        "data": images,
        "conditioning": {"class_labels": labels},
        "null": {"class_labels": torch.tensor(2)},
    }


def stable_diffusion():
    """Stable Diffusion 2's kind: v-prediction, its sampler a PNDM."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    betas = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    scheduler = diffusers.PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1)
    others = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    pipeline = diffusers.StableDiffusionPipeline(
        unet=unet, vae=vae(), scheduler=scheduler, requires_safety_checker=False, **others
    )
    prompts = rows(5, 12)
    given = {"prompt_embeds": prompts[:2], "negative_prompt_embeds": torch.zeros(2, 5, 12)}
    return {
        "pipeline": pipeline,
        "data": rows(4, 8, 8),
        "conditioning": {"encoder_hidden_states": prompts},
        "null": {"encoder_hidden_states": torch.zeros(5, 12)},
        "given": given,
    }


def dit():
    """Classes, and a learned variance: twice the channels."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        norm_num_groups=2,
    )
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.2)
    pipeline = diffusers.DiTPipeline(transformer, vae(), DDIMScheduler())
    return {
        "pipeline": pipeline,
        "data": rows(4, 8, 8),
        "conditioning": {"class_labels": torch.arange(N)},
        "null": {"class_labels": torch.tensor(1000)},
        "given": {"class_labels": [1, 2]},
    }


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=8,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    others = [f"{part}{k}" for part in ("text_encoder", "tokenizer") for k in ("", "_2", "_3")]
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(), **dict.fromkeys(others)
    )
    prompts, pooled = rows(5, 12), rows(16)
    names = ("prompt_embeds", "negative_prompt_embeds")
    given = {name: prompts[2 * k : 2 * k + 2] for k, name in enumerate(names)}
    names = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given |= {name: pooled[2 * k : 2 * k + 2] for k, name in enumerate(names)}
    return {
        "pipeline": pipeline,
        "data": rows(4, 8, 8),
        "conditioning": {"encoder_hidden_states": prompts, "pooled_projections": pooled},
        "null": {"encoder_hidden_states": torch.zeros(5, 12)},
        "given": given | {"height": 8, "width": 8},
    }


def flux():
    """Packed latents [n, tokens, channels], t / 1000, and places of the tokens."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    others = [f"{part}{k}" for part in ("text_encoder", "tokenizer") for k in ("", "_2")]
    pipeline = diffusers.FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae(), transformer=transformer, **dict.fromkeys(others)
    )
    ids = {
        "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 4, 4))),
        "txt_ids": torch.zeros(5, 3),
    }

    def predict(model, x, t, conditioning):
        return model(x, timestep=t / 1000, return_dict=False, **ids, **conditioning)[0]

    prompts, pooled = rows(5, 12), rows(16)
    given = {"prompt_embeds": prompts[:2], "pooled_prompt_embeds": pooled[:2]}
    return {
        "pipeline": pipeline,
        "data": rows(16, 16),
        "conditioning": {"encoder_hidden_states": prompts, "pooled_projections": pooled},
        "null": {"encoder_hidden_states": torch.zeros(5, 12)},
        "given": given | {"height": 8, "width": 8},
        "predict": predict,
        "scale": 1000,
    }


FAMILIES = [labelled, stable_diffusion, dit, sd3, flux]


class Family(SimpleNamespace):
    """A pipeline and what its denoiser is trained on, with shorthands."""

    predict, scale = staticmethod(denoisers.predict), 1

    @property
    def part(self):
        return "unet" if hasattr(self.pipeline, "unet") else "transformer"

    @property
    def model(self):
        return getattr(self.pipeline, self.part)

    @property
    def how(self):
        return {name: getattr(self, name) for name in ("conditioning", "null", "predict")}

    def add_adapter(self):
        """LoRA whose B is not zero, so that the model with it differs from the one without."""
        self.model.requires_grad_(False)
        if hasattr(self.model, "add_adapter"):
            self.model.add_adapter(LORA)
        else:
            inject_adapter_in_model(LORA, self.model)
        g = torch.Generator().manual_seed(0)
        for name, weight in self.model.named_parameters():
            if "lora_B" in name:
                weight.data = (torch.randn(weight.shape, generator=g) / 10).to(weight)

    def decoupled(self, **changes):
        given = CALL | self.how | {"drop": 0.5, "progress": False}
        return decouple(self.pipeline, self.data, **given | changes)

    def sampled(self, model):
        """Latents or images of three steps of diffusers' pipeline with another denoiser."""
        g = torch.Generator().manual_seed(0)
        if isinstance(self.pipeline, SimpleNamespace):  # there is no pipeline of classes and UNets
            x, scheduler = (
                torch.randn(2, 1, 8, 8, generator=g),
                DDIMScheduler(prediction_type="sample"),
            )
            scheduler.set_timesteps(3)
            with torch.no_grad():
                for t in scheduler.timesteps:
                    found = model(x.to(model.dtype), t, class_labels=torch.tensor([0, 1])).sample
                    x = scheduler.step(found.float(), t, x).prev_sample
            return x
        pipeline = type(self.pipeline)(**self.pipeline.components | {self.part: model})
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.to(model.dtype)
        tensors = {k: v.to(model.dtype) for k, v in self.given.items() if hasattr(v, "dtype")}
        given = self.given | tensors | {"num_inference_steps": 3, "generator": g}
        kind = "np" if "class_labels" in given else "latent"
        return torch.as_tensor(pipeline(**given, output_type=kind).images)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.__name__)
def family(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family = Family(**request.param())
        family.model.eval()
        return family


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


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


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_the_first_loss_written_out_is_the_run_s(family, adapted):
    """Also that nothing but the draw drops labels: else student and teacher would differ."""
    model, spec = family.model, dataclasses.replace(SPEC, drop=0.5, consistency_weight=2.0)
    pretrained = copy.deepcopy(model).eval()
    if adapted:
        family.add_adapter()
    student = copy.deepcopy(model).eval()
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


def test_conditions_are_dropped_by_the_step_s_own_coin(family):
    schedule = denoisers.Schedule.__args__[0](1000)
    spec = dataclasses.replace(SPEC, batch_size=1000)
    given = (family.data, schedule, spec, 3, family.conditioning, family.null)
    whole, bare = draw(*given), draw(*given[:4])
    assert all(map(torch.equal, whole[:5], bare[:5])) and bare.conditions == ()
    dropping = dataclasses.replace(spec, drop=0.3)
    some, again = (draw(*given[:2], dropping, *given[3:]) for _ in range(2))
    assert all(map(torch.equal, whole[:5], some[:5]))
    for name, rows, kept, same in zip(
        family.conditioning, some.conditions, whole.conditions, again.conditions, strict=True
    ):
        changed = (rows != kept).flatten(1).any(1) if rows.ndim > 1 else rows != kept
        assert torch.equal(rows, same) and changed.float().mean() == pytest.approx(
            0.3 * (name in family.null), abs=0.05
        )
        if name in family.null:
            assert (rows[changed] == family.null[name]).all()


# decouple, merge, sample


def test_three_steps_change_every_expert_and_nothing_else(family):
    before = state(family.model)
    experts = family.decoupled(channel_projection=False)
    assert equal(state(family.model), before)
    for expert in experts:
        assert type(expert) is type(family.model) and not expert.training
        moved = [(w != before[n]).any() for n, w in expert.named_parameters()]
        assert sum(moved) / len(moved) > 0.6
    assert not equal(*map(state, experts))
    merged = merge_experts(family.model, experts, [0.5, 0.5])
    averaged, same = AveragedEnsemble(experts), RoutedEnsemble([merged] * 2, RANGES, family.scale)
    routed = RoutedEnsemble(experts, RANGES, family.scale)
    calls = [0, 0]
    for k, expert in enumerate(experts):
        expert.register_forward_hook(lambda *_, k=k: calls.__setitem__(k, calls[k] + 1))
    found = {m: family.sampled(m) for m in (family.model, merged, averaged, routed, same)}
    assert torch.equal(found[merged], found[same])
    assert len({tuple(x.flatten().tolist()) for x in found.values()}) == 4
    assert all(x.isfinite().all() and x.shape == found[merged].shape for x in found.values())
    assert min(calls) > 3  # three by the average, and each some by routing


def test_an_adapter_s_steps_change_it_alone(family, tmp_path):
    pretrained = copy.deepcopy(family.model)
    family.add_adapter()
    before = state(family.model)
    trainable = {n for n, p in family.model.named_parameters() if p.requires_grad}
    with pytest.warns(UserWarning, match="no channel projections"):
        experts = family.decoupled(folder=tmp_path)
    assert equal(state(family.model), before)
    assert trainable == {n for n, p in family.model.named_parameters() if p.requires_grad}
    start = lora.adapter_state(family.model)
    for k, expert in enumerate(experts):
        assert equal(lora.adapter_state(tmp_path / f"expert-{k}"), expert)
        assert all((expert[name] != tensor).any() for name, tensor in start.items())
    for k, expert in enumerate(experts):  # as files, where diffusers' pipelines take them
        if hasattr(family.pipeline, "load_lora_weights"):
            family.pipeline.load_lora_weights(tmp_path / f"expert-{k}", adapter_name=f"e{k}")
        else:
            config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS)
            inject_adapter_in_model(config, family.model, f"e{k}")
            set_peft_model_state_dict(family.model, expert, f"e{k}")
    members = [WithAdapter(family.model, f"e{k}") for k in range(2)]
    found = family.sampled(RoutedEnsemble(members, RANGES, family.scale))
    whole = []
    for expert in experts:
        whole.append(copy.deepcopy(pretrained))
        for name in expert:
            if name.endswith("lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                delta = expert[f"{module}.lora_B.weight"] @ expert[name]
                whole[-1].get_submodule(module).weight.data += delta
    expected = family.sampled(RoutedEnsemble(whole, RANGES, family.scale))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# stopped, narrow, held out


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_a_stopped_run_goes_on_to_the_bit(family, adapted, tmp_path, monkeypatch):
    if adapted:
        family.add_adapter()
    given = {"channel_projection": False, "checkpoint_every": 1}
    whole, step, left = family.decoupled(**given), Training._step, iter(range(5))

    def stopping(run, number):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(run, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_step", stopping)
        family.decoupled(**given, folder=tmp_path)
    with safe_open(tmp_path / "expert-1.safetensors", "pt") as file:
        held = {k.removeprefix("model.") for k in file.keys() if k.startswith("model.")}  # noqa: SIM118
    assert held == {name for name, p in family.model.named_parameters() if p.requires_grad}
    resumed = family.decoupled(**given, folder=tmp_path)
    assert all(equal(state(a), state(b)) for a, b in zip(resumed, whole, strict=True))


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_narrow_models_train_float32_masters(family, adapted):
    """A base of bfloat16 stays it below an adapter, and a full copy becomes float32."""
    if adapted:
        family.add_adapter()
    before = state(family.model.to(torch.bfloat16))
    experts = family.decoupled(ranges=[0], channel_projection=False, learning_rate=1e-6)
    assert equal(state(family.model), before)
    tensors = state(experts[0])
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
    start = lora.adapter_state(family.model) if adapted else before
    moved = [
        (tensors[n] != start[n].float()).float().mean() for n in start if "lora" in n or not adapted
    ]
    assert sum(moved) / len(moved) > 0.6
    family.model.eval()
    assert family.sampled(family.model).isfinite().all()


def test_held_out_losses_see_the_conditions(family):
    given = (family.data, family.pipeline.scheduler, 5, 0, family.conditioning, family.predict)
    fixed = FixedNoise(*given)
    errors = fixed.errors(family.model)
    for i in (0, 7, 29):
        drawn = {"clean": denoisers.to_model_range(family.data)[fixed.image[i], None]}
        drawn |= {"noise": fixed.noise[i, None], "timesteps": fixed.timesteps[i, None]}
        noisy, target = by_hand(family, SimpleNamespace(**drawn))
        rows = {name: v[fixed.image[i], None] for name, v in family.conditioning.items()}
        with torch.no_grad():
            found = family.predict(family.model, noisy, drawn["timesteps"], rows)
        error = (found[:, : noisy.shape[1]] - target).square().mean()
        assert errors[i].item() == pytest.approx(error.item(), rel=1e-3)


# what is refused, before the first step


@pytest.fixture
def text():
    """The family of text-conditional UNets."""
    return Family(**stable_diffusion())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"conditioning": {"encoder_hidden_states": rows(5, 12)[:4]}},
            r"\(4, 5, 12\): give 6 rows",
        ),
        ({"conditioning": {"encoder_hidden_states": [1] * 6}}, "is list: give 6 rows"),
        (
            {"conditioning": {}, "null": {}, "drop": 0.0},
            r"fails .* conditions \[\] .*encoder_hidden",
        ),
        ({"conditioning": {"prompts": rows(5, 12)}, "null": {}, "drop": 0}, "fails .*'prompts'"),
        ({"null": {}}, r"null rows {}, drop=0\.5: give rows"),
        ({"null": {"prompts": torch.zeros(5, 12)}}, r"null rows {'prompts': \(5, 12\)}"),
        (
            {"null": {"encoder_hidden_states": torch.zeros(1, 5, 12)}},
            r"rows {.*: \(1, 5, 12\)}.* of {.*: \(5, 12\)}",
        ),
        (
            {"predict": lambda m, x, t, c: x[:, :3]},
            r"gives \(1, 3, 8, 8\) for data of \(1, 4, 8, 8\)",
        ),
        ({"channel_projection": True}, "has no channel projections .*channel_projection=False"),
        ({"null": {"encoder_hidden_states": 2}}, "null rows {'encoder_hidden_states': 2}"),
        (
            {"conditioning": {"encoder_hidden_states": rows(5, 12) * torch.nan}},
            "encoder_hidden_states hold NaN or infinity",
        ),
        ({"steps": "3", "n_ranges": 2.0}, r"n_ranges=2\.0.*whole numbers"),
        ({"checkpoint_every": 0}, "checkpoint_every=0: give whole numbers"),
        ({"ranges": 1}, "ranges=1: give each once"),
        ({"ranges": [1.0]}, r"ranges=\[1\.0\]: give each once"),
        ({"ranges": []}, r"ranges=\[\]: give each once"),
    ],
)
def test_what_does_not_fit_is_named(text, changes, words):
    with pytest.raises((ArgumentError, ModelError, ValueError), match=words):
        text.decoupled(**changes)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda m: m.requires_grad_(False),
            r"frozen \['down.*lora_A.* besides it can be trained \[\]",
        ),
        (lambda m: m.requires_grad_(True), r"frozen \[\], besides it can be trained \['conv_in"),
        (lambda m: m.disable_adapters(), r"Active of \['default'\] are \[\]"),
        (lambda m: m.fuse_lora(), r"Active of \['default'\] are \[\]"),
        (
            lambda m: [m.add_adapter(LORA, "b"), m.set_adapters(["default", "b"])],
            r"are \['b', 'default'\]",
        ),
    ],
    ids=["frozen", "base", "disabled", "fused", "two"],
)
def test_an_adapter_that_would_not_be_trained_alone_is_named(text, spoil, words):
    text.add_adapter()
    spoil(text.model)
    with pytest.raises(ArgumentError, match=words):
        text.decoupled(channel_projection=False)


def test_a_pipeline_of_no_one_denoiser_is_named(text):
    text.pipeline.register_modules(unet=None)
    with pytest.raises(ArgumentError, match="is NoneType: give it one"):
        text.decoupled()
    ensemble = AveragedEnsemble([text.model])
    with pytest.raises(ArgumentError, match="is AveragedEnsemble: give it one"):
        decouple(SimpleNamespace(unet=ensemble, scheduler=DDPMScheduler()), text.data, **CALL)


def test_experts_of_another_adapter_or_predict_are_not_taken(text, tmp_path):
    text.add_adapter()
    text.model.train().mid_block.eval()
    how = {"channel_projection": False, "folder": tmp_path}
    first, before = text.decoupled(**how), {m: m.training for m in text.model.modules()}
    assert not text.model.mid_block.training and text.model.conv_in.training
    assert all(equal(a, b) for a, b in zip(text.decoupled(**how), first, strict=True))
    assert before == {m: m.training for m in text.model.modules()}
    with pytest.raises(ArgumentError, match="with other predict"):
        text.decoupled(**how, predict=lambda m, x, t, c: denoisers.predict(m, x, t, c))
    text.model.set_adapters("default", 0.25)
    with pytest.raises(ArgumentError, match="with other model's settings"):
        text.decoupled(**how)
    (tmp_path / "arguments.json").write_text("{")
    with pytest.raises(ArgumentError, match="is damaged"):
        text.decoupled(**how)


def test_an_adapter_that_could_not_be_merged_is_named(text):
    text.model.requires_grad_(False)
    text.model.add_adapter(LoraConfig(r=2, target_modules=TARGETS, use_dora=True))
    with pytest.raises(ModelError, match="no adapter of plain LoRA"):
        text.decoupled(channel_projection=False)


def test_an_adapter_is_given_and_has_no_projections(text):
    text.model.requires_grad_(False)
    with pytest.raises(ArgumentError, match="all is frozen: give the model an adapter"):
        text.decoupled()
    text.add_adapter()
    with pytest.raises(ArgumentError, match="adapters and projections do not mix"):
        text.decoupled(channel_projection=True)


def test_weights_of_the_noise_s_loss_are_for_models_of_noise(text):
    spec = dataclasses.replace(SPEC, loss_weighting="min-snr")
    with pytest.raises(ArgumentError, match=r"min-snr.*is of models of noise"):
        finetune(text.model, text.pipeline.scheduler, text.data, spec, **text.how)


# on a CUDA device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", FAMILIES[:4], ids=lambda f: f.__name__, indirect=True)
def test_captured_steps_are_the_eager_ones(family, tmp_path):
    """Of all but Flux, whose ids are copied from the CPU here."""
    spec = dataclasses.replace(SPEC, steps=6, drop=0.5)
    given = (family.model, family.pipeline.scheduler, family.data, spec)
    how = family.how | {"device": "cuda", "channel_projection": False}
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
    kinds = {"diffusion-v1-4": stable_diffusion, "diffusion-3": sd3, "DiT": dit}
    monkeypatch.setattr(
        "deme_lib.diffusion.models.load_pipeline",
        lambda source: next(make()["pipeline"] for name, make in kinds.items() if name in source),
    )
    monkeypatch.chdir(tmp_path)
    latents, prompts = rows(4, 8, 8), rows(5, 12)
    save_file({"latents": latents}, "latents.safetensors")
    save_file({"captions": prompts, "empty": torch.zeros(5, 12)}, "captions.safetensors")
    given = {"latents": latents, "prompts": prompts, "pooled": rows(16)}
    save_file(given, "sd3.safetensors")
    save_file({"latents": latents, "labels": torch.arange(N)}, "dit.safetensors")
    few = printed.replace("20_000", "3").replace("steps=2000", "steps=3, batch_size=2")
    names = {}
    exec(few.replace("(**prompt)", "(**prompt, num_inference_steps=2)"), names)
    assert len(names["experts"]) == len(names["adapters"]) == 4
    assert sorted(path.name for path in tmp_path.glob("*/expert-*")) == [
        f"expert-{k}" for k in (0, 0, 1, 1, 2, 2, 3, 3)
    ]
    assert names["image"].size == (8, 8)
