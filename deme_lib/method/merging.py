"""Task vectors and their weighted merge (paper Eq. 8), as arithmetic on state dicts.

Computed in float32, or in the weights' own type where that is wider.
"""

import math
from collections.abc import Mapping, Sequence

import torch

State = Mapping[str, torch.Tensor]


def task_vector(base: State, tuned: State) -> dict[str, torch.Tensor]:
    """tau = theta_i - theta, one tensor for each tensor of ``base``, on its device.

    Raises:
        KeyError: the two have different tensor names.
        ValueError: a tensor has different shapes in the two.
    """
    check_same_architecture(base, tuned)
    return {
        name: tuned[name].to(tensor.device, wide(tensor.dtype)) - tensor
        for name, tensor in base.items()
    }


def merge(
    base: State,
    task_vectors: Sequence[State],
    weights: Sequence[float],
    out: State | None = None,
) -> State:
    """Eq. 8: theta + sum_i w_i tau_i, per tensor, in ``base``'s dtypes.

    Projections are tensors like the others: the base's are the identity, so they merge to
    W = I + sum_i w_i (W_i - I).

    Args:
        base: state dict of the pretrained model.
        task_vectors: one state dict of differences an expert.
        weights: one finite number a task vector; of weight 0 a vector is not looked at.
        out: tensors to write into, such as a model's state dict; None makes new ones.

    Raises:
        ValueError: lengths differ, a weight is not finite, or shapes differ.
        KeyError: tensor names differ.
    """
    if len(weights) != len(task_vectors):
        raise ValueError(
            f"{len(weights)} merge weights for {len(task_vectors)} experts: give one an expert"
        )
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"merge weights must be finite, got {list(weights)}")
    for state in task_vectors if out is None else (*task_vectors, out):
        check_same_architecture(base, state)
    merged = (
        {name: torch.empty_like(tensor) for name, tensor in base.items()} if out is None else out
    )
    for name, tensor in base.items():
        room, total = merged[name], tensor
        if room.dtype != wide(room.dtype):
            room = torch.empty_like(tensor, dtype=torch.float32)
        for weight, vector in zip(weights, task_vectors, strict=True):
            if weight:
                total = torch.add(total, vector[name], alpha=weight, out=room)
        merged[name].copy_(total)
    return merged


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to add up in: float32, or a wider one as it is."""
    return torch.promote_types(dtype, torch.float32)


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
