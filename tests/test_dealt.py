"""Sampling on many processes: how far it has come, how long it may take, and copies left behind."""

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from side_by_side import side_by_side
from tiny import sharp_model

from gadfly.distributed.processes import Processes
from gadfly.errors import AlarmError
from gadfly.logprobs import log_distribution
from gadfly.samplers import Canary, DealtSampler, LocalSampler, Request, Sample

NEVER = frozenset({258})
REQUESTS = [Request((5, 6, 7 + number), 3, f"stream {number}") for number in range(4)]


def test_progress_is_told_at_every_token_and_changes_no_sample(tiny_model: Path) -> None:
    model, reports = sharp_model(tiny_model), list[str]()
    silent = LocalSampler(model, NEVER, max_parallel_responses=6)
    speaking = LocalSampler(model, NEVER, max_parallel_responses=6, progress=reports.append)
    samples = speaking.sample(REQUESTS, temperature=1.0, max_response_tokens=5)
    assert samples == silent.sample(REQUESTS, temperature=1.0, max_response_tokens=5)
    # Four groups of three, two groups at a time.
    assert reports == [f"sampling: token {place} of at most 5" for place in range(1, 6)] * 2


def sample_slowly(processes: Processes, folder: Path, timeout_seconds: float) -> list[list[Sample]]:
    """Sample the requests where the first of many takes longer than anything may take, a bit a token."""

    def pause(module: Any, arguments: Any) -> None:
        if processes.size > 1 and processes.rank == 0:
            time.sleep(0.5)

    model = sharp_model(folder)
    model.register_forward_pre_hook(pause)
    processes.gather("start", None)
    processes.limit_waits(timeout_seconds)
    own = LocalSampler(model, NEVER, progress=processes.progress)
    return DealtSampler(own, processes).sample(REQUESTS, temperature=1.0, max_response_tokens=12)


@pytest.mark.slow
def test_slow_sampling_is_not_taken_for_stuck_by_those_that_wait_for_it(tiny_model: Path) -> None:
    alone = sample_slowly(Processes(), tiny_model, 0.0)
    first, second = side_by_side(sample_slowly, tiny_model, 3.0)
    assert first == second
    for group, wanted in zip(first, alone, strict=True):
        assert [sample.tokens for sample in group] == [sample.tokens for sample in wanted]


class Spoilt:
    """A sampler whose samples are not finite in the second process."""

    def __init__(self, processes: Processes):
        self._rank = processes.rank

    def sample(self, requests: Any, *, temperature: float, max_response_tokens: int) -> list[list[Sample]]:
        if self._rank == 1:
            raise AlarmError("log-probabilities of 1 of 1 samples are not finite", "sampler-gap")
        return [[Sample((5,), (0.0,), finished=False)] for _ in requests]

    def update(self, weights: Any) -> None:
        del weights


def told_by_all(processes: Processes) -> tuple[str, str, list[int]]:
    try:
        DealtSampler(Spoilt(processes), processes).sample(REQUESTS, temperature=1.0, max_response_tokens=1)
    except AlarmError as alarm:
        # Whoever is left waiting elsewhere would not come here.
        return str(alarm), alarm.alarm, processes.gather("after it", processes.rank)
    raise AssertionError("nobody was told")


def test_what_one_process_cannot_sample_stops_all_with_the_name_of_the_alarm() -> None:
    told = "rank 1: log-probabilities of 1 of 1 samples are not finite"
    assert side_by_side(told_by_all) == 2 * [(told, "sampler-gap", [0, 1])]


def test_a_copy_without_the_students_weights_raises_an_alarm_that_says_all(tiny_model: Path) -> None:
    student = sharp_model(tiny_model)
    copied = copy.deepcopy(student)

    def student_logprobs(tokens: Any) -> list[float]:
        ids = torch.tensor(tokens)
        with torch.no_grad():
            logits = student(input_ids=ids[None], use_cache=False).logits[0, :-1]
        values: list[float] = log_distribution(logits, 1.0).gather(-1, ids[1:, None]).squeeze(-1).tolist()
        return values

    sampler = LocalSampler(copied, NEVER, canary=Canary(student_logprobs))
    sampler.update(student.named_parameters())
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    with torch.no_grad():
        student.lm_head.weight.mul_(1.5)
    with pytest.raises(AlarmError) as alarm:
        sampler.update(before.items())
    text = str(alarm.value)
    assert text.startswith("the inference copy gives the tokens of a fixed text log-probabilities that are ")
    assert (
        "the student's own weights are right, its last update included, and nothing was sampled since" in text
    )
    assert 'set engine.precision = "float32", or run on one process' in text
    assert "vLLM" not in text
    assert "\n" not in text
    sampler.update(student.named_parameters())
