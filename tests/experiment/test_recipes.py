"""Recipes: a key changes with what the artefact is made of, and with nothing else."""

import inspect

import pytest

from deme_lib.experiment import recipes, stages
from deme_lib.experiment.arms import SEARCHES, present
from deme_lib.experiment.parameters import EXECUTION, Parameters, load

P = load("params/digits.yaml")
SHOW = {"experiment", "primary_decoupling", "primary_merging", "confidence"}
CHANGES = {
    "dataset": "someone/pictures",
    "pretrained": "someone/model",
    "model_channels": [8],
    "attention": True,
    "features": "inception",
    "second_features": "",
    "inception_weights": "weights.pth",
    "sampling_seeds": [5, 6],
    "merge_weights": "uniform",
    "primary_decoupling": ["merged - all_same"],
    "primary_merging": ["merged - one_scaled"],
    "precision": "bf16",
    "search_strategy": "grid",
    "timestep_spacing": "trailing",
    "device": "cpu",
    "experiment": "other",
    "runs_dir": "elsewhere",
    "allow_long": True,
    "channel_projection": False,
    "search_candidates": 9,
    "search_low": -0.1,
    "range_cut": "log-snr",
    "loss_weighting": "p2",
    "seeds": [1],
}
"""Another value of each parameter; numbers not listed here are changed by a rule."""


BESIDES = {
    "min_snr_gamma": load("params/digits.yaml", loss_weighting="min-snr"),
    "p2_gamma": load("params/digits.yaml", loss_weighting="p2"),
}
"""Parameters that count only beside another."""


def changed(name, value=None, p=P):
    before = getattr(p, name)
    if value is None:
        value = CHANGES.get(name)
    if value is None:
        value = before + 1 if isinstance(before, int) else before / 2
    assert value != before
    return Parameters(**p.model_dump() | {name: value})


def keys(p):
    return {label: recipe.key for label, recipe in recipes.everything(p).items()}


def moved(name, value=None):
    """Labels of the recipes whose key a change of one parameter moves."""
    p = BESIDES.get(name, P)
    before, after = keys(p), keys(changed(name, value, p))
    return {label for label in before | after if before.get(label) != after.get(label)}


@pytest.mark.parametrize("name", Parameters.model_fields)
def test_exactly_what_matters_is_in_the_keys(name):
    if name in EXECUTION | SHOW:
        assert not moved(name)
    else:
        assert moved(name)


def test_every_execution_parameter_exists():
    assert set(Parameters.model_fields) >= EXECUTION | SHOW


# what a change leaves alone

TRAINED = {"data", "baseline", "all-same", "all-plain"} | {
    f"{kind}-{k}of4" for kind in ("expert", "soup") for k in (1, 2, 3, 4)
}


def test_the_trained_are_all_there():
    assert set(keys(P)) >= TRAINED


SEARCH = [n for n in Parameters.model_fields if n.startswith("search_") and n != "search_images"]
AFTER_TRAINING = [
    *("merge_weights", "sampling_steps", "timestep_spacing", "samples", "sampling_seeds"),
    *("features", "second_features", "is_splits", "kid_subset_size", "acceptance_samples"),
]


@pytest.mark.parametrize("name", SEARCH + AFTER_TRAINING)
def test_what_comes_after_training_retrains_nothing(name):
    assert not moved(name) & TRAINED


@pytest.mark.parametrize("name", SEARCH)
def test_a_search_parameter_moves_all_searches_alike(name):
    assert moved(name) >= {f"search-{s}" for s in SEARCHES} | {"merged", "images-merged"}
    assert not moved(name) & {"images-merged_uniform", "images-routed", "acceptance"}


@pytest.mark.parametrize("name", ["is_splits", "kid_subset_size", "kid_subsets"])
def test_a_metric_s_parameter_moves_metrics_only(name):
    assert moved(name) == {"acceptance"} | {f"metrics-{arm.name}" for arm in present("none")}


@pytest.mark.parametrize("name", ["finetune_steps", "probability", "consistency_weight"])
def test_finetuning_leaves_the_baseline(name):
    found = moved(name)
    assert not found & {"data", "baseline", "reference", "acceptance", "images-pretrained"}
    assert {f"expert-{k}of4" for k in (1, 2, 3, 4)} <= found
    assert ("all-plain" in found) == (name == "finetune_steps")


def test_the_probability_is_the_experts_alone():
    assert not moved("probability") & {"all-same", "all-plain", "soup-1of4"}


@pytest.mark.parametrize("name", ["gradient_bins", "plane_points"])
def test_an_analysis_moves_its_own_artefact(name):
    gradients, planes = {"gradients", "gradients-merged"}, {"plane", "landscape"}
    assert moved(name) == (gradients if name == "gradient_bins" else planes)


def test_a_loss_weighting_adds_an_arm_and_moves_nothing_else():
    added = {"all-p2", "images-reweighted", "metrics-reweighted"}
    assert moved("loss_weighting") == added
    plain, weighted = (
        recipes.finetuned(BESIDES["p2_gamma"], m) for m in ("all_plain", "reweighted")
    )
    assert weighted[0].parameters == plain[0].parameters | {"loss_weighting": "p2", "p2_gamma": 1.0}


def test_another_cut_retrains_the_experts_alone():
    found = moved("range_cut")
    assert {"expert-1of4", "images-routed", "landscape", "range-losses"} <= found
    assert not found & {"baseline", "all-same", "all-plain", "soup-1of4", "images-soup"}


def test_training_seeds_are_experiments_of_their_own():
    p = load("params/digits.yaml", seeds=[3, 0])
    assert [q.seeds for q in p.per_seed()] == [[3], [0]] and p.seed == 3
    assert keys(p.per_seed()[1]) == keys(P)
    same = {label for label, key in keys(P).items() if keys(p)[label] == key}
    assert same == {"data", "reference"}


# the graph


def test_labels_and_keys_are_unique():
    found = recipes.everything(P)
    assert all(label == recipe.label for label, recipe in found.items())
    assert len({recipe.key for recipe in found.values()}) == len(found)


def test_upstream_comes_first_and_every_stage_exists():
    seen = set()
    for recipe in recipes.everything(P).values():
        assert {upstream.key for upstream in recipe.inputs.values()} <= seen
        assert recipe.stage in stages.STAGES
        seen.add(recipe.key)


def test_the_total_of_training_steps_is_the_same_for_experts_and_controls():
    families = {f: recipes.finetuned(P, f) for f in ("experts", "soup", "all_same", "all_plain")}
    totals = {sum(r.training_steps for r in family) for family in families.values()}
    assert totals == {4000}
    for family in families.values():
        assert all(r.parameters["steps"] == r.training_steps for r in family)


def test_techniques_are_equal_but_for_the_plain_control():
    names = ("consistency_weight", "channel_projection", "finetune_lr", "batch_size", "seed")

    def techniques(family):
        return [[r.parameters[n] for n in names] for r in recipes.finetuned(P, family)]

    assert techniques("experts") == techniques("soup") == techniques("all_same") * 4
    assert techniques("all_plain")[0][:2] == [0.0, False]
    assert techniques("all_plain")[0][2:] == techniques("all_same")[0][2:]


@pytest.mark.parametrize("weights", ["uniform", [0.1, 0.2, 0.3, 0.4]])
def test_given_weights_need_no_merge_search(weights):
    found = recipes.everything(changed("merge_weights", weights))
    assert "search-merge" in recipes.everything(P) and "search-merge" not in found
    assert {"search-scale", "search-soup", "search-single"} <= set(found)
    assert "search" not in found["merged"].inputs
    assert found["images-output_merge"].parameters["weights"] == weights
    assert found["images-one_scaled"].key == recipes.everything(P)["images-one_scaled"].key


def test_every_arm_of_experts_has_them_in_order():
    experts = [r.key for r in recipes.finetuned(P, "experts")]
    for arm in present("none"):
        inputs = recipes.images(P, arm).inputs
        members = [r.key for role, r in inputs.items() if role.startswith("member")]
        assert (members == experts) == (arm.members == "experts")


def test_a_pretrained_model_is_not_trained(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first = recipes.baseline(changed("pretrained", str(tmp_path)))
    assert first.stage == "load_baseline" and first.training_steps == 0
    (tmp_path / "config.json").write_text("{ }")
    assert recipes.baseline(changed("pretrained", str(tmp_path))).key != first.key


@pytest.mark.parametrize("stage", sorted(stages.STAGES))
def test_stages_are_described_by_recipes(stage):
    """Every stage is asked for by some experiment."""
    asked = {r.stage for p in (P, changed("pretrained")) for r in recipes.everything(p).values()}
    assert stage in asked and inspect.isfunction(stages.STAGES[stage])
