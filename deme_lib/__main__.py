"""``python -m deme_lib``: a thin face of the library for jobs and the shell."""

import argparse
import os
import sys
from pathlib import Path

from deme_lib import ROOT

PRESET = "params/fashion8.yaml"


def make(options: argparse.Namespace) -> None:
    """make artefacts, or the artefacts of jobs, and what they need"""
    from deme_lib.experiment import sweeps
    from deme_lib.experiment.parameters import ParameterError

    plan, wanted = sweeps.plan(options.file), {}
    for name in options.names:
        found = [(r, p) for r, p in plan.values() if name in (r.name, r.label, r.job)]
        if not found:
            known = sorted({r.job for r, _ in plan.values()} - {""})
            raise ParameterError(
                f"no job or artefact called {name!r} in {options.file}: `list` prints the "
                f"artefacts, and jobs are {', '.join(known)}"
            )
        for recipe, p in found:
            wanted.setdefault(id(p), (p, []))[1].append(recipe)
    from deme_lib.experiment import stages

    for p, recipes in wanted.values():
        stages.make_all(recipes, p)


def listing(options: argparse.Namespace) -> None:
    """artefacts of a file by job, stored or missing"""
    from deme_lib.experiment import sweeps
    from deme_lib.experiment.store import Store

    for name, (recipe, p) in sweeps.plan(options.file).items():
        state = "stored" if Store(p.runs_dir).holds(recipe) else "missing"
        print(f"{state:8}{recipe.job:24}{name}")


def check(options: argparse.Namespace) -> int:
    """what would stop a run, asked before it starts"""
    from deme_lib.experiment import check, sweeps

    problems = 0
    for about, problem, found in check.examine(sweeps.plan(options.file)):
        print(f"{'problem' if problem else 'ok':8}{about:12}{found}", flush=True)
        problems += problem
    return int(problems > 0)


def sweep(options: argparse.Namespace) -> None:
    """records, table and figure of a sweep, making what is missing"""
    from deme_lib.experiment import collect, sweeps
    from deme_lib.report import render

    loaded = sweeps.load(options.file)
    overrides = {"figures_dir": options.figures} if options.figures else {}
    out = collect.collect_sweep(loaded, **overrides)
    render.render(out.parents[1])
    print(out)


def gallery(options: argparse.Namespace) -> None:
    """executed notebooks as Markdown beside the figures, and as a site"""
    from deme_lib.report.gallery import gallery

    gallery(options.executed, options.figures)


def render(options: argparse.Namespace) -> None:
    """tables and figures again, from records alone"""
    from deme_lib.report import render

    render.render(options.folder)


def readme(options: argparse.Namespace) -> None:
    """generated numbers and tables in Markdown files again"""
    from deme_lib.report import readme

    for path in options.files:
        path.write_text(readme.fill(path.read_text(), ROOT / "figures"))


def reproduced(options: argparse.Namespace) -> int:
    """whether two runs of one preset agree"""
    from deme_lib.report import reproduced

    return reproduced.verdict(options.committed, options.other)


def parameters(options: argparse.Namespace) -> None:
    """all parameters with default, type, range and meaning"""
    from deme_lib.experiment import parameters

    print(parameters.listing())


def classifier(options: argparse.Namespace) -> None:
    """train the metric's two classifiers of a file's data again"""
    from deme_lib.diffusion import classifier, data
    from deme_lib.experiment import parameters

    p = parameters.load(options.file)
    sizes = (p.train_images, p.search_images, p.test_images)
    roles = data.split(p.dataset, *sizes, p.split_seed, p.image_size)
    classifier.train(p.experiment, roles, p.split_seed, options.out)


def fashion8(options: argparse.Namespace) -> None:
    """make the built-in data set again from Fashion-MNIST's four files"""
    from deme_lib.diffusion import data

    data.write_fashion8(options.folder)
    print(f"wrote {data.FASHION8}")


def _paths(*names: str) -> list:
    return [((name,), {"type": Path}) for name in names]


FILE = ("-f", "--file"), {"default": PRESET, "help": f"parameter or sweep file ({PRESET})"}
COMMANDS = {
    "make": (make, [(("names",), {"nargs": "+", "help": "names as printed by `list`"}), FILE]),
    "list": (listing, [FILE]),
    "check": (check, [FILE]),
    "sweep": (sweep, [FILE, (("--figures",), {"help": "folder to write under"})]),
    "render": (render, _paths("folder")),
    "readme": (readme, [(("files",), {"nargs": "+", "type": Path})]),
    "gallery": (gallery, _paths("executed", "figures")),
    "reproduced": (reproduced, _paths("committed", "other")),
    "parameters": (parameters, []),
    "classifier": (
        classifier,
        [FILE, (("-o", "--out"), {"type": Path, "default": Path("runs/classifiers")})],
    ),
    "fashion8": (fashion8, _paths("folder")),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deme_lib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (function, wanted) in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__)
        for flags, settings in wanted:
            command.add_argument(*flags, **settings)
        command.set_defaults(run=function)
    options = parser.parse_args(arguments)
    if options.command != "make" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("a launcher can only `make`: for all else set the parameter `processes`")
    try:
        return options.run(options) or 0
    except (OSError, MemoryError, RuntimeError, ValueError, KeyError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
