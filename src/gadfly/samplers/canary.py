"""The canary: whether what samples has the student's weights, by the log-probabilities of a fixed text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from gadfly.errors import AlarmError

StudentLogprobs = Callable[[Sequence[int]], list[float]]
"""Log-probability (nats, temperature 1) of each token after the first, by the trainer."""

_ANOTHER_SAMPLER = 'try another version of vLLM, or set sampling.backend = "local" without servers'

# What two correct implementations may differ by through rounding, in nats on half of the tokens.
_SINGLE, _HALF = 1e-3, 0.2


@dataclass(frozen=True)
class Canary:
    """Compares a sampler with the trainer after every update.

    It sees weights that were left behind once what they miss is above rounding: at the paper's learning rates
    that is some steps.

    Attributes:
        student_logprobs: how to ask the trainer.
        is_half: whether either of the two computes in bfloat16.
    """

    student_logprobs: StudentLogprobs
    is_half: bool = False

    def check(
        self, who: str, tokens: Sequence[int], theirs: Sequence[float], *, remedy: str = _ANOTHER_SAMPLER
    ) -> None:
        """Compare log-probabilities of each token after the first.

        Args:
            who: what samples.
            tokens: the text.
            theirs: what that says of it.
            remedy: what to do about it, for the alarm.

        Raises:
            AlarmError: the sampler's are not the student's.
        """
        self.compare(who, self.student_logprobs(tokens), theirs, remedy=remedy)

    def compare(
        self, who: str, ours: Sequence[float], theirs: Sequence[float], *, remedy: str = _ANOTHER_SAMPLER
    ) -> None:
        """The same with what the trainer has said already."""
        gap = median(abs(mine - other) for mine, other in zip(ours, theirs, strict=True))
        tolerance = _HALF if self.is_half else _SINGLE
        # Not `>`: no number is no agreement either.
        if not gap <= tolerance:
            raise AlarmError(
                f"{who} gives the tokens of a fixed text log-probabilities that are {gap:.3g} nats from the "
                f"student's (the median), more than the {tolerance:g} of rounding: it does not have the "
                f"student's weights, or computes another model or in another type; the student's own weights "
                f"are right, its last update included, and nothing was sampled since; {remedy}",
                alarm="sampler-gap",
            )


def canary_text(vocabulary: int, length: int) -> tuple[int, ...]:
    """Token ids far from each other, so that they touch embeddings all over the vocabulary."""
    return tuple((1 + 7919 * place) % vocabulary for place in range(length))
