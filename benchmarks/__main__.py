"""Runs the benchmarks named, or all; exit code 1 if one falls short."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module

from benchmarks.result import Result

NAMES = (
    "step",
    "step_smollm2",
    "discriminator",
    "student",
    "sampling",
    "training_rate",
    "memory",
    "roles",
    "plan",
    "cost",
    "collect",
)
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them one after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: all), or NAME:CASE"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.add_argument("--quick", action="store_true", help="try that everything runs, at tiny sizes")
    options = parser.parse_args(arguments)
    if unknown := {name.partition(":")[0] for name in options.names} - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    results = []
    for result in _run(parser, options.names or NAMES, options.quick):
        results.append(result)
        if not options.json:
            sys.stdout.write(_line(result, options.quick) + "\n")
            sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return int(not (options.quick or all(result.is_met for result in results)))


def _run(parser: argparse.ArgumentParser, names: Sequence[str], quick: bool) -> Iterator[Result]:
    for name in names:
        bench, _, only = name.partition(":")
        module = import_module(f"benchmarks.{bench}")
        if only and only not in module.CASES:
            parser.error(f"no case {only} of {bench}; there are {', '.join(module.CASES)}")
        for case in [only] if only else module.CASES:
            yield module.run(case, quick)


def _line(result: Result, quick: bool) -> str:
    verdict = "met" if result.is_met else "NOT MET"
    wanted = f"wanted {result.wanted:.2f}: {verdict}" if result.wanted else "a figure"
    figures = f"{result.ratio:.3f} ({result.low:.3f} to {result.high:.3f})"
    return f"{result.bench}: {figures}, {'only a trial' if quick else wanted}. {result.details}"


if __name__ == "__main__":
    # Before the libraries that read them are imported.
    for _name, _value in _ENVIRONMENT.items():
        os.environ.setdefault(_name, _value)
    sys.exit(main())
