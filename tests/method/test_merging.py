"""Task vectors and their merge (paper Eq. 8)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deme_lib.method.merging import merge, task_vector

SHAPES = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "scale": ()}
weight_lists = st.lists(st.floats(-2, 2), min_size=1, max_size=6)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def family(n, dtype=torch.float32):
    """A base, n experts and their task vectors."""
    base, experts = state(0, dtype), [state(1 + i, dtype) for i in range(n)]
    return base, experts, [task_vector(base, e) for e in experts]


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@given(weight_lists, dtypes, st.randoms())
def test_the_textbook_formula_in_any_order_of_experts(weights, dtype, random):
    """Against float64. With unit roundoff u of float32 (or float64), a term w_i tau_i meets a
    rounding of w_i, of tau_i, of their product and of at most N sums, theta those of N sums: an
    error of at most (N + 3) u (|theta| + sum_i |w_i tau_i|), to first order. 1 % more allows for
    second order."""
    base, experts, vectors = family(len(weights), dtype)
    order = random.sample(range(len(weights)), len(weights))
    merged = merge(base, [vectors[i] for i in order], [weights[i] for i in order])
    wide = torch.promote_types(dtype, torch.float32)
    u = torch.finfo(wide).eps / 2
    for name in SHAPES:
        theta = base[name].double()
        terms = [w * (e[name].double() - theta) for w, e in zip(weights, experts, strict=True)]
        expected, size = theta + sum(terms), theta.abs() + sum(t.abs() for t in terms)
        n = (len(weights) + 3) * (2 if wide == torch.float64 else 1)  # it rounds like that too
        bound = 1.01 * n * u * size + torch.finfo(wide).tiny
        assert merged[name].dtype == wide
        assert ((merged[name].double() - expected).abs() <= bound).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_zero_give_the_base_and_one_hot_weights_the_expert(dtype):
    base, experts, vectors = family(4, dtype)
    assert_equal(merge(base, vectors, [0.0] * 4, out=state(9, dtype)), base)
    for i, expert in enumerate(experts):
        merged = merge(base, vectors, [float(i == j) for j in range(4)])
        torch.testing.assert_close(merged, {name: t.float() for name, t in expert.items()})


@pytest.mark.parametrize("buffer", [torch.tensor([3, 4]), torch.tensor([True, False])])
def test_integers_and_booleans_are_the_base_s_and_must_be_equal(buffer):
    base, expert = ({"w": state(seed)["scale"], "buffer": buffer} for seed in (0, 1))
    vector = task_vector(base, expert)
    for merged in (merge(base, [vector], [0.3]), merge(base, [vector], [1.0])):
        assert merged["buffer"].dtype == buffer.dtype and torch.equal(merged["buffer"], buffer)
    with pytest.raises(ValueError, match=r"buffer.*differs"):
        task_vector(base, expert | {"buffer": buffer.flip(0)})


def test_an_expert_that_diverged_does_no_harm_at_weight_zero():
    base, _, vectors = family(2)
    alone = merge(base, vectors[1:], [0.5])
    vectors[0]["scale"] = torch.tensor(float("nan"))
    assert_equal(merge(base, vectors, [0.0, 0.5]), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_may_write_into_a_model_s_tensors(dtype):
    base, _, vectors = family(2, dtype)
    out = state(9, dtype)
    tensors = dict(out)
    assert merge(base, vectors, [0.3, 0.6], out=out) is out
    assert all(out[name] is tensors[name] for name in SHAPES)
    expected = merge(base, vectors, [0.3, 0.6])
    assert_equal(out, {name: tensor.to(dtype) for name, tensor in expected.items()})
    with pytest.raises(KeyError, match=r"conv\.bias"):
        merge(base, vectors, [0.3, 0.6], out={n: t for n, t in out.items() if n != "conv.bias"})


@pytest.mark.parametrize("weights", [[0.0, 0.0], [0.5, 0.0]])
def test_the_inputs_stay_and_the_result_shares_no_memory_with_them(weights):
    base, _, vectors = family(2)
    before = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in merge(base, vectors, weights).values():
        tensor += 1
    assert_equal(base, before)


@pytest.mark.parametrize(
    ("weights", "words"),
    [([1.0], r"\[1\.0\] for 2 experts"), ([0.5, float("inf")], "one finite number for each")],
)
def test_there_is_one_finite_weight_an_expert(weights, words):
    base, _, vectors = family(2)
    with pytest.raises(ValueError, match=words):
        merge(base, vectors, weights)


def test_other_architectures_are_errors_that_name_the_tensor():
    base, experts, vectors = family(1)
    lacking = {n: t for n, t in experts[0].items() if n != "conv.bias"}
    with pytest.raises(KeyError, match=r"only one of.*conv\.bias"):
        task_vector(base, lacking)
    with pytest.raises(KeyError, match=r"only one of.*more"):
        task_vector(base, experts[0] | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"conv\.bias is \(4,\).*\(1,\)"):
        task_vector(base, experts[0] | {"conv.bias": torch.zeros(1)})
    with pytest.raises(KeyError, match=r"conv\.bias"):
        merge(base, [*vectors, lacking], [0.0, 0.0])  # also where its weight is zero
