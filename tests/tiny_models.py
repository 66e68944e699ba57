"""Tiny random denoisers of five families: how they are trained, sampled, changed, compared."""

import itertools
from types import SimpleNamespace

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, inject_adapter_in_model

from deme_lib.diffusion import denoisers
from deme_lib.diffusion.training import TrainingSpec
from deme_lib.method.projection import is_projection

SPEC = TrainingSpec(
    steps=6,
    purpose=(0, "expert"),
    own_range=range(500),
    learning_rate=1e-3,
    final_learning_rate=1e-4,
    batch_size=4,
    probability=0.3,
)
CALL = {"n_ranges": 2, "steps": 3, "learning_rate": 1e-3, "batch_size": 4}  # of ``decouple``
CALL |= {"device": "cpu", "progress": False}

PICKLE = "cbuiltins\nopen\n(S'{}'\nS'w'\ntR."  # a file that opens a new one when it is loaded
N, NONE = 6, torch.zeros(5, 12)  # rows of data; the embedding of no prompt
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_v"]}
UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1}
UNET |= {"norm_num_groups": 4}
TOKENS = {"sample_size": 8, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2}


def equal(first, second):
    """Whether two models, or states, hold the same to the bit."""
    first, second = (
        x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (first, second)
    )
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def same(experts, others):
    return all(equal(a, b) for a, b in zip(experts, others, strict=True))


def shaken(unet, seed=5):
    """The model, every projection of it moved away from the identity."""
    g = torch.Generator().manual_seed(seed)
    for name, tensor in unet.named_parameters():
        if is_projection(name):
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=g)
    return unet


def rows(*shape):
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(len(shape)))


def vae():
    return AutoencoderKL(
        block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8
    )


def missing(*parts):
    """A pipeline's text encoders and tokenizers, which embeddings stand in for."""
    names = ("".join(pair) for pair in itertools.product(("text_encoder", "tokenizer"), parts))
    return dict.fromkeys(names)


class Family(SimpleNamespace):
    """A pipeline and what its denoiser is trained on."""

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

    def predicted(self, model):
        """For the first two rows of data, at two timesteps."""
        x, t = denoisers.to_model_range(self.data[:2]), torch.tensor([3, 700])
        with torch.inference_mode():
            return self.predict(model, x, t, {n: v[:2] for n, v in self.conditioning.items()})

    def sampled(self, model):
        """Latents or images of three steps of diffusers' pipeline with another denoiser."""
        g = torch.Generator().manual_seed(0)
        if isinstance(self.pipeline, SimpleNamespace):  # there is no pipeline of classes and UNets
            scheduler = DDIMScheduler(prediction_type="sample")
            x = torch.randn(2, 1, 8, 8, generator=g)
            scheduler.set_timesteps(3)
            for t in scheduler.timesteps:
                with torch.no_grad():
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


def labelled():
    """A class-conditional UNet2DModel that predicts the image."""
    unet = diffusers.UNet2DModel(
        **UNET,
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    )
    return Family(
        pipeline=SimpleNamespace(unet=unet, scheduler=DDPMScheduler(prediction_type="sample")),
        data=(rows(1, 8, 8) * 50 + 128).clamp(0, 255).byte(),
        conditioning={"class_labels": torch.arange(N) % 2},
        null={"class_labels": torch.tensor(2)},
    )


def stable_diffusion():
    """Stable Diffusion 2's kind: v-prediction, its sampler a PNDM."""
    unet = diffusers.UNet2DConditionModel(
        **UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    betas = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    scheduler = diffusers.PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1)
    others = missing("") | {"safety_checker": None, "feature_extractor": None}
    prompts = rows(5, 12)
    return Family(
        pipeline=diffusers.StableDiffusionPipeline(
            unet=unet, vae=vae(), scheduler=scheduler, requires_safety_checker=False, **others
        ),
        data=rows(4, 8, 8),
        conditioning={"encoder_hidden_states": prompts},
        null={"encoder_hidden_states": NONE},
        given={"prompt_embeds": prompts[:2], "negative_prompt_embeds": torch.zeros(2, 5, 12)},
    )


def dit():
    """Classes, and a learned variance: twice the channels."""
    transformer = diffusers.DiTTransformer2DModel(
        **TOKENS, in_channels=4, out_channels=8, norm_num_groups=2
    )
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.2)
    return Family(
        pipeline=diffusers.DiTPipeline(transformer, vae(), DDIMScheduler()),
        data=rows(4, 8, 8),
        conditioning={"class_labels": torch.arange(N)},
        null={"class_labels": torch.tensor(1000)},
        given={"class_labels": [1, 2]},
    )


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        **TOKENS,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=12,
        caption_projection_dim=8,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    scheduler, others = FlowMatchEulerDiscreteScheduler(shift=3.0), missing("", "_2", "_3")
    prompts, pooled = rows(5, 12), rows(16)
    given = {"prompt_embeds": prompts[:2], "pooled_prompt_embeds": pooled[:2]}
    given |= {f"negative_{name}": tensor.flip(0) for name, tensor in given.items()}
    return Family(
        pipeline=diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae(), **others),
        data=rows(4, 8, 8),
        conditioning={"encoder_hidden_states": prompts, "pooled_projections": pooled},
        null={"encoder_hidden_states": NONE},
        given=given | {"height": 8, "width": 8},
    )


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
    places = torch.cartesian_prod(*map(torch.arange, (1, 4, 4)))
    ids = {"img_ids": places, "txt_ids": torch.zeros(5, 3)}

    def predict(model, x, t, conditioning):
        return model(x, timestep=t / 1000, return_dict=False, **ids, **conditioning)[0]

    prompts, pooled = rows(5, 12), rows(16)
    given = {"prompt_embeds": prompts[:2], "pooled_prompt_embeds": pooled[:2]}
    scheduler, parts = FlowMatchEulerDiscreteScheduler(), {"transformer": transformer}
    return Family(
        pipeline=diffusers.FluxPipeline(scheduler, vae(), **parts, **missing("", "_2")),
        data=rows(16, 16),
        conditioning={"encoder_hidden_states": prompts, "pooled_projections": pooled},
        null={"encoder_hidden_states": NONE},
        given=given | {"height": 8, "width": 8},
        predict=predict,
        scale=1000,
    )


FAMILIES = {kind.__name__: kind for kind in (labelled, stable_diffusion, dit, sd3, flux)}


def family_of(name):
    """A family of seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        family = FAMILIES[name]()
    family.model.eval()
    return family


def add_adapter(model, seed=0, name="default", **settings):
    """LoRA whose B is not zero, so that the model with it differs from the one without."""
    inject_adapter_in_model(LoraConfig(**LORA | settings), model.requires_grad_(False), name)
    model._hf_peft_config_loaded = True
    g = torch.Generator().manual_seed(seed)
    for key, weight in model.named_parameters():
        if f".{name}." in key:
            weight.data = (0.3 * torch.randn(weight.shape, generator=g)).to(weight)
    return model
