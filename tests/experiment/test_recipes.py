"""Recipes: a key changes with what the artefact is made of, and with nothing else."""

import pytest

from deme_lib.diffusion.data import DataError
from deme_lib.experiment import parameters, recipes, stages
from deme_lib.experiment.arms import ARMS, DEFAULT_ARMS, SEARCHES, arm_of
from deme_lib.experiment.schema import EXECUTION, Parameters

EVERY_ARM = [*ARMS, "soup@0.98"]
P = parameters.load("params/fashion8.yaml", arms=EVERY_ARM, loss_weighting="min-snr", seeds=[0])
SHOW = {"experiment", "primary_decoupling", "primary_merging", "confidence", "margin"}
TRAINED_HERE = {"model_channels", "layers_per_block", "attention", "pretrain_steps", "pretrain_lr"}
CHANGES = {
    "dataset": "someone/pictures",
    "pretrained": "someone/model",
    "model_channels": [8],
    "attention": True,
    "features": "inception",
    "second_features": "",
    "fid_reference": "train",
    "inception_weights": "weights.pth",
    "sampling_seeds": [5, 6],
    "seeds": [1],
    "arms": list(DEFAULT_ARMS),
    "merge_weights": "search",
    "primary_decoupling": ["soup - all_same"],
    "primary_merging": ["deme_merged - one_scaled"],
    "ema_decay": 0.99,
    "further_ema_decays": [0.98],
    "precision": "bf16",
    "search_low": -0.1,
    "timestep_spacing": "trailing",
    "device": "cpu",
    "experiment": "other",
    "runs_dir": "elsewhere",
    "figures_dir": "elsewhere",
    "channel_projection": False,
    "range_cut": "log-snr",
    "loss_weighting": "uncertainty",
    "acceptance_samples": 10_001,
    "confidence": 0.9,
}
"""Another value of each parameter; numbers not listed here are changed by a rule."""


def changed(name, value=None, p=P):
    before = getattr(p, name)
    if value is None:
        value = CHANGES.get(name)
    if value is None:
        value = before + 1 if isinstance(before, int) else before / 2
    assert value != before
    return Parameters(**p.model_dump() | {name: value})


def keys(p):
    return {recipe.label: recipe.key for recipe in recipes.everything(p).values()}


def moved(name, value=None, p=P):
    """Labels of the recipes whose key a change of one parameter moves."""
    if name in TRAINED_HERE:
        p = changed("pretrained", "", p)
    if name == "p2_gamma":
        p = changed("loss_weighting", "p2", p)
    before, after = keys(p), keys(changed(name, value, p))
    return {label for label in before | after if before.get(label) != after.get(label)}


@pytest.mark.parametrize("name", Parameters.model_fields)
def test_exactly_what_matters_is_in_the_keys(name):
    assert bool(moved(name)) == (name not in EXECUTION | SHOW)


# what a change leaves alone

FAMILIES = ("all_plain", "all_same", "soup", "soup_same", "plain", "deme")
TRAINED = {"data", "baseline"} | {r.label for f in FAMILIES for r in recipes.finetuned(P, f)}
SEARCH = [n for n in Parameters.model_fields if n.startswith("search_") and n != "search_images"]
AFTER_TRAINING = ("sampling_steps", "timestep_spacing", "samples", "sampling_seeds", "features")
AFTER_TRAINING += ("second_features", "fid_reference", "is_splits", "kid_subset_size", "arms")


@pytest.mark.parametrize("name", [*SEARCH, *AFTER_TRAINING, "acceptance_samples"])
def test_what_comes_after_training_retrains_nothing(name):
    added = {r.label for f in ("all_same", "soup_same") for r in recipes.finetuned(P, f)}
    assert not moved(name) & TRAINED - (added if name == "arms" else set())


@pytest.mark.parametrize("name", SEARCH)
def test_a_search_parameter_moves_all_searches_alike(name):
    assert moved(name) >= {f"search-{s}" for s in SEARCHES} | {"images-merged_searched"}
    assert not moved(name) & {"images-deme_merged", "images-deme_routed", "acceptance"}


@pytest.mark.parametrize("name", ["finetune_steps", "probability", "consistency_weight"])
def test_finetuning_leaves_the_baseline(name):
    found = moved(name)
    assert not found & {"data", "baseline", "reference", "acceptance", "images-pretrained"}
    assert {f"deme-{k}of4" for k in (1, 2, 3, 4)} <= found
    assert ({"all-plain", "plain-1of4", "soup-1of4"} <= found) == (name == "finetune_steps")
    assert ("all-same" in found) == (name != "probability")


def test_another_cut_retrains_the_experts_alone():
    found = moved("range_cut")
    assert {"plain-1of4", "deme-1of4", "images-deme_routed", "landscape", "gate"} <= found
    assert not found & {"baseline", "all-same", "all-plain", "soup-1of4", "images-soup"}


def test_another_weighting_moves_its_arm_alone():
    found = {label for label in moved("loss_weighting") if not label.startswith("all-")}
    assert found == {"images-reweighted", "metrics-reweighted"}
    plain, weighted = (recipes.finetuned(P, m)[0] for m in ("all_plain", "reweighted"))
    added = {"loss_weighting": "min-snr", "min_snr_gamma": 5.0}
    assert weighted.parameters == plain.parameters | added


def test_training_seeds_share_the_data_alone():
    other = keys(changed("seeds"))
    same = {label for label, key in keys(P).items() if other[label] == key}
    assert same == {"data", "reference", "floor"}


def test_presets_of_the_same_design_share_their_stages():
    """The long preset differs from the default in seeds and added arms only."""
    short, long = (parameters.load(f"params/{n}.yaml") for n in ("fashion8", "fashion8-full"))
    differ = {n for n, v in short.results().items() if long.results()[n] != v}
    assert differ == {"experiment", "seeds", "arms"}
    assert set(short.seeds) < set(long.seeds) and set(short.arms) < set(long.arms)
    ours, theirs = keys(short.per_seed()[0]), keys(long.per_seed()[0])
    assert ours.items() <= theirs.items()


# the graph


def test_names_are_unique_and_upstream_comes_first():
    found, seen = recipes.everything(P), set()
    assert len({recipe.label for recipe in found.values()}) == len(found)
    for name, recipe in found.items():
        assert name == recipe.name and recipe.job and recipe.stage in stages.STAGES
        assert {upstream.name for upstream in recipe.inputs.values()} <= seen
        seen.add(name)


def test_jobs_are_a_graph():
    """A job must not wait for one that waits for it: Snakemake runs them whole."""
    needs: dict[str, set[str]] = {}
    for recipe in recipes.everything(P).values():
        upstream = {r.job for r in recipe.inputs.values()} - {recipe.job}
        needs.setdefault(recipe.job, set()).update(upstream)
    while needs:
        free = [job for job, before in needs.items() if not before & needs.keys()]
        assert free, needs
        for job in free:
            del needs[job]


def test_every_family_takes_the_same_number_of_steps():
    families = {f: recipes.finetuned(P, f) for f in (*FAMILIES, "reweighted")}
    assert {sum(r.training_steps for r in family) for family in families.values()} == {4000}
    for family in families.values():
        assert all(r.parameters["steps"] == r.training_steps for r in family)


def test_families_differ_in_what_their_names_say():
    def techniques(family):
        names = ("consistency_weight", "channel_projection", "probability", "n_ranges")
        return [[r.parameters[n] for n in names] for r in recipes.finetuned(P, family)]

    assert techniques("deme") == [[1.0, True, 0.3, 4]] * 4
    assert techniques("plain") == [[0.0, False, 0.0, 4]] * 4
    assert techniques("soup_same") == techniques("all_same") * 4 == [[1.0, True, 0.0, 1]] * 4
    assert techniques("soup") == techniques("all_plain") * 4 == [[0.0, False, 0.0, 1]] * 4
    streams = {r.parameters["purpose"] for f in FAMILIES for r in recipes.finetuned(P, f)}
    assert len(streams) == len(TRAINED) - 2


def test_every_arm_has_its_members_in_order_and_its_weights():
    for name in EVERY_ARM:
        arm = arm_of(name, P.further_ema_decays)
        inputs = recipes.images(P, arm).inputs
        members = [r.label for role, r in inputs.items() if role.startswith("member")]
        assert members == [r.label for r in recipes.finetuned(P, arm.members)]
        assert ("search" in inputs) == (arm.weights in SEARCHES)
    given = changed("merge_weights", [0.1, 0.2, 0.3, 0.4])
    assert recipes.merged(given).parameters["weights"] == [0.1, 0.2, 0.3, 0.4]
    assert "search" in recipes.merged(changed("merge_weights")).inputs


@pytest.mark.parametrize("name", ["soup@0.5", "pretrained@0.98", "all_checkpoints@0", "sou"])
def test_an_arm_that_there_is_not_is_refused(name):
    with pytest.raises(ValueError, match="arm"):
        arm_of(name, P.further_ema_decays)


def test_a_seed_without_a_shipped_model_is_refused_before_anything_runs():
    p = parameters.load("params/fashion8.yaml", seeds=[12345])
    with pytest.raises(DataError, match=r"seed 12345, only for seeds \[0, 1"):
        recipes.everything(p)


def test_every_stage_is_asked_for():
    asked = {
        r.stage for p in (P, changed("pretrained", "")) for r in recipes.everything(p).values()
    }
    assert asked == set(stages.STAGES)
