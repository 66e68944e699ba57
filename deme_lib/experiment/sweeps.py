"""Sweeps: one preset with a list of overrides, a cell of a table each.

A sweep file names its base, the arms to judge in every cell, and the arms of the base to show
beside them. Cells share whatever stages are equal, with each other and with the base.
"""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deme_lib.experiment import parameters, recipes
from deme_lib.experiment.arms import BASE, arm_of
from deme_lib.experiment.parameters import ParameterError
from deme_lib.experiment.schema import Parameters
from deme_lib.experiment.store import Recipe

Plan = dict[str, tuple[Recipe, Parameters]]
MEASURED = {"arms": True, "beside": True, "cells": {"__all__": {"cell", "set"}}}
"""What the numbers of a sweep come from, beside its base."""


class Cell(BaseModel):
    """One cell: what differs from the base, the paper's number where it has one.

    ``against`` names what this cell alone is compared with.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    cell: str = Field(min_length=1)
    set: dict[str, Any]
    paper: float | None = None
    against: list[str] = []


class Sweep(BaseModel):
    """A sweep file, as it stands.

    Attributes:
        axis: what differs between cells, in words.
        arms: arms judged in every cell.
        beside: arms of the base, shown with them.
        against: what every cell is compared with: an arm of ``beside``, a cell (arm by arm), or
            "cell / arm".
        note: what a reader of the table must know.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    sweep: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)
    axis: str
    base: str
    arms: list[str] = Field(min_length=1)
    beside: list[str] = Field(min_length=1)
    against: list[str] = Field(min_length=1)
    note: str = ""
    cells: list[Cell] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_lead_somewhere(self) -> Self:
        names = [cell.cell for cell in self.cells]
        taken = {BASE, *(arm_of(name).name for name in (*self.arms, *self.beside))}
        if len(set(self.arms)) < len(self.arms) or "pretrained" not in self.beside:
            raise ValueError("name every arm once, and pretrained in beside")
        if len(set(names)) < len(names) or any(n in taken or " / " in n for n in names):
            raise ValueError(
                f"cells need names of their own, other than {BASE} or an arm's and without ' / ': "
                f"{names}"
            )
        known = {*self.beside, *names, *(f"{name} / {arm}" for name in names for arm in self.arms)}
        named = {*self.against, *(name for cell in self.cells for name in cell.against)}
        if unknown := sorted(named - known):
            raise ValueError(f"against names {unknown}: no cell, cell / arm, or arm beside")
        if all({*self.against, *cell.against} <= {cell.cell} for cell in self.cells):
            raise ValueError("against compares no cell with anything else: name another")
        return self

    def parts(self) -> dict[str, tuple[Parameters, list[str]]]:
        """Parameters and arms of the base, then of every cell.

        Raises:
            ParameterError: a cell sets an unknown or ill-typed parameter.
        """
        base = parameters.load(self.base)
        shown = list(dict.fromkeys([*base.arms, *self.beside]))
        found = {BASE: (parameters.load(self.base, arms=shown), self.beside)}
        arms = list(dict.fromkeys(["pretrained", *self.arms]))
        named = {"primary_decoupling": [], "primary_merging": [], "arms": arms}
        for cell in self.cells:
            try:
                p = parameters.load(self.base, **named, **cell.set)
            except ParameterError as error:
                message = f"sweep {self.sweep}, cell {cell.cell!r}: {error}"
                raise ParameterError(message) from None
            found[cell.cell] = p, self.arms
        return found


def load(path: str | Path) -> Sweep:
    """Read and check a sweep file and all its cells.

    Raises:
        ParameterError: it is no sweep, or something in it is unknown, ill-typed or twice there.
    """
    values = parameters.read(path)
    if "sweep" not in values:
        raise ParameterError(f"{path} is no sweep: name a file such as those in params/sweeps")
    try:
        sweep = Sweep(**values)
    except ValidationError as error:
        problems = [f"\n  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ParameterError(f"{path} is no sweep:{''.join(problems)}") from None
    _check_cells(sweep, path)
    return sweep


def folder_name(sweep: Sweep) -> str:
    """The sweep's name; with a mark where it is not the shipped file of that name."""
    shipped = parameters.PRESETS / "sweeps" / f"{sweep.sweep}.yaml"
    same = shipped.is_file() and Sweep(**parameters.read(shipped)) == sweep
    return sweep.sweep if same else f"{sweep.sweep}-changed"


def folder_of(sweep: Sweep, base: Parameters) -> Path:
    """Where records, tables and figures of a sweep go."""
    return parameters.folder_of(base) / "sweeps" / folder_name(sweep)


def is_recorded(sweep: Sweep, out: Path, q: Parameters) -> bool:
    """Whether ``out`` holds the records of a training seed, of these very cells and arms.

    Raises:
        ParameterError: they are of other parameters, cells or arms.
    """
    if not parameters.is_recorded(out, q):
        return False
    there = Sweep.model_validate_json((out / "sweep.json").read_text())
    if there.model_dump(include=MEASURED) != sweep.model_dump(include=MEASURED):
        raise ParameterError(
            f"{out} was recorded with other cells or arms: delete that folder to record it anew, "
            "or give the sweep another name"
        )
    return True


def _check_cells(sweep: Sweep, path: str | Path) -> None:
    """Cells may differ from the base in finetuning, merging and search alone; not in how long."""
    found = {cell: p for cell, (p, _) in sweep.parts().items()}
    base, pretrained = found[BASE], arm_of("pretrained")
    for cell, p in found.items():
        same = recipes.metrics(p, pretrained).key == recipes.metrics(base, pretrained).key
        if not same or p.seeds != base.seeds or p.runs_dir != base.runs_dir:
            raise ParameterError(
                f"{path}: cell {cell!r} changes the pretrained model, its evaluation, the seeds or "
                "runs_dir; a sweep varies finetuning, merging and search: set the rest in its base"
            )
    if set(sweep.beside) == {"pretrained"}:
        del found[BASE]  # compared with nothing
    totals = {cell: p.n_ranges * p.finetune_steps for cell, p in found.items()}
    if len(set(totals.values())) > 1:
        raise ParameterError(
            f"{path}: what is compared trains for different totals of n_ranges * finetune_steps, "
            f"{totals}: set finetune_steps so that they are equal, or, where only {BASE} differs, "
            "name pretrained alone in beside"
        )


def plan(path: str | Path, recorded: bool = True, **overrides: Any) -> Plan:
    """Everything that a file asks for, preset or sweep, by name, upstream first.

    Args:
        recorded: also what belongs to training seeds whose records are already there.
    """
    if "sweep" in parameters.read(path):
        sweep = load(path)
        base = parameters.load(sweep.base, **overrides)
        out = folder_of(sweep, base)
        seeds = [q.seed for q in base.per_seed() if recorded or not is_recorded(sweep, out, q)]
        wanted = [
            (recipes.metrics(q, arm_of(arm)), q)
            for p, arms in sweep.parts().values()
            for q in p.per_seed()
            if q.seed in seeds
            for arm in arms
        ]
    else:
        p = parameters.load(path, **overrides)
        out = parameters.folder_of(p)
        seeds = [q for q in p.per_seed() if recorded or not parameters.is_recorded(out, q)]
        wanted = [
            (r, q) for q in seeds for r in recipes.everything(q, looks=q.seed == p.seed).values()
        ]
    found: Plan = {}
    for recipe, p in wanted:
        for name, each in recipes.upstream_first(recipe).items():
            found.setdefault(name, (each, p))
    return found
