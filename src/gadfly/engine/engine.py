"""One role's model and its optimiser, behind a handful of verbs; it knows no algorithm.

The loss is a pure function passed in. The model is always in eval mode: scores and
log-probabilities must be those that were sampled and rewarded, so there is no dropout.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar, get_args

import torch
from torch import Tensor, nn

from gadfly.attention import takes_attention
from gadfly.config import Optimizer
from gadfly.discriminator import Scores
from gadfly.engine.precision import Precision
from gadfly.errors import AlarmError
from gadfly.groups import Group
from gadfly.logprobs import Logprobs
from gadfly.packing import MicroBatch, micro_batches, num_rows

Output = TypeVar("Output", Logprobs, Scores)
Objective = Callable[[Output, MicroBatch], Tensor]


class Engine(Generic[Output]):
    """Runs and trains one model on groups.

    Args:
        model: student, reference or discriminator; put into eval mode.
        read: one forward pass of a micro-batch to the role's output.
        micro_batch_tokens: tokens in one pass; changes memory, not results beyond rounding.
        precision: `bfloat16` runs matrix products under autocast; weights keep their type. What is to be
            measured first (see `precision.py`) is no precision yet.
        optimizer: AdamW's settings; None for a model that is only read, whose weights then take no gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[nn.Module, MicroBatch], Output],
        *,
        micro_batch_tokens: int,
        precision: Precision = "float32",
        optimizer: Optimizer | None = None,
    ):
        assert precision in get_args(Precision), f"{precision} is no precision; it is to be resolved before"
        self.model = model.eval()
        self._reader: Callable[[nn.Module, MicroBatch], Output] = read
        self._is_autocast = precision == "bfloat16"
        self._micro_batch_tokens = micro_batch_tokens
        # A discriminator's attention is its backbone's.
        self._shares_prompts = takes_attention(getattr(model, "backbone", model))
        self._settings = optimizer
        self._adamw: torch.optim.AdamW | None = None
        if optimizer is None:
            model.requires_grad_(False)
        else:
            self._adamw = torch.optim.AdamW(
                model.parameters(),
                lr=0.0,
                betas=optimizer.adam_betas,
                weight_decay=optimizer.weight_decay,
                fused=True,
            )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def forward(self, groups: Sequence[Group]) -> Output:
        """The output for every row of the batch, without gradients."""
        with torch.no_grad():
            pieces = [(batch, self._read(batch)) for batch in self._cut(groups)]
        return _in_row_order(pieces, num_rows(groups))

    def forward_backward(
        self, groups: Sequence[Group], objective: Callable[[Output, MicroBatch], Tensor]
    ) -> tuple[Output, float]:
        """Add the gradients of an objective over the batch.

        Returns:
            The output that the objective saw (detached, in row order), and the loss summed over
            micro-batches.

        Raises:
            AlarmError: if the loss is not finite; nothing has been updated, and the gradients are forgotten.
        """
        assert self._adamw is not None, "a model that is only read has no gradients"
        pieces: list[tuple[MicroBatch, Output]] = []
        total = 0.0
        for batch in self._cut(groups):
            output = self._read(batch)
            loss = objective(output, batch)
            if not math.isfinite(value := loss.item()):
                self._adamw.zero_grad()
                ids = ", ".join(groups[index].id for index in batch.group_index.unique().tolist())
                raise AlarmError(f"the loss is {value} (prompts {ids})")
            loss.backward()
            total += value
            pieces.append((batch, _detached(output)))
        return _in_row_order(pieces, num_rows(groups)), total

    def clip_gradients(self) -> float:
        """Scale the gradients down to `max_grad_norm`, and return their norm before that.

        Raises:
            AlarmError: if the norm is not finite; nothing has been updated, and the gradients are forgotten.
        """
        assert self._settings is not None, "a model that is only read has no gradients"
        assert self._adamw is not None, "settings come with an optimiser"
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.max_grad_norm))
        if not math.isfinite(norm):
            self._adamw.zero_grad()
            raise AlarmError(f"the gradient norm is {norm}")
        return norm

    def step(self, learning_rate: float) -> None:
        """Update the weights once with the gradients, and forget the gradients."""
        assert self._adamw is not None, "a model that is only read is never updated"
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the model's weights, not copied."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's tensors by `quantity.parameter`, for a checkpoint; zeros before the first step."""
        assert self._adamw is not None, "a model that is only read has no optimiser"
        state: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            held: dict[str, Any] = self._adamw.state[parameter]
            if not held:
                held.update(
                    step=torch.zeros((), dtype=torch.float32, device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
            state.update({f"{quantity}.{name}": value for quantity, value in held.items()})
        return state

    def _read(self, batch: MicroBatch) -> Output:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._is_autocast):
            output: Output = self._reader(self.model, batch)
        return output

    def _cut(self, groups: Sequence[Group]) -> list[MicroBatch]:
        return micro_batches(
            groups, self._micro_batch_tokens, self.device, shares_prompts=self._shares_prompts
        )


def _detached(output: Output) -> Output:
    return type(output)(**{field.name: getattr(output, field.name).detach() for field in fields(output)})


def _in_row_order(pieces: list[tuple[MicroBatch, Output]], total_rows: int) -> Output:
    """One output for the whole batch from those of its micro-batches, padded with zeros to the longest."""
    kind = type(pieces[0][1])
    merged: dict[str, Tensor] = {}
    for field in fields(kind):
        values: list[Tensor] = [getattr(output, field.name) for _, output in pieces]
        shape = [
            total_rows,
            *(max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)),
        ]
        whole = values[0].new_zeros(shape)
        for (batch, _), value in zip(pieces, values, strict=True):
            place = (batch.rows, slice(value.shape[1])) if value.dim() == 2 else (batch.rows,)
            whole[place] = value
        merged[field.name] = whole
    return kind(**merged)
