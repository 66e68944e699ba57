"""The ways in for parameters: files, overrides, notebooks; each checked against the schema.

A parameter file is flat YAML and names only what differs from the defaults, which live in
``schema``. Unknown and ill-typed parameters are errors that name the nearest right one.
"""

import ast
import math
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deme_lib import ROOT
from deme_lib.errors import Explained
from deme_lib.experiment.schema import Parameters, unknown

PRESETS = ROOT / "params"
FIELDS = Parameters.model_fields
LITERALS = ast.Constant | ast.List | ast.Dict | ast.UnaryOp  # what a parameter is written as
DATASET, MODEL = (FIELDS[name].default for name in ("dataset", "pretrained"))


class ParameterError(Explained, ValueError):
    """A parameter is unknown, of the wrong type, or out of range."""


def check(values: dict[str, Any], source: str) -> Parameters:
    """Overlay ``values`` on the defaults and check everything.

    The default pretrained model belongs to the default data set: on another, one is trained.

    Raises:
        ParameterError: naming the parameter, what is wrong, and what to do.
    """
    if odd := [name for name in values if name not in FIELDS]:
        raise ParameterError(f"{source}: {unknown(odd[0], FIELDS, 'parameter')}")
    values = {n: os.path.expanduser(v) if isinstance(v, str) else v for n, v in values.items()}
    if values.get("dataset", DATASET) != DATASET and values.get("pretrained", MODEL) == MODEL:
        values["pretrained"] = ""
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


def folder_name(p: Parameters) -> str:
    """The experiment's name; with a digest where a result's parameter differs from its file."""
    path = PRESETS / f"{p.experiment}.yaml"
    same = path.is_file() and load(path).results() == p.results()
    return p.experiment if same else f"{p.experiment}-{p.digest()}"


def read(path: str | Path) -> dict[str, Any]:
    """What a parameter file holds, unchecked but for what YAML would hide."""
    found = next((p for p in (Path(path or ""), ROOT / (path or "")) if p.is_file()), None)
    if found is None:
        presets = ", ".join(sorted(str(p.relative_to(ROOT)) for p in PRESETS.glob("*.yaml")))
        raise ParameterError(f"no parameter file {str(path or '')!r}; there are {presets}")
    try:
        text = found.read_text()
    except ValueError as error:
        raise ParameterError(f"{found} is not valid YAML: {error}") from error
    values = parse(text, str(found))
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise ParameterError(f"{found} must be a list of `name: value` lines")
    return values


def parse(text: str, where: str) -> Any:
    """YAML, without what it would read otherwise than it is written.

    Raises:
        ParameterError: the text is no YAML, gives a name twice or holds an octal.
    """
    try:
        value, root = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ParameterError(f"{where} is not valid YAML: {error}") from error
    if root is not None:
        _check_nodes(root, where)
    return value


def _check_nodes(node: yaml.Node, where: str) -> None:
    """Refuse what YAML reads otherwise than it is written: names given twice, and octals."""
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ParameterError(f"{where} gives {twice[0]!r} twice: delete one of its lines")
        for key, value in node.value:
            _check_nodes(value, f"{where}, {key.value}")
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_nodes(value, where)
    elif node.tag == "tag:yaml.org,2002:int" and node.value != str(yaml.safe_load(node.value)):
        read = yaml.safe_load(node.value)  # YAML 1.1 has octals, such as 0100
        raise ParameterError(f"{where}: YAML reads {node.value} as {read}: write it in digits")


def from_notebook(namespace: dict[str, Any]) -> Parameters:
    """Check the parameters of a notebook, whoever set them: its cell, papermill, or a person.

    papermill injects every key of ``-f`` into every notebook and only warns of unknown ones, so
    the names are read from the cells that were run (IPython's ``In``): papermill's, and those that
    give a known parameter a literal, where an annotated name is one too. What papermill's own
    reading of a file hides (a parameter given twice, 0100 for 64) shows in ``load`` alone.

    Args:
        namespace: the notebook's ``globals()``.
    """
    names: dict[str, None] = {}
    for source in namespace.get("In", []):
        assigned, injected = _assigned(source), source.startswith("# Parameters")
        known = [name for name in assigned if name in FIELDS]
        if injected or any(isinstance(assigned[name].value, LITERALS) for name in known):
            declared = {n for n, s in assigned.items() if injected or isinstance(s, ast.AnnAssign)}
            names |= dict.fromkeys([*known, *sorted(declared)])
    return check({name: namespace[name] for name in names if name in namespace}, "this notebook")


def _assigned(source: str) -> dict[str, ast.Assign | ast.AnnAssign]:
    """Names that a cell assigns, with the assignment."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return {}
    found = {}
    for statement in statements:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value:
            targets = getattr(statement, "targets", None) or [statement.target]
            found |= {t.id: statement for t in targets if isinstance(t, ast.Name)}
    return found


def listing() -> str:
    """Every parameter with its default, type, range and meaning, as a parameter file."""
    lines = []
    for name, kind in Parameters.model_json_schema()["properties"].items():
        default, meaning, _ = (kind.pop(key) for key in ("default", "description", "title"))
        lines.append(f"{name}: {_as_yaml(default)}  # {_as_yaml(kind)}: {meaning}")
    return "\n".join(lines)


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).split("\n")[0]


def _explain(error: Any) -> str:
    """One problem of a value, with what the parameter means."""
    problem, value = error["msg"].removeprefix("Value error, "), error["input"]
    if not error["loc"]:
        return problem
    name = error["loc"][0]
    text = f"{name}={value!r:.80}: {problem} ({FIELDS[name].description})"
    if isinstance(value, bool) and error["type"] in ("string_type", "literal_error"):
        return f"{text}; a word that YAML reads as true or false needs quotes"
    return text
