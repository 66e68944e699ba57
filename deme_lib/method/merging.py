"""Task vectors and their weighted merge (paper Eq. 8), as arithmetic on state dicts.

Computed in float32, or in the weights' own type where that is wider. Tensors of integers and
booleans (counters, masks) are no weights: they must be equal, and are the base's in a merge.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

State = Mapping[str, torch.Tensor]


def task_vector(base: State, tuned: State) -> dict[str, torch.Tensor]:
    """tau = theta_i - theta, on ``base``'s device, in float32 or a wider type; of integers 0."""
    check_same(base, tuned)
    return {
        name: tuned[name].to(theta.device, wide(theta, tuned[name])) - theta
        if theta.is_floating_point()
        else torch.zeros_like(theta)
        for name, theta in base.items()
    }


def merge(
    base: State,
    task_vectors: Sequence[State],
    weights: Sequence[float],
    out: State | None = None,
) -> State:
    """Eq. 8: theta + sum_i w_i tau_i, per tensor, in the wider of theta's and the tau_i's types.

    Projections are tensors like the others: the base's are the identity, so they merge to
    W = I + sum_i w_i (W_i - I).

    Args:
        weights: one finite number a task vector; of weight 0 a vector is not looked at.
        out: tensors to write into, such as a model's state dict; None makes new ones.
    """
    check_weights(weights, len(task_vectors))
    for state in task_vectors if out is None else (*task_vectors, out):
        check_same(base, state, integers=False)
    merged = {} if out is None else out
    for name, theta in base.items():
        taus = [vector[name] for vector in task_vectors]
        if out is None:
            merged[name] = torch.empty_like(theta, dtype=widest(theta, *taus))
        room, total = merged[name], theta
        if theta.is_floating_point():
            if room.dtype != wide(room):
                room = torch.empty_like(theta, dtype=torch.float32)
            for weight, tau in zip(weights, taus, strict=True):
                if weight:
                    total = torch.add(total, tau, alpha=weight, out=room)
        merged[name].copy_(total)
    return merged


def widest(*tensors: torch.Tensor) -> torch.dtype:
    """The narrowest type that holds what all of the tensors hold."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def wide(*tensors: torch.Tensor) -> torch.dtype:
    """The type to add up in: float32, or a wider one of the tensors'."""
    return torch.promote_types(widest(*tensors), torch.float32)


def check_weights(weights: Sequence[float], experts: int) -> None:
    """Raise where there is no expert, or not one finite weight for each."""
    if not experts or len(weights) != experts or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"merge weights {list(weights)} for {experts} experts: give one or more experts, and "
            "one finite number for each"
        )


def check_same(base: State, other: State, integers: bool = True) -> None:
    """Raise where names or shapes differ, or integers, of which there is no mean."""
    if odd := sorted(base.keys() ^ other.keys()):
        raise KeyError(f"only one of base and expert has {odd[:5]}: take copies of one model")
    for name, theta in base.items():
        tuned = other[name]
        if theta.shape != tuned.shape:
            raise ValueError(
                f"{name} is {tuple(theta.shape)} in the base and {tuple(tuned.shape)} in an "
                "expert: take copies of one model"
            )
        if integers and not theta.is_floating_point() and (theta != tuned.to(theta.device)).any():
            raise ValueError(
                f"{name} ({theta.dtype}) differs between base and expert, and is no weight to "
                "merge: copy the base's into the expert"
            )


def check_untied(model: nn.Module) -> None:
    """Raise where two names share a parameter: Eq. 8 is per name."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if tied := sorted(names - {name for name, _ in model.named_parameters()}):
        raise ValueError(f"{tied[:5]} are tied to other weights: give each a parameter of its own")
