"""What each artefact is made from: the experiment as a graph of recipes. No torch, no work.

``stages`` holds the function behind each recipe; ``Recipe.parameters`` is all that it may read.
Every function takes the parameters of one training seed.
"""

from dataclasses import replace

from deme_lib.diffusion.data import classifier_hash, fingerprint, is_local, shipped_pretrained
from deme_lib.experiment.arms import SEARCHES, Arm, arm_of, search_of
from deme_lib.experiment.schema import Parameters
from deme_lib.experiment.store import Recipe

ADAM = ("batch_size", "adam_beta1", "adam_beta2", "weight_decay", "clip_norm", "ema_decay")
TRAINING = (*ADAM, "precision", "seed", "loss_images")
SAMPLING = ("sampling_steps", "timestep_spacing")
CUT = ("n_ranges", "range_cut")
SHIPPED = "fashion8"
FEW = 20_000  # images of an arm, above which each arm is a job of its own


def data(p: Parameters) -> Recipe:
    """The three roles of the images."""
    names = ("train_images", "search_images", "test_images", "split_seed", "image_size")
    parameters = {**p.pick(*names), "dataset": _source(p.dataset), "hash": _hash(p, p.dataset)}
    return Recipe("data", "data", parameters, {}, locations=p.pick("dataset"), job="data")


def reference(p: Parameters) -> Recipe:
    """Features of the real images of every role."""
    inputs, locations = {"data": data(p)}, p.pick("inception_weights")
    return Recipe("reference", "reference", _features(p), inputs, locations=locations, job="data")


def _scored(p: Parameters, recipe: Recipe) -> Recipe:
    """The recipe of a stage that also extracts features and compares with those of real images."""
    return replace(
        recipe,
        parameters={**recipe.parameters, **_features(p)},
        inputs={"data": data(p), "reference": reference(p), **recipe.inputs},
        locations=p.pick("inception_weights"),
    )


def floor(p: Parameters) -> Recipe:
    """What real images score that no model trained on."""
    names = ("samples", "fid_reference", "is_splits", "kid_subset_size", "kid_subsets")
    return _scored(p, Recipe("floor", "floor", p.pick(*names), {}, job="data"))


def baseline(p: Parameters) -> Recipe:
    """The pretrained model: shipped, loaded, or trained here."""
    if p.pretrained:
        names = ("num_train_timesteps", "loss_images", "seed")
        content = p.pretrained
        if content == SHIPPED:
            content = str(shipped_pretrained(SHIPPED, p.seed))
        parameters = {"pretrained": _source(p.pretrained), "hash": _hash(p, content)}
        return Recipe(
            "load_baseline",
            "baseline",
            parameters | p.pick(*names),
            {"data": data(p)},
            locations=p.pick("pretrained"),
            job="data",
        )
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


def finetuned(p: Parameters, members: str) -> list[Recipe]:
    """A family of finetuned copies; see ``arms.Arm`` for the families."""
    n, label = p.n_ranges, members.replace("_", "-")
    if members == "none":
        return []
    if members == "reweighted":
        return [_reweighted(p)]
    if members in ("all_plain", "all_same"):
        return [_finetune(p, members, label, n * p.finetune_steps)]
    return [_finetune(p, members, f"{label}-{k + 1}of{n}", p.finetune_steps, k) for k in range(n)]


def _reweighted(p: Parameters) -> Recipe:
    """The plain control with its loss re-weighted: the same draws, so that nothing else differs."""
    (plain,) = finetuned(p, "all_plain")
    used = {"min-snr": ("min_snr_gamma",), "p2": ("p2_gamma",)}.get(p.loss_weighting, ())
    parameters = plain.parameters | p.pick("loss_weighting", *used)
    if p.loss_weighting == "uncertainty":
        parameters["n_tasks"] = p.n_ranges
    label = f"all-{p.loss_weighting.replace('+', '-')}"
    return replace(plain, label=label, parameters=parameters, job=f"reweighted-{p.seed}")


def _finetune(p: Parameters, family: str, label: str, steps: int, k: int = 0) -> Recipe:
    """Copy ``k`` of a family: of some on its range of timesteps, of the others on all."""
    ranged, techniques = family in ("plain", "deme"), family in ("deme", "soup_same", "all_same")
    return Recipe(
        "finetune",
        label,
        {
            **p.pick("finetune_lr", "further_ema_decays", *TRAINING),
            "purpose": label,
            "steps": steps,
            "checkpoints": steps // p.finetune_steps,
            "n_ranges": p.n_ranges if ranged else 1,
            "range_cut": p.range_cut if ranged else "uniform",
            "range_index": k if ranged else 0,
            "probability": p.probability if ranged and techniques else 0.0,
            "consistency_weight": p.consistency_weight if techniques else 0.0,
            "channel_projection": p.channel_projection and techniques,
        },
        {"data": data(p), "baseline": baseline(p)},
        training_steps=steps,
        job=f"{family}-{p.seed}",
    )


def search(p: Parameters, name: str) -> Recipe:
    """One of ``SEARCHES``, all under one budget."""
    budget = ("search_low", "search_high", "search_step", "search_losses")
    scoring = ("search_candidates", "search_samples", "search_streams", "loss_images", "seed")
    images = p.search_candidates * p.search_samples * p.search_streams
    recipe = Recipe(
        "search",
        f"search-{name}",
        {**p.pick(*budget, *scoring, *SAMPLING), "single": name == "single"},
        _models(p, SEARCHES[name]),
        denoiser_calls=p.search_losses * p.loss_images + images * p.sampling_steps,
        job=f"search-{name}-{p.seed}",
    )
    return _scored(p, recipe)


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
    parameters |= {"ema_decay": arm.ema_decay, **(p.pick(*CUT) if arm.combine == "routed" else {})}
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
    return Recipe("gate", "gate", p.pick(*CUT, "loss_draws"), inputs, job=f"evaluate-{p.seed}")


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
    parameters = {"arm": arm.name, **p.pick(*names, "sampling_steps", "fid_reference")}
    made, label = images(p, arm), f"metrics-{_file_name(arm)}"
    return _scored(p, Recipe("metrics", label, parameters, {"images": made}, job=made.job))


def _file_name(arm: Arm) -> str:
    return arm.name.replace("@", "-ema-")


def acceptance(p: Parameters) -> Recipe:
    """Whether the metric holds still and ranks alike, before any arm is judged."""
    names = ("acceptance_samples", "samples", "seed", "fid_reference", *SAMPLING)
    recipe = Recipe(
        "acceptance",
        "acceptance",
        p.pick(*names),
        {"baseline": baseline(p)},
        denoiser_calls=(p.acceptance_samples + 2 * p.samples) * p.sampling_steps,
        job=f"acceptance-{p.seed}",
    )
    return _scored(p, recipe)


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


def everything(p: Parameters, looks: bool = True) -> dict[str, Recipe]:
    """All recipes of one training seed by name, upstream first.

    Args:
        looks: with what the figures look at, beside what arms are judged by.
    """
    looked_at = [
        acceptance(p),
        gradients(p),
        landscape(p),
        task_vectors(p),
        plane(p),
        activations(p),
        gradients(p, after_merging=True),
    ]
    arms = [arm_of(name, p.further_ema_decays) for name in p.arms]
    judged = [floor(p), gate(p), *(metrics(p, arm) for arm in arms)]
    return upstream_first(*(looked_at if looks else []), *judged)


def upstream_first(*wanted: Recipe) -> dict[str, Recipe]:
    """Recipes by name after all that they are made from, each once."""
    found: dict[str, Recipe] = {}
    for recipe in wanted:
        found |= upstream_first(*recipe.inputs.values()) | {recipe.name: recipe}
    return found


def _features(p: Parameters) -> dict:
    names = p.pick("features", "second_features")
    return {
        **names,
        "classifiers": [classifier_hash(name) for name in names.values()],
        "inception_weights": _source(p.inception_weights),
        "inception_hash": _hash(p, p.inception_weights) if p.inception_weights else "",
    }


def _hash(p: Parameters, source: str) -> str:
    """The hash of data or weights, looked at once for an experiment."""
    if source not in p._hashes:
        p._hashes[source] = fingerprint(source)
    return p._hashes[source]


def _source(name: str) -> str:
    """For a key: "local" where a name is of a local file, whose content stands there too."""
    return "local" if is_local(name) else name
