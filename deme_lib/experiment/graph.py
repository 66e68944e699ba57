"""From parameters to artefacts: which stage makes what, from what. No work is done here.

Every function takes the parameters of one training seed (``p.per_seed()``) and returns artefacts
for ``make``. A stage's keyword arguments are its key, so what is equal is made once.
"""

import os
from typing import Any

from deme_lib.diffusion.data import (
    PRETRAINED,
    classifier_hash,
    fingerprint,
    is_local,
    shipped_pretrained,
)
from deme_lib.diffusion.training import LEARNT
from deme_lib.experiment.arms import ARMS, DEME, Arm, Family
from deme_lib.experiment.schema import Parameters
from deme_lib.experiment.stages import judge, look, prepare, train
from deme_lib.experiment.store import Artefact, Machine, Source
from deme_lib.method.timesteps import split_timesteps

ADAM = ("batch_size", "adam_beta1", "adam_beta2", "weight_decay", "clip_norm")
TRAINING = (*ADAM, "precision", "seed", "finetune_lr", "loss_images")
SAMPLING = ("seed", "sampler", "sampling_steps")
SCORING = ("fid_reference", "is_splits", "kid_subset_size", "kid_subsets")


def data(p: Parameters) -> Artefact:
    """The images, each with one role: train, search or test."""
    names = ("train_images", "search_images", "test_images", "split_seed", "image_size")
    return _artefact(p, "data", prepare.data, dataset=_source(p, p.dataset), **p.pick(*names))


def reference(p: Parameters) -> Artefact:
    """Features of the real images."""
    return _artefact(p, "reference", prepare.reference, data=data(p), **_features(p))


def floor(p: Parameters) -> Artefact:
    """What real images score that no model trained on."""
    known = {"reference": reference(p), "features": _features(p)["features"]}
    return _artefact(p, "floor", prepare.floor, **known, **p.pick("samples", *SCORING))


def baseline(p: Parameters) -> Artefact:
    """The pretrained model: shipped, a user's, or trained here."""
    names = ("num_train_timesteps", "loss_images", "seed")
    if p.pretrained:
        shipped = p.pretrained in {folder.name for folder in PRETRAINED.iterdir()}
        source = str(shipped_pretrained(p.pretrained, p.seed)) if shipped else p.pretrained
        known = {"data": data(p), "pretrained": _source(p, source), **p.pick(*names)}
        return _artefact(p, "baseline", train.load_baseline, **known)
    names += ("model_channels", "layers_per_block", "attention", "pretrain_steps", "pretrain_lr")
    known = {"data": data(p), **p.pick(*names, *TRAINING)}
    return _artefact(p, "baseline", train.train_baseline, **known)


def ranges(p: Parameters) -> list[range]:
    """Eq. 3: the N ranges of timesteps."""
    return split_timesteps(p.n_ranges, p.num_train_timesteps)


def copies(p: Parameters, family: Family | None) -> list[Artefact]:
    """A family of finetuned copies, in order; none of the pretrained model's."""
    if family is None:
        return []
    n, label = p.n_ranges, family.name.replace("_", "-")
    if family.copies == "one":  # weighted it has the control's draws, so that nothing else differs
        return [_copy(p, family, "all-plain" if family.weighting else label, 0, p.total_steps)]
    wanted, steps = range(n) if family.copies == "N" else [n - 1], p.total_steps // n
    return [_copy(p, family, f"{label}-{k + 1}of{n}", k, steps) for k in wanted]


def taught_by(p: Parameters, family: Family | None) -> list[Artefact]:
    """The copies that a family's are distilled from."""
    return copies(p, family and family.teacher)


def experts(p: Parameters) -> list[Artefact]:
    """DeMe's N experts."""
    return copies(p, DEME)


def _copy(p: Parameters, family: Family, purpose: str, k: int, steps: int) -> Artefact:
    own = ranges(p)[k] if family.ranged else range(p.num_train_timesteps)
    known: dict[str, Any] = {"data": data(p), "baseline": baseline(p)}
    known |= p.pick(*TRAINING, "final_lr", "ema_fraction")
    known |= {"purpose": purpose, "steps": steps, "own_range": [own.start, own.stop]}
    techniques = family.techniques
    known["probability"] = p.probability if techniques and family.ranged else 0.0
    known["consistency_weight"] = p.consistency_weight if techniques else 0.0
    known["channel_projection"] = techniques and p.channel_projection
    label = purpose
    if family.weighting:
        weighting = p.loss_weighting if family.weighting == "parameter" else family.weighting
        used = {"min-snr": ("min_snr_gamma",), "p2": ("p2_gamma",)}.get(weighting, ())
        known |= {"loss_weighting": weighting, **p.pick(*used)}
        known |= {"n_tasks": p.n_ranges} if weighting in ("balanced", *LEARNT) else {}
        label = f"all-{weighting.replace('+', '-')}"
    if family.teacher:
        known |= {"teachers": taught_by(p, family), "ranges": _bounds(p), "consistency_weight": 1.0}
    return _artefact(p, label, train.finetune, **known)


def search(p: Parameters, family: Family = DEME) -> Artefact:
    """The search of merge weights for a family's copies."""
    names = ("search_low", "search_high", "search_trials", "search_samples", *SAMPLING)
    known = {"data": data(p), "reference": reference(p), "baseline": baseline(p)}
    known |= {"members": copies(p, family), **_features(p), **p.pick(*names)}
    return _artefact(p, "search", judge.search, **known)


def _denoiser(p: Parameters, arm: Arm) -> dict[str, Any]:
    """What ``judge.denoiser_of`` builds an arm's denoiser from."""
    members = copies(p, arm.family)
    weights = None
    if arm.weighted and p.merge_weights != "uniform":
        weights = search(p, arm.family) if p.merge_weights == "search" else p.merge_weights
    own = [[r.start, r.stop] for r in ranges(p)] if members else []
    found = {"baseline": baseline(p), "members": members, "ranges": own}
    return found | {"combine": arm.combine, "weights": weights}


def merged(p: Parameters, arm: Arm = ARMS["deme_merged"]) -> Artefact:
    """The merged model as a diffusers pipeline."""
    return _artefact(p, "merged", judge.merged, **_denoiser(p, arm))


def images(p: Parameters, arm: Arm) -> Artefact:
    """An arm's images for every sampling seed, its losses and its cost."""
    names = ("samples", "sampling_seeds", "loss_draws", "loss_bins", *SAMPLING)
    known = {"data": data(p), **_denoiser(p, arm), **p.pick(*names)}
    return _artefact(p, f"images-{arm.name}", judge.images, **known)


def scores(p: Parameters, arm: Arm) -> Artefact:
    """An arm's metrics per sampling seed."""
    known = {"images": images(p, arm), "reference": reference(p), **_features(p)}
    known |= p.pick("sampling_seeds", "sampler", "sampling_steps", *SCORING)
    return _artefact(p, f"scores-{arm.name}", judge.scores, **known)


def gradients(p: Parameters, after_merging: bool = False) -> Artefact:
    """Fig. 1a, of the pretrained model or of the merged one."""
    model = "merged" if after_merging else "pretrained"
    pipeline = merged(p) if after_merging else baseline(p)
    known = {"data": data(p), "model": model, "pipeline": pipeline}
    known |= p.pick("gradient_bins", "seed")
    return _artefact(p, f"gradients-{model}", look.gradients, **known)


def activations(p: Parameters) -> Artefact:
    """Fig. 2: where the experts' activations differ from the pretrained model's."""
    known = {"data": data(p), "baseline": baseline(p), "members": experts(p), "seed": p.seed}
    return _artefact(p, "activations", look.activations, ranges=_bounds(p), **known)


def landscape(p: Parameters) -> Artefact:
    """Fig. 4: held-out loss around the pretrained weights, for all timesteps and per range."""
    known = {"data": data(p), "baseline": baseline(p), "ranges": _bounds(p)}
    names = ("seed", "plane_points", "loss_images")
    return _artefact(p, "landscape", look.landscape, **known, **p.pick(*names))


def task_vectors(p: Parameters) -> Artefact:
    """Fig. 6b, and norms and cosines of the experts' task vectors."""
    known = {"baseline": baseline(p), "members": experts(p)}
    return _artefact(p, "task-vectors", look.task_vectors, **known)


def plane(p: Parameters) -> Artefact:
    """Fig. 6a: held-out loss over the weights of the first and the last expert."""
    known = {"data": data(p), "baseline": baseline(p), "members": experts(p)}
    return _artefact(p, "plane", look.plane, **known, **p.pick("plane_points", "loss_images"))


def looks(p: Parameters) -> list[Artefact]:
    """What the paper's figures are drawn from."""
    before = [gradients(p), landscape(p)]
    return [*before, task_vectors(p), plane(p), activations(p), gradients(p, after_merging=True)]


def jobs(p: Parameters, looked_at: bool, fine: bool = False) -> dict[str, list[Artefact]]:
    """One training seed's work in processes that may run side by side: name -> what each makes.

    Args:
        looked_at: with what the paper's figures look at, beside what arms are judged by.
        fine: a process for each copy and each arm; otherwise one for a family and its arms, since
            a process takes seconds to start.
    """
    found = {"prepare": [data(p), reference(p), floor(p)]}  # the same for all training seeds
    found[f"baseline-{p.seed}"] = [baseline(p)]
    for arm, q in p.rows().values():
        copied = taught_by(q, arm.family) + copies(q, arm.family)
        judged, job = [images(q, arm), scores(q, arm)], ""
        if arm.weighted and q.merge_weights == "search":
            judged.insert(0, search(q, arm.family))
        if not fine:
            shared = (job for job, made in found.items() if any(c in made for c in copied))
            job = next(shared, (copied or judged)[0].name)
        for made in (*([copy] for copy in copied), judged):
            known = found.setdefault(job or made[-1].name, [])
            known += [artefact for artefact in made if artefact not in known]
    if looked_at:
        made = {artefact.name for job in found.values() for artefact in job}
        needed = [*experts(p), *merged(p).upstream()]  # also where no arm has them
        others = {a.name: a for a in needed if a.name not in made}
        found[f"looks-{p.seed}"] = [*others.values(), merged(p), *looks(p)]
    return found


def _artefact(p: Parameters, label: str, stage: Any, **arguments: Any) -> Artefact:
    names = ("device", "sampling_batch", "checkpoint_every", "runs_dir")
    threads = min(p.threads, os.cpu_count() or 1)
    return Artefact(label, stage, arguments, Machine(threads=threads, **p.pick(*names)))


def _bounds(p: Parameters) -> list[list[int]]:
    return [[own.start, own.stop] for own in ranges(p)]


def _features(p: Parameters) -> dict[str, Any]:
    names = [name for name in (p.features, p.second_features) if name]
    weights = p.inception_weights
    return {
        "features": [Source(name, classifier_hash(name)) for name in names],
        "inception_weights": _source(p, weights) if weights else "",
    }


def _source(p: Parameters, name: str) -> Source:
    """A name with the content behind it, which is looked at once for an experiment."""
    if name not in p._sources:
        content = fingerprint(name)
        p._sources[name] = Source(name, content if is_local(name) else f"{name} {content}")
    return p._sources[name]
