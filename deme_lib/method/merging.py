"""Task vectors and their weighted merge (paper Eq. 8), as arithmetic on state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

State = Mapping[str, torch.Tensor]


def task_vector(base: State, tuned: State) -> dict[str, torch.Tensor]:
    """tau = theta_i - theta, in float64, one tensor for each tensor of ``base``.

    Raises:
        KeyError: the two have different tensor names.
        ValueError: a tensor has different shapes in the two.
    """
    check_same_architecture(base, tuned)
    return {name: tuned[name].to(base[name].device).double() - base[name].double() for name in base}


def merge(
    base: State, task_vectors: Sequence[State], weights: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Eq. 8: theta + sum_i w_i tau_i, per tensor, in float64, returned in ``base``'s dtypes.

    Projections are tensors like the others: the base's are the identity, so they merge to
    W = I + sum_i w_i (W_i - I).

    Args:
        base: state dict of the pretrained model.
        task_vectors: one state dict of differences an expert.
        weights: one finite number a task vector.

    Raises:
        ValueError: lengths differ, a weight is not finite, or shapes differ.
        KeyError: tensor names differ.
    """
    if len(weights) != len(task_vectors):
        raise ValueError(
            f"{len(weights)} merge weights for {len(task_vectors)} experts: give one an expert"
        )
    if not torch.tensor(weights, dtype=torch.float64).isfinite().all():
        raise ValueError(f"merge weights must be finite, got {list(weights)}")
    for vector in task_vectors:
        check_same_architecture(base, vector)
    merged = {}
    for name, tensor in base.items():
        total = tensor.to(torch.float64, copy=True)
        for weight, vector in zip(weights, task_vectors, strict=True):
            if weight:
                total = total + weight * vector[name].double()
        merged[name] = total.to(tensor.dtype)
    return merged


def check_same_architecture(base: State, other: State) -> None:
    """Raise where two state dicts do not hold the same tensors."""
    if missing := sorted(base.keys() - other.keys()):
        raise KeyError(f"an expert lacks {missing[:5]}: it is of another architecture")
    if extra := sorted(other.keys() - base.keys()):
        raise KeyError(f"an expert has tensors that the base lacks, {extra[:5]}")
    for name, tensor in base.items():
        if tensor.shape != other[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the base and "
                f"{tuple(other[name].shape)} in an expert: they are of different architectures"
            )
