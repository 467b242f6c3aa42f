"""Plants every fault, runs clean seeds beside them, and prints what found what."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gadfly.console import show_logs


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit code 1 if a fault was not found in time, or a clean run has one."""
    parser = argparse.ArgumentParser(prog="python -m experiments.faults", description=__doc__)
    parser.add_argument("only", nargs="*", help="faults whose names hold one of these words (default: all)")
    parser.add_argument("--clean", type=int, default=5, help="how many clean seeds (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults' ground; the clean ones follow it")
    parser.add_argument("--folder", type=Path, help="keep everything there (default: nothing is kept)")
    options = parser.parse_args(arguments)
    show_logs(is_quiet=True)
    if options.folder is not None:
        return _report(options.folder.resolve(), options.seed, options.clean, options.only)
    with tempfile.TemporaryDirectory() as folder:
        return _report(Path(folder), options.seed, options.clean, options.only)


def _report(folder: Path, seed: int, num_clean: int, only: Sequence[str]) -> int:
    # After the libraries' progress bars are quieted, which they settle when they are imported.
    from experiments.faults.plants import FAULTS  # noqa: PLC0415
    from experiments.faults.running import run_clean, run_fault, warmed_up  # noqa: PLC0415
    from experiments.faults.table import CLEAN_HEAD, HEAD, clean_line, line  # noqa: PLC0415

    chosen = [fault for fault in FAULTS if not only or any(word in fault.name for word in only)]
    is_well = True
    start = warmed_up(folder / "start", seed) if any(fault.needs_start for fault in chosen) else None
    _say(*HEAD)
    for number, fault in enumerate(chosen):
        outcome = run_fault(fault, folder / f"fault-{number:02d}", seed, start)
        found = outcome.of(fault)
        is_well &= found is not None and found.step <= fault.within
        _say(line(fault, outcome))
    if num_clean:
        _say("", *CLEAN_HEAD)
    for other in range(seed + 1, seed + 1 + num_clean):
        outcome = run_clean(folder / f"clean-{other}", other)
        is_well &= not outcome.sights
        _say(clean_line(other, outcome))
    return 0 if is_well else 1


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{text}\n" for text in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
