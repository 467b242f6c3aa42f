"""One step's samples: asked of the sampler, put into groups beside the teacher's responses."""

from collections.abc import Sequence
from dataclasses import replace

from gadfly.chat_template import Renderer
from gadfly.groups import Branch, Group
from gadfly.samplers import Sample, Sampler, requests_for
from gadfly.stages.examples import Example


def sample_groups(
    sampler: Sampler,
    renderer: Renderer,
    batch: Sequence[Example],
    *,
    group_size: int,
    temperature: float,
    max_response_tokens: int,
    seed: int,
    purpose: str,
) -> tuple[list[Group], list[list[Sample]]]:
    """The batch's groups with fresh student branches, and the samples as they were drawn.

    `purpose` names the stage and step; with the seed and the prompt id it fixes the random numbers.
    """
    requests = requests_for([example.group for example in batch], group_size, seed, purpose)
    samples = sampler.sample(requests, temperature=temperature, max_response_tokens=max_response_tokens)
    groups = [
        replace(example.group, students=tuple(_branch(sample, renderer) for sample in drawn))
        for example, drawn in zip(batch, samples, strict=True)
    ]
    return groups, samples


def _branch(sample: Sample, renderer: Renderer) -> Branch:
    return Branch(sample.tokens, sample.finished, renderer.response_text(sample.tokens))
