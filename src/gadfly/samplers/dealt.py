"""Sampling on many processes: requests are dealt to them, and every one gets all samples."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from gadfly.distributed.processes import Processes, deal
from gadfly.samplers.sampler import Request, Sample, Sampler


class DealtSampler:
    """A sampler whose work is shared; each process has an inference copy of its own in `own`.

    Every process is asked for the same requests and answers with the same samples: the random numbers of a
    response are its request's, whoever draws it.
    """

    def __init__(self, own: Sampler, processes: Processes):
        self._own, self._processes = own, processes

    def sample(
        self, requests: Sequence[Request], *, temperature: float, max_response_tokens: int
    ) -> list[list[Sample]]:
        """The samples of each request, in order. Temperature 0 is greedy."""
        lengths = [
            len(request.prompt_tokens) + request.num_samples * max_response_tokens for request in requests
        ]
        hand = deal(lengths, self._processes.size)[self._processes.rank]
        self._processes.note("sampling")

        def draw() -> list[list[Sample]]:
            own = [requests[index] for index in hand]
            return self._own.sample(own, temperature=temperature, max_response_tokens=max_response_tokens)

        # What one process refuses, such as samples that are not finite, none goes on with.
        drawn = self._processes.together("sampling", draw)
        gathered = self._processes.gather("samples", list(zip(hand, drawn, strict=True)))
        by_index = {index: samples for hand_and_samples in gathered for index, samples in hand_and_samples}
        return [by_index[index] for index in range(len(requests))]

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the student's weights, in every process."""
        self._processes.together("the student's weights", lambda: self._own.update(weights))
