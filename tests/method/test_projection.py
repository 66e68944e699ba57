"""Channel-wise projections (paper Sec. 3.2)."""

import copy

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from deme_lib.method.projection import (
    ProjectedUNet2DModel,
    is_projection,
    plain_or_projected,
    projection_share,
    unet_class,
)

CONFIGS = {
    "plain": {},
    "attention": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "add_attention": True,
        "attention_head_dim": 4,
    },
    "three layers": {"layers_per_block": 3},
    "three resolutions": {
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
    },
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def stock(request, tiny_unet):
    return tiny_unet(**request.param)


def shake_projections(unet, seed=5):
    """Move every projection away from the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in unet.named_parameters():
            if is_projection(name):
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return unet


def predict(unet, batch):
    with torch.no_grad():
        return unet(*batch).sample


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
    hidden = project(unet.mid_block, unet.mid_block.forward(hidden, embedding))
    for block in unet.up_blocks:
        n = len(block.resnets)
        skips, own = skips[:-n], tuple(skips[-n:])
        hidden = project(block, block.forward(hidden, own, embedding))
    assert not skips
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def test_identity_projections_change_nothing(stock, noisy_batch):
    projected = ProjectedUNet2DModel.from_stock(stock)
    torch.testing.assert_close(predict(projected, noisy_batch), predict(stock, noisy_batch))


def test_projections_act_on_hidden_states_and_not_on_skips(stock, noisy_batch):
    unet = shake_projections(ProjectedUNet2DModel.from_stock(stock))
    with torch.no_grad():
        expected = blocks_then_projections(unet, *noisy_batch)
    torch.testing.assert_close(predict(unet, noisy_batch), expected, rtol=1e-4, atol=1e-5)
    assert (expected - predict(stock, noisy_batch)).abs().max() > 0.01


def test_one_projection_a_block_and_the_share_counts_them(stock):
    unet = ProjectedUNet2DModel.from_stock(stock)
    channels = stock.config.block_out_channels
    expected = 2 * sum(c * c for c in channels) + channels[-1] ** 2  # down and up, mid
    names = unet.state_dict().keys() - stock.state_dict().keys()
    assert len(names) == 2 * len(channels) + 1
    assert all(is_projection(name) for name in names)
    assert not any(is_projection(name) for name in stock.state_dict())
    assert projection_share(unet) == expected / (expected + stock.num_parameters())
    assert projection_share(stock) == 0


def test_without_a_mid_block(tiny_unet, noisy_batch):
    stock = tiny_unet(mid_block_type=None)
    unet = ProjectedUNet2DModel.from_stock(stock)
    assert torch.equal(predict(unet, noisy_batch), predict(stock, noisy_batch))


def test_a_deep_copy_uses_its_own_projection(tiny_unet, noisy_batch):
    original = shake_projections(ProjectedUNet2DModel.from_stock(tiny_unet()))
    before = predict(original, noisy_batch)
    twin = copy.deepcopy(original)
    assert torch.equal(predict(twin, noisy_batch), before)
    shake_projections(twin, seed=6)
    assert torch.equal(predict(original, noisy_batch), before)
    assert not torch.allclose(predict(twin, noisy_batch), before)


def test_from_stock_leaves_the_stock_alone(tiny_unet, noisy_batch):
    stock = tiny_unet()
    before = predict(stock, noisy_batch)
    with torch.no_grad():
        for tensor in ProjectedUNet2DModel.from_stock(stock).parameters():
            tensor.zero_()
    assert torch.equal(predict(stock, noisy_batch), before)


@pytest.mark.parametrize("training", [True, False])
def test_from_stock_keeps_dtype_and_mode(tiny_unet, training):
    unet = ProjectedUNet2DModel.from_stock(tiny_unet().to(torch.float64).train(training))
    assert {p.dtype for p in unet.parameters()} == {torch.float64}
    assert unet.training == unet.mid_block.projection.training == training


def test_saves_and_loads(tmp_path, tiny_unet, noisy_batch):
    unet = shake_projections(ProjectedUNet2DModel.from_stock(tiny_unet()))
    unet.save_pretrained(tmp_path)
    loaded = ProjectedUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(predict(loaded, noisy_batch), predict(unet, noisy_batch))
    assert unet_class(ProjectedUNet2DModel.load_config(tmp_path)) is ProjectedUNet2DModel


def test_state_dict_round_trip_is_strict(tiny_unet, noisy_batch):
    unet = shake_projections(ProjectedUNet2DModel.from_stock(tiny_unet()))
    other = ProjectedUNet2DModel.from_stock(tiny_unet(seed=1))
    other.load_state_dict(unet.state_dict())
    assert torch.equal(predict(other, noisy_batch), predict(unet, noisy_batch))
    with pytest.raises(RuntimeError, match=r"projection\.weight"):
        other.load_state_dict(tiny_unet().state_dict())


def test_gradients_reach_every_projection(stock, noisy_batch):
    unet = ProjectedUNet2DModel.from_stock(stock).requires_grad_(True)
    unet(*noisy_batch).sample.square().mean().backward()
    grads = {n: p.grad.abs().max() for n, p in unet.named_parameters() if is_projection(n)}
    assert grads and all(g > 0 for g in grads.values())


def test_a_diffusers_pipeline_saves_it_and_takes_it_back(tmp_path, tiny_unet):
    unet = shake_projections(ProjectedUNet2DModel.from_stock(tiny_unet()))
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    pipeline.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(
        tmp_path, unet=ProjectedUNet2DModel.from_pretrained(tmp_path / "unet")
    )
    images = []
    for each in (pipeline, again):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(each(generator=generator, num_inference_steps=2, output_type="np").images)
    torch.testing.assert_close(*map(torch.from_numpy, images), rtol=0, atol=1e-4)  # in [0, 1]


def test_unet_class_reads_the_configuration(tiny_unet):
    assert unet_class(tiny_unet().config | {"_class_name": "UNet2DModel"}) is UNet2DModel
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        unet_class({"_class_name": "UNet2DConditionModel"})


def test_plain_or_projected(tiny_unet):
    stock = tiny_unet()
    assert plain_or_projected(stock, projected=False) is stock
    projected = plain_or_projected(stock, projected=True)
    assert isinstance(projected, ProjectedUNet2DModel)
    assert plain_or_projected(projected, projected=True) is projected
