"""Ranges, routing and draws of timesteps (paper Eq. 3, 6, 7)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deme_lib.method.timesteps import draw_timesteps, route, split_timesteps

T_and_N = st.integers(1, 1200).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t)))


@given(T_and_N)
def test_ranges_tile_all_timesteps_and_routing_is_floor_of_tN_over_T(sizes):
    T, N = sizes
    ranges = split_timesteps(N, T)
    assert len(ranges) == N and [t for r in ranges for t in r] == list(range(T))
    owner = route(torch.arange(T), ranges)
    assert owner.dtype == torch.int64
    assert owner.tolist() == [t * N // T for t in range(T)]


def test_routing_keeps_the_shape_and_takes_an_empty_batch():
    ranges = split_timesteps(4, 1000)
    assert route(torch.tensor(999), ranges).item() == 3
    assert route(torch.tensor([[0, 250], [749, 750]]), ranges).tolist() == [[0, 1], [2, 3]]
    assert route(torch.tensor([], dtype=torch.int64), ranges).shape == (0,)


@pytest.mark.parametrize(("N", "T"), [(0, 10), (-1, 10), (11, 10), (1, 0)])
def test_impossible_cuts_are_errors(N, T):
    with pytest.raises(ValueError, match=f"n_ranges={N} "):
        split_timesteps(N, T)


@pytest.mark.parametrize("outside", [-1, 1000])
def test_timesteps_outside_the_ranges_are_errors(outside):
    with pytest.raises(ValueError, match=r"leave \[0, 1000\)"):
        route(torch.tensor([5, outside]), split_timesteps(4, 1000))


@pytest.mark.parametrize(("p", "reached"), [(0.0, range(5, 10)), (1.0, range(20))])
def test_draws_are_uniform_in_what_they_reach(p, reached):
    n = 20_000
    drawn = draw_timesteps(n, range(5, 10), 20, p, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64
    counts, share = torch.bincount(drawn, minlength=20)[list(reached)], 1 / len(reached)
    assert counts.sum() == n
    assert (counts - n * share).abs().max() < 5 * (n * share * (1 - share)) ** 0.5


def test_continuous_draws_fill_their_range_and_t_max_is_routed_alone():
    own, g = range(750, 1000), torch.Generator().manual_seed(0)
    drawn = draw_timesteps(20_000, own, 1000, 0.0, g, continuous=True)
    assert drawn.dtype == torch.float32 and (drawn >= 750).all() and (drawn < 1000).all()
    assert drawn.mean().item() == pytest.approx(875, abs=3) and drawn.unique().numel() > 19_000
    ranges = split_timesteps(4, 1000)
    assert route(torch.tensor([1000.0, 750.0, 749.999, 0.0]), ranges).tolist() == [3, 3, 2, 0]
    with pytest.raises(ValueError, match=r"leave \[0, 1000\)"):
        route(torch.tensor(1000.1), ranges)


def test_draws_leave_their_range_at_the_expected_rate_within_a_batch():
    """A draw from all of [0, T) falls back into the own range 1 time in N."""
    n, N, T, p = 40_000, 4, 1000, 0.3
    own = split_timesteps(N, T)[2]
    drawn = draw_timesteps(n, own, T, p, torch.Generator().manual_seed(0))
    outside = ((drawn < own.start) | (drawn >= own.stop)).float().mean().item()
    expected = p * (1 - 1 / N)
    assert abs(outside - expected) < 5 * (expected * (1 - expected) / n) ** 0.5
