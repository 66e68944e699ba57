"""What each artefact is made from: the experiment as a graph of recipes. No torch, no work.

``stages`` holds the function behind each recipe; ``Recipe.parameters`` is all that it may read.
"""

from __future__ import annotations

from dataclasses import replace

from deme_lib.diffusion.data import classifier_hash, fingerprint, is_local
from deme_lib.experiment.arms import ARMS, SEARCHES, Arm, present, search_of
from deme_lib.experiment.parameters import Parameters
from deme_lib.experiment.store import Recipe

ADAM = ("batch_size", "adam_beta1", "adam_beta2", "weight_decay", "clip_norm", "ema_decay")
TRAINING = (*ADAM, "precision", "seed")


def data(p: Parameters) -> Recipe:
    """The three roles of the images."""
    names = ("dataset", "train_images", "search_images", "test_images", "split_seed")
    parameters = {
        **p.pick(*names),
        **p.pick_changed("image_size"),
        **_sources(p, "dataset"),
        "hash": fingerprint(p.dataset),
    }
    return Recipe("data", "data", parameters, {}, locations=p.pick("dataset"))


def reference(p: Parameters) -> Recipe:
    """Features of the train and test images."""
    return Recipe(
        "reference", "reference", _features(p), {"data": data(p)}, locations=_weights_file(p)
    )


def baseline(p: Parameters) -> Recipe:
    """The pretrained model: trained here, or loaded."""
    if p.pretrained:
        loaded = {
            **p.pick("num_train_timesteps", "loss_draws"),
            **_sources(p, "pretrained"),
            "hash": fingerprint(p.pretrained),
        }
        locations = p.pick("pretrained")
        return Recipe("load_baseline", "baseline", loaded, {"data": data(p)}, locations=locations)
    names = ("model_channels", "layers_per_block", "num_train_timesteps", "init_roundings")
    steps = ("pretrain_steps", "pretrain_lr", "finetune_lr", "loss_draws")
    return Recipe(
        "train_baseline",
        "baseline",
        {**p.pick(*names, *steps, *TRAINING), **p.pick_changed("attention")},
        {"data": data(p)},
        training_steps=p.pretrain_steps,
    )


def finetuned(p: Parameters, members: str) -> list[Recipe]:
    """A family of finetuned copies: experts, soup, or a control of one copy."""
    n, one = p.n_ranges, p.finetune_steps
    if members == "experts":
        return [_finetune(p, f"expert-{k + 1}of{n}", one, range_index=k) for k in range(n)]
    if members == "soup":
        return [_finetune(p, f"soup-{k + 1}of{n}", one) for k in range(n)]
    if members == "all_same":
        return [_finetune(p, "all-same", n * one)]
    if members == "all_plain":
        return [_finetune(p, "all-plain", n * one, techniques=False)]
    if members == "reweighted":
        return [_reweighted(p)]
    return []


def _reweighted(p: Parameters) -> Recipe:
    """The plain control with its loss re-weighted: the same draws, so that nothing else differs."""
    plain = _finetune(p, "all-plain", p.n_ranges * p.finetune_steps, techniques=False)
    used = {"min-snr": ("min_snr_gamma",), "p2": ("p2_gamma",)}.get(p.loss_weighting, ())
    weighting = p.pick("loss_weighting", *used)
    if p.loss_weighting == "uncertainty":
        weighting["n_tasks"] = p.n_ranges
    parameters = plain.parameters | weighting
    return replace(plain, label=f"all-{p.loss_weighting.replace('+', '-')}", parameters=parameters)


def _finetune(
    p: Parameters, label: str, steps: int, range_index: int | None = None, techniques: bool = True
) -> Recipe:
    """One finetuned copy; without a range it trains on all timesteps."""
    cut = p.pick_changed("range_cut") if range_index is not None else {}
    return Recipe(
        "finetune",
        label,
        {
            **p.pick("finetune_lr", "loss_draws", *TRAINING),
            "purpose": label,
            "steps": steps,
            "n_ranges": p.n_ranges if range_index is not None else 1,
            "range_index": range_index or 0,
            "probability": p.probability if range_index is not None else 0.0,
            "consistency_weight": p.consistency_weight if techniques else 0.0,
            "channel_projection": p.channel_projection and techniques,
            **cut,
        },
        {"data": data(p), "baseline": baseline(p)},
        training_steps=steps,
    )


def search(p: Parameters, name: str) -> Recipe:
    """One of ``SEARCHES``, all under one strategy and budget."""
    members = {"merge": "experts", "single": "experts", "soup": "soup", "scale": "all_same"}[name]
    budget = ("search_strategy", "search_low", "search_high", "search_step", "search_losses")
    scoring = ("search_candidates", "search_samples", "loss_draws", "seed")
    losses = p.search_losses * p.search_images * p.loss_draws
    return Recipe(
        "search",
        f"search-{name}",
        {**p.pick(*budget, *scoring, *SAMPLING), **_features(p), "single": name == "single"},
        {"data": data(p), "reference": reference(p), **_models(p, members)},
        locations=_weights_file(p),
        denoiser_calls=losses + p.search_candidates * p.search_samples * p.sampling_steps,
    )


SAMPLING = ("sampling_steps", "timestep_spacing")


def _models(p: Parameters, members: str) -> dict[str, Recipe]:
    """The pretrained model and a family, as inputs."""
    family = {f"member{k}": recipe for k, recipe in enumerate(finetuned(p, members))}
    return {"baseline": baseline(p), **family}


def _denoiser(p: Parameters, arm: Arm) -> tuple[dict, dict[str, Recipe]]:
    """Parameters and inputs from which ``stages`` builds an arm's denoiser."""
    inputs = _models(p, arm.members)
    name = search_of(arm, p.merge_weights)
    if name is not None:
        inputs["search"] = search(p, name)
    weights: str | list[float] = arm.weights
    if arm.weights == "preset":
        weights = p.merge_weights
    parameters = {"combine": arm.combine, "weights": weights}
    if arm.combine == "routed":
        parameters |= p.pick("n_ranges") | p.pick_changed("range_cut")
    return parameters, inputs


def merged(p: Parameters) -> Recipe:
    """The merged model as a diffusers pipeline."""
    parameters, inputs = _denoiser(p, ARMS["merged"])
    return Recipe("merged", "merged", parameters, inputs)


def images(p: Parameters, arm: Arm) -> Recipe:
    """An arm's images for every sampling seed, its losses and its cost."""
    parameters, inputs = _denoiser(p, arm)
    names = ("samples", "sampling_seeds", "loss_draws", "loss_bins", *SAMPLING)
    members = len(inputs) - 1 if arm.combine == "outputs" else 1
    return Recipe(
        "images",
        f"images-{arm.name}",
        {**parameters, **p.pick(*names)},
        {"data": data(p), **inputs},
        denoiser_calls=members * p.samples * len(p.sampling_seeds) * p.sampling_steps,
    )


def metrics(p: Parameters, arm: Arm) -> Recipe:
    """An arm's metrics per sampling seed."""
    names = ("is_splits", "kid_subset_size", "kid_subsets", "samples", "sampling_seeds")
    return Recipe(
        "metrics",
        f"metrics-{arm.name}",
        {**p.pick(*names, "sampling_steps"), **_features(p)},
        {"data": data(p), "reference": reference(p), "images": images(p, arm)},
        locations=_weights_file(p),
    )


def acceptance(p: Parameters) -> Recipe:
    """Whether the metric holds still and ranks alike, before any arm is judged."""
    names = ("acceptance_samples", "samples", "pretrain_steps", "seed")
    reals = ("is_splits", "kid_subset_size", "kid_subsets")
    total = p.acceptance_samples + (0 if p.pretrained else 2 * p.samples)
    return Recipe(
        "acceptance",
        "acceptance",
        {**p.pick(*names, *reals, *SAMPLING), **_sources(p, "pretrained"), **_features(p)},
        {"data": data(p), "reference": reference(p), "baseline": baseline(p)},
        locations=_weights_file(p),
        denoiser_calls=total * p.sampling_steps,
    )


def gradients(p: Parameters, after_merging: bool = False) -> Recipe:
    """Fig. 1a, for the pretrained model or the merged one."""
    inputs = {"data": data(p), "baseline": baseline(p)}
    label = "gradients"
    if after_merging:
        inputs, label = {**inputs, "merged": merged(p)}, "gradients-merged"
    return Recipe("gradients", label, p.pick("gradient_bins", "seed"), inputs, version=2)


def activations(p: Parameters) -> Recipe:
    """Fig. 2: where the experts' activations differ from the pretrained model's."""
    parameters = {**p.pick("seed"), **p.pick_changed("range_cut")}
    inputs = {"data": data(p), **_models(p, "experts")}
    return Recipe("activations", "activations", parameters, inputs, version=2)


def landscape(p: Parameters) -> Recipe:
    """Fig. 4: held-out loss around the pretrained weights, for all timesteps and per range."""
    names = ("plane_points", "n_ranges", "loss_draws", "seed")
    return Recipe(
        "landscape",
        "landscape",
        {**p.pick(*names), **p.pick_changed("range_cut")},
        {"data": data(p), "baseline": baseline(p)},
        denoiser_calls=(p.plane_points | 1) ** 2 * p.search_images * p.loss_draws,
    )


def task_vectors(p: Parameters) -> Recipe:
    """Fig. 6b and the norms and cosines of the experts' task vectors."""
    return Recipe("task_vectors", "task-vectors", {}, _models(p, "experts"))


def range_losses(p: Parameters) -> Recipe:
    """Held-out loss of the pretrained model, each expert and each control in each range."""
    families = ("experts", "all_same", "all_plain")
    members = [recipe for family in families for recipe in finetuned(p, family)]
    inputs = {f"member{k}": recipe for k, recipe in enumerate(members)}
    parameters = {"labels": ["pretrained", *(r.label for r in members)]}
    return Recipe(
        "range_losses",
        "range-losses",
        {**parameters, **p.pick("n_ranges", "loss_draws"), **p.pick_changed("range_cut")},
        {"data": data(p), "baseline": baseline(p), **inputs},
    )


def plane(p: Parameters) -> Recipe:
    """Fig. 6a: held-out loss over the weights of the first and the last expert."""
    return Recipe(
        "plane",
        "plane",
        p.pick("plane_points", "loss_draws"),
        {"data": data(p), **_models(p, "experts")},
        denoiser_calls=p.plane_points**2 * p.search_images * p.loss_draws,
    )


def everything(p: Parameters) -> dict[str, Recipe]:
    """All recipes of an experiment by label, upstream first."""
    found: dict[str, Recipe] = {}
    arms = present(p.loss_weighting)
    used = {search_of(arm, p.merge_weights) for arm in arms}
    for recipe in (
        acceptance(p),
        gradients(p),
        *(search(p, name) for name in SEARCHES if name in used),
        range_losses(p),
        task_vectors(p),
        plane(p),
        activations(p),
        landscape(p),
        merged(p),
        gradients(p, after_merging=True),
        *(metrics(p, arm) for arm in arms),
    ):
        found |= {r.label: r for r in upstream_first(recipe) if r.label not in found}
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
        "classifiers": [classifier_hash(name) for name in (p.features, p.second_features)],
        **_sources(p, "inception_weights"),
        "inception_hash": fingerprint(p.inception_weights) if p.inception_weights else "",
    }


def _weights_file(p: Parameters) -> dict[str, str]:
    return p.pick("inception_weights")


def _sources(p: Parameters, *names: str) -> dict[str, str]:
    """Parameters that may name local files: "local" for the key, where the content stands."""
    given = p.pick(*names)
    return {n: "local" if is_local(source) else source for n, source in given.items()}
