"""The open questions: every answer follows the intervals, whichever way they fall."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pandas as pd
import pytest
import synthetic

from deme_lib.report import comparisons, questions, render, tables


def answers(folder, **options):
    """The eight answers for synthetic records in which arms may have other mean FIDs."""
    known = tables.read(synthetic.write(folder / "records", **options))
    return questions.answers(known, folder / "records" / "sweeps")


@pytest.fixture(params=[(0,), (0, 1, 2)], ids=["one training seed", "three"])
def training_seeds(request):
    return request.param


def test_every_question_is_a_heading_with_an_answer(tmp_path, training_seeds):
    folder = synthetic.write(tmp_path, training_seeds=training_seeds)
    text = render.questions_markdown(tables.read(folder), folder / "sweeps")
    assert re.findall(r"^## (\d)\. ", text, re.MULTILINE) == list("12345678")
    assert text.count("| :-- |") == 7  # none for sweeps that were not run
    assert "nan" not in text
    assert ("for these weights" in text) == (len(training_seeds) == 1)
    assert ("over 3 training seeds" in text) == (len(training_seeds) == 3)
    assert (
        "DeMe merged (searched) against soup, searched: no difference found (exploratory)" in text
    )


@pytest.mark.parametrize(
    ("fid", "said"),
    [
        ({"merged": 0.1}, "not all of it"),
        ({"merged": 0.9}, "the merge is worse than it"),
        (
            {"merged": 0.45, "all_scaled": 0.45},
            "not decided: the control gains too, and no further gain",
        ),
        ({"merged": 0.45, "all_scaled": 0.45, "all_same": 0.57}, "not decided."),
    ],
)
def test_finetuning_alone(tmp_path, fid, said):
    text = answers(tmp_path, fid=fid)[0].text
    assert text.startswith(f"By FID and for these weights, {said}")
    assert "scale searched: " in text and "same techniques: " in text
    assert "no technique against pretrained: " in text
    assert ("allows a further gain" in text) == ("not decided" in said)


def test_what_the_interval_allows_is_a_share_of_the_gain(tmp_path):
    folder = synthetic.write(tmp_path)
    metrics = pd.read_csv(folder / "metrics.csv")
    base = metrics.loc[metrics["arm"] == "pretrained", "fid"].to_numpy()
    noise = np.array([-1.0, 1.0, -1.0, 1.0, 0.0])
    metrics.loc[metrics["arm"] == "merged", "fid"] = base - 0.2
    metrics.loc[metrics["arm"] == "all_scaled", "fid"] = base - 0.1 + 0.1 * noise
    metrics.to_csv(folder / "metrics.csv", index=False)
    half = comparisons.paired_interval(0.1 * noise, 0.95)[1]
    low, high = (f"{round(100 * (0.1 + s * half) / 0.2)} %".replace("-", "−") for s in (-1, 1))
    text = questions.answers(tables.read(folder), folder)[0].text
    assert f"gain from {low} to {high} of the merge's whole gain" in text and "−" in low
    metrics.loc[metrics["arm"] == "pretrained", "fid"] = base - 0.3
    metrics.to_csv(folder / "metrics.csv", index=False)
    assert "whole gain" not in questions.answers(tables.read(folder), folder)[0].text


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ({"better"}, "yes"),
        ({"worse"}, "no, it is worse"),
        ({"better", "no difference found"}, "in part"),
        ({"worse", "no difference found"}, "no"),
        ({"better", "worse"}, "it depends on the comparison"),
        ({"no difference found"}, "not decided"),
    ],
)
def test_what_outcomes_say_together(outcomes, said):
    assert questions._lead(outcomes) == said


@pytest.mark.parametrize(("own", "said"), [(0.1, "yes."), (0.9, "no, it is worse.")])
def test_is_it_better_than_the_others(tmp_path, training_seeds, own, said):
    others = [("soup", "soup_uniform"), ("routed", "averaged"), ("one_scaled", "best_single")]
    fid = {"merged": own, "merged_uniform": own} | {b: 0.5 for pair in others for b in pair}
    found = answers(tmp_path, fid=fid, training_seeds=training_seeds)
    for number, kind in ((2, "exploratory"), (3, "primary"), (5, "exploratory")):
        answer = found[number - 1]
        assert f", {said} DeMe merged (searched) against" in answer.text
        assert answer.table["kind"].tolist() == [kind, kind]
        assert answer.text.count("(exploratory)") == 2 * (kind == "exploratory")


def test_no_better_than_the_others(tmp_path):
    fid = {arm: 0.5 for arm in ("merged", "routed", "averaged")}
    assert "not decided. DeMe" in answers(tmp_path, fid=fid)[2].text


def test_rows_are_those_of_the_paired_tables(tmp_path):
    known = tables.read(synthetic.write(tmp_path))
    row = comparisons.paired(known, 2).iloc[0]
    found = comparisons.between(known, "merged", "averaged")
    assert found == {k: row[k] for k in found}
    assert (found["kind"], found["level"]) == ("primary", pytest.approx(0.975))
    uniform = comparisons.between(known, "merged_uniform", "soup_uniform")
    assert (uniform["kind"], uniform["level"]) == ("exploratory", 0.95)


@pytest.mark.parametrize(
    ("uniform", "said"), [(0.9, "yes."), (0.1, "no, it is worse."), (0.46, "not decided")]
)
def test_searched_weights(tmp_path, uniform, said):
    answer = answers(tmp_path, fid={"merged_uniform": uniform})[3]
    assert answer.text.startswith(
        f"By FID on noise that no search saw and for these weights, {said}"
    )


def test_weights_that_were_not_searched_answer_nothing(tmp_path):
    answer = answers(tmp_path, merge="uniform")[3]
    assert "weights were not searched" in answer.text and answer.table.empty


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        ([0.3] * 5, "yes, less"),
        ([-0.3] * 5, "more, not less"),
        ([0.3, -0.3, 0.3, -0.3, 0.0], "not decided, as no difference was found"),
    ],
)
def test_gradient_conflict(tmp_path, shift, said):
    folder = synthetic.write(tmp_path)
    timesteps = (0, 240, 250, 999)
    rows = product(("pretrained", "merged"), range(5), timesteps, timesteps)
    full = pd.DataFrame(rows, columns=["model", "draw", "timestep1", "timestep2"]).assign(n=256)
    near = (full["timestep1"] < 250) == (full["timestep2"] < 250)
    full["cosine"] = near * 0.9 - 0.2 * (full["timestep1"] + full["timestep2"] == 250)  # 0 and 250
    full.loc[full["model"] == "merged", "cosine"] += np.repeat(shift, 16)
    full.assign(n=256).to_csv(folder / "gradients.csv", index=False)
    answer = questions.answers(tables.read(folder), folder)[5]
    assert f"ranges, {said}: merged − pretrained" in answer.text
    # different ranges: 0-250, 0-999, 240-250, 240-999 and 250-999
    before = answer.table.set_index("model").loc["pretrained"]
    assert before["mean cosine"] == f"{(0.9 - 0.2) / 5:.3f} ± 0.000"
    assert before["share of negative pairs"] == "0.200 ± 0.000"
    d = np.array(shift)
    mean, half = comparisons.paired_interval(d, 0.95)
    assert tables.plus_minus(mean, half, signed=True) in answer.text


@pytest.mark.parametrize("odd", ["one range", "one model", "one draw"])
def test_gradients_that_answer_nothing(tmp_path, odd):
    folder = synthetic.write(tmp_path, n_ranges=1 if odd == "one range" else 4)
    gradients = pd.read_csv(folder / "gradients.csv")
    query = {"one model": "model == 'pretrained'", "one draw": "draw == 0"}.get(odd, "draw >= 0")
    gradients.query(query).to_csv(folder / "gradients.csv", index=False)
    answer = questions.answers(tables.read(folder), folder)[5]
    assert answer.text.startswith("Not answered") and answer.table.empty


def test_costs_are_those_of_the_arms(tmp_path):
    answer = answers(tmp_path)[6]
    row = answer.table.set_index("arm").loc["averaged ensemble"]
    assert row.tolist() == ["4,000", "640,000", "80", "0", "0"]
    assert "averaged ensemble holds 4.00 times the parameters" in answer.text
    assert "calls the denoiser 4 times as often" in answer.text
    assert answer.text.startswith("Finetuning takes 4,000 steps an arm")


@pytest.mark.parametrize(
    ("two", "eight", "said"),
    [
        (0.5, 0.5, "no difference found between a cell and what it is compared with"),
        (0.3, 0.5, "2 (DeMe merged) better than 4"),
        (0.9, 0.3, "2 (DeMe merged) worse than 4, 8 (DeMe merged) better than 4"),
    ],
)
def test_cells_of_a_sweep_against_the_one_it_names(tmp_path, two, eight, said):
    records = synthetic.write(tmp_path / "records")
    fid = {"2": two, "4": 0.5, "8": eight}
    cells = dict.fromkeys(fid)
    synthetic.write_sweep(records, "ranges", ("merged",), cells=cells, fid=fid, against="4")
    answer = questions.answers(tables.read(records), records / "sweeps")[7]
    corrected = "97.5 % paired t intervals, Bonferroni over 2, exploratory), for these weights."
    assert f"N: lowest mean FID: {min(fid, key=fid.get)} (DeMe merged)" in answer.text or two == 0.5
    assert f"(not a test); {said} ({corrected}" in answer.text
    assert answer.table["cell"].tolist() == list(fid)
    compared = answer.table["FID compared"].tolist()
    assert compared[1] == "–" and all(text.endswith(" to 4") for text in compared[::2])
    assert "make sweep SWEEP=params/sweeps/cuts.yaml" in answer.text
    assert "sweeps/ranges.yaml" not in answer.text
