"""Ensembles of denoisers, callable wherever a member is (paper Eq. 7 and its rival).

The paper's "before merge" is routed: each timestep is predicted by the expert of its range. The
"simple ensemble" of a reader is the average of all predictions at every timestep. Members are
called one after the other: stacked into one batched call (``torch.func.vmap``) they take longer on
a CPU (figures/benchmarks.md). A pipeline takes an ensemble as its ``unet`` or ``transformer``.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.utils._pytree import tree_map

from deme_lib.method.projection import model_class
from deme_lib.method.timesteps import check_tiling, route

NOTE = "ensemble.json"  # what a folder's members are


class _Ensemble(nn.Module):
    """Answers whatever a pipeline asks of its denoiser as the first member does.

    Args:
        active_on: device to which a member is moved for its turn, while the others wait on the
            CPU; None: members stay where they are, and move with the ensemble.
    """

    def __init__(self, members: Sequence[nn.Module], active_on: torch.device | str | None = None):
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs at least one member")
        self.members = nn.ModuleList(members)
        self.active_on, self.active, self.settings = active_on, None, {}
        for member in members if active_on else ():
            member.to("cpu")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "members":  # there are none yet
                raise
            return getattr(self.members[0], name)

    @property
    def device(self) -> torch.device:
        return self.members[0].device if self.active_on is None else torch.device(self.active_on)

    def _apply(self, *how: Any) -> Self:  # such as .to(device)
        return super()._apply(*how) if self.active_on is None else self

    def save_pretrained(self, folder: Path | str) -> None:
        """Save every member by its own ``save_pretrained``, and what the ensemble makes of them."""
        for member in self.members:
            check_no_adapters(member)
        for k, member in enumerate(self.members):
            member.save_pretrained(Path(folder) / f"member-{k}")
        note = {"class": type(self).__name__, "members": len(self.members), **self.settings}
        (Path(folder) / NOTE).write_text(json.dumps(note))

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, active_on: torch.device | str | None = None, **how: Any
    ) -> Self:
        """What ``save_pretrained`` saved; ``how`` is of the members', such as ``torch_dtype``."""
        note = json.loads((Path(folder) / NOTE).read_text())
        if (kind := note.pop("class")) != cls.__name__:
            raise ValueError(f"{folder} holds a {kind}: load it with {kind}.from_pretrained")
        members = []
        for k in range(note.pop("members")):
            home = Path(folder) / f"member-{k}"
            model = model_class(json.loads((home / "config.json").read_text()))
            members.append(model.from_pretrained(home, **how))
        return cls(members, **note, active_on=active_on)

    def _call(self, k: int, args: tuple, kwargs: dict) -> Any:
        if self.active_on and self.active != k:
            if self.active is not None:
                self.members[self.active].to("cpu")
            self.members[k].to(self.active_on)
            self.active = k
        return self.members[k](*args, **kwargs)


class RoutedEnsemble(_Ensemble):
    """Eq. 7: the expert of range k predicts the samples whose timestep lies in range k.

    Wan 2.2's two experts are of the same kind: with ``boundary_ratio`` r of T timesteps its
    ``transformer_2`` has ``range(0, r T)``, its ``transformer`` ``range(r T, T)``.

    Args:
        experts: one denoiser a range.
        ranges: adjacent ranges that tile [0, T) in order, from ``split_timesteps``, or their
            starts and stops.
        timestep_scale: t of what a denoiser is called with: 1000 for Flux, called with t / 1000.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        ranges: Sequence[range | Sequence[int]],
        timestep_scale: float = 1.0,
        active_on: torch.device | str | None = None,
    ):
        super().__init__(experts, active_on)
        if len(experts) != len(ranges):
            raise ValueError(f"{len(experts)} experts for {len(ranges)} ranges: give one a range")
        self.ranges = [r if isinstance(r, range) else range(*r) for r in ranges]
        check_tiling(self.ranges)
        self.settings = {
            "ranges": [(r.start, r.stop) for r in self.ranges],
            "timestep_scale": timestep_scale,
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the experts return, to any arguments.

        The timestep, one or [B] in [0, T), is ``timestep=``, or the second argument. Where it is
        in several ranges an expert is given its own of each tensor [B, ...].
        """
        t = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        scale = self.settings["timestep_scale"]
        owner = route(t if scale == 1 else t * scale, self.ranges)
        owners = owner.unique().tolist()
        if len(owners) == 1:  # as in sampling: the cost of one model
            return self._call(owners[0], args, kwargs)

        def of(k: int) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda v: v[owner.to(v.device) == k] if v.shape[:1] == owner.shape else v

        def joined(*parts: torch.Tensor) -> torch.Tensor:
            whole = parts[0].new_empty(len(owner), *parts[0].shape[1:])
            for k, part in zip(owners, parts, strict=True):
                whole[owner.to(whole.device) == k] = part
            return whole

        found = [self._call(k, *_each(of(k), (args, kwargs))) for k in owners]
        return _each(joined, *found)


class AveragedEnsemble(_Ensemble):
    """The simple ensemble: the mean of the members' N predictions, at every timestep."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the members return, on average, to any arguments."""
        share = 1 / len(self.members)
        found = [self._call(k, args, kwargs) for k in range(len(self.members))]
        return _each(lambda *parts: sum(share * part for part in parts), *found)


class WithAdapter(_Ensemble):
    """One adapter's turn on a model: experts of an ensemble that holds the model once.

    It is the one of ``pipeline.load_lora_weights(folder, adapter_name=name)``, active in a call.
    """

    def __init__(self, model: nn.Module, name: str):
        super().__init__([model])
        self.name, known = name, sorted(getattr(model, "peft_config", {}))
        if name not in known:
            raise ValueError(f"adapter {name!r} is to be one of {known}: load it first")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for layer in adapter_layers(self):
            layer.set_adapter(self.name)
        return self._call(0, args, kwargs)


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer  # the extra ``lora``

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def check_no_adapters(model: nn.Module) -> None:
    """ValueError where a model's weights, saved from below its adapters, could not be loaded."""
    if any(".base_layer." in name for name in model.state_dict()):
        raise ValueError(
            "the model's weights lie under its adapters: fuse and unload these first, or save them "
            "with save_adapter"
        )


def _each(change: Callable[..., torch.Tensor], *alike: Any) -> Any:
    """Change tensors, however deep in tuples, lists and dictionaries; all else is the first's."""
    return tree_map(lambda *v: change(*v) if isinstance(v[0], torch.Tensor) else v[0], *alike)
