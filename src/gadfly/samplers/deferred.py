"""Weights for a sampler when it needs them, however often they change in between."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from gadfly.samplers.sampler import Request, Sample, Sampler


class DeferredSampler:
    """A sampler that takes over weights when it is next asked for samples.

    Supervised steps sample nothing, and a hand-over gathers all shards, or goes to servers over the network.
    """

    def __init__(self, own: Sampler):
        self._own = own
        self._weights: Iterable[tuple[str, Tensor]] | None = None

    def sample(
        self, requests: Sequence[Request], *, temperature: float, max_response_tokens: int
    ) -> list[list[Sample]]:
        """The samples of each request, in order, by the newest weights. Temperature 0 is greedy.

        Raises:
            AlarmError: these are not what the sampler has afterwards.
        """
        if self._weights is not None:
            weights, self._weights = self._weights, None
            self._own.update(weights)
        return self._own.sample(requests, temperature=temperature, max_response_tokens=max_response_tokens)

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Keep weights in mind that are to be read as they are when there is something to sample."""
        self._weights = weights
