"""Runs an experiment, and writes its results; without a name, lists them."""

import argparse
import os
import sys
from pathlib import Path

from experiments.experiment import FOLDER, load_experiment, names
from gadfly.console import show_logs
from gadfly.errors import ConfigError, GadflyError


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing of the seeds asked for, then write results, figure and pages."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("name", nargs="?", help="which; without it, all are listed")
    parser.add_argument("--seeds", type=int, help="how many (default: as the experiment has it)")
    parser.add_argument("--first", type=int, help="the first of them (default: as the experiment has it)")
    parser.add_argument("--arms", type=_names, help="only these, as in dpo,oracle, or none (default: all)")
    parser.add_argument("--folder", type=Path, default=FOLDER.parent / "runs" / "experiments")
    parser.add_argument("--quick", action="store_true", help="try that everything runs, at tiny sizes")
    parser.add_argument("--pages", action="store_true", help="write results and pages of what is there")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="more settings for every run")
    # Settings may stand behind options.
    options = parser.parse_intermixed_args(arguments)
    if options.name is None:
        for name in names():
            sys.stdout.write(f"{name:<20} {load_experiment(name).title}\n")
        return 0
    try:
        _run(options)
    except GadflyError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _names(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


def _run(options: argparse.Namespace) -> None:
    experiment = load_experiment(options.name)
    if unknown := set(options.arms or ()) - experiment.arms.keys():
        raise ConfigError(
            f"--arms: {options.name} has no {', '.join(sorted(unknown))}; it has {', '.join(experiment.arms)}"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    show_logs()
    # After the libraries' progress bars are quieted, which they settle when they are imported.
    from experiments.pages import write_pages  # noqa: PLC0415
    from experiments.results import collect_results, kept_results  # noqa: PLC0415
    from experiments.runner import run_seed  # noqa: PLC0415

    folder = options.folder / (f"{options.name}-quick" if options.quick else options.name)
    settings = [*(experiment.quick if options.quick else []), *options.settings]
    ground = {**experiment.ground_settings, **(experiment.quick_ground if options.quick else {})}
    count = options.seeds or (1 if options.quick else experiment.seeds)
    first = options.first
    seeds = experiment.seeds_of_results(count) if first is None else list(range(first, first + count))
    if not options.pages:
        for seed in seeds:
            run_seed(options.name, experiment, folder, seed, settings, ground, options.arms)
    # A quick run shows nothing, and tuning decides nothing: nothing is kept of them but what they print.
    is_tuning = bool(set(seeds) & set(experiment.tuning_seeds))
    is_kept = not (options.quick or options.settings or is_tuning)
    own = seeds if is_tuning else None
    results = collect_results(options.name, experiment, folder, settings, ground, own)
    if is_kept and (earlier := kept_results(options.name)):
        results = results.with_earlier(earlier.without(experiment.tuning_seeds))
    sys.stdout.write(write_pages(options.name, experiment, results, is_kept=is_kept))


if __name__ == "__main__":
    sys.exit(main())
