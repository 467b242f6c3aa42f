"""`gadfly watch`: a run folder seen from outside, while the run goes on or after it.

It only reads, takes no lock, and loads neither torch nor anything that draws.
"""

from gadfly.stages.watch.screen import Line, screen, snapshot
from gadfly.stages.watch.watched import Watched

__all__ = ["Line", "Watched", "screen", "snapshot"]
