"""One pass gives score and gradient; micro-batches add up; what is not finite never reaches the weights."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from tiny import random_groups
from torch import Tensor
from transformers import PreTrainedModel

from gadfly.config import Optimizer
from gadfly.discriminator import Discriminator, Scores, new_discriminator, read_scores
from gadfly.engine import Engine, faster_precision, scheduled_learning_rate
from gadfly.errors import AlarmError
from gadfly.logprobs import LogprobReader, Logprobs
from gadfly.losses import group_advantages
from gadfly.models import load_language_model
from gadfly.objectives import discriminator_objective, grpo_objective, sft_objective
from gadfly.packing import MicroBatch

GROUPS = random_groups(0, 6)
SCORED_GROUPS = random_groups(1, 5, teachers=2, students=3)
POLICY = [group.only_students() for group in GROUPS]
SFT = [group.only_teachers() for group in GROUPS]


@pytest.fixture
def student(tiny_model: Path) -> PreTrainedModel:
    return load_language_model(str(tiny_model), "float64")[0]


@pytest.fixture
def discriminator(tiny_model: Path) -> Discriminator:
    return new_discriminator(str(tiny_model), "float64", seed=0)[0]


def student_engine(
    model: PreTrainedModel, micro_batch_tokens: int = 90, **optimizer: float
) -> Engine[Logprobs]:
    return Engine(
        model,
        LogprobReader(0.8),
        micro_batch_tokens=micro_batch_tokens,
        optimizer=Optimizer(**optimizer),
    )


def discriminator_engine(model: Discriminator, micro_batch_tokens: int = 90) -> Engine[Scores]:
    return Engine(model, read_scores, micro_batch_tokens=micro_batch_tokens, optimizer=Optimizer())


def gradients(engine: Engine[Logprobs] | Engine[Scores]) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}
    assert found
    return {name: gradient.clone() for name, gradient in found.items()}


def weights(engine: Engine[Logprobs] | Engine[Scores]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in engine.weights()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 0.0) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=0, atol=atol) for name in one)


def policy_objective(model: PreTrainedModel) -> Callable[[Logprobs, MicroBatch], Tensor]:
    """GRPO with random rewards, and a KL term to a reference that differs from the student."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.1)
    rewards = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logprobs = Engine(reference, LogprobReader(0.8), micro_batch_tokens=10**6).forward(POLICY)
    advantages = group_advantages(rewards).flatten()
    return grpo_objective(POLICY, advantages, logprobs, clip_range=0.2, kl_coefficient=0.3)


# Gradients


@pytest.mark.parametrize("budget", [1, 90, 200])
def test_student_gradients_over_micro_batches_equal_those_of_one_big_batch(
    budget: int, student: PreTrainedModel
) -> None:
    for groups, objective in ((POLICY, policy_objective(student)), (SFT, sft_objective(SFT))):
        big = student_engine(copy.deepcopy(student), 10**6)
        _, loss = big.forward_backward(groups, objective)
        small = student_engine(copy.deepcopy(student), budget)
        _, sum_of_shares = small.forward_backward(groups, objective)
        assert sum_of_shares == pytest.approx(loss, abs=1e-12)
        assert same(gradients(small), gradients(big), atol=1e-10)


@pytest.mark.parametrize("kind", ["bradley_terry", "cross_entropy"])
@pytest.mark.parametrize("budget", [1, 90, 200])
def test_discriminator_gradients_over_micro_batches_equal_those_of_one_big_batch(
    budget: int, kind: str, discriminator: Discriminator
) -> None:
    objective = discriminator_objective(SCORED_GROUPS, kind)
    big = discriminator_engine(copy.deepcopy(discriminator), 10**6)
    _, loss = big.forward_backward(SCORED_GROUPS, objective)
    small = discriminator_engine(copy.deepcopy(discriminator), budget)
    _, sum_of_shares = small.forward_backward(SCORED_GROUPS, objective)
    assert sum_of_shares == pytest.approx(loss, abs=1e-12)
    assert same(gradients(small), gradients(big), atol=1e-10)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("is_chunked", [True, False])
def test_on_two_threads_gradients_are_the_same_to_the_last_bit_every_time(
    is_chunked: bool, tiny_model: Path
) -> None:
    student, _ = load_language_model(str(tiny_model), "float32")
    # The prompt's last state predicts the first token of all eight; threads that each add to its gradient,
    # as torch's indexing has them do from 32,768 numbers on, come in any order.
    long = [group.only_students() for group in random_groups(2, 1, students=8, lengths=[300])]
    engine = Engine(student, LogprobReader(1.0, is_chunked), micro_batch_tokens=10**6, optimizer=Optimizer())
    seen = set()
    for _ in range(20):
        engine.forward_backward(long, sft_objective(long))
        seen.add(b"".join(gradient.numpy().tobytes() for gradient in gradients(engine).values()))
        engine.model.zero_grad()
    assert len(seen) == 1


def test_the_reference_matters_only_through_the_kl_term(student: PreTrainedModel) -> None:
    advantages = torch.zeros(18, dtype=torch.float64)
    reference = Engine(copy.deepcopy(student), LogprobReader(0.8), micro_batch_tokens=10**6).forward(POLICY)
    settings = {"clip_range": 0.2, "kl_coefficient": 0.3}
    engine = student_engine(student)
    # The student is its own reference and nobody has an advantage: nothing to gain.
    _, loss = engine.forward_backward(POLICY, grpo_objective(POLICY, advantages, reference, **settings))
    assert loss == pytest.approx(0, abs=1e-12)
    assert max(float(gradient.abs().max()) for gradient in gradients(engine).values()) < 1e-12
    further = Logprobs(reference.values - 0.5, reference.entropy)
    _, loss = engine.forward_backward(POLICY, grpo_objective(POLICY, advantages, further, **settings))
    assert loss == pytest.approx(0.3 * (math.exp(-0.5) - 1 + 0.5), rel=1e-9)


def test_the_score_in_the_loss_is_the_score_returned_and_the_score_before_the_update(
    discriminator: Discriminator,
) -> None:
    engine = discriminator_engine(discriminator)
    before = engine.forward(GROUPS)
    seen = torch.full_like(before.values, math.nan)
    objective = discriminator_objective(GROUPS, "bradley_terry")

    def watched(scores: Scores, batch: MicroBatch) -> Tensor:
        assert scores.values.requires_grad
        seen[batch.rows] = scores.values.detach()
        return objective(scores, batch)

    returned, _ = engine.forward_backward(GROUPS, watched)
    assert torch.equal(returned.values, seen)
    assert torch.equal(returned.values, before.values)
    assert not returned.values.requires_grad
    engine.clip_gradients()
    engine.step(1e-3)
    assert not torch.equal(engine.forward(GROUPS).values, before.values)
    assert torch.equal(returned.values, before.values)


def test_rows_return_in_the_order_of_groups_padded_with_zeros(student: PreTrainedModel) -> None:
    engine = student_engine(student, 60)
    output, _ = engine.forward_backward(SFT, sft_objective(SFT))
    lengths = [len(group.teachers[0].tokens) for group in SFT]
    assert output.values.shape == (6, max(lengths))
    for row, length in enumerate(lengths):
        assert bool((output.values[row, :length] < 0).all())
        assert bool((output.values[row, length:] == 0).all())
        alone = engine.forward([SFT[row]]).values[0]
        assert torch.allclose(output.values[row, :length], alone, rtol=0, atol=1e-10)


def test_each_teacher_response_is_back_propagated_once(student: PreTrainedModel) -> None:
    reads: list[int] = []
    reader = LogprobReader()

    def counted(model: torch.nn.Module, batch: MicroBatch) -> Logprobs:
        reads.extend(batch.rows.tolist())
        return reader(model, batch)

    engine = Engine(student, counted, micro_batch_tokens=60, optimizer=Optimizer())
    engine.forward_backward(SFT, sft_objective(SFT))
    assert sorted(reads) == list(range(6))


# Steps


def test_the_first_step_is_that_of_adamw_worked_by_hand(student: PreTrainedModel) -> None:
    engine = student_engine(student, weight_decay=0.1)
    engine.forward_backward(SFT, sft_objective(SFT))
    old, gradient = weights(engine), gradients(engine)
    engine.step(1e-2)
    # Both running means are the first gradient's, so the step is its sign, but for epsilon.
    expected = {
        name: old[name] * (1 - 1e-2 * 0.1) - 1e-2 * gradient[name] / (gradient[name].abs() + 1e-8)
        for name in old
    }
    assert same(weights(engine), expected, atol=1e-12)


def test_a_copied_state_stays_as_it_is_when_the_model_is_trained_on(student: PreTrainedModel) -> None:
    engine = student_engine(student)
    copied, live = engine.whole_state(is_copy=True), engine.whole_state()
    before = {name: value.clone() for name, value in live.items()}
    engine.forward_backward(SFT, sft_objective(SFT))
    engine.step(0.1)
    assert same(copied, before)
    assert not same(live, before)


def test_a_step_forgets_the_gradients(student: PreTrainedModel) -> None:
    engine = student_engine(student)
    objective = sft_objective(SFT)
    engine.forward_backward(SFT, objective)
    once = gradients(engine)
    engine.step(0.0)
    engine.forward_backward(SFT, objective)
    assert same(gradients(engine), once)


def test_steps_on_the_teachers_responses_make_them_likelier(student: PreTrainedModel) -> None:
    engine = student_engine(student)
    losses = []
    for _ in range(5):
        losses.append(engine.forward_backward(SFT, sft_objective(SFT))[1])
        engine.clip_gradients()
        engine.step(1e-2)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5


def test_gradients_are_scaled_down_to_the_largest_norm_and_never_up(student: PreTrainedModel) -> None:
    objective = sft_objective(SFT)
    loose = student_engine(copy.deepcopy(student), max_grad_norm=1e6)
    loose.forward_backward(SFT, objective)
    untouched = gradients(loose)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in untouched.values()))
    assert norm > 0.2
    assert loose.clip_gradients() == pytest.approx(norm, rel=1e-9)
    assert same(gradients(loose), untouched)
    tight = student_engine(copy.deepcopy(student), max_grad_norm=0.2)
    tight.forward_backward(SFT, objective)
    assert tight.clip_gradients() == pytest.approx(norm, rel=1e-9)
    scaled = {name: gradient * 0.2 / norm for name, gradient in untouched.items()}
    assert same(gradients(tight), scaled, atol=1e-6)
    assert tight.clip_gradients() == pytest.approx(0.2, rel=1e-4)


def test_weights_are_named_and_live(student: PreTrainedModel) -> None:
    engine = student_engine(student)
    live = dict(engine.weights())
    assert live.keys() == dict(student.named_parameters()).keys()
    before = {name: value.clone() for name, value in live.items()}
    engine.forward_backward(SFT, sft_objective(SFT))
    engine.step(1e-3)
    assert not any(torch.equal(live[name], before[name]) for name in live)
    assert not any(value.requires_grad for value in live.values())


@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_optimiser_put_back_goes_on_as_if_it_had_never_stopped(
    steps_before: int, student: PreTrainedModel
) -> None:
    def take(engine: Engine[Logprobs], count: int) -> None:
        for _ in range(count):
            engine.forward_backward(SFT, sft_objective(SFT))
            engine.clip_gradients()
            engine.step(1e-2)

    undisturbed = student_engine(copy.deepcopy(student))
    take(undisturbed, steps_before + 2)

    stopped = student_engine(copy.deepcopy(student))
    take(stopped, steps_before)
    kept = {name: value.clone() for name, value in stopped.optimizer_state().items()}
    resumed = student_engine(copy.deepcopy(stopped.model))
    for name, value in resumed.optimizer_state().items():
        value.copy_(kept[name])
    take(resumed, 2)
    assert same(weights(resumed), weights(undisturbed))
    assert same(resumed.optimizer_state(), undisturbed.optimizer_state())
    # Looking at the state of the one that stopped did not disturb it either.
    take(stopped, 2)
    assert same(weights(stopped), weights(undisturbed))


# What is not finite


def test_a_loss_that_is_not_finite_alarms_and_changes_nothing(student: PreTrainedModel) -> None:
    engine = student_engine(student, 60)
    before = weights(engine)
    objective = sft_objective(SFT)
    poisoned = SFT[3].id

    def spoiled(now: Logprobs, batch: MicroBatch) -> Tensor:
        hit = any(SFT[index].id == poisoned for index in batch.group_index.tolist())
        return objective(now, batch) * (math.inf if hit else 1)

    with pytest.raises(AlarmError, match=rf"the loss is inf \(prompts .*{poisoned}.*; nothing was updated$"):
        engine.forward_backward(SFT, spoiled)
    assert same(weights(engine), before)
    # Nothing of the failed pass is left: the next one has its own gradients alone.
    engine.forward_backward(SFT, objective)
    fresh = student_engine(copy.deepcopy(student), 60)
    fresh.forward_backward(SFT, objective)
    assert same(gradients(engine), gradients(fresh))


def test_a_gradient_that_is_not_finite_alarms_and_changes_nothing(student: PreTrainedModel) -> None:
    engine = student_engine(student)
    before = weights(engine)

    def kinked(now: Logprobs, batch: MicroBatch) -> Tensor:
        # Zero, with an infinite slope.
        return (now.values - now.values.detach()).sum().abs().sqrt()

    engine.forward_backward(SFT, kinked)
    named = rf"\(batch of the prompts {SFT[0].id}, .*\)"
    with pytest.raises(AlarmError, match=rf"^the gradient norm is .* {named}; nothing was updated$"):
        engine.clip_gradients()
    engine.step(1e-3)
    assert same(weights(engine), before)


# Engines that are only read


def test_an_engine_without_optimiser_reads_and_holds_no_gradients(student: PreTrainedModel) -> None:
    engine = Engine(student, LogprobReader(0.8), micro_batch_tokens=90)
    output = engine.forward(POLICY)
    assert not output.values.requires_grad
    assert not any(parameter.requires_grad for parameter in student.parameters())
    with pytest.raises(AssertionError, match="only read"):
        engine.forward_backward(POLICY, sft_objective(POLICY))
    with pytest.raises(AssertionError, match="only read"):
        engine.step(1e-3)


def test_an_engine_puts_its_model_into_eval_mode(student: PreTrainedModel) -> None:
    engine = student_engine(student.train())
    assert not student.training
    assert engine.device == torch.device("cpu")


# Half precision


def test_half_precision_products_leave_scores_logprobs_weights_and_gradients_in_single_precision(
    tiny_model: Path,
) -> None:
    groups = random_groups(2, 20, lengths=range(3, 8))
    model = new_discriminator(str(tiny_model), "float32", seed=0)[0]
    outputs, found = {}, {}
    for precision in ("float32", "bfloat16"):
        engine = Engine(
            copy.deepcopy(model),
            read_scores,
            micro_batch_tokens=200,
            precision=precision,
            optimizer=Optimizer(),
        )
        scores, _ = engine.forward_backward(groups, discriminator_objective(groups, "bradley_terry"))
        outputs[precision], found[precision] = scores.values, gradients(engine)
        engine.step(1e-3)
        assert {value.dtype for _, value in engine.weights()} == {torch.float32}
    exact, rounded = outputs["float32"], outputs["bfloat16"]
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).abs().max()) < 0.02
    # Half a score's digits would make ties, and ties take away advantages.
    assert len(rounded.unique()) == len(rounded)
    for name, gradient in found["float32"].items():
        assert found["bfloat16"][name].dtype == torch.float32
        if name != "score_head.bias":
            cosine = torch.cosine_similarity(gradient.flatten(), found["bfloat16"][name].flatten(), dim=0)
            assert float(cosine) > 0.98, name


def test_half_precision_logprobs_are_normalised_in_single_precision(tiny_model: Path) -> None:
    model = load_language_model(str(tiny_model), "float32")[0]
    exact, rounded = (
        Engine(model, LogprobReader(0.8), micro_batch_tokens=200, precision=precision).forward(POLICY).values
        for precision in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).abs().max()) < 0.05


def test_an_engine_takes_no_precision_that_is_still_to_be_measured(student: PreTrainedModel) -> None:
    # The annotation refuses it where types are checked, as in these tests; an assertion does elsewhere.
    with pytest.raises((AssertionError, TypeCheckError), match="precision"):
        Engine(student, LogprobReader(0.8), micro_batch_tokens=90, precision="auto")


def test_half_precision_is_chosen_only_where_it_is_clearly_faster() -> None:
    precision, timed = faster_precision(torch.device("cpu"))
    single, half = timed["float32_seconds"], timed["bfloat16_seconds"]
    assert min(single, half) > 0
    if timed["bfloat16_rows"] == timed["float32_rows"]:
        assert precision == ("bfloat16" if single / half > 1.15 else "float32")
    else:
        # A sixteenth that takes more than half as long as the whole: eight times slower.
        assert precision == "float32"
        assert half > single / 2


def test_a_slow_trial_is_cut_short() -> None:
    started = time.process_time()
    faster_precision(torch.device("cpu"))
    # The time of this process, so that what runs beside the tests does not count.
    assert time.process_time() - started < 1.5 * torch.get_num_threads()


# Schedule


def test_a_constant_rate_is_the_same_at_every_step() -> None:
    assert {scheduled_learning_rate(3e-6, "constant", step, 7) for step in range(1, 8)} == {3e-6}


def test_a_cosine_falls_from_the_full_rate_towards_zero() -> None:
    rates = [scheduled_learning_rate(2.0, "cosine", step, 8) for step in range(1, 9)]
    assert rates[0] == 2.0
    assert rates[4] == pytest.approx(1.0)
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.1
    assert rates[2] == pytest.approx(1 + math.cos(math.pi / 4))
