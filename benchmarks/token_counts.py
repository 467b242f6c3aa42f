"""Tokens that each way of working pushes through a model, in forward passes: a backward pass counts two.

Their ratio is the bound of what sharing prompts can save. Attention over long texts, the head (which reads
response tokens only, on both sides) and the memory traffic of decoding are not in it.
"""

from benchmarks.rival import Passes
from benchmarks.subjects import Shape

_TRAINED = 3


def shared(shape: Shape, branches: int) -> int:
    """Each prompt once."""
    return shape.prompts * (shape.prompt_tokens + branches * shape.response_tokens)


def repeated(shape: Shape, branches: int) -> int:
    """A prompt for every branch."""
    return shape.prompts * branches * (shape.prompt_tokens + shape.response_tokens)


def student_bound(shape: Shape) -> float:
    """Of the student's update with the reference's pass."""
    return repeated(shape, shape.group_size) / shared(shape, shape.group_size)


def three_pass_bound(shape: Shape) -> float:
    """Of the discriminator's step: samples to score, then pairs to train on, against one pass over all."""
    students = repeated(shape, shape.group_size)
    return (students + _TRAINED * 2 * students) / (_TRAINED * shared(shape, shape.group_size + 1))


def step_bound(shape: Shape, passes: Passes) -> float:
    """Of a whole step: sampling and reference forward, student and discriminator forward and backward."""
    size = shape.group_size
    teachers = size // passes.discriminator_samples
    rival = (2 + _TRAINED) * repeated(shape, size) + _TRAINED * repeated(shape, size + teachers)
    ours = (2 + _TRAINED) * shared(shape, size) + _TRAINED * shared(shape, size + 1)
    return rival / ours
