"""What each way of working pushes through a model, in forward passes: a backward pass counts two.

Their ratio is the bound of what sharing prompts can save: by tokens alone, or with the attention of a model
of some size, which for long texts is much of the work and which sharing hardly saves. The head (which reads
response tokens only, on both sides) and the memory traffic of decoding are not in it.
"""

from dataclasses import dataclass

from benchmarks.rival import Passes
from benchmarks.subjects import Shape, Size

_TRAINED = 3


@dataclass(frozen=True)
class Work:
    """Tokens, and pairs of a token and one that it attends to."""

    tokens: int
    pairs: int

    def __add__(self, other: "Work") -> "Work":
        """Both."""
        return Work(self.tokens + other.tokens, self.pairs + other.pairs)

    def __rmul__(self, times: int) -> "Work":
        """The same more than once."""
        return Work(times * self.tokens, times * self.pairs)

    def products(self, size: Size) -> int:
        """Multiplications in a layer of a model."""
        key_channels = size.hidden // size.heads * size.key_heads
        token = size.hidden * (2 * size.hidden + 2 * key_channels + 3 * size.intermediate)
        # A score, and the sum of values.
        return self.tokens * token + self.pairs * 2 * size.hidden


def shared(shape: Shape, branches: int) -> Work:
    """Each prompt once."""
    prompt, response = shape.prompt_tokens, shape.response_tokens
    pairs = _causal(prompt) + branches * (response * prompt + _causal(response))
    return shape.prompts * Work(prompt + branches * response, pairs)


def repeated(shape: Shape, branches: int) -> Work:
    """A prompt for every branch."""
    length = shape.prompt_tokens + shape.response_tokens
    return shape.prompts * branches * Work(length, _causal(length))


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def student_bound(shape: Shape, size: Size | None = None) -> float:
    """Of the student's update with the reference's pass; by tokens, or in a model of a size."""
    return _ratio(repeated(shape, shape.group_size), shared(shape, shape.group_size), size)


def three_pass_bound(shape: Shape, size: Size | None = None) -> float:
    """Of the discriminator's step: samples to score, then pairs to train on, against one pass over all."""
    students = repeated(shape, shape.group_size)
    ours = _TRAINED * shared(shape, shape.group_size + 1)
    return _ratio(students + 2 * _TRAINED * students, ours, size)


def step_bound(shape: Shape, passes: Passes, size: Size | None = None) -> float:
    """Of a whole step: sampling and reference forward, student and discriminator forward and backward."""
    branches = shape.group_size
    teachers = branches // passes.discriminator_samples
    rival = (2 + _TRAINED) * repeated(shape, branches) + _TRAINED * repeated(shape, branches + teachers)
    ours = (2 + _TRAINED) * shared(shape, branches) + _TRAINED * shared(shape, branches + 1)
    return _ratio(rival, ours, size)


def in_words(by_tokens: float, with_attention: float) -> str:
    """Both bounds in words."""
    return f"bound by token counts {by_tokens:.2f}, with attention {with_attention:.2f}"


def _ratio(rival: Work, ours: Work, size: Size | None) -> float:
    return rival.tokens / ours.tokens if size is None else rival.products(size) / ours.products(size)
