"""From parameters to artefacts: which stage makes what, from what. No work is done here.

Every function takes the parameters of one training seed (``p.per_seed()``) and returns artefacts
for ``make``. A stage's keyword arguments are its key, so what is equal is made once; what a
function does not give of them is the parameter, or the artefact (``MADE``), of that name.
"""

import inspect
import os
from collections.abc import Callable
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

SPLIT = ("train_images", "search_images", "test_images", "split_seed", "image_size")
SCORING = ("is_splits", "kid_subset_size", "kid_subsets")
ADAM = ("batch_size", "adam_beta1", "adam_beta2", "weight_decay", "clip_norm")


def data(p: Parameters) -> Artefact:
    """The images, each with one role: train, search or test."""
    return _artefact(p, prepare.data, dataset=_source(p, p.dataset), **p.pick(*SPLIT))


def reference(p: Parameters) -> Artefact:
    """Features of the real images."""
    return _artefact(p, prepare.reference)


def floor(p: Parameters) -> Artefact:
    """What real images score that no model trained on."""
    return _artefact(p, prepare.floor, **p.pick(*SCORING))


def baseline(p: Parameters) -> Artefact:
    """The pretrained model: shipped, a user's, or trained here."""
    if not p.pretrained:
        return _artefact(p, train.train_baseline, "baseline", **p.pick(*ADAM, "precision"))
    shipped = p.pretrained in {folder.name for folder in PRETRAINED.iterdir()}
    source = str(shipped_pretrained(p.pretrained, p.seed)) if shipped else p.pretrained
    return _artefact(p, train.load_baseline, "baseline", pretrained=_source(p, source))


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
    known = {"purpose": purpose, "steps": steps, "own_range": [own.start, own.stop]}
    known |= p.pick(*ADAM, "precision")
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
    return _artefact(p, train.finetune, label, **known)


def search(p: Parameters, family: Family = DEME) -> Artefact:
    """The search of merge weights for a family's copies."""
    return _artefact(p, judge.search, members=copies(p, family))


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
    return _artefact(p, judge.merged, **_denoiser(p, arm))


def images(p: Parameters, arm: Arm) -> Artefact:
    """An arm's images for every sampling seed, its losses and its cost."""
    return _artefact(p, judge.images, f"images-{arm.name}", **_denoiser(p, arm))


def scores(p: Parameters, arm: Arm) -> Artefact:
    """An arm's metrics per sampling seed."""
    known = {"images": images(p, arm), **p.pick(*SCORING)}
    return _artefact(p, judge.scores, f"scores-{arm.name}", **known)


def gradients(p: Parameters, after_merging: bool = False) -> Artefact:
    """Fig. 1a, of the pretrained model or of the merged one."""
    model = "merged" if after_merging else "pretrained"
    pipeline = merged(p) if after_merging else baseline(p)
    return _artefact(p, look.gradients, f"gradients-{model}", model=model, pipeline=pipeline)


def activations(p: Parameters) -> Artefact:
    """Fig. 2: where the experts' activations differ from the pretrained model's."""
    return _artefact(p, look.activations)


def landscape(p: Parameters) -> Artefact:
    """Fig. 4: held-out loss around the pretrained weights, for all timesteps and per range."""
    return _artefact(p, look.landscape)


def task_vectors(p: Parameters) -> Artefact:
    """Fig. 6b, and norms and cosines of the experts' task vectors."""
    return _artefact(p, look.task_vectors)


def plane(p: Parameters) -> Artefact:
    """Fig. 6a: held-out loss over the weights of the first and the last expert."""
    return _artefact(p, look.plane)


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


def _artefact(p: Parameters, stage: Callable, label: str = "", **given: Any) -> Artefact:
    names = ("device", "sampling_batch", "checkpoint_every", "runs_dir")
    threads = min(p.threads, os.cpu_count() or 1)
    for name, wanted in inspect.signature(stage).parameters.items():
        asked = wanted.kind is wanted.KEYWORD_ONLY and wanted.default is wanted.empty
        if asked and name not in given:
            given[name] = MADE[name](p) if name in MADE else getattr(p, name)
    label = label or stage.__name__.replace("_", "-")
    return Artefact(label, stage, given, Machine(threads=threads, **p.pick(*names)))


def _bounds(p: Parameters) -> list[list[int]]:
    return [[own.start, own.stop] for own in ranges(p)]


def _features(p: Parameters) -> list[Source]:
    names = [name for name in (p.features, p.second_features) if name]
    return [Source(name, classifier_hash(name)) for name in names]


def _inception_weights(p: Parameters) -> Source | str:
    return _source(p, p.inception_weights) if p.inception_weights else ""


def _source(p: Parameters, name: str) -> Source:
    """A name with the content behind it, which is looked at once for an experiment."""
    if name not in p._sources:
        content = fingerprint(name)
        p._sources[name] = Source(name, content if is_local(name) else f"{name} {content}")
    return p._sources[name]


MADE = {"data": data, "reference": reference, "baseline": baseline, "members": experts}
MADE |= {"ranges": _bounds, "features": _features, "inception_weights": _inception_weights}
"""Arguments of stages that are no parameters."""
