"""The typed schema of all parameters, and the checks that every way in goes through.

A parameter file is flat YAML and names only what differs from the defaults, which live in
``schema``. Unknown and ill-typed parameters are errors that name the nearest right one.
"""

from __future__ import annotations

import ast
import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deme_lib import ROOT
from deme_lib.experiment.schema import Parameters

PRESETS = ROOT / "params"
DATASET = Parameters.model_fields["dataset"].default


class ParameterError(ValueError):
    """A parameter is unknown, of the wrong type, or out of range."""


def check(values: dict[str, Any], source: str) -> Parameters:
    """Overlay ``values`` on the defaults and check everything.

    Where they name another data set and no pretrained model, one is trained.

    Raises:
        ParameterError: naming the parameter, what is wrong, and what to do.
    """
    for name in values:
        if name not in Parameters.model_fields:
            raise ParameterError(f"{source}: unknown parameter {name!r}{_nearest(name)}")
    if values.get("dataset", DATASET) != DATASET:
        values = {"pretrained": "", **values}
    try:
        return Parameters(**values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(e)}" for e in error.errors())
        raise ParameterError(f"{source}:\n{problems}") from None


def load(path: str | Path, **overrides: Any) -> Parameters:
    """Read a parameter file; relative paths count from the working directory, then the root.

    Raises:
        ParameterError: the file is missing, is no flat YAML mapping, or holds a bad parameter.
    """
    return check({**read(path), **overrides}, str(path))


def is_preset(p: Parameters) -> bool:
    """Whether every parameter that can change a result equals ``params/<experiment>.yaml``."""
    path = PRESETS / f"{p.experiment}.yaml"
    return path.is_file() and load(path).results() == p.results()


def folder_name(p: Parameters) -> str:
    """The experiment's name; with a digest where a parameter differs from its file."""
    return p.experiment if is_preset(p) else f"{p.experiment}-{p.digest()}"


def read(path: str | Path) -> dict[str, Any]:
    """What a parameter or sweep file holds, unchecked."""
    found = next((p for p in (Path(path), ROOT / path) if p.is_file()), None)
    if found is None:
        presets = ", ".join(sorted(str(p.relative_to(ROOT)) for p in PRESETS.rglob("*.yaml")))
        raise ParameterError(f"no parameter file {path}; there are {presets}")
    return _read_yaml(found)


def from_notebook(namespace: dict[str, Any]) -> Parameters:
    """Check the parameters of a notebook, whoever set them: its cell, papermill, or a person.

    papermill injects every key of ``-f`` into every notebook and only warns of unknown ones, so
    the names are read from the cells that were run (IPython's ``In``).

    Args:
        namespace: the notebook's ``globals()``.
    """
    fields, cells = set(Parameters.model_fields), []
    for source in namespace.get("In", []):
        names = _names_set_by(source)
        known = fields & set(names)
        if known:  # a cell that was edited and run again replaces what it said before
            cells = [c for c in cells if not fields & set(c) or not fields & set(c) <= known]
        cells.append(names)
    names = [name for cell in cells for name in cell if name in namespace]
    return check({name: namespace[name] for name in names}, "this notebook")


def _names_set_by(source: str) -> list[str]:
    """Names that a cell sets as parameters: none, unless it is a parameters cell.

    That is papermill's injected cell, or one that assigns a literal to a known parameter. Where a
    cell does other things as well, only the known names in it are parameters.
    """
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    try:
        statements = ast.parse("\n".join(lines)).body
    except SyntaxError:
        return []
    assignments = [s for s in statements if isinstance(s, ast.Assign | ast.AnnAssign) and s.value]
    names = {name: s for s in assignments for name in _targets(s)}
    known = [name for name in names if name in Parameters.model_fields]
    if source.startswith("# Parameters"):
        return list(names)
    if not any(_is_literal(names[name].value) for name in known):
        return []
    return list(names) if len(assignments) == len(statements) else known


def _targets(statement: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError):
        return False
    return True


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        values = yaml.safe_load(text)
        twice = _given_twice(yaml.compose(text, yaml.SafeLoader))
    except (yaml.YAMLError, ValueError) as error:
        raise ParameterError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise ParameterError(f"{path} must be a flat list of `name: value` lines")
    if twice:
        raise ParameterError(f"{path} gives {twice[0]!r} twice: delete one of its lines")
    return values


def _given_twice(node: yaml.Node | None) -> list[str]:
    """Names that a mapping sets more than once; YAML would silently take the last."""
    names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    return [name for name in names if names.count(name) > 1]


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, Parameters.model_fields, n=1, cutoff=0.5)
    return (
        f"; did you mean {close[0]!r}?" if close else "; `python -m deme_lib parameters` lists them"
    )


def _explain(error: Any) -> str:
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    name, value = error["loc"][0], error["input"]
    problem = error["msg"].removeprefix("Value error, ")
    text = f"{name}={value!r}: {problem} ({Parameters.model_fields[name].description})"
    if isinstance(value, str) and "e" in value.lower() and _is_number(value):
        text += f"; YAML reads {value} as text, write {float(value)!r}"
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
