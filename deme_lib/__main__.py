"""``python -m deme_lib``: the library from the shell, for jobs and for people."""

import argparse
import sys
from pathlib import Path
from typing import Any

PRESET = "params/fashion8.yaml"


def make(options: argparse.Namespace) -> None:
    """make jobs or artefacts by name; without names everything, with its tables and figures"""
    from deme_lib.experiment import collect, graph, parameters, store
    from deme_lib.report import render

    p = parameters.load(options.file, **dict(options.parameter))
    if not options.names:
        folder = collect.collect(p)
        render.render(folder)
        return print(folder)
    jobs = {k: v for q in p.per_seed() for k, v in graph.jobs(q, p.looks_at(q.seed)).items()}
    every = [artefact for found in jobs.values() for artefact in found]
    for name in options.names:
        found = [a for a in every if name in (a.name, a.label)] or jobs.get(name)
        if not found:
            known = sorted({*jobs, *(artefact.label for artefact in every)})
            raise parameters.ParameterError(
                f"no job or artefact {name!r} in {options.file}; there are {', '.join(known)}"
            )
        for folder in store.make(found):
            print(folder)
    return None


def render(options: argparse.Namespace) -> None:
    """tables and figures again, from records alone; with --page, the table between its markers"""
    from deme_lib.report import render

    render.render(options.folder)
    if options.page:
        render.fill_readme(options.page, options.folder)


def ladder(options: argparse.Namespace) -> None:
    """gains over the sizes of models, from the records of several experiments"""
    from deme_lib.report import render

    render.ladder(options.folders, options.out)


def compare(options: argparse.Namespace) -> int:
    """whether training seeds made again agree with committed records"""
    from deme_lib.report import reproduced

    return reproduced.verdict(options.committed, options.other, options.seeds)


def merge(options: argparse.Namespace) -> None:
    """Eq. 8 on folders of models, pipelines or adapters: base, experts, one weight each (1/N)"""
    import torch

    from deme_lib.diffusion.merged import merge_folders

    weights = options.weights or [1 / len(options.experts)] * len(options.experts)
    dtype = options.dtype and getattr(torch, options.dtype)
    merge_folders(options.base, options.experts, weights, options.out, dtype)


def parameters(options: argparse.Namespace) -> None:
    """all parameters with default, type, range and meaning"""
    from deme_lib.experiment import parameters

    print(parameters.listing())


def notebooks(options: argparse.Namespace) -> int:
    """run the notebooks in place with their defaults, or check that their outputs are current"""
    from deme_lib.report import notebooks

    return notebooks.check() if options.check else notebooks.execute()


def classifier(options: argparse.Namespace) -> None:
    """train the two classifiers whose features a file's FID uses"""
    from deme_lib.diffusion import classifier, data
    from deme_lib.experiment import graph, parameters

    p = parameters.load(options.file)
    roles = data.split(p.dataset, **p.pick(*graph.SPLIT))
    classifier.train(p.experiment, roles, p.split_seed, options.out)


def _override(text: str) -> tuple[str, Any]:
    from deme_lib.experiment import parameters

    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: write name=value")
    try:
        return name, parameters.parse(value, name)
    except parameters.ParameterError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


FILE = ("-f", "--file"), {"default": PRESET, "help": f"parameter file ({PRESET})"}
OVERRIDE = ("-p", "--parameter"), {"type": _override, "action": "append", "default": []}
COMMANDS = {
    make: [(("names",), {"nargs": "*"}), FILE, OVERRIDE],
    render: [(("folder",), {"type": Path}), (("--page",), {"type": Path})],
    ladder: [
        (("folders",), {"type": Path, "nargs": "+"}),
        (("-o", "--out"), {"type": Path, "default": Path("figures")}),
    ],
    compare: [
        (("committed",), {"type": Path}),
        (("other",), {"type": Path}),
        (("--seeds",), {"type": int, "nargs": "+"}),
    ],
    merge: [
        (("base",), {"type": Path}),
        (("experts",), {"type": Path, "nargs": "+"}),
        (("--weights",), {"type": float, "nargs": "+"}),
        (("-o", "--out"), {"type": Path, "required": True}),
        (("--dtype",), {"choices": ["float64", "float32", "bfloat16", "float16"]}),
    ],
    parameters: [],
    notebooks: [(("--check",), {"action": "store_true"})],
    classifier: [FILE, (("-o", "--out"), {"type": Path, "default": Path("runs/classifiers")})],
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; an error is one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m deme_lib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for function, wanted in COMMANDS.items():
        command = commands.add_parser(function.__name__, help=function.__doc__)
        for flags, settings in wanted:
            command.add_argument(*flags, **settings)
        command.set_defaults(run=function)
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except (OSError, MemoryError, RuntimeError, ValueError, KeyError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
