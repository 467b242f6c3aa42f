"""On a terminal a step's line replaces the one before; elsewhere the lines are thinned out."""

import contextlib
import os
import pty
import subprocess
import sys
import textwrap
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"

SHOW = """
import logging, sys
from gadfly.console import show_logs
console = show_logs()
logger = logging.getLogger("gadfly.stages.gad")
def step(number, last=False):
    logger.info("gad %d/9", number, extra={"live": True, "last": last})
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), **more}


def on_a_terminal(code: str, columns: int = 80) -> str:
    """What a process writes to a terminal of that width."""
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", SHOW + textwrap.dedent(code)]
    done = subprocess.run(command, stderr=end, env=environment(COLUMNS=str(columns)), check=True)
    os.close(end)
    assert done.returncode == 0
    text = b""
    # An error is how Linux says that the other end is gone.
    with os.fdopen(terminal, "rb", buffering=0) as output, contextlib.suppress(OSError):
        while piece := output.read(4096):
            text += piece
    return text.decode().replace("\r\n", "\n")


def in_a_pipe(code: str) -> str:
    command = [sys.executable, "-c", SHOW + textwrap.dedent(code)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment(), check=True).stderr


def seen(text: str) -> list[str]:
    """The lines a terminal shows in the end."""
    return [line.rsplit("\x1b[K", 1)[-1] for line in text.split("\n")]


def test_a_live_line_replaces_the_one_before() -> None:
    text = on_a_terminal("step(1); step(2); step(9, last=True); logger.info('gad: done')")
    assert text == "\r\x1b[Kgad 1/9\r\x1b[Kgad 2/9\r\x1b[Kgad 9/9\ngad: done\n"
    assert seen(text) == ["gad 9/9", "gad: done", ""]


def test_a_warning_in_between_has_a_line_of_its_own() -> None:
    text = on_a_terminal("step(1); logger.warning('careful'); logger.info('so'); step(2); step(3)")
    assert seen(text) == ["gad 1/9", "careful", "so", "gad 3/9"]


def test_what_others_write_can_have_a_line_of_its_own() -> None:
    text = on_a_terminal("step(1); console.end_line(); console.end_line(); print('error', file=sys.stderr)")
    assert seen(text) == ["gad 1/9", "error", ""]


def test_a_live_line_never_wraps() -> None:
    code = "logger.info('x' * 100, extra={'live': True}); logger.info('y' * 100)"
    assert seen(on_a_terminal(code, columns=40)) == ["x" * 39, "y" * 100, ""]


def test_what_data_says_does_not_steer_the_terminal() -> None:
    line = in_a_pipe("logger.warning('prompt %s', '\\x1b]0;pwned\\x07\\u202e')")
    assert line == "prompt «U+001B»]0;pwned«U+0007»«U+202E»\n"


def test_live_lines_are_thinned_out_in_a_pipe() -> None:
    text = in_a_pipe("[step(n) for n in range(1, 9)]; logger.warning('careful'); step(9, last=True)")
    assert text == "gad 1/9\ncareful\ngad 9/9\n"


def test_a_live_line_comes_again_after_ten_seconds_in_a_pipe() -> None:
    text = in_a_pipe("""
        import time
        clock, time.monotonic = 0.0, lambda: clock
        for number in range(1, 10):
            clock += 4
            step(number)
    """)
    assert text == "gad 1/9\ngad 4/9\ngad 7/9\n"


def test_a_reader_that_went_away_stops_no_run() -> None:
    code = "[(step(n), logger.info('x' * 5000)) for n in range(100)]; print('ran to its end')"
    command = [sys.executable, "-c", SHOW + code]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, env=environment(), check=False)
    os.close(writer)
    assert done.stdout == b"ran to its end\n"
    assert done.returncode == 0
