"""Intervals, Holm's steps and verdicts: against references, by simulation, and in the records."""

import numpy as np
import pytest
import scipy.stats

from deme_lib.report import intervals, records


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
        (np.nan, 0.3, "no verdict"),
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


def test_named_comparisons_are_corrected_within_their_ablation_alone(known):
    known.parameters["confirmation_seeds"] = []  # all
    found = intervals.comparisons(known)
    primary = found[found["kind"] == "primary"]
    named = known.parameters["primary_decoupling"] + known.parameters["primary_merging"]
    for measure, rows in primary.groupby("measure"):
        assert list(rows["a"] + " - " + rows["b"]) == named and measure in intervals.JUDGED
    judged = len(known.training_seeds) >= intervals.FEWEST
    assert ("no verdict" in set(primary["verdict"])) != judged
    for _, part in primary.groupby(["ablation", "measure"]):
        alphas = intervals.holm(part["p"].to_numpy(), 0.05)
        assert part["level"].to_numpy() == pytest.approx(1 - alphas)
    others = found[found["kind"] != "primary"]
    assert set(others["level"]) == {0.95} and set(others["verdict"]) == {""}
    exploratory = known.parameters["exploratory"]
    estimated = len(intervals.JUDGED) + len(intervals.BESIDE)
    assert len(others) == len(named) * estimated + 3 * len(exploratory)


@pytest.mark.parametrize(
    ("named", "judged"), [([1, 2, 3, 99], [1, 2, 3]), ([98, 3], [3]), ([98, 99], []), ([], None)]
)
def test_verdicts_are_of_the_seeds_that_confirm_if_they_are_enough(known, named, judged):
    known.parameters["confirmation_seeds"] = named
    found, everyone = intervals.comparisons(known), known.training_seeds
    primary, rest = (found[(found["kind"] == "primary") == yes] for yes in (True, False))
    judged = everyone if judged is None else judged
    assert set(primary["n_units"]) == {len(judged)} and set(rest["n_units"]) == {len(everyone)}
    for column, fewest in (("effect", 1), ("low", 2)):
        assert set(primary[column].notna()) == {len(judged) >= fewest}
    assert (set(primary["verdict"]) == {"no verdict"}) == (len(judged) < intervals.FEWEST)
    fid = known.of("fid").loc[judged]
    d = fid["plain_routed"] - fid["all_plain"]
    assert primary["effect"].iloc[0] == pytest.approx(d.mean(), nan_ok=True)


def test_a_comparison_is_the_paired_interval_over_training_seeds(known):
    found = intervals.comparisons(known).query("kind == 'estimate'")
    found = found.set_index(["a", "b", "measure"])
    fid = known.metrics.pivot(index="training_seed", columns="arm", values="fid")
    d = fid["plain_routed"] - fid["soup"]
    expected = scipy.stats.ttest_1samp(d, 0).confidence_interval(0.95)
    r = found.loc[("plain_routed", "soup", "fid")]
    assert r["n_units"] == len(known.training_seeds)
    assert (r["effect"], r["low"], r["high"]) == pytest.approx((d.mean(), *expected))
    assert r["margin"] == pytest.approx(0.05 * (fid["pretrained"].mean() - known.floor_of("fid")))
    score = known.metrics.groupby("arm")["inception_score"].mean()["pretrained"]
    r = found.loc[("deme_merged", "soup", "inception_score")]  # higher is better
    assert r["margin"] == pytest.approx(0.05 * (known.floor_of("inception_score") - score))


def test_the_gate_is_relative_to_one_model_of_all_timesteps(known, folder, change):
    found = intervals.gate(known)
    mine = known.losses[(known.losses["training_seed"] == 2) & (known.losses["bin_start"] >= 750)]
    means = mine.groupby("arm")["loss"].mean()
    expected = means["plain_routed"] / means["all_plain"] - 1
    assert found.loc[(2, 4), "plain_routed"] == pytest.approx(expected)
    assert found.index.get_level_values("range").unique().tolist() == [1, 2, 3, 4]
    assert intervals.CONTROL not in found
    change(folder, "run.json", lambda run: run["parameters"].update(n_ranges=3))
    assert intervals.gate(records.read(folder)).empty  # [0, 334) cuts the bin [300, 350)
