"""Runs the benchmarks named, or all; exit code 1 if one falls short."""

import argparse
import json
import pkgutil
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from benchmarks.result import Result


def main() -> int:
    """Run them one after the other."""
    found = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    names = [name for name in found if name not in ("__main__", "result")]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    results: list[Result] = []
    for name in options.names or names:
        result: Result = import_module(f"benchmarks.{name}").run()
        results.append(result)
        if not options.json:
            verdict = "met" if result.ratio >= result.wanted else "NOT MET"
            figures = f"{result.ratio:.3f} ({result.low:.3f} to {result.high:.3f})"
            sys.stdout.write(f"{name}: {figures}, wanted {result.wanted:.2f}: {verdict}. {result.details}\n")
            sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return int(any(result.ratio < result.wanted for result in results))


if __name__ == "__main__":
    sys.exit(main())
