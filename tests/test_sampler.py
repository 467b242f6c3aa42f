"""Samples against transformers' own decoding, the trainer's log-probabilities, and the true distribution."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from tiny import forgetful_folder, random_groups, sharp_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gadfly.config import Optimizer
from gadfly.demo.scripted_teacher import prompt, random_records
from gadfly.engine import Engine
from gadfly.groups import Branch, Group
from gadfly.logprobs import LogprobReader
from gadfly.models import load_language_model
from gadfly.samplers import LocalSampler, Request, Sample, Sampler, packing_dtype, requests_for

ENDS = frozenset(range(10))
"""Ten of 259 tokens end a response, so that many of them end early."""

GROUPS = random_groups(0, 7)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> PreTrainedModel:
    return sharp_model(tiny_model)


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """The demo's student, which brings an attention mask of its own."""
    return load_language_model(str(forgetful_folder(tmp_path_factory.mktemp("demo"))), "float64")[0]


@pytest.fixture(params=["tiny", "forgetful"])
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, list[Request]]:
    """A model, and requests whose prompts differ in length."""
    model: PreTrainedModel = request.getfixturevalue(request.param)
    if request.param == "tiny":
        return model, requests_for(GROUPS, 3, seed=5, purpose="gad/1")
    rng = np.random.default_rng(0)
    lengths = [len(prompt(record).split()) for record in random_records(0, 6)]
    groups = [
        Group(f"p{number}", tuple(rng.integers(3, model.config.vocab_size, length - number % 3).tolist()))
        for number, length in enumerate(lengths)
    ]
    return model, requests_for(groups, 3, seed=5, purpose="gad/1")


def draw(
    model: PreTrainedModel,
    requests: list[Request],
    *,
    temperature: float = 0.8,
    cap: int = 16,
    parallel: int = 100,
    ends: frozenset[int] = ENDS,
) -> list[list[Sample]]:
    sampler = LocalSampler(model, ends, max_parallel_responses=parallel)
    return sampler.sample(requests, temperature=temperature, max_response_tokens=cap)


def tokens_of(answers: list[list[Sample]]) -> list[list[tuple[int, ...]]]:
    return [[sample.tokens for sample in group] for group in answers]


def test_prompts_of_unequal_length_are_sampled_side_by_side(
    case: tuple[PreTrainedModel, list[Request]],
) -> None:
    model, requests = case
    assert len({len(request.prompt_tokens) for request in requests}) > 2
    answers = draw(model, requests)
    assert [len(group) for group in answers] == [3] * len(requests)
    lengths = {len(sample.tokens) for group in answers for sample in group}
    assert len(lengths) > 3
    assert isinstance(LocalSampler(model, ENDS), Sampler)


def test_greedy_samples_are_those_of_transformers_generate(
    case: tuple[PreTrainedModel, list[Request]],
) -> None:
    model, requests = case
    requests = [Request(request.prompt_tokens, 1, "") for request in requests]
    answers = draw(model, requests, temperature=0.0, cap=12)
    for request, (sample,) in zip(requests, answers, strict=True):
        ids = torch.tensor([request.prompt_tokens])
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=sorted(ENDS),
            pad_token_id=0,
        )
        assert list(sample.tokens) == generated[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("parallel", [1, 6, 100])
def test_samples_depend_neither_on_batching_nor_on_the_order_of_requests(
    parallel: int, case: tuple[PreTrainedModel, list[Request]]
) -> None:
    model, requests = case
    answers = draw(model, requests)
    assert tokens_of(draw(model, requests, parallel=parallel)) == tokens_of(answers)
    order = np.random.default_rng(parallel).permutation(len(requests)).tolist()
    permuted = draw(model, [requests[index] for index in order], parallel=parallel)
    assert tokens_of(permuted) == [tokens_of(answers)[index] for index in order]


def test_a_sample_depends_on_its_index_and_not_on_how_many_are_drawn(tiny: PreTrainedModel) -> None:
    many = draw(tiny, requests_for(GROUPS, 5, seed=5, purpose="gad/1"))
    few = draw(tiny, requests_for(GROUPS[2:4], 2, seed=5, purpose="gad/1"))
    assert tokens_of(few) == [group[:2] for group in tokens_of(many)[2:4]]


def test_a_longer_cap_only_lengthens_samples(tiny: PreTrainedModel) -> None:
    requests = requests_for(GROUPS, 3, seed=5, purpose="gad/1")
    for short, long in zip(draw(tiny, requests, cap=4), draw(tiny, requests, cap=16), strict=True):
        assert [sample.tokens for sample in short] == [sample.tokens[:4] for sample in long]


@pytest.mark.parametrize("temperature", [0.8, 1.3])
def test_logprobs_are_those_the_trainer_reads_at_the_same_temperature(
    temperature: float, case: tuple[PreTrainedModel, list[Request]]
) -> None:
    model, requests = case
    answers = draw(model, requests, temperature=temperature)
    groups = [
        Group("7", request.prompt_tokens, students=tuple(Branch(s.tokens, s.finished, "") for s in group))
        for request, group in zip(requests, answers, strict=True)
    ]
    reader = LogprobReader(temperature)
    read = Engine(copy.deepcopy(model), reader, micro_batch_tokens=300).forward(groups).values
    samples = [sample for group in answers for sample in group]
    for row, sample in zip(read, samples, strict=True):
        length = len(sample.tokens)
        assert len(sample.logprobs) == length
        assert row[:length].tolist() == pytest.approx(sample.logprobs, abs=1e-10)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_first_tokens_are_distributed_as_the_softmax_at_the_temperature(
    temperature: float, tiny: PreTrainedModel
) -> None:
    ids = (65, 66, 67)
    count = 4000
    (answer,) = draw(tiny, [Request(ids, count, "chi-square")], temperature=temperature, cap=1)
    with torch.no_grad():
        logits = tiny(torch.tensor([ids])).logits[0, -1]
    expected = (torch.softmax(logits / temperature, -1) * count).numpy()
    seen = np.zeros_like(expected)
    for token, times in Counter(sample.tokens[0] for sample in answer).items():
        seen[token] = times
    # The test needs five expected in a cell: rarer tokens are put together.
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    seen = np.append(seen[~rare], seen[rare].sum())
    assert len(expected) > 20
    assert chisquare(seen, expected).pvalue > 0.01


def test_a_sample_finishes_on_any_end_token_which_it_includes(tiny: PreTrainedModel) -> None:
    answers = draw(tiny, requests_for(GROUPS, 40, seed=1, purpose="gad/1"), temperature=1.5, parallel=300)
    samples = [sample for group in answers for sample in group]
    finished = [sample for sample in samples if sample.finished]
    assert 0 < len(finished) < len(samples)
    assert len({sample.tokens[-1] for sample in finished}) > 5
    for sample in samples:
        assert not ENDS & set(sample.tokens[:-1])
        assert sample.finished == (sample.tokens[-1] in ENDS)
        assert 1 <= len(sample.tokens) <= 16
        assert sample.finished or len(sample.tokens) == 16
    # Some end at the very cap, and count as finished.
    assert any(len(sample.tokens) == 16 for sample in finished)


def test_one_token_is_the_shortest_cap(tiny: PreTrainedModel) -> None:
    answers = draw(tiny, requests_for(GROUPS, 30, seed=1, purpose="gad/1"), temperature=1.5, cap=1)
    samples = [sample for group in answers for sample in group]
    assert {len(sample.tokens) for sample in samples} == {len(sample.logprobs) for sample in samples} == {1}
    assert {sample.finished for sample in samples} == {True, False}


def test_samples_of_a_group_differ_and_so_do_steps_seeds_and_prompts(tiny: PreTrainedModel) -> None:
    same_prompt = [Group(name, GROUPS[0].prompt_tokens) for name in ("a", "b")]
    answers = [
        draw(tiny, requests_for(same_prompt, 4, seed=seed, purpose=purpose))
        for seed, purpose in ((1, "gad/1"), (1, "gad/2"), (1, "warmup/1"), (2, "gad/1"))
    ]
    drawn = [sample.tokens for groups in answers for group in groups for sample in group]
    assert len(set(drawn)) == len(drawn) == 32
    again = draw(tiny, requests_for(same_prompt, 4, seed=1, purpose="gad/1"))
    assert again == answers[0]


def test_random_numbers_of_a_sample_are_uniform_and_those_of_a_shorter_cap_are_their_beginning() -> None:
    request = Request((1,), 2, "stream")
    numbers = request.uniforms(0, 1000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.03
    assert request.uniforms(0, 10).tolist() == numbers[:10].tolist()
    assert not np.isin(request.uniforms(1, 1000), numbers).any()
    assert Request((2, 3), 9, "stream").uniforms(0, 10).tolist() == numbers[:10].tolist()


def test_samples_at_a_temperature_near_zero_are_the_greedy_ones(tiny: PreTrainedModel) -> None:
    requests = requests_for(GROUPS, 4, seed=3, purpose="gad/1")
    cold = draw(tiny, requests, temperature=1e-3)
    greedy = draw(tiny, requests, temperature=0.0)
    assert tokens_of(cold) == tokens_of(greedy)


def test_no_requests_give_no_samples(tiny: PreTrainedModel) -> None:
    assert draw(tiny, []) == []


def test_update_copies_the_students_weights_into_the_samplers_own(tiny: PreTrainedModel) -> None:
    student = copy.deepcopy(tiny)
    engine = Engine(student, LogprobReader(), micro_batch_tokens=100, optimizer=Optimizer())
    sampler = LocalSampler(copy.deepcopy(tiny), ENDS)
    requests = requests_for(GROUPS, 2, seed=1, purpose="gad/1")

    def sample() -> list[list[Sample]]:
        return sampler.sample(requests, temperature=0.8, max_response_tokens=16)

    before = sample()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.2)
    assert sample() == before
    sampler.update(engine.weights())
    after = sample()
    assert after != before
    assert after == draw(student, requests)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert sample() == after


def test_a_shared_model_is_up_to_date_without_a_copy(tiny: PreTrainedModel) -> None:
    student = copy.deepcopy(tiny)
    engine = Engine(student, LogprobReader(), micro_batch_tokens=100, optimizer=Optimizer())
    sampler = LocalSampler(student, ENDS)
    addresses = [parameter.data_ptr() for parameter in student.parameters()]
    # Torch counts in-place writes to a tensor.
    versions = [parameter._version for parameter in student.parameters()]
    sampler.update(engine.weights())
    assert [parameter.data_ptr() for parameter in student.parameters()] == addresses
    assert [parameter._version for parameter in student.parameters()] == versions
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.2)
    requests = requests_for(GROUPS, 2, seed=1, purpose="gad/1")
    answers = sampler.sample(requests, temperature=0.8, max_response_tokens=16)
    assert answers == draw(copy.deepcopy(student), requests)


def test_sampling_leaves_no_gradients_and_no_trace_in_the_global_random_state(tiny: PreTrainedModel) -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    draw(tiny, requests_for(GROUPS, 2, seed=1, purpose="gad/1"))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state
    assert all(parameter.grad is None for parameter in tiny.parameters())


def test_the_forgetful_student_draws_only_on_what_it_can_see(forgetful: PreTrainedModel) -> None:
    seen, memory = forgetful.config.record_tokens, forgetful.config.memory_tokens
    rng = np.random.default_rng(1)
    record = rng.integers(3, forgetful.config.vocab_size, seen).tolist()
    pasts = rng.integers(3, forgetful.config.vocab_size, (2, 8)).tolist()
    lately = rng.integers(3, forgetful.config.vocab_size, memory).tolist()
    prompts = [tuple(record + past + lately) for past in pasts]
    assert prompts[0] != prompts[1]
    one, other = draw(forgetful, [Request(ids, 4, "same") for ids in prompts])
    assert [sample.tokens for sample in one] == [sample.tokens for sample in other]
    # What it does see makes a difference.
    prompts = [(*prompts[0][:-1], last) for last in (5, 50)]
    one, other = draw(forgetful, [Request(ids, 4, "same") for ids in prompts])
    assert [sample.tokens for sample in one] != [sample.tokens for sample in other]


def test_packed_weights_draw_the_same_tokens_with_the_same_logprobs(tiny_model: Path) -> None:
    single = sharp_model(tiny_model).float()
    for name, weight in single.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(weight, -1, 1)
    requests = requests_for(GROUPS, 3, seed=5, purpose="gad/1")
    packed, plain = (LocalSampler(single, ENDS, copy_dtype=dtype) for dtype in (torch.float32, None))
    for temperature in (0.0, 0.8):
        ours, theirs = (
            list(chain(*sampler.sample(requests, temperature=temperature, max_response_tokens=16)))
            for sampler in (packed, plain)
        )
        assert [sample.tokens for sample in ours] == [sample.tokens for sample in theirs]
        for our, their in zip(ours, theirs, strict=True):
            assert our.logprobs == pytest.approx(their.logprobs, abs=1e-5)


def test_only_weights_beyond_the_caches_are_packed(tiny: PreTrainedModel) -> None:
    assert packing_dtype(tiny) is None
    # 16,384 x 1,024 numbers to logits.
    config = LlamaConfig(
        vocab_size=2**14, hidden_size=2**10, intermediate_size=8, num_hidden_layers=1, num_attention_heads=8
    )
    assert packing_dtype(LlamaForCausalLM(config)) == torch.float32
    assert packing_dtype(LlamaForCausalLM(config).double()) is None


def test_layers_that_are_patched_or_in_another_precision_decode_as_the_model_has_them(
    tiny_model: Path,
) -> None:
    model = sharp_model(tiny_model).bfloat16()
    # As models do that compute their logits in single precision.
    model.lm_head.float()
    model.model.norm.register_forward_hook(lambda _, __, states: states.float())
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda _, __, states: 2 * states)
        # As libraries do that patch layers one by one.
        up_proj = layer.mlp.up_proj
        up_proj.forward = lambda states, weight=up_proj.weight: 2 * F.linear(states, weight)
    requests = requests_for(GROUPS, 3, seed=5, purpose="gad/1")
    copied, plain = (
        LocalSampler(model, ENDS, copy_dtype=dtype).sample(requests, temperature=0.0, max_response_tokens=8)
        for dtype in (torch.bfloat16, None)
    )
    for ours, theirs in zip(chain(*copied), chain(*plain), strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_weights_are_packed_when_something_is_sampled_and_not_at_each_update(tiny_model: Path) -> None:
    model = sharp_model(tiny_model).float()
    sampler = LocalSampler(model, ENDS, copy_dtype=torch.float32)
    requests = requests_for(GROUPS, 3, seed=5, purpose="gad/1")

    def times_packed(work: Callable[[], object]) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            work()
        return sum(event.count for event in profile.key_averages() if "reorder_linear_weight" in event.key)

    linears = sum(type(layer) is torch.nn.Linear for layer in model.modules())
    sample = partial(sampler.sample, requests, temperature=0.8, max_response_tokens=4)
    assert times_packed(sample) == linears
    assert times_packed(sample) == 0
    assert times_packed(partial(sampler.update, model.named_parameters())) == 0
    assert times_packed(sample) == linears


@pytest.fixture(scope="module")
def autocast_student(tiny_model: Path) -> Engine:
    """A student in single precision that is trained under bfloat16 autocast."""
    model = sharp_model(tiny_model).float()
    return Engine(
        model, LogprobReader(0.8), micro_batch_tokens=1000, precision="bfloat16", optimizer=Optimizer()
    )


def gap_to_the_trainer(student: Engine, sampler: LocalSampler) -> float:
    """Mean difference (nats) between what the sampler says of its tokens and what the trainer does."""
    answers = sampler.sample(
        requests_for(GROUPS, 8, seed=5, purpose="gad/1"), temperature=0.8, max_response_tokens=16
    )
    groups = [
        replace(group, students=tuple(Branch(sample.tokens, sample.finished, "") for sample in samples))
        for group, samples in zip(GROUPS, answers, strict=True)
    ]
    trained = student.forward([group.only_students() for group in groups]).values
    rows = [sample.logprobs for samples in answers for sample in samples]
    gaps = [abs(np.array(row) - trained[place, : len(row)].numpy()) for place, row in enumerate(rows)]
    return float(np.concatenate(gaps).mean())


def test_in_half_precision_samples_are_rounded_as_the_trainer_rounds(autocast_student: Engine) -> None:
    student = autocast_student
    half, single = (LocalSampler(student.model, ENDS, copy_dtype=dtype) for dtype in (torch.bfloat16, None))
    assert 4 * gap_to_the_trainer(student, half) < gap_to_the_trainer(student, single)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copies_of_weights_are_those_of_the_last_update(autocast_student: Engine, dtype: torch.dtype) -> None:
    model = copy.deepcopy(autocast_student.model)
    requests = requests_for(GROUPS, 3, seed=5, purpose="gad/1")
    sampler = LocalSampler(model, ENDS, copy_dtype=dtype)

    def drawn(sampler: LocalSampler) -> list[list[Sample]]:
        return sampler.sample(requests, temperature=0.8, max_response_tokens=16)

    before = drawn(sampler)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    sampler.update(model.named_parameters())
    assert drawn(sampler) == drawn(LocalSampler(model, ENDS, copy_dtype=dtype)) != before
