"""What a run says while it goes: one line a step, rewritten in place on a terminal, thinned out elsewhere."""

import logging
import math
import os
import shutil
import sys
import time

from gadfly.visible_text import visible

# Seconds between the lines of steps where they cannot be rewritten in place (a file, a pipe).
_PAUSE_SECONDS = 10.0


class ConsoleHandler(logging.Handler):
    """Shows log records on standard error.

    Of the records marked `live`, each replaces the one before on a terminal; elsewhere one in ten seconds is
    shown. The one also marked `last` stays and is always shown.
    """

    def __init__(self) -> None:
        super().__init__()
        self._in_place = sys.stderr.isatty()
        self._line_is_open = False
        self._shown_at = -math.inf

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record to standard error."""
        # Ids, names and texts of data are in it, and must not steer the terminal.
        text = visible(self.format(record))
        live, last = getattr(record, "live", False), getattr(record, "last", False)
        if live and self._in_place:
            # A line that wraps could not be rewritten.
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r\x1b[K{text[:width]}")
            self._line_is_open = True
            if last:
                self.end_line()
        elif not live or last or time.monotonic() - self._shown_at >= _PAUSE_SECONDS:
            self.end_line()
            self._write(f"{text}\n")
            if live:
                self._shown_at = time.monotonic()

    def end_line(self) -> None:
        """Let what is written next begin on a line of its own."""
        if self._line_is_open:
            self._write("\n")
        self._line_is_open = False

    def _write(self, text: str) -> None:
        # A reader that went away, such as `| head`, must not stop a training run.
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except BrokenPipeError:
            self.setLevel(logging.CRITICAL + 1)


def show_logs(*, is_quiet: bool = False) -> ConsoleHandler:
    """Send gadfly's log to the console, and quiet the libraries that are loaded after this.

    `is_quiet` is for a process beside the one that speaks: it shows nothing.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = ConsoleHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("gadfly")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.CRITICAL if is_quiet else logging.INFO)
    logger.propagate = False
    return handler
