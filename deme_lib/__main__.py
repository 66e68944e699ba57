"""``python -m deme_lib``: a thin face of the library for jobs and the shell."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deme_lib import ROOT
from deme_lib.experiment import parameters
from deme_lib.experiment.parameters import ParameterError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deme_lib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    make = commands.add_parser("make", help="make artefacts and what they need")
    make.add_argument("names", nargs="+", help="names as printed by `list`, or their labels")
    listing = commands.add_parser("list", help="artefacts of a file, stored or missing")
    sweep = commands.add_parser("sweep", help="table and figure of a sweep, making what is missing")
    check = commands.add_parser("check", help="what would stop a run, asked before it starts")
    for command in (make, listing, sweep, check):
        command.add_argument(
            "-f", "--file", default="params/digits.yaml", help="parameter or sweep file"
        )

    render = commands.add_parser("render", help="tables and figures again, from records alone")
    render.add_argument("folder", type=Path, help="such as figures/digits; holds records/")
    readme = commands.add_parser("readme", help="write the tables of a folder into README.md")
    readme.add_argument("folder", type=Path)

    training = commands.add_parser("classifier", help="train the metric's classifiers again")
    training.add_argument("-f", "--file", default="params/digits.yaml", help="parameter file")
    training.add_argument("-o", "--out", type=Path, default=Path("runs/classifiers"))

    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command](options) or 0
    except (OSError, MemoryError, RuntimeError, ValueError, KeyError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _make(options: argparse.Namespace) -> None:
    from deme_lib.experiment import stages, sweeps

    plan = sweeps.plan(options.file)
    for wanted in options.names:
        found = [entry for name, entry in plan.items() if wanted in (name, entry[0].label)]
        if len(found) != 1:
            problem = "several artefacts" if found else "no artefact"
            raise ParameterError(
                f"{problem} called {wanted!r}; {options.file} has {', '.join(plan)}"
            )
        stages.make(*found[0])


def _list(options: argparse.Namespace) -> None:
    from deme_lib.experiment import sweeps
    from deme_lib.experiment.store import Store

    for name, (recipe, p) in sweeps.plan(options.file).items():
        print(f"{'stored ' if Store(p.runs_dir).holds(recipe) else 'missing'} {name}")


def _sweep(options: argparse.Namespace) -> None:
    from deme_lib.experiment import sweep_records, sweeps
    from deme_lib.report import sweep_tables

    sweep = sweeps.load(options.file)
    folder = sweep_records.collect(sweep)
    sweep_tables.render(folder / "records", folder, sweep.sweep)
    print(folder / "sweeps")


def _check(options: argparse.Namespace) -> int:
    from deme_lib.experiment import doctor, sweeps

    found = []
    for finding in doctor.examine(sweeps.plan(options.file)):
        print(finding, flush=True)
        found.append(finding.status)
    return int(doctor.PROBLEM in found)


def _render(options: argparse.Namespace) -> None:
    from deme_lib.report import render

    render.render(options.folder / "records", options.folder)


def _readme(options: argparse.Namespace) -> None:
    from deme_lib.report import render

    render.update_readme(ROOT / "README.md", options.folder)


def _classifier(options: argparse.Namespace) -> None:
    from deme_lib.diffusion import classifier, data

    p = parameters.load(options.file)
    sizes = (p.train_images, p.search_images, p.test_images)
    roles = data.split(p.dataset, *sizes, p.split_seed, p.image_size)
    classifier.train(p.experiment, roles, p.split_seed, options.out)


COMMANDS = {
    "make": _make,
    "list": _list,
    "sweep": _sweep,
    "check": _check,
    "render": _render,
    "readme": _readme,
    "classifier": _classifier,
}

if __name__ == "__main__":
    sys.exit(main())
