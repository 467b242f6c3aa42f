"""What every sampler is asked and answers, whatever runs it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gadfly.groups import Group


@dataclass(frozen=True)
class Request:
    """G responses to one prompt.

    `stream` names the random numbers: those of a response follow from it and the sample's index
    alone, so they do not depend on what else is sampled beside it, on how many processes, or on
    where a run was resumed.
    """

    prompt_tokens: tuple[int, ...]
    num_samples: int
    stream: str

    def uniforms(self, sample: int, count: int) -> NDArray[np.float64]:
        """The random numbers in [0, 1) of one sample, one a token."""
        key = int.from_bytes(self._key(sample)[:16], "little")
        return np.random.Generator(np.random.Philox(key=key)).random(count)

    def seed(self, sample: int) -> int:
        """The same for an engine that draws its own: a seed in [0, 2**63)."""
        return int.from_bytes(self._key(sample)[:8], "little") >> 1

    def _key(self, sample: int) -> bytes:
        return hashlib.sha256(f"{self.stream}\x00{sample}".encode()).digest()


@dataclass(frozen=True)
class Sample:
    """One response as ids, its closing end-of-turn token included.

    Attributes:
        tokens: at least one id.
        logprobs: of each token (nats) under the distribution it was drawn from, temperature
            included; of a greedy one, at temperature 1.
        finished: whether it ended by itself; false if it hit the cap.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


@runtime_checkable
class Sampler(Protocol):
    """Draws responses with inference weights of its own."""

    def sample(
        self, requests: Sequence[Request], *, temperature: float, max_response_tokens: int
    ) -> list[list[Sample]]:
        """The samples of each request, in order. Temperature 0 is greedy."""
        ...

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the student's weights."""
        ...


def requests_for(groups: Sequence[Group], num_samples: int, seed: int, purpose: str) -> list[Request]:
    """One request a group; `purpose` (a stage and step) keeps its random numbers apart from all others."""
    return [
        Request(group.prompt_tokens, num_samples, f"{seed}\x00{purpose}\x00{group.id}") for group in groups
    ]
