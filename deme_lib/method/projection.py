"""Channel-wise projections (paper Sec. 3.2): P(F) = W F on the output of every block.

They sit where the published reference puts them: after every down block (on the hidden state, not
on the skip tensors), after the mid block, after every up block. Because the skips bypass them they
cannot be folded into neighbouring weights; a merged model keeps them.
"""

import functools
from typing import Self

import diffusers
from diffusers import ModelMixin, UNet2DModel
from torch import nn


class ProjectedUNet2DModel(UNet2DModel):
    """A ``UNet2DModel`` with an identity-initialised C x C projection after every block.

    Takes the same configuration as ``UNet2DModel``; each block gains the parameter
    ``projection.weight`` of shape [C, C, 1, 1]. Saves and loads as any diffusers model.
    """

    @functools.wraps(UNet2DModel.__init__)  # from_config reads the names of its arguments
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in blocks_of(self).values():
            channels = block.resnets[-1].out_channels
            block.projection = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
            nn.init.dirac_(block.projection.weight)  # W = I
            block.register_forward_hook(_project_output)

    @classmethod
    def from_stock(cls, unet: UNet2DModel) -> Self:
        """The same function with projections added: outputs equal ``unet``'s until W is trained."""
        projected = cls.from_config(unet.config)
        nn.Module.to(projected, device=unet.device, dtype=unet.dtype)
        projected.load_state_dict(projected.state_dict() | unet.state_dict())
        return projected.train(unet.training)


def blocks_of(unet: UNet2DModel) -> dict[str, nn.Module]:
    """Its blocks in the order of a call: ``down 1`` and so on, ``mid``, ``up 1`` and so on."""
    down = {f"down {i}": block for i, block in enumerate(unet.down_blocks, start=1)}
    middle = {} if unet.mid_block is None else {"mid": unet.mid_block}
    up = {f"up {i}": block for i, block in enumerate(unet.up_blocks, start=1)}
    return down | middle | up


def _project_output(block: nn.Module, _inputs, output):
    """Forward hook: project the hidden state; pass skips on untouched.

    It takes the projection from the block it is called for, so a deep copy uses its own.
    """
    if isinstance(output, tuple):
        return (block.projection(output[0]), *output[1:])
    return block.projection(output)


def is_projection(name: str) -> bool:
    """Whether a parameter name of a ``ProjectedUNet2DModel`` belongs to a projection."""
    return ".projection." in name


def projection_share(unet: nn.Module) -> float:
    """Share of the parameters that are projections (the paper reports 1.06 %)."""
    sizes = {name: tensor.numel() for name, tensor in unet.named_parameters()}
    return sum(n for name, n in sizes.items() if is_projection(name)) / sum(sizes.values())


def model_class(config: dict) -> type[ModelMixin]:
    """The class a saved model's ``config.json`` names: one of diffusers', or the projected UNet."""
    name = config.get("_class_name") if isinstance(config, dict) else None
    own = name == ProjectedUNet2DModel.__name__
    cls = ProjectedUNet2DModel if own else getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise ValueError(f"its config.json names {name}, which is no model of diffusers'")
    return cls


def plain_or_projected(model: ModelMixin, projected: bool | None) -> ModelMixin:
    """``model`` itself, or a projected version where asked and not there already.

    None asks for projections where they are defined, on a ``UNet2DModel``.
    """
    defined = isinstance(model, UNet2DModel)
    if projected and not defined:
        raise ValueError(
            f"a {type(model).__name__} has no channel projections (Sec. 3.2 defines them on UNets "
            "of blocks, here UNet2DModel): set channel_projection=False"
        )
    if defined and projected is not False and not isinstance(model, ProjectedUNet2DModel):
        return ProjectedUNet2DModel.from_stock(model)
    return model
