"""From parameters to artefacts: what a key holds, what is shared, what runs side by side."""

import pytest
from tiny import experiment

from deme_lib.experiment import arms, graph, parameters
from deme_lib.experiment.arms import ARMS
from deme_lib.experiment.schema import EXECUTION

P = parameters.load("params/fashion8.yaml").per_seed()[0]


def names(p):
    return {a.name for made in graph.jobs(p, True).values() for a in made}


def changed(**changes):
    return parameters.load("params/fashion8.yaml", **changes).per_seed()[0]


def test_n_ranges_reaches_the_stage_as_its_own_range():
    experts = graph.experts(changed(n_ranges=8))
    assert [e.arguments["own_range"] for e in experts] == [
        [125 * k, 125 * k + 125] for k in range(8)
    ]
    assert [e.arguments["steps"] for e in experts] == [500] * 8
    assert [e.label for e in experts] == [f"deme-{k}of8" for k in range(1, 9)]


def test_families_differ_in_ranges_and_techniques_alone():
    everywhere, first = [0, 1000], [0, 250]
    expected = {
        arms.ALL_PLAIN: (everywhere, 4000, 0.0, 0.0, False),
        arms.SOUP: (everywhere, 1000, 0.0, 0.0, False),
        arms.PLAIN: (first, 1000, 0.0, 0.0, False),
        arms.DEME: (first, 1000, 0.3, 1.0, True),
    }
    looked = ("own_range", "steps", "probability", "consistency_weight", "channel_projection")
    for family, values in expected.items():
        arguments = graph.copies(P, family)[0].arguments
        assert tuple(arguments[name] for name in looked) == values, family.name
        others = arguments.keys() - {*looked, "purpose"}
        assert all(
            arguments[n] == graph.experts(P)[0].arguments[n] for n in others - {"data", "baseline"}
        )


def test_a_weighted_control_differs_from_the_plain_one_in_its_weights_alone():
    p = changed(loss_weighting="min-snr", arms=["reweighted"])
    (plain,), (other,), (balanced,) = (
        graph.copies(p, family) for family in (arms.ALL_PLAIN, arms.REWEIGHTED, arms.BALANCED)
    )
    assert plain.arguments["purpose"] == "all-plain"
    extra = {"loss_weighting": "min-snr", "min_snr_gamma": 5.0}
    assert other.arguments == plain.arguments | extra
    assert balanced.arguments == plain.arguments | {"loss_weighting": "balanced", "n_tasks": 4}


def test_a_distilled_copy_is_taught_by_the_plain_experts_of_its_job():
    p = changed(arms=["plain_routed", "distilled"])
    (copy,) = graph.copies(p, arms.DISTILLED)
    assert copy.arguments["teachers"] == graph.copies(p, arms.PLAIN)
    jobs = graph.jobs(p, False)
    (made,) = (made for made in jobs.values() if copy in made)
    assert all(a in made[: made.index(copy)] for a in graph.copies(p, arms.PLAIN))
    assert len(graph.jobs(p, False, fine=True)) == len(jobs) + 4 + 2


def test_the_last_expert_is_the_plain_one_of_the_last_range():
    assert [a.name for a in graph.copies(P, arms.LAST)] == [graph.copies(P, arms.PLAIN)[-1].name]


@pytest.mark.parametrize("name", sorted(EXECUTION - {"seeds", "again", "figures_dir"}))
def test_no_execution_parameter_is_in_a_key(name):
    value = {"device": "cpu", "runs_dir": "elsewhere"}.get(name, 7)
    assert names(changed(**{name: value})) == names(P)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"margin": 0.1, "exploratory": []}, {"data", "baseline", "deme-1of4", "scores-averaged"}),
        ({"kid_subsets": 3}, {"data", "reference", "deme-1of4", "images-averaged"}),
        ({"sampling_steps": 10}, {"data", "reference", "baseline", "deme-1of4", "plane"}),
        ({"probability": 0.1}, {"baseline", "plain-1of4", "images-pretrained", "scores-soup"}),
        ({"finetune_lr": 1e-4}, {"data", "reference", "floor", "images-pretrained"}),
    ],
)
def test_what_a_parameter_does_not_touch_is_not_made_again(change, kept):
    before = {n.rpartition("-")[0]: n for n in names(P)}
    after = {n.rpartition("-")[0]: n for n in names(changed(**change))}
    same = {label for label in before if before[label] == after.get(label)}
    assert kept <= same
    assert "margin" in change or len(same) < len(before)


def test_cells_share_what_is_equal(tmp_path):
    cells = [{"cell": "default"}, {"cell": "p = 1", "probability": 1.0, "arms": ["deme_merged"]}]
    p = experiment(tmp_path, cells=cells, arms=["soup", "deme_merged"], base="soup").per_seed()[0]
    assert list(p.rows()) == [
        ("default", "pretrained"),
        ("default", "soup"),
        ("default", "deme_merged"),
        ("p = 1", "deme_merged"),
    ]
    jobs = graph.jobs(p, False, fine=True)
    assert len([name for name in jobs if name.startswith("soup-")]) == 2
    assert len([name for name in jobs if name.startswith("deme-")]) == 4
    assert len([name for name in jobs if name.startswith("scores-")]) == 4


@pytest.mark.parametrize(("fine", "count"), [(True, 2 + 14 + 9 + 1), (False, 2 + 6 + 1)])
def test_jobs_hold_everything_and_every_upstream_artefact_has_a_maker(fine, count):
    jobs = graph.jobs(P, True, fine)
    made = [a.name for found in jobs.values() for a in found]
    assert {u.name for found in jobs.values() for a in found for u in a.upstream()} <= {*made}
    assert graph.floor(P).name in made and len(made) == len({*made}) and len(jobs) == count


def test_weights_are_given_to_the_arm_that_takes_them():
    p = changed(merge_weights=[0.1, 0.1, 0.2, 0.5])
    assert graph.images(p, ARMS["deme_merged"]).arguments["weights"] == [0.1, 0.1, 0.2, 0.5]
    assert graph.images(p, ARMS["soup"]).arguments["weights"] is None
    p = changed(merge_weights="search")
    assert graph.images(p, ARMS["deme_merged"]).arguments["weights"].name == graph.search(p).name


def test_a_model_in_an_absolute_folder_is_a_user_s(tmp_path):
    found = graph.baseline(experiment(tmp_path, pretrained=str(tmp_path)).per_seed()[0])
    assert found.arguments["pretrained"].name == str(tmp_path)
