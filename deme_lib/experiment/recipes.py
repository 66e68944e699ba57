"""What each artefact is made from: the experiment as a graph of recipes. No torch, no work.

``stages`` holds the function behind each recipe; ``Recipe.parameters`` is all that it may read.
Every function takes the parameters of one training seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from deme_lib import ROOT
from deme_lib.diffusion.data import classifier_hash, fingerprint, is_local
from deme_lib.experiment.arms import SEARCHES, Arm, arm_of, search_of
from deme_lib.experiment.parameters import ParameterError
from deme_lib.experiment.schema import Parameters
from deme_lib.experiment.store import Recipe

ADAM = ("batch_size", "adam_beta1", "adam_beta2", "weight_decay", "clip_norm", "ema_decay")
TRAINING = (*ADAM, "further_ema_decays", "precision", "seed", "loss_images")
SAMPLING = ("sampling_steps", "timestep_spacing")
CUT = ("n_ranges", "range_cut")
SHIPPED = "fashion8"
FEW = 20_000  # images of an arm, above which each arm is a job of its own


def data(p: Parameters) -> Recipe:
    """The three roles of the images."""
    names = ("train_images", "search_images", "test_images", "split_seed", "image_size")
    parameters = {**p.pick(*names), **_sources(p, "dataset"), "hash": _hash(p, p.dataset)}
    return Recipe("data", "data", parameters, {}, locations=p.pick("dataset"), job="data")


def reference(p: Parameters) -> Recipe:
    """Features of the real images of every role."""
    parameters, locations = _features(p), p.pick("inception_weights")
    inputs = {"data": data(p)}
    return Recipe("reference", "reference", parameters, inputs, locations=locations, job="data")


def floor(p: Parameters) -> Recipe:
    """What real images score that no model trained on."""
    names = ("samples", "fid_reference", "is_splits", "kid_subset_size", "kid_subsets")
    parameters = {**p.pick(*names), **_features(p)}
    inputs = {"data": data(p), "reference": reference(p)}
    locations = p.pick("inception_weights")
    return Recipe("floor", "floor", parameters, inputs, locations=locations, job="data")


def baseline(p: Parameters) -> Recipe:
    """The pretrained model: shipped, loaded, or trained here."""
    if p.pretrained:
        names = ("num_train_timesteps", "loss_images", "seed")
        source = _shipped(p) if p.pretrained == SHIPPED else p.pretrained
        loaded = {**p.pick(*names), **_sources(p, "pretrained"), "hash": _hash(p, source)}
        inputs, locations = {"data": data(p)}, p.pick("pretrained")
        return Recipe("load_baseline", "baseline", loaded, inputs, locations=locations, job="data")
    names = ("model_channels", "layers_per_block", "attention", "num_train_timesteps")
    steps = ("pretrain_steps", "pretrain_lr", "finetune_lr")
    return Recipe(
        "train_baseline",
        "baseline",
        p.pick(*names, *steps, *TRAINING),
        {"data": data(p)},
        training_steps=p.pretrain_steps,
        job=f"baseline-{p.seed}",
    )


def _shipped(p: Parameters) -> str:
    """The folder of the shipped pretrained model of a training seed."""
    folder = ROOT / "deme_lib" / "shipped" / "pretrained" / SHIPPED
    if not (folder / f"seed-{p.seed}").is_dir():
        seeds = sorted(int(path.name.removeprefix("seed-")) for path in folder.glob("seed-*"))
        raise ParameterError(
            f"no pretrained model of {SHIPPED} ships for seed {p.seed}, only for seeds {seeds}: "
            'take those, or set pretrained to "" to train one'
        )
    return str(folder / f"seed-{p.seed}")


def finetuned(p: Parameters, members: str) -> list[Recipe]:
    """A family of finetuned copies; see ``arms.Arm`` for the families."""
    n, one = p.n_ranges, p.finetune_steps
    if members == "none":
        return []
    if members in ("plain", "deme"):
        techniques = members == "deme"
        labels = [f"{members}-{k + 1}of{n}" for k in range(n)]
        return [_finetune(p, members, s, one, techniques, k) for k, s in enumerate(labels)]
    if members in ("soup", "soup_same"):
        techniques, name = members == "soup_same", members.replace("_", "-")
        return [_finetune(p, members, f"{name}-{k + 1}of{n}", one, techniques) for k in range(n)]
    if members == "reweighted":
        return [_reweighted(p)]
    return [_finetune(p, members, members.replace("_", "-"), n * one, members == "all_same")]


def _reweighted(p: Parameters) -> Recipe:
    """The plain control with its loss re-weighted: the same draws, so that nothing else differs."""
    (plain,) = finetuned(p, "all_plain")
    used = {"min-snr": ("min_snr_gamma",), "p2": ("p2_gamma",)}.get(p.loss_weighting, ())
    parameters = plain.parameters | p.pick("loss_weighting", *used)
    if p.loss_weighting == "uncertainty":
        parameters["n_tasks"] = p.n_ranges
    label = f"all-{p.loss_weighting.replace('+', '-')}"
    return replace(plain, label=label, parameters=parameters, job=f"reweighted-{p.seed}")


def _finetune(
    p: Parameters,
    family: str,
    label: str,
    steps: int,
    techniques: bool,
    range_index: int | None = None,
) -> Recipe:
    """One finetuned copy; without a range it trains on all timesteps."""
    ranged = range_index is not None
    return Recipe(
        "finetune",
        label,
        {
            **p.pick("finetune_lr", *TRAINING),
            "purpose": label,
            "steps": steps,
            "checkpoints": steps // p.finetune_steps,
            "n_ranges": p.n_ranges if ranged else 1,
            "range_cut": p.range_cut if ranged else "uniform",
            "range_index": range_index or 0,
            "probability": p.probability if ranged and techniques else 0.0,
            "consistency_weight": p.consistency_weight if techniques else 0.0,
            "channel_projection": p.channel_projection and techniques,
        },
        {"data": data(p), "baseline": baseline(p)},
        training_steps=steps,
        job=f"{family}-{p.seed}",
    )


def search(p: Parameters, name: str) -> Recipe:
    """One of ``SEARCHES``, all under one strategy and budget."""
    budget = ("search_strategy", "search_low", "search_high", "search_step", "search_losses")
    scoring = ("search_candidates", "search_samples", "search_streams", "loss_images", "seed")
    images = p.search_candidates * p.search_samples * p.search_streams
    return Recipe(
        "search",
        f"search-{name}",
        {**p.pick(*budget, *scoring, *SAMPLING), **_features(p), "single": name == "single"},
        {"data": data(p), "reference": reference(p), **_models(p, SEARCHES[name])},
        locations=p.pick("inception_weights"),
        denoiser_calls=p.search_losses * p.loss_images + images * p.sampling_steps,
        job=f"search-{name}-{p.seed}",
    )


def _models(p: Parameters, members: str) -> dict[str, Recipe]:
    """The pretrained model and a family, as inputs."""
    family = {f"member{k}": recipe for k, recipe in enumerate(finetuned(p, members))}
    return {"baseline": baseline(p), **family}


def _denoiser(p: Parameters, arm: Arm) -> tuple[dict, dict[str, Recipe]]:
    """Parameters and inputs from which ``stages`` builds an arm's denoiser."""
    inputs = _models(p, arm.members)
    if name := search_of(arm, p.merge_weights):
        inputs["search"] = search(p, name)
    weights = p.merge_weights if arm.weights == "preset" else arm.weights
    parameters = {"combine": arm.combine, "weights": weights, "checkpoints": arm.checkpoints}
    parameters["ema_decay"] = arm.ema_decay
    if arm.combine == "routed":
        parameters |= p.pick(*CUT)
    return parameters, inputs


def merged(p: Parameters) -> Recipe:
    """The merged model as a diffusers pipeline."""
    parameters, inputs = _denoiser(p, arm_of("deme_merged"))
    return Recipe("merged", "merged", parameters, inputs, job=f"look-{p.seed}")


def gate(p: Parameters) -> Recipe:
    """Test loss per range of the experts against the all-timestep model, before any image."""
    families = ("all_plain", "plain", "deme")
    inputs = {f"{f}{k}": r for f in families for k, r in enumerate(finetuned(p, f))}
    inputs = {"data": data(p), "baseline": baseline(p), **inputs}
    job = f"evaluate-{p.seed}"
    return Recipe("gate", "gate", p.pick(*CUT, "loss_draws"), inputs, job=job)


def images(p: Parameters, arm: Arm) -> Recipe:
    """An arm's images for every sampling seed, its losses and its cost."""
    parameters, inputs = _denoiser(p, arm)
    names = ("samples", "sampling_seeds", "seed", "loss_draws", "loss_bins", *SAMPLING)
    calls = p.n_ranges if arm.combine == "outputs" else 1
    count = p.samples * len(p.sampling_seeds)
    return Recipe(
        "images",
        f"images-{_file_name(arm)}",
        {"arm": arm.name, **parameters, **p.pick(*names)},
        {"data": data(p), **inputs},
        denoiser_calls=calls * count * p.sampling_steps,
        job=f"evaluate-{p.seed}" + (f"-{_file_name(arm)}" if count > FEW else ""),
    )


def metrics(p: Parameters, arm: Arm) -> Recipe:
    """An arm's metrics per sampling seed."""
    names = ("samples", "sampling_seeds", "is_splits", "kid_subset_size", "kid_subsets")
    made = images(p, arm)
    return Recipe(
        "metrics",
        f"metrics-{_file_name(arm)}",
        {"arm": arm.name, **p.pick(*names, "sampling_steps", "fid_reference"), **_features(p)},
        {"data": data(p), "reference": reference(p), "images": made},
        locations=p.pick("inception_weights"),
        job=made.job,
    )


def _file_name(arm: Arm) -> str:
    return arm.name.replace("@", "-ema-")


def acceptance(p: Parameters) -> Recipe:
    """Whether the metric holds still and ranks alike, before any arm is judged."""
    names = ("acceptance_samples", "samples", "seed", "fid_reference", *SAMPLING)
    return Recipe(
        "acceptance",
        "acceptance",
        {**p.pick(*names), **_features(p)},
        {"data": data(p), "reference": reference(p), "baseline": baseline(p)},
        locations=p.pick("inception_weights"),
        denoiser_calls=(p.acceptance_samples + 2 * p.samples) * p.sampling_steps,
        job=f"acceptance-{p.seed}",
    )


def gradients(p: Parameters, after_merging: bool = False) -> Recipe:
    """Fig. 1a, for the pretrained model or the merged one."""
    inputs, label, job = {"data": data(p), "baseline": baseline(p)}, "gradients", "look-baseline"
    if after_merging:
        inputs, label, job = {**inputs, "merged": merged(p)}, "gradients-merged", "look"
    parameters = p.pick("gradient_bins", "seed")
    return Recipe("gradients", label, parameters, inputs, job=f"{job}-{p.seed}")


def activations(p: Parameters) -> Recipe:
    """Fig. 2: where the experts' activations differ from the pretrained model's."""
    inputs = {"data": data(p), **_models(p, "deme")}
    parameters = p.pick("seed", *CUT)
    return Recipe("activations", "activations", parameters, inputs, job=f"look-{p.seed}")


def landscape(p: Parameters) -> Recipe:
    """Fig. 4: held-out loss around the pretrained weights, for all timesteps and per range."""
    return Recipe(
        "landscape",
        "landscape",
        p.pick("plane_points", "loss_images", "seed", *CUT),
        {"data": data(p), "baseline": baseline(p)},
        denoiser_calls=(p.plane_points | 1) ** 2 * p.loss_images,
        job=f"look-baseline-{p.seed}",
    )


def task_vectors(p: Parameters) -> Recipe:
    """Fig. 6b and the norms and cosines of the experts' task vectors."""
    inputs = _models(p, "deme")
    return Recipe("task_vectors", "task-vectors", {}, inputs, job=f"look-{p.seed}")


def range_losses(p: Parameters) -> Recipe:
    """Held-out loss of the pretrained model, each expert and the plain control in each range."""
    members = [
        recipe for family in ("plain", "deme", "all_plain") for recipe in finetuned(p, family)
    ]
    inputs = {f"member{k}": recipe for k, recipe in enumerate(members)}
    parameters = {"labels": ["pretrained", *(r.label for r in members)]}
    parameters |= p.pick("loss_images", *CUT)
    inputs = {"data": data(p), "baseline": baseline(p), **inputs}
    return Recipe("range_losses", "range-losses", parameters, inputs, job=f"look-{p.seed}")


def plane(p: Parameters) -> Recipe:
    """Fig. 6a: held-out loss over the weights of the first and the last expert."""
    return Recipe(
        "plane",
        "plane",
        p.pick("plane_points", "loss_images"),
        {"data": data(p), **_models(p, "deme")},
        denoiser_calls=p.plane_points**2 * p.loss_images,
        job=f"look-{p.seed}",
    )


def judged(p: Parameters) -> list[Recipe]:
    """What one training seed is judged by: the floor, the gate and every arm's metrics."""
    arms = [arm_of(name, p.further_ema_decays) for name in p.arms]
    return [floor(p), gate(p), *(metrics(p, arm) for arm in arms)]


def looked_at(p: Parameters) -> list[Recipe]:
    """What the figures look at, of one training seed."""
    return [
        acceptance(p),
        gradients(p),
        landscape(p),
        range_losses(p),
        task_vectors(p),
        plane(p),
        activations(p),
        gradients(p, after_merging=True),
    ]


def everything(p: Parameters, looks: bool = True) -> dict[str, Recipe]:
    """All recipes of one training seed by name, upstream first."""
    found: dict[str, Recipe] = {}
    for recipe in [*(looked_at(p) if looks else []), *judged(p)]:
        found |= {r.name: r for r in upstream_first(recipe) if r.name not in found}
    return found


def upstream_first(recipe: Recipe) -> list[Recipe]:
    """A recipe after all that it is made from, each once."""
    found: dict[str, Recipe] = {}
    for upstream in recipe.inputs.values():
        found |= {r.name: r for r in upstream_first(upstream) if r.name not in found}
    return [*found.values(), recipe]


def _features(p: Parameters) -> dict:
    return {
        **p.pick("features", "second_features"),
        "classifiers": [
            _hash(p, name, classifier_hash) for name in (p.features, p.second_features)
        ],
        **_sources(p, "inception_weights"),
        "inception_hash": _hash(p, p.inception_weights) if p.inception_weights else "",
    }


def _hash(p: Parameters, source: str, of: Callable[[str], str] = fingerprint) -> str:
    """The hash of data or weights, looked at once for an experiment."""
    if source not in p._hashes:
        p._hashes[source] = of(source)
    return p._hashes[source]


def _sources(p: Parameters, *names: str) -> dict[str, str]:
    """Parameters that may name local files: "local" for the key, where the content stands."""
    given = p.pick(*names)
    return {n: "local" if is_local(source) else source for n, source in given.items()}
