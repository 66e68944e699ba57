"""Tables and verdicts: against independent references, and following the numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import synthetic

from deme_lib.report import comparisons, render, tables


@pytest.fixture
def records(tmp_path):
    """A folder of synthetic records with all arms."""
    return synthetic.write(tmp_path / "records")


def test_paired_interval_by_hand():
    # mean 2, sd 1, n = 3: 4.302652730 (Student's t, 2 degrees, 97.5 %) / sqrt(3)
    mean, half = comparisons.paired_interval(np.array([1.0, 2.0, 3.0]), 0.95)
    assert mean == 2
    assert half == pytest.approx(4.302652730 / 3**0.5)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.975])
def test_paired_interval_is_scipys(level):
    d = np.random.default_rng(1).normal(0.1, 1, 7)
    mean, half = comparisons.paired_interval(d, level)
    interval = scipy.stats.ttest_1samp(d, 0).confidence_interval(level)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))


def test_paired_interval_needs_two_seeds():
    with pytest.raises(ValueError, match="two sampling seeds"):
        comparisons.paired_interval(np.array([1.0]), 0.95)


def test_crossed_interval_by_hand():
    # means by row 1, 4 and by column 2, 3: variances of the mean 4.5 / 2 and 0.5 / 2, sum 2.5;
    # 2.5^2 / (2.25^2 + 0.25^2) = 1.2195 degrees of freedom
    mean, half = comparisons.paired_interval(np.array([[0.5, 1.5], [3.5, 4.5]]), 0.95)
    assert mean == 2.5
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 6.25 / 5.125) * 2.5**0.5)


@pytest.mark.parametrize("seeds", [3, 5])
def test_crossed_interval_falls_back_to_one_kind_of_seed(seeds):
    """One row, one column, or rows or columns that repeat: the t interval over what varies."""
    d = np.random.default_rng(2).normal(0.1, 1, seeds)
    plain = comparisons.paired_interval(d, 0.95)
    for matrix in (d[None], d[:, None], np.tile(d, (4, 1)), np.tile(d[:, None], (1, 4))):
        assert comparisons.paired_interval(matrix, 0.95) == pytest.approx(plain)
    assert comparisons.paired_interval(np.full((3, 5), 0.25), 0.95) == (0.25, 0)


@pytest.mark.parametrize(
    ("training", "sampling", "both"),
    [
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
        (1, 1, 1),
        (0.3, 0.3, 1),
        (1, 0.3, 1),
        (0.3, 1, 1),
        (1, 1, 0),
    ],
)
def test_crossed_interval_covers(training, sampling, both):
    """2,000 data sets of 3 training seeds by 5 sampling seeds; the truth is 0."""
    rng = np.random.default_rng(0)
    d = training * rng.normal(size=(2000, 3, 1)) + sampling * rng.normal(size=(2000, 1, 5))
    d = d + both * rng.normal(size=(2000, 3, 5))
    intervals = np.array([comparisons.paired_interval(x, 0.95) for x in d])
    covered = (np.abs(intervals[:, 0]) <= intervals[:, 1]).mean()
    assert 0.93 <= covered <= 0.995


def test_common_noise_cancels(tmp_path):
    """Pairing: a constant shift is seen exactly, however much the seeds differ."""
    folder = synthetic.write(tmp_path)
    metrics = pd.read_csv(folder / "metrics.csv")
    base = metrics.loc[metrics["arm"] == "pretrained", "fid"].to_numpy()
    metrics.loc[metrics["arm"] == "routed", "fid"] = base - 0.25
    metrics.to_csv(folder / "metrics.csv", index=False)
    table = comparisons.paired(tables.read(folder), 2).set_index(["a", "b"])
    row = table.loc[("routed", "pretrained")]
    assert row["fid"] == pytest.approx(-0.25)
    assert row["fid_halfwidth"] == pytest.approx(0, abs=1e-12)


def test_mean_and_sd_are_over_seeds(records):
    known = tables.read(records)
    row = tables.ablation(known, 1).set_index("arm").loc["merged"]
    fids = known.metrics.query("arm == 'merged'")["fid"].to_numpy()
    assert row["fid_mean"] == pytest.approx(fids.sum() / fids.size)
    variance = ((fids - fids.mean()) ** 2).sum() / (fids.size - 1)
    assert row["fid_sd"] == pytest.approx(variance**0.5)


def test_with_several_training_seeds_the_sd_is_over_their_means(tmp_path):
    known = tables.read(synthetic.write(tmp_path, training_seeds=(0, 1, 2)))
    row = tables.ablation(known, 1).set_index("arm").loc["merged"]
    fids = known.metrics.query("arm == 'merged'")["fid"].to_numpy().reshape(3, 5)
    assert row["fid_mean"] == pytest.approx(fids.mean())
    assert row["fid_sd"] == pytest.approx(np.std(fids.mean(axis=1), ddof=1))
    assert row["weights"] == "; ".join(["[0.25, 0.0, 0.55, 0.4]"] * 3)


def test_costs_and_test_losses_are_means_over_training_seeds(tmp_path):
    folder = synthetic.write(tmp_path, training_seeds=(0, 1))
    arms = pd.read_csv(folder / "arms.csv")
    second = (arms["arm"] == "soup") & (arms["training_seed"] == 1)
    arms.loc[second, ["test_loss", "search_losses"]] = [0.087, 153]
    arms.to_csv(folder / "arms.csv", index=False)
    row = tables.ablation(tables.read(folder), 1).set_index("arm").loc["soup"]
    assert row["test_loss"] == pytest.approx(0.082)
    assert row["search_losses"] == 152 and row["search_images"] == 18_000
    assert row["training_steps"] == 4000


def test_differences_pair_training_and_sampling_seeds(tmp_path):
    folder = synthetic.write(tmp_path, training_seeds=(7, 3))
    metrics = pd.read_csv(folder / "metrics.csv").sample(frac=1, random_state=0)
    metrics["fid"] = metrics["training_seed"] * 10.0 + metrics["seed"]
    metrics.loc[metrics["arm"] == "pretrained", "fid"] = 0.0
    metrics.to_csv(folder / "metrics.csv", index=False)
    d = comparisons.differences(tables.read(folder), "merged", "pretrained", "fid")
    assert d.tolist() == [[30, 31, 32, 33, 34], [70, 71, 72, 73, 74]]


def test_texts_say_what_several_training_seeds_cover(tmp_path):
    known = tables.read(synthetic.write(tmp_path, training_seeds=(0, 1, 2), fid={"merged": 0.1}))
    covers = "cover training, the search and sampling noise: not the data split or the classifier"
    said = [comparisons.verdict(known, 1), render.limits(known), tables.caption(known)]
    assert all(covers in text for text in said)
    said += [comparisons.in_short(known), render.paired_markdown(known, 1)]
    assert not any("these weights" in text or "one training seed" in text for text in said)
    assert "better than all timesteps, scale searched over 3 training seeds" in said[0]
    assert "sampling seeds times 3 training seeds" in said[0]
    assert "over the 3 training seeds (of each one's mean over 5 sampling seeds)" in said[2]
    assert "The sd covers training and the search alone" in said[2]
    first = [comparisons.metric(known), comparisons.copying(known)]
    assert all("(training seed 0)" in text for text in first)


def test_training_seeds_of_a_given_model_do_not_cover_pretraining(tmp_path):
    known = tables.read(synthetic.write(tmp_path, training_seeds=(0, 1)))
    known.parameters["pretrained"] = "my-model"
    covers = "cover finetuning, the search and sampling noise: not pretraining, the data split or"
    assert covers in tables.covers(known) and covers in tables.spread(known)
    assert "The sd covers finetuning and the search alone" in tables.spread(known)


def test_weights_are_listed_per_training_seed(tmp_path):
    folder = synthetic.write(tmp_path, training_seeds=(0, 4))
    arms = pd.read_csv(folder / "arms.csv")
    second = (arms["arm"] == "merged") & (arms["training_seed"] == 4)
    arms.loc[second, "weights"] = "[0.0, 0.5, 0.0, 0.0]"
    arms.to_csv(folder / "arms.csv", index=False)
    text = comparisons.verdict(tables.read(folder), 1)
    both = "(0.25, 0, 0.55, 0.4) / (0, 0.5, 0, 0)"
    assert f"Weights (training seeds 0 / 4): DeMe merged (searched) {both};" in text
    assert "all timesteps, scale searched (0.8)." in text  # the same for both
    assert "not zero (training seed 4): the search chose no merge" in text


def test_rows_keep_the_order_of_arms(records):
    known = tables.read(records)
    names = tables.ablation(known, 2)["arm"].tolist()
    assert names == [*known.arms.query("ablation2 == 1")["arm"], "real"]


@pytest.mark.parametrize(
    ("fid", "outcome"), [(0.1, "better"), (0.9, "worse"), (0.45, "no difference found")]
)
def test_verdict_follows_the_numbers(tmp_path, fid, outcome):
    known = tables.read(synthetic.write(tmp_path, fid={"merged": fid, "all_scaled": 0.45}))
    primary = comparisons.paired(known, 1).iloc[0]
    assert (primary["a"], primary["b"]) == ("merged", "all_scaled")
    assert primary["outcome"] == outcome
    assert primary["verdict"] in comparisons.verdict(known, 1)
    assert ("for these weights" in primary["verdict"]) == (outcome in ("better", "worse"))


def test_words_at_the_edges():
    text = comparisons.in_words("a", "b", -0.1, 0.2, "here")
    assert text == "no difference in FID found (half-width 0.2)"
    assert comparisons.in_words("a", "b", 0.0, 0.0, "here") == "the same numbers for every seed"
    assert comparisons.outcome_of(0.2, 0.2) == "no difference found"


def test_only_primaries_are_corrected_and_each_pair_stands_once(records):
    known = tables.read(records)
    one, two = comparisons.paired(known, 1), comparisons.paired(known, 2)
    assert one.query("kind == 'primary'")["level"].tolist() == [0.95]
    assert two.query("kind == 'primary'")["level"].tolist() == pytest.approx([0.975, 0.975])
    for table in (one, two):
        assert set(table.query("kind == 'exploratory'")["level"]) == {0.95}
        corrected = ~table["verdict"].str.endswith(", uncorrected")
        assert (corrected == (table["kind"] == "primary")).all()
        pairs = [frozenset(p) for p in zip(table["a"], table["b"], strict=True)]
        assert len(set(pairs)) == len(pairs)


def test_a_primary_is_exploratory_in_neither_ablation(records):
    known = tables.read(records)
    pairs = {n: {p[:3] for p in comparisons.comparisons(known, n)} for n in (1, 2)}
    assert ("merged", "routed", "primary") in pairs[2]
    assert not {p for p in pairs[1] if set(p[:2]) == {"merged", "routed"}}
    assert ("merged_uniform", "averaged", "exploratory") in pairs[2]
    known.parameters["primary_merging"] = ["merged - averaged"]
    one = {p[:3] for p in comparisons.comparisons(known, 1)}
    assert ("merged", "routed", "exploratory") in one


def test_inception_score_is_compared(records):
    known = tables.read(records)
    row = comparisons.paired(known, 2).iloc[0]
    d = comparisons.differences(known, "merged", "averaged", "inception_score")
    half = comparisons.paired_interval(d, row["level"])[1]
    assert row["inception_score"] == pytest.approx(d.mean())
    assert row["inception_score_halfwidth"] == pytest.approx(half)
    text = render.paired_markdown(known, 2)
    assert "| IS (higher is better) |" in text and "only in where the experts" in text


@pytest.mark.parametrize(("fid", "outcome"), [(0.1, " better than"), (0.9, " worse than")])
def test_verdict_of_ablation_1_reads_merged_against_soup(tmp_path, fid, outcome):
    known = tables.read(synthetic.write(tmp_path, fid={"merged": fid}))
    row = comparisons.paired(known, 1).query("a == 'merged' and b == 'soup'").iloc[0]
    text = comparisons.verdict(known, 1).partition("with merging kept but ranges removed")[2]
    difference = tables.plus_minus(row["fid"], row["fid_halfwidth"], signed=True)
    assert difference in text and outcome in row["verdict"] and row["verdict"] in text
    assert "ranges removed" not in comparisons.verdict(known, 2)


def test_an_unknown_primary_arm_is_an_error(records):
    known = tables.read(records)
    known.parameters["primary_merging"] = ["merged - mergd"]
    with pytest.raises(ValueError, match=r"primary_merging.*mergd"):
        comparisons.paired(known, 2)


@pytest.mark.parametrize(("chosen", "said"), [([0, 0.5, 0, 0], True), ([0.1, 0.5, 0, 0], False)])
def test_one_weight_is_no_merge(tmp_path, chosen, said):
    known = tables.read(synthetic.write(tmp_path, weights=chosen))
    assert ("the search chose no merge" in comparisons.verdict(known, 2)) == said


@pytest.mark.parametrize(
    ("merge", "word"),
    [("search", "searched"), ("uniform", "uniform"), ([1.0] * 4, "weights given")],
)
def test_title_says_where_the_weights_come_from(tmp_path, merge, word):
    known = tables.read(synthetic.write(tmp_path, merge=merge))
    assert known.titles["merged"] == f"DeMe merged ({word})"


@pytest.mark.parametrize(
    ("shift", "outcome"),
    [(-1.0, "better"), (1.0, "worse"), ([-1.0, 1.0, -1.0, 1.0, 0.0], "no difference found")],
)
def test_verdict_says_what_each_other_measure_finds(records, shift, outcome):
    metrics = pd.read_csv(records / "metrics.csv")
    a, b = metrics["arm"] == "merged", metrics["arm"] == "all_scaled"
    metrics.loc[a, "fid_second"] = metrics.loc[b, "fid_second"].to_numpy() + np.array(shift)
    metrics.loc[a, "pixel"] = metrics.loc[b, "pixel"].to_numpy() - np.array(shift)
    metrics.to_csv(records / "metrics.csv", index=False)
    opposite = {"better": "worse", "worse": "better"}.get(outcome, outcome)
    text = comparisons.verdict(tables.read(records), 1)
    assert f", {outcome}; by pixels " in text
    assert text.partition("by pixels ")[2].partition("; by KID")[0].endswith(f", {opposite}")


def test_verdict_reads_kid_times_1000(records):
    known = tables.read(records)
    row = comparisons.paired(known, 1).iloc[0]
    kid = tables.plus_minus(1000 * row["kid"], 1000 * row["kid_halfwidth"], signed=True)
    said = f"by KID × 1000, the only one to test images, {kid}, {row['outcome']}."
    assert said in comparisons.verdict(known, 1)


@pytest.mark.parametrize(("loss", "said"), [(0.076, True), (0.078, False)])
def test_verdict_says_where_fid_and_test_loss_disagree(tmp_path, loss, said):
    folder = synthetic.write(tmp_path, fid={"merged": 0.1})
    arms = pd.read_csv(folder / "arms.csv")
    arms.loc[arms["arm"] == "all_scaled", "test_loss"] = loss
    arms.to_csv(folder / "arms.csv", index=False)
    text = comparisons.verdict(tables.read(folder), 1)
    clause = "test loss is lower for all timesteps, scale searched: 0.07600 against 0.07700"
    assert (clause in text) == ("test loss" in text) == said


@pytest.mark.parametrize(("merge", "said"), [("search", True), ("uniform", False)])
def test_verdict_of_ablation_2_reads_uniform_merge_against_average(tmp_path, merge, said):
    known = tables.read(synthetic.write(tmp_path, merge=merge))
    row = comparisons.paired(known, 2).query("a == 'merged_uniform' and b == 'averaged'").iloc[0]
    text = comparisons.verdict(known, 2).partition("no search on both sides, ")[2]
    assert bool(text) == (row["verdict"] in text) == said
    assert "on both sides" not in comparisons.verdict(known, 1)


@pytest.mark.parametrize(
    ("fid", "said"),
    [(0.1, "is −0.025, of the same sign"), (0.9, "is −0.025, of the other sign")],
)
def test_searched_pairs_are_compared_on_the_searches_noise_too(tmp_path, fid, said):
    folder = synthetic.write(tmp_path, fid={"merged": fid})
    found = pd.read_csv(folder / "search.csv")
    for name, value in (("merge", 0.25), ("scale", 0.275)):
        found.loc[(found["search"] == name) & (found["chosen"] == 1), "fid"] = value
    found.to_csv(folder / "search.csv", index=False)
    known = tables.read(folder)
    assert said in comparisons.verdict(known, 1)
    assert "own noise" not in comparisons.verdict(known, 2)  # averaged, routed: no search
    known.parameters["primary_merging"] = ["merged - best_single"]  # not the candidate chosen
    assert "own noise" not in comparisons.verdict(known, 2)
    known.parameters["primary_merging"] = ["merged - one_scaled"]
    assert "own noise (one stream, n = 1,500" in comparisons.verdict(known, 2)


def test_caption_says_what_was_measured(records):
    text = tables.caption(tables.read(records))
    for part in ("n = 2,000", "digits-a", "DDIM 20", "5 sampling seeds", "one training seed"):
        assert part in text
    assert "shared between arms (same noise): compare arms by the paired differences" in text
    assert "IS is of this classifier's classes" in text
    metrics = pd.read_csv(records / "metrics.csv").assign(features="inception")
    metrics.to_csv(records / "metrics.csv", index=False)
    assert "classifier's classes" not in tables.caption(tables.read(records))


def test_what_intervals_cover_is_said_everywhere(records):
    known = tables.read(records)
    covers = "cover sampling noise only: not training, the search, the data split or the classifier"
    said = [
        render.limits(known),
        tables.caption(known),
        *(comparisons.verdict(known, n) for n in (1, 2)),
    ]
    assert all(covers in text for text in said)


def test_seed_difference_by_hand():
    # pairs (1, 3), (1, 1), (3, 1): 2 / 2, 0, 2 / 2
    assert comparisons.seed_difference(np.array([[1.0, 3.0, 1.0]])) == pytest.approx((2 / 3) ** 0.5)


def test_the_metric_paragraph_follows_the_records(records, tmp_path):
    metrics = pd.read_csv(records / "metrics.csv")
    metrics.loc[metrics["arm"] == "pretrained", "fid"] = [1.0, 1.0, 1.0, 1.0, 3.0]
    metrics["fid_second"] = -metrics["fid"]
    metrics.to_csv(records / "metrics.csv", index=False)
    text = comparisons.metric(tables.read(records))
    assert "(n = 2,000)" in text and f"{100 * 0.4**0.5:.2g} % (rms)" in text  # 4 of 10 pairs
    assert "rank correlation −1.00" in text
    assert 'of "all timesteps, no technique" by digits-a and of "pretrained" by digits-b' in text
    assert "and of 3 training lengths, whose FIDs lie 0.1 or more apart, does not show" in text
    odd = tables.read(synthetic.write(tmp_path / "odd", second=False))
    assert "Agreement of halves does not show that arms" in comparisons.metric(odd)
    odd.acceptance["accepted"] = False
    assert "Agreement" not in comparisons.metric(odd)
    assert "Spearman" not in comparisons.metric(odd)


@pytest.mark.parametrize(
    ("test", "who"), [(9.0, "of all 13 arms"), (0.1, "of no arm"), (2.0, "of 1 of 13 arms")]
)
def test_copying_compares_medians(records, test, who):
    table = pd.read_csv(records / "neighbours.csv")
    table["median"] = [test, 1.9, *np.linspace(2.1, 2.3, 12)]
    table.to_csv(records / "neighbours.csv", index=False)
    text = comparisons.copying(tables.read(records))
    assert "1.900 to 2.300" in text and f"{test:.3f} for test images (n = 300)" in text
    assert f"generated images {who} lie closer" in text


def test_flatness_says_the_last_quarter_and_the_minimum():
    steps, losses = [0, 100, 200, 300, 400], [5.0, 2.0, 1.0, 1.6, 2.0]
    table = pd.DataFrame({"run": "baseline", "step": steps, "held_out_loss": losses})
    text = tables.flatness(table)
    assert "+25.00% over the last quarter" in text
    assert "minimum 1.00000 after 200 steps, +100.00% from it to the end" in text


def test_a_missing_record_says_what_to_run(records):
    (records / "losses.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"losses\.csv(.|\n)*05_evaluation"):
        tables.read(records)


def test_a_missing_column_is_named(records):
    pd.read_csv(records / "plane.csv").drop(columns="w2").to_csv(records / "plane.csv")
    with pytest.raises(ValueError, match=r"plane\.csv lacks the columns \['w2'\]"):
        tables.read(records)


def test_another_n_is_not_compared(records):
    metrics = pd.read_csv(records / "metrics.csv")
    metrics.loc[0, "n"] = 500
    metrics.to_csv(records / "metrics.csv", index=False)
    with pytest.raises(ValueError, match="mixes n"):
        tables.read(records)


def test_an_arm_without_a_training_seed_is_not_paired(tmp_path):
    folder = synthetic.write(tmp_path, training_seeds=(0, 1))
    metrics, arms = pd.read_csv(folder / "metrics.csv"), pd.read_csv(folder / "arms.csv")
    moved = (metrics["arm"] == "soup") & (metrics["training_seed"] == 1)
    metrics.assign(training_seed=metrics["training_seed"].mask(moved, 0)).to_csv(
        folder / "metrics.csv", index=False
    )
    with pytest.raises(ValueError, match=r"soup needs .* training seed \[0, 1\] and sampling seed"):
        tables.read(folder)
    metrics.to_csv(folder / "metrics.csv", index=False)
    arms.iloc[:-1].to_csv(folder / "arms.csv", index=False)
    with pytest.raises(ValueError, match=r"arms\.csv: best_single"):
        tables.read(folder)


def test_an_arm_without_a_seed_is_not_paired(records):
    pd.read_csv(records / "metrics.csv").iloc[1:].to_csv(records / "metrics.csv", index=False)
    with pytest.raises(ValueError, match="pretrained needs exactly one row per training seed"):
        tables.read(records)


@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [(-0.1234, 0.0456, "−0.123 ± 0.046"), (3.5, 12.3, "+4 ± 12"), (1.0, 0.0, "+1.000 ± 0.000")],
)
def test_plus_minus_keeps_two_digits_of_the_spread(mean, spread, text):
    assert tables.plus_minus(mean, spread, signed=True) == text


def test_readme_parts_are_replaced_and_nothing_else(tmp_path):
    for name in ("ablation1", "ablation2", "verdicts"):
        (tmp_path / f"{name}.md").write_text(f"new {name} \\1\n")
    readme = tmp_path / "README.md"
    old = "\n".join(
        f"<!-- {n} -->\nold\n<!-- /{n} -->\nkept {n}" for n in ("ablation1", "verdicts")
    )
    readme.write_text(f"# title\n{old}\n")
    with pytest.raises(ValueError, match="no <!-- ablation2 -->"):
        render.update_readme(readme, tmp_path)
    readme.write_text(f"# title\n{old}\n<!-- ablation2 --><!-- /ablation2 -->\nend\n")
    render.update_readme(readme, tmp_path)
    first = readme.read_text()
    assert "old" not in first and "new ablation2 \\1" in first
    assert first.startswith("# title\n") and first.endswith("\nend\n") and "kept verdicts" in first
    render.update_readme(readme, tmp_path)
    assert readme.read_text() == first
