"""Intervals, Holm's steps and verdicts: against references, by simulation, and in the records."""

import numpy as np
import pytest
import scipy.stats
from evidence import ALL, SWEEPS, change, write

from deme_lib.report import intervals, records, searches


@pytest.mark.parametrize("level", [0.5, 0.95, 0.975])
def test_t_interval_is_scipys(level):
    d = np.random.default_rng(1).normal(0.1, 1, 7)
    test = scipy.stats.ttest_1samp(d, 0)
    expected = (*test.confidence_interval(level), test.pvalue)
    assert intervals.t_interval(d, level) == pytest.approx(expected)


def test_one_unit_or_no_spread():
    assert np.isnan(intervals.t_interval(np.array([1.0]), 0.95)).all()
    assert intervals.t_interval(np.zeros(5), 0.95) == (0, 0, 1)
    assert intervals.t_interval(np.full(5, 0.25), 0.95) == (0.25, 0.25, 0)


@pytest.mark.parametrize(
    ("p", "steps"),
    [
        ([0.04, 0.001, 0.02], [1, 3, 2]),  # all rejected: 0.05 / 3, / 2, / 1
        ([0.03, 0.001, 0.04], [2, 3, 2]),  # the second is not, so the third stays at its step
        ([0.5, 0.6, 0.02], [3, 3, 3]),
        ([np.nan, 0.01], [1, 2]),
    ],
)
def test_holm_by_hand(p, steps):
    assert intervals.holm(np.array(p), 0.05) == pytest.approx(0.05 / np.array(steps))


@pytest.mark.parametrize(
    ("mean", "margin", "words"),
    [
        (1.0, 0.5, "different"),
        (-1.0, 2.0, "different, below the margin"),
        (-1.0, 1.05, "different"),  # the interval leaves the margin
        (0.0, 0.3, "equivalent"),
        (0.0, 0.1, "undecided"),
        (1.0, np.nan, "different"),
        (0.0, np.nan, "undecided"),
    ],
)
def test_verdicts(mean, margin, words):
    d = mean + 0.2 * np.array([-1, -0.5, 0, 0.5, 1, 0])  # t interval: mean ± 0.149, 90 %: ± 0.117
    assert intervals.verdict(d, 0.95, margin) == words
    assert intervals.verdict(-d, 0.95, margin) == words
    assert intervals.verdict(d[:4], 0.95, margin) == "no verdict"


@pytest.mark.parametrize("units", [5, 8])
@pytest.mark.parametrize("effect", [0.0, 1.0])
def test_simulated_experiments(units, effect):
    """1,000 experiments of three comparisons; one has no effect, or one at the margin of 1.

    Allowed: the nominal rate plus three standard deviations of the binomial.
    """
    rng, runs, alpha = np.random.default_rng(0), 1000, 0.05
    truth = np.array([effect, effect, 2.0])
    covered, different, inside, agree = 0, 0, 0, True
    for _ in range(runs):
        shared = rng.normal(0, 0.3, units)  # comparisons share an arm
        d = [t + shared + rng.normal(0, 0.6, units) for t in truth]
        rows = intervals.family(d, 1 - alpha, margin=1.0)
        low, high, _ = intervals.t_interval(d[0], 1 - alpha)
        covered += low <= truth[0] <= high
        different += any(r["verdict"].startswith("different") for r in rows[:2])
        inside += rows[0]["verdict"] in ("equivalent", "different, below the margin")
        agree &= all((r["low"] > 0 or r["high"] < 0) == (r["p"] < 1 - r["level"]) for r in rows)
        agree &= all(
            (r["low"] > 0 or r["high"] < 0) == r["verdict"].startswith("different") for r in rows
        )
    slack = 3 * np.sqrt(alpha * (1 - alpha) / runs)
    assert abs(covered / runs - (1 - alpha)) < slack
    assert agree  # interval, p and verdict never contradict each other
    if effect == 0:
        assert different / runs < alpha + slack  # in the family of two that have no effect
    else:
        assert inside / runs < alpha + slack  # an effect as large as the margin, called smaller


def row(found, a, b, measure="fid"):
    rows = found[(found["a"] == a) & (found["b"] == b) & (found["measure"] == measure)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_a_row_is_the_paired_interval_over_training_seeds(known):
    found = intervals.comparisons(known)
    means = known.metrics.groupby(["training_seed", "arm"])["fid"].mean().unstack()
    d = means["soup"] - means["pretrained"]
    expected = scipy.stats.ttest_1samp(d, 0).confidence_interval(0.95)
    excess = means["pretrained"].mean() - known.floor("fid")
    r = row(found, "soup", "pretrained")
    assert (r["kind"], r["units"], r["n_units"]) == ("exploratory", "training seeds", 8)
    assert (r["effect"], r["low"], r["high"]) == pytest.approx((d.mean(), *expected))
    assert r["relative"] == pytest.approx(d.mean() / means["pretrained"].mean())
    shares = (d.mean() / excess, expected[0] / excess, expected[1] / excess)
    assert (r["share"], r["share_low"], r["share_high"]) == pytest.approx(shares)
    assert r["margin"] == pytest.approx(0.05 * excess)


def test_primaries_are_a_family_and_everything_else_is_not(known):
    found = intervals.comparisons(known)
    primary = found[found["kind"] == "primary"]
    named = known.parameters["primary_decoupling"] + known.parameters["primary_merging"]
    assert list(primary["a"] + " - " + primary["b"]) == named
    assert list(primary["ablation"]) == [1, 1, 1, 2, 2]
    for _, part in primary.groupby("ablation"):
        alphas = intervals.holm(part["p"].to_numpy(), 0.05)
        assert part["level"].to_numpy() == pytest.approx(1 - alphas)
    assert set(found.loc[found["kind"] != "primary", "level"]) == {0.95}
    secondary = row(found, "deme_merged", "soup", "inception_score")
    scores = known.metrics.groupby("arm")["inception_score"].mean()
    reach = known.floor("inception_score") - scores["pretrained"]
    assert secondary["kind"] == "secondary"
    assert secondary["margin"] == pytest.approx(0.05 * reach)


def test_every_pair_is_there_once(known):
    found = intervals.comparisons(known)
    fid = found[found["measure"] == "fid"]
    pairs = [frozenset(pair) for pair in zip(fid["a"], fid["b"], strict=True)]
    assert len(pairs) == len(set(pairs))
    arms = {arm for arm in ALL if "@" not in arm}
    assert {frozenset((arm, "pretrained")) for arm in arms - {"pretrained"}} <= set(pairs)
    assert {frozenset((arm, "deme_merged")) for arm in arms - {"deme_merged"}} <= set(pairs)
    assert frozenset(("deme_merged@0.98", "soup@0.98")) in pairs


@pytest.mark.parametrize(("seeds", "interval"), [((0,), False), ((0, 1, 2), True)])
def test_few_units_give_no_verdict(tmp_path, seeds, interval):
    folder = write(tmp_path / "records", training_seeds=seeds, seeds=(0,))
    found = intervals.comparisons(records.read(folder))
    assert set(found["verdict"]) == {"no verdict"}
    assert found["low"].notna().all() == interval and found["effect"].notna().all()


def test_without_a_floor_nothing_is_equivalent(tmp_path):
    folder = write(tmp_path / "records", range(8), optional=False)
    found = intervals.comparisons(records.read(folder))
    assert found["share"].isna().all() and found["margin"].isna().all()
    assert set(found["verdict"]) <= {"different", "undecided"}


def test_a_sweep_s_cells_are_compared_with_what_its_file_names():
    """With the plain copy, and the merged row with the cell of one technique less."""
    found = intervals.comparisons(records.read(SWEEPS / "techniques" / "records"))
    assert set(found["kind"]) == {"exploratory"} and set(found["units"]) == {"sampling seeds"}
    mine = found[found["a"] == "N=8, PS + CL / deme_merged"]["b"].tolist()
    assert mine == ["pretrained", "N=1, none / deme_routed", "N=8, PS / deme_merged"]


def test_the_gate_is_relative_to_the_model_of_all_timesteps(known, tmp_path):
    found = intervals.gate(known).set_index(["model", "range"])
    losses = known.gate.set_index(["training_seed", "model", "range"])["loss"].unstack("model")
    relative = (losses["plain_routed"] / losses["all_plain"] - 1).unstack("range")[4]
    expected = scipy.stats.ttest_1samp(relative, 0).confidence_interval(0.95)
    r = found.loc[("plain_routed", 4)]
    assert (r["relative"], r["low"], r["high"]) == pytest.approx((relative.mean(), *expected))
    assert set(found["units"]) == {"training seeds"} and "all_plain" not in found.index
    one = records.read(write(tmp_path / "records", training_seeds=(0,)))
    r = intervals.gate(one).set_index(["model", "range"]).loc[("deme_routed", 1)]
    losses = one.gate.set_index(["model", "range"])
    half = scipy.stats.t.ppf(0.975, 9999) * losses.loc[("deme_routed", 1), "se"]
    assert (r["units"], r["n_units"]) == ("images", 10_000)
    assert r["high"] - r["relative"] == pytest.approx(half / losses.loc[("all_plain", 1), "loss"])


def test_searches_show_what_luck_was_worth(known):
    """A gain over the unsearched weights, in evaluation less what the search promised."""
    found = searches.table(known).set_index("arm")
    assert found.index.tolist() == ["merged_searched", "soup_searched", "all_scaled"]
    fid = known.metrics.set_index(["training_seed", "arm"])["fid"].unstack()
    tried = known.search.set_index("training_seed")
    tried = tried[tried["search"] == "soup"]
    chosen = tried[tried["chosen"] == 1]
    kept, none = (sum(chosen["weights"] == str([w] * 4)) for w in (0.25, 0.0))
    row = found.loc["soup_searched"]
    assert (row["kept"], row["none"], row["other"]) == (kept, none, 8 - kept - none)
    score = chosen["fid"] - tried.loc[tried["weights"] == str([0.25] * 4), "fid"]
    curse = fid["soup_searched"] - fid["soup"] - score
    expected = scipy.stats.ttest_1samp(curse, 0).confidence_interval(0.95)
    assert (row["in_search"], row["curse"]) == pytest.approx((score.mean(), curse.mean()))
    assert (row["low"], row["high"]) == pytest.approx(tuple(expected))


def test_weights_of_a_file_are_no_search_s(tmp_path):
    def given(arms):
        return arms.assign(weights=arms["weights"].mask(arms["arm"] == "deme_merged", "[1, 2, 3]"))

    folder = write(tmp_path / "records", arms=ALL)
    for path in folder.glob("*/arms.csv"):
        change(path, given)
    found = searches.table(records.read(folder))
    assert found["arm"].tolist() == ["soup_searched", "all_scaled"]
