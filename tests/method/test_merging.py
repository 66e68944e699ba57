"""Task vectors and their merge (paper Eq. 8)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deme_lib.diffusion.merged import merge_experts
from deme_lib.method.merging import merge, task_vector
from deme_lib.method.projection import ProjectedUNet2DModel, is_projection

SHAPES = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "scale": ()}
weight_lists = st.lists(st.floats(-2, 2), min_size=1, max_size=5)


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def base_and_experts(n, dtype=torch.float32):
    base = state(0, dtype)
    experts = [state(1 + i, dtype) for i in range(n)]
    return base, experts, [task_vector(base, e) for e in experts]


def assert_bit_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 4])
def test_zero_weights_give_the_base_and_one_hot_weights_the_expert(n, dtype):
    base, experts, vectors = base_and_experts(n, dtype)
    assert_bit_equal(merge(base, vectors, [0.0] * n), base)
    for i, expert in enumerate(experts):
        assert_bit_equal(merge(base, vectors, [float(i == j) for j in range(n)]), expert)


def test_an_expert_that_diverged_does_no_harm_at_weight_zero():
    base, experts, vectors = base_and_experts(2)
    vectors[0]["scale"] = torch.tensor(float("nan"))
    assert_bit_equal(merge(base, vectors, [0.0, 1.0]), experts[1])


@given(weight_lists)
def test_the_textbook_formula(weights):
    base, experts, vectors = base_and_experts(len(weights))
    merged = merge(base, vectors, weights)
    for name in SHAPES:
        start = base[name].numpy().astype(np.float64)
        tuned = [e[name].numpy().astype(np.float64) for e in experts]
        expected = start + sum(w * (t - start) for w, t in zip(weights, tuned, strict=True))
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-6, atol=1e-7)


@given(weight_lists, st.floats(-2, 2))
def test_merging_is_linear_in_the_weights(weights, scale):
    base, _, vectors = base_and_experts(len(weights), torch.float64)
    once = task_vector(base, merge(base, vectors, weights))
    scaled = task_vector(base, merge(base, vectors, [scale * w for w in weights]))
    for name in SHAPES:
        torch.testing.assert_close(scaled[name], scale * once[name], rtol=1e-9, atol=1e-12)


@given(st.permutations(range(4)))
def test_the_order_of_the_experts_does_not_matter(order):
    base, _, vectors = base_and_experts(4)
    weights = [0.1, 0.2, 0.3, 0.4]
    expected = merge(base, vectors, weights)
    shuffled = merge(base, [vectors[i] for i in order], [weights[i] for i in order])
    for name in SHAPES:
        torch.testing.assert_close(shuffled[name], expected[name])


def test_uniform_weights_average_the_experts():
    base, experts, vectors = base_and_experts(4)
    merged = merge(base, vectors, [0.25] * 4)
    for name in SHAPES:
        mean = torch.stack([e[name].double() for e in experts]).mean(0).float()
        torch.testing.assert_close(merged[name], mean)


def test_task_vectors_are_float64_differences():
    base, experts, vectors = base_and_experts(1)
    for name in SHAPES:
        assert vectors[0][name].dtype == torch.float64
        assert torch.equal(vectors[0][name], experts[0][name].double() - base[name].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inputs_stay_and_the_result_shares_no_memory_with_them(dtype):
    base, _, vectors = base_and_experts(2, dtype)
    before = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in merge(base, vectors, [0.0, 0.0]).values():
        tensor += 1
    for tensor in merge(base, vectors, [0.5, 0.0]).values():
        tensor += 1
    assert_bit_equal(base, before)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 0.0, 0.0]])
def test_one_weight_an_expert(weights):
    base, _, vectors = base_and_experts(2)
    with pytest.raises(ValueError, match=f"{len(weights)} merge weights for 2 experts"):
        merge(base, vectors, weights)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_must_be_finite(bad):
    base, _, vectors = base_and_experts(2)
    with pytest.raises(ValueError, match="finite"):
        merge(base, vectors, [0.5, bad])


def test_other_architectures_are_errors_that_name_the_tensor():
    base, experts, vectors = base_and_experts(1)
    lacking = {n: t for n, t in experts[0].items() if n != "conv.bias"}
    with pytest.raises(KeyError, match=r"lacks.*conv\.bias"):
        task_vector(base, lacking)
    with pytest.raises(KeyError, match=r"base lacks.*more"):
        task_vector(base, experts[0] | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"conv\.bias is \(4,\).*\(1,\)"):
        task_vector(base, experts[0] | {"conv.bias": torch.zeros(1)})
    with pytest.raises(KeyError, match=r"conv\.bias"):
        merge(base, [*vectors, lacking], [0.0, 0.0])  # also where its weight is zero


def test_projections_merge_around_the_identity(tiny_unet):
    """W = I + sum_i w_i (W_i - I), and the merged state loads strictly."""
    base = ProjectedUNet2DModel.from_stock(tiny_unet())
    experts, weights = [ProjectedUNet2DModel.from_stock(tiny_unet(i)) for i in (1, 2)], [0.3, 0.6]
    generator = torch.Generator().manual_seed(0)
    for expert in experts:
        for name, tensor in expert.named_parameters():
            if is_projection(name):
                tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    merged = merge_experts(base, experts, weights).state_dict()
    names = [n for n in merged if is_projection(n)]
    assert len(names) == 5
    for name in names:
        matrices = [e.state_dict()[name][:, :, 0, 0] for e in experts]
        eye = torch.eye(len(matrices[0]))
        expected = eye + sum(w * (m - eye) for w, m in zip(weights, matrices, strict=True))
        torch.testing.assert_close(merged[name][:, :, 0, 0], expected)
    base.load_state_dict(merged)


def test_a_stock_base_gains_identity_projections(tiny_unet):
    stock, expert = tiny_unet(), ProjectedUNet2DModel.from_stock(tiny_unet(1))
    merged = merge_experts(stock, [expert], [1.0])
    assert isinstance(merged, ProjectedUNet2DModel)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expert.state_dict()[name], rtol=0, atol=0)


def test_a_projected_base_refuses_stock_experts(tiny_unet):
    with pytest.raises(KeyError, match=r"projection\.weight"):
        merge_experts(ProjectedUNet2DModel.from_stock(tiny_unet()), [tiny_unet(1)], [1.0])
