"""The processes that do one run together: this one alone, or as `ranks.py` has it, many side by side.

All of them run the same program on the same batches, so they come to the same calls in the same order. What
differs is who does the work: reading and writing the run folder is the first process's (`once`), and forward
passes and samples are dealt out (`deal`) and put together again (`gather`).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gadfly.errors import GadflyError, UserError

T = TypeVar("T")


class Processes:
    """One process alone, for which everything is easy.

    Attributes:
        rank: which process this is, from 0.
        size: how many there are.
        place: where the work is, as in `gad step 7`; for errors.
        group: torch's handle for collectives of Python objects; None for one process.

    Example:
        >>> alone = Processes()
        >>> alone.once("reading a file", lambda: 3), alone.gather("results", 3)
        (3, [3])
    """

    rank = 0
    size = 1
    place = "the start"
    group: Any = None

    def once(self, what: str, action: Callable[[], T], *, is_patient: bool = False) -> T:
        """Do something in the first process; every process gets its result, or its error.

        Args:
            what: names it for whoever waits too long.
            action: what to do; its result can be pickled.
            is_patient: whether it may take as long as it likes, having time-outs of its own.
        """
        del what, is_patient
        return action()

    def gather(self, what: str, value: T) -> list[T]:
        """The values of all processes, by rank; each can be pickled."""
        del what
        return [value]

    def together(self, what: str, action: Callable[[], T]) -> T:
        """Do something in every process; if it is refused in one, it is in all.

        Raises:
            GadflyError: the error of the first process that has one.
        """
        result: list[T] = []
        refusal: GadflyError | None = None
        try:
            result = [action()]
        except GadflyError as error:
            refusal = error
        for rank, other in enumerate(self.gather(what, refusal)):
            if other is not None:
                refused = copy.copy(other)
                refused.args = (f"rank {rank}: {other}" if rank else str(other),)
                raise refused from other
        return result[0]

    def limit_waits(self, seconds: float) -> None:
        """How long one process may keep the others waiting, without progress, from now on."""

    def note(self, what: str) -> None:
        """Say what this process is about to do: it is what the others learn if it never ends."""

    def progress(self, what: str) -> None:
        """Say how far this process has come with what it does: what moves is not stuck, however slow.

        As often as one likes, and in every process another number of times, while `note` is for what all of
        them come to.
        """

    def beside(self) -> "Processes":
        """The same processes for a thread that works beside the main one."""
        return self

    def follow(self, beside: "Processes") -> None:
        """While this thread waits for one beside it: say what that has come to."""

    def check_same(self, what: str, value: str, remedy: str) -> None:
        """Refuse to go on where the processes differ in something that must be the same.

        Raises:
            UserError: naming the processes that differ from the first.
        """
        values = self.gather(what, value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            named = ", ".join(map(str, others))
            raise UserError(f"{what}: rank {named} has {values[others[0]]}, rank 0 has {values[0]}; {remedy}")


def deal(weights: Sequence[int], num_hands: int) -> list[list[int]]:
    """Deal items to hands so that the hands weigh about the same: the heaviest first, each to the lightest.

    Every process comes to the same deal. A hand may stay empty.

    Returns:
        The indices of each hand's items, in order.

    Example:
        >>> deal([5, 9, 4, 3], 2)
        [[1, 3], [0, 2]]
    """
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    loads = [0] * num_hands
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        lightest = loads.index(min(loads))
        hands[lightest].append(index)
        loads[lightest] += weights[index]
    return [sorted(hand) for hand in hands]
