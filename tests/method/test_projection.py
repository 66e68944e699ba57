"""Channel-wise projections (paper Sec. 3.2)."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from tiny_models import shaken
from torch import nn

from deme_lib.method import projection
from deme_lib.method.projection import ProjectedUNet2DModel, is_projection, plain_or_projected

CONFIGS = {
    "plain": {},
    "attention": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "add_attention": True,
        "attention_head_dim": 4,
    },
    "three layers": {"layers_per_block": 3},
    "no mid block": {"mid_block_type": None},
    "three resolutions": {
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
    },
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def stock(request, tiny_unet):
    return tiny_unet(**request.param)


def predict(unet, batch):
    with torch.no_grad():
        return unet(*batch).sample


def assert_same_function(first, second, batch):
    torch.testing.assert_close(predict(first, batch), predict(second, batch), rtol=1e-4, atol=1e-5)


def blocks_then_projections(unet, sample, timesteps):
    """The UNet's forward written out: W times each block's hidden state, skips as they are."""

    def project(block, hidden):
        return torch.einsum("oc,bchw->bohw", block.projection.weight[:, :, 0, 0], hidden)

    embedding = unet.time_embedding(unet.time_proj(timesteps))
    hidden = unet.conv_in(sample)
    skips = [hidden]
    for block in unet.down_blocks:
        hidden, new_skips = block.forward(hidden, embedding)  # .forward: past the hooks
        hidden, skips = project(block, hidden), [*skips, *new_skips]
    if unet.mid_block is not None:
        hidden = project(unet.mid_block, unet.mid_block.forward(hidden, embedding))
    for block in unet.up_blocks:
        n = len(block.resnets)
        skips, own = skips[:-n], tuple(skips[-n:])
        hidden = project(block, block.forward(hidden, own, embedding))
    assert not skips
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def test_identity_projections_change_nothing(stock, noisy_batch):
    assert_same_function(ProjectedUNet2DModel.from_stock(stock), stock, noisy_batch)


def test_blocks_may_be_of_other_widths_than_configured(tiny_unet, noisy_batch):
    blocks = {"down_block_types": ("KDownBlock2D",) * 2, "up_block_types": ("KUpBlock2D",) * 2}
    stock = tiny_unet(block_out_channels=(32, 64), layers_per_block=2, **blocks)
    assert_same_function(ProjectedUNet2DModel.from_stock(stock), stock, noisy_batch)


def test_projections_act_on_hidden_states_and_not_on_skips(stock, noisy_batch):
    unet = shaken(ProjectedUNet2DModel.from_stock(stock))
    with torch.no_grad():
        expected = blocks_then_projections(unet, *noisy_batch)
    torch.testing.assert_close(predict(unet, noisy_batch), expected, rtol=1e-4, atol=1e-5)
    assert (expected - predict(stock, noisy_batch)).abs().max() > 0.01


def test_one_projection_a_block_and_the_share_counts_them(stock):
    unet = ProjectedUNet2DModel.from_stock(stock)
    channels = stock.config.block_out_channels
    mid = stock.mid_block is not None
    expected = 2 * sum(c * c for c in channels) + mid * channels[-1] ** 2  # down and up, mid
    names = unet.state_dict().keys() - stock.state_dict().keys()
    assert len(names) == 2 * len(channels) + mid
    assert all(is_projection(name) for name in names)
    assert not any(is_projection(name) for name in stock.state_dict())
    assert projection.projection_share(unet) == expected / (expected + stock.num_parameters())
    assert projection.projection_share(stock) == 0


def test_a_deep_copy_uses_its_own_projection(tiny_unet, noisy_batch):
    original = shaken(ProjectedUNet2DModel.from_stock(tiny_unet()))
    before = predict(original, noisy_batch)
    twin = copy.deepcopy(original)
    assert_same_function(twin, original, noisy_batch)
    shaken(twin, seed=6)
    torch.testing.assert_close(predict(original, noisy_batch), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predict(twin, noisy_batch), before, rtol=1e-2)


def test_from_stock_leaves_the_stock_alone_and_keeps_dtype_and_mode(tiny_unet):
    stock = tiny_unet().to(torch.float64).train()
    unet = ProjectedUNet2DModel.from_stock(stock)
    assert {p.dtype for p in unet.parameters()} == {torch.float64}
    assert unet.training and unet.mid_block.projection.training
    pointers = {p.data_ptr() for p in stock.parameters()}
    assert not pointers & {p.data_ptr() for p in unet.parameters()}


def test_the_class_and_projections_are_as_asked(tiny_unet):
    for cls in (UNet2DModel, ProjectedUNet2DModel, UNet2DConditionModel):
        assert projection.model_class({"_class_name": cls.__name__}) is cls
    for config in ({}, [], {"_class_name": "DDPMScheduler"}, {"_class_name": "MyUNet"}):
        with pytest.raises(ValueError, match="no model of diffusers'"):
            projection.model_class(config)
    stock = tiny_unet()
    assert plain_or_projected(stock, projected=False) is stock
    projected = plain_or_projected(stock, projected=True)
    assert isinstance(projected, ProjectedUNet2DModel)
    assert plain_or_projected(projected, projected=True) is projected
    assert isinstance(plain_or_projected(stock, projected=None), ProjectedUNet2DModel)
    other = nn.Linear(1, 1)  # projections are defined on UNet2DModel
    assert all(plain_or_projected(other, projected) is other for projected in (None, False))
    with pytest.raises(ValueError, match="Linear has no channel projections"):
        plain_or_projected(other, projected=True)
