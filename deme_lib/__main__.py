"""``python -m deme_lib``: a thin face of the library for jobs and the shell."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deme_lib import ROOT, parameters
from deme_lib.parameters import ParameterError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deme_lib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    make = commands.add_parser("make", help="make artefacts and what they need")
    make.add_argument("labels", nargs="+", help="labels as printed by `list`")
    listing = commands.add_parser("list", help="artefacts of an experiment, stored or missing")
    for command in (make, listing):
        command.add_argument("-f", "--file", default="params/digits.yaml", help="parameter file")

    render = commands.add_parser("render", help="tables and figures again, from records alone")
    render.add_argument("folder", type=Path, help="such as figures/digits; holds records/")
    readme = commands.add_parser("readme", help="write the tables of a folder into README.md")
    readme.add_argument("folder", type=Path)

    training = commands.add_parser("classifier", help="train the metric's classifiers again")
    training.add_argument("-f", "--file", default="params/digits.yaml", help="parameter file")
    training.add_argument("-o", "--out", type=Path, default=Path("runs/classifiers"))

    options = parser.parse_args(arguments)
    try:
        COMMANDS[options.command](options)
    except (ParameterError, FileNotFoundError, RuntimeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _make(options: argparse.Namespace) -> None:
    from deme_lib import recipes, stages

    p = parameters.load(options.file)
    known = recipes.everything(p)
    if unknown := [label for label in options.labels if label not in known]:
        raise ParameterError(f"no artefact {unknown}; {options.file} has {', '.join(known)}")
    for label in options.labels:
        stages.make(known[label], p)


def _list(options: argparse.Namespace) -> None:
    from deme_lib import recipes
    from deme_lib.store import Store

    p = parameters.load(options.file)
    store = Store(p.runs_dir)
    for recipe in recipes.everything(p).values():
        print(f"{'stored ' if store.holds(recipe) else 'missing'} {recipe.name}")


def _render(options: argparse.Namespace) -> None:
    from deme_lib import report

    report.render(options.folder / "records", options.folder)


def _readme(options: argparse.Namespace) -> None:
    from deme_lib import report

    report.update_readme(ROOT / "README.md", options.folder)


def _classifier(options: argparse.Namespace) -> None:
    from deme_lib import classifier, data

    p = parameters.load(options.file)
    sizes = (p.train_images, p.search_images, p.test_images)
    roles = data.split(p.dataset, *sizes, p.split_seed, p.image_size)
    classifier.train(p.experiment, roles, p.split_seed, options.out)


COMMANDS = {
    "make": _make,
    "list": _list,
    "render": _render,
    "readme": _readme,
    "classifier": _classifier,
}

if __name__ == "__main__":
    sys.exit(main())
