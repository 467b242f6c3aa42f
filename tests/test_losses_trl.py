"""Values and gradients of the objectives, through the tiny model, against trl's and torch's own losses."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import random_groups
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

from gadfly import losses
from gadfly.config import Optimizer
from gadfly.discriminator import Discriminator, new_discriminator, read_scores
from gadfly.engine import Engine
from gadfly.logprobs import LogprobReader, Logprobs
from gadfly.models import load_language_model
from gadfly.objectives import discriminator_objective, grpo_objective, sft_objective
from gadfly.packing import micro_batches

CPU = torch.device("cpu")


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        largest = float(gradient.abs().max())
        assert largest > 0
        assert torch.allclose(gradient, theirs[name], rtol=0, atol=tolerance * largest), name


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_policy_loss_and_gradients_are_those_of_trl(loss_type: str, tiny_model: Path, tmp_path: Path) -> None:
    model, renderer = load_language_model(str(tiny_model), "float64")
    settings_ = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        report_to=[],
        per_device_train_batch_size=4,
        num_generations=4,
        loss_type=loss_type,
        epsilon=0.2,
        beta=0.1,
        temperature=0.8,
        # The paper's trainer does not weight the KL term by the probability ratio.
        use_bias_correction_kl=False,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=len,
        args=settings_,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 4}),
        processing_class=renderer.tokenizer,
    )
    groups = random_groups(5, 3, teachers=0, students=4)
    (batch,) = micro_batches(groups, 10**6, CPU)
    mask = batch.response_mask
    now = LogprobReader(0.8)(model, batch)
    noise = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old, ref = now.values.detach() + 0.5 * noise
    advantages = losses.group_advantages(noise[0, :, 0].reshape(3, 4)).flatten()
    num_tokens = int(mask.sum())
    loss = losses.grpo_loss(
        now.values, old, advantages, mask, clip_range=0.2, num_tokens=num_tokens
    ) + 0.1 * losses.kl_penalty(now.values, ref, mask, num_tokens=num_tokens)
    loss.backward()
    ours = gradients(model)
    model.zero_grad()

    inputs = {
        "prompt_ids": batch.input_ids[:, : batch.num_prompt_columns],
        "prompt_mask": batch.attention_mask[:, : batch.num_prompt_columns],
        "completion_ids": batch.response_tokens,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    their_loss = trainer._compute_loss(model, inputs)
    their_loss.backward()
    # trl's projection to the vocabulary is in single precision, whatever the model is in.
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    assert_same_gradients(ours, gradients(model), 1e-5)
    model.zero_grad()

    # At one update a batch the old log-probabilities are today's: the objective, in micro-batches.
    engine = Engine(model, LogprobReader(0.8), micro_batch_tokens=40, optimizer=Optimizer())
    reference = Logprobs(ref[batch.rows.argsort()], ref)
    in_row_order = torch.empty_like(advantages)
    in_row_order[batch.rows] = advantages
    objective = grpo_objective(groups, in_row_order, reference, clip_range=0.2, kl_coefficient=0.1)
    _, total = engine.forward_backward(groups, objective)
    ours = gradients(model)
    model.zero_grad()
    their_loss = trainer._compute_loss(model, inputs | {"old_per_token_logps": None})
    their_loss.backward()
    assert total == pytest.approx(their_loss.item(), rel=1e-5)
    assert_same_gradients(ours, gradients(model), 1e-5)


def test_bradley_terry_loss_and_gradients_are_those_of_trl_with_the_teacher_repeated(
    tiny_model: Path, tmp_path: Path
) -> None:
    discriminator, renderer = new_discriminator(str(tiny_model), "float64", seed=0)
    classifier = reward_model_of(discriminator, tiny_model)
    trainer = RewardTrainer(
        model=classifier,
        args=RewardConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=Dataset.from_dict({"chosen": ["a b"] * 2, "rejected": ["a c"] * 2}),
        processing_class=renderer.tokenizer,
    )
    # trl finds the last token by its not being PAD; ours is padded with 0, which no random text holds.
    classifier.config.pad_token_id = 0
    groups = random_groups(6, 3, teachers=2, students=3)
    engine = Engine(discriminator, read_scores, micro_batch_tokens=60, optimizer=Optimizer())
    _, loss = engine.forward_backward(groups, discriminator_objective(groups, "bradley_terry"))

    (batch,) = micro_batches(groups, 10**6, CPU)
    group, teacher = batch.group_index, batch.is_teacher
    pairs = [
        (i, j)
        for i in range(len(teacher))
        for j in range(len(teacher))
        if group[i] == group[j] and teacher[i] and not teacher[j]
    ]
    order = torch.tensor([i for i, _ in pairs] + [j for _, j in pairs])
    inputs = {
        "input_ids": batch.input_ids[order],
        "attention_mask": batch.attention_mask[order],
        "position_ids": batch.position_ids[order],
    }
    their_loss = trainer.compute_loss(classifier, inputs)
    their_loss.backward()
    assert loss == pytest.approx(their_loss.item(), rel=1e-9)
    ours = {
        name.replace("backbone.", "model.").replace("score_head.", "score."): gradient
        for name, gradient in gradients(discriminator).items()
        if name != "score_head.bias"
    }
    # transformers' RMSNorm rounds to single precision in any model, here once a pair and not once a row.
    assert_same_gradients(ours, gradients(classifier), 1e-6)
    # A constant added to all scores cancels.
    assert abs(float(discriminator.score_head.bias.grad)) < 1e-15


def reward_model_of(discriminator: Discriminator, folder: Path) -> torch.nn.Module:
    """The same weights as transformers' reward model."""
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    model.model.load_state_dict(discriminator.backbone.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(discriminator.score_head.weight)
    return model


def test_sft_loss_and_gradients_are_those_of_torchs_cross_entropy(tiny_model: Path) -> None:
    model, _ = load_language_model(str(tiny_model), "float64")
    groups = random_groups(7, 4, teachers=2, students=0)
    engine = Engine(model, LogprobReader(), micro_batch_tokens=40, optimizer=Optimizer())
    _, loss = engine.forward_backward(groups, sft_objective(groups))
    ours = gradients(model)
    model.zero_grad()
    (batch,) = micro_batches(groups, 10**6, CPU)
    logits = model(batch.input_ids, batch.attention_mask, batch.position_ids).logits
    logits = logits[:, batch.num_prompt_columns - 1 : -1]
    mask = batch.response_mask
    their_loss = torch.nn.functional.cross_entropy(logits[mask], batch.response_tokens[mask])
    their_loss.backward()
    assert loss == pytest.approx(their_loss.item(), rel=1e-9)
    # The model norms in single precision whatever its weights are.
    assert_same_gradients(ours, gradients(model), 1e-6)
