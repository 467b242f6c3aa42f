"""The command line: the only place that prints results or sets an exit code.

gadfly run recipe.toml [key=value ...]      every stage that is not done yet
gadfly STAGE recipe.toml [key=value ...]    one stage
gadfly demo                                 the whole method on a scripted teacher, in minutes
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

import gadfly
from gadfly.cli.opening import do, do_by_ray, open_recipe, report_beside
from gadfly.console import show_logs
from gadfly.errors import GadflyError, UserError
from gadfly.visible_text import visible

app = typer.Typer(
    help="Distil any black-box LLM into your own model, on-policy, from the teacher's text alone.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings for this run, as in gad.group_size=4.", show_default=False),
]

Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A stage as in runs/NAME/gad, a checkpoint of it, or a model's folder or name.",
        show_default=False,
    ),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run the recipe's own code: the functions of gad.rewards.")
]


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
    ray_workers: Annotated[
        int | None, typer.Option(help="As many processes, by Ray Train.", min=1, show_default=False)
    ] = None,
) -> None:
    """Every stage that is not done yet, in order. Stopped at any moment, the same command goes on."""
    if ray_workers is None:
        _say(f"report: {do('run', recipe, overrides, allow_code) / 'report.html'}")
    else:
        _say(f"report: {do_by_ray(recipe, overrides, ray_workers, allow_code) / 'report.html'}")


def _stage_command(name: str, help_text: str) -> None:
    def command(recipe: RecipePath, overrides: Overrides = None) -> None:
        _say(f"{name}: done, in {do(name, recipe, overrides)}")

    app.command(name, help=help_text)(command)


@app.command()
def collect(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell rows, tokens and cost; ask nothing.")
    ] = False,
    trial: Annotated[
        bool, typer.Option("--trial", help="Ask 20 prompts, show some answers and the cost.")
    ] = False,
) -> None:
    """The teacher's answers to data.prompts through its API, each paid for once."""
    if not (dry_run or trial):
        _say(f"collect: done, in {do('collect', recipe, overrides)}")
        return
    from gadfly.stages import collect as stage  # noqa: PLC0415

    with open_recipe(recipe, overrides) as opened:
        work = stage.estimate if dry_run else stage.trial
        _say(opened.processes.once("collect", lambda: work(opened.alone()), is_patient=True))


_stage_command("audit", "What could tell teacher from student without reading, before anything is trained.")
_stage_command("seqkd", "The baseline: SFT on the teacher's responses.")
_stage_command("warmup", "SFT of the student, and the discriminator's first steps on its fresh samples.")
_stage_command("audit-warmup", "The audit again, of the student that warmup made.")


@app.command()
def gad(recipe: RecipePath, overrides: Overrides = None, allow_code: AllowCode = False) -> None:
    """GRPO of the student against the live discriminator."""
    _say(f"gad: done, in {do('gad', recipe, overrides, allow_code)}")


_stage_command("best", "Which kept GAD checkpoint is best, by a judge on held-out prompts.")
_stage_command("seqkd-equal-time", "The baseline again, for as many seconds as warmup and gad took.")
_stage_command("generate", "Responses of checkpoints to the test prompts.")
_stage_command("judge", "What a judge makes of the generations; by default a classifier that needs no API.")


@app.command()
def report(recipe: RecipePath, overrides: Overrides = None) -> None:
    """One HTML file with curves, samples and figures of what is there so far, at any moment of a run."""
    _say(f"report: {report_beside(recipe, overrides) / 'report.html'}")


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="The run folder, as in runs/NAME.", show_default=False)],
    once: Annotated[bool, typer.Option("--once", help="Show how it stands and end.")] = False,
) -> None:
    """A run as it goes: progress, metrics with trends, alarms, newest samples. Ctrl-C leaves it running."""
    from gadfly.stages.watch import Watched, screen, snapshot  # noqa: PLC0415

    watched = Watched(folder)
    if sys.stdout.isatty() and not once:
        from rich.console import Group  # noqa: PLC0415
        from rich.live import Live  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        with contextlib.suppress(_Stopped), Live(screen=True, auto_refresh=False) as live:
            while watched.is_running:
                lines = screen(watched, live.console.height)
                live.update(
                    Group(*(Text.assemble(*line.pieces, no_wrap=True) for line in lines)), refresh=True
                )
                time.sleep(1)
                watched.look()
    typer.echo(snapshot(watched))


@app.command()
def export(
    checkpoint: Checkpoint,
    folder: Annotated[Path, typer.Argument(help="Where to; must not exist.", show_default=False)],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the weights.")
    ] = "float32",
) -> None:
    """A trained student as a plain Hugging Face folder, LoRA merged."""
    from gadfly.stages.export import export as write  # noqa: PLC0415  torch loads only where it is used

    write(checkpoint, folder, dtype)
    _say(f"{folder}: written")


@app.command()
def chat(
    checkpoint: Checkpoint,
    system: Annotated[str | None, typer.Option(help="A system turn.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.8,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Of the answers.", min=0)] = 0,
) -> None:
    """Talk to a trained student, a line a turn; Ctrl-D ends it."""
    from gadfly.stages.chat import Chat  # noqa: PLC0415  torch loads only where it is used

    talk = Chat(checkpoint, system=system, temperature=temperature, max_tokens=max_tokens, seed=seed)
    is_asked = sys.stdin.isatty()
    while True:
        if is_asked:
            typer.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            _say(talk.answer(line.strip()))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="How many.", min=1)] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Of one, as in 80GB or 24GiB.")] = "80GB",
) -> None:
    """Whether a recipe fits on some GPUs, by formula from its model's config alone."""
    from gadfly.recipe_file import load_recipe  # noqa: PLC0415

    loaded = load_recipe(recipe, overrides or [])
    from gadfly.stages import plan as stage  # noqa: PLC0415  torch loads once the recipe is known to be right

    _say(stage.plan(loaded, gpus, gpu_memory))


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to put data, models and the run.")] = Path(
        "runs/demo"
    ),
    overrides: Overrides = None,
    seed: Annotated[
        int, typer.Option(help="Of data, models and samples; settings were chosen on 0, 1, 11 and 12.", min=0)
    ] = 2,
) -> None:
    """The whole method on a scripted teacher and a forgetful student, with an exact count of answers."""
    from gadfly.demo.demo import run_demo  # noqa: PLC0415  torch loads only where it is used

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("gadfly demo: it runs in one process; start it without torchrun")
    table = run_demo(folder, seed, overrides or [])
    typer.echo(table)
    typer.echo(f"report: {folder / 'report.html'}")


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"gadfly {gadfly.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _say(text: str) -> None:
    """Print a result: of many processes, the first one speaks."""
    if _is_first():
        # A recipe's names and paths are in it.
        typer.echo(visible(text))


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


class _Stopped(SystemExit):
    """Ctrl-C or a request to end; passes through `except Exception`, and typer leaves it alone."""


def _stop(number: int, _: object) -> None:
    raise _Stopped(128 + number)


def main() -> None:
    """Run a command; user errors are one line and an exit code, bugs keep their traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    console = show_logs(is_quiet=not _is_first())
    try:
        app()
    except GadflyError as error:
        console.end_line()
        if not error.is_shown_elsewhere:
            typer.echo(visible(str(error)), err=True)
        sys.exit(error.exit_code)
    except _Stopped:
        console.end_line()
        if _is_first():
            typer.echo("stopped; run the same command to go on", err=True)
        raise
