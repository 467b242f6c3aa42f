"""One role's model and its optimiser, behind a handful of verbs; it knows no algorithm.

The loss is a pure function passed in. The model is always in eval mode: scores and
log-probabilities must be those that were sampled and rewarded, so there is no dropout.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Generic, TypeVar, get_args

import torch
from torch import Tensor, nn

from gadfly.attention import takes_attention
from gadfly.config import Optimizer
from gadfly.discriminator import Scores
from gadfly.distributed.processes import Processes, deal
from gadfly.engine.precision import Precision
from gadfly.engine.sharding import Reading, recompute_activations, reshard, shard, whole
from gadfly.errors import AlarmError
from gadfly.groups import Group
from gadfly.logprobs import Logprobs
from gadfly.lora import left_out_of_saves
from gadfly.packing import MicroBatch, cuts, filler, num_rows, num_tokens, pack
from gadfly.visible_text import few

Output = TypeVar("Output", Logprobs, Scores)
Objective = Callable[[Output, MicroBatch], Tensor]


class Engine(Generic[Output]):
    """Runs and trains one model on groups.

    On many processes every one of them is given the whole batch. Each works on its share of the groups, and
    all get the outputs of all, so that whoever uses an engine need not know how many processes there are.

    Args:
        model: student, reference or discriminator; put into eval mode. On many processes every one has all of
            it, and keeps a share.
        read: one forward pass of a micro-batch to the role's output.
        micro_batch_tokens: tokens in one pass; changes memory, not results beyond rounding.
        precision: `bfloat16` runs matrix products under autocast; weights keep their type. What is to be
            measured first (see `precision.py`) is no precision yet.
        optimizer: AdamW's settings; None for a model that is only read, whose weights then take no gradient.
        recomputes: whether activations inside a layer are computed again in the backward pass, not kept.
        processes: who works on it.
        shared: frozen weights of another role, by name, which are this model's too (see `sharding.shard`).
    """

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[nn.Module, MicroBatch], Output],
        *,
        micro_batch_tokens: int,
        precision: Precision = "float32",
        optimizer: Optimizer | None = None,
        recomputes: bool = False,
        processes: Processes | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ):
        assert precision in get_args(Precision), f"{precision} is no precision; it is to be resolved before"
        self.model = model.eval()
        self.precision = precision
        self._reader: Callable[[nn.Module, MicroBatch], Output] = read
        self._micro_batch_tokens = micro_batch_tokens
        # A discriminator's attention is its backbone's.
        self._shares_prompts = takes_attention(getattr(model, "backbone", model))
        self._settings = optimizer
        self._processes = processes or Processes()
        self._reading = Reading(model)
        self._adamw: torch.optim.AdamW | None = None
        # Prompts of the last backward pass, to name them should its gradient be no number.
        self._asked: list[str] = []
        if optimizer is None:
            model.requires_grad_(False)
        if recomputes and optimizer is not None:
            recompute_activations(self._reading)
        if self._processes.size > 1:
            shard(self._reading, in_half_precision=precision == "bfloat16", shared=shared)
        if optimizer is not None:
            self._adamw = torch.optim.AdamW(
                self._trained(),
                lr=0.0,
                betas=optimizer.adam_betas,
                weight_decay=optimizer.weight_decay,
                fused=True,
            )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def forward(
        self, groups: Sequence[Group], read: Callable[[nn.Module, MicroBatch], Output] | None = None
    ) -> Output:
        """The output for every row of the batch, without gradients; `read` in place of the engine's own."""
        with torch.no_grad():
            pieces = [(batch, self._read(batch, read)) for batch in self._passes(groups)]
        reshard(self._reading)
        return self._merged(groups, pieces)

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
        self._asked = [group.id for group in groups]
        pieces: list[tuple[MicroBatch, Output]] = []
        total, spoiled = 0.0, []
        for batch in self._passes(groups):
            output = self._read(batch)
            if not batch.is_filler:
                loss = objective(output, batch)
                total += loss.item()
                pieces.append((batch, _detached(output)))
            else:
                loss = _nothing(output)
            if not (batch.is_filler or math.isfinite(loss.item())):
                spoiled += [groups[index].id for index in batch.group_index.unique().tolist()]
            loss.backward()
        gathered = self._processes.gather("losses", (total, spoiled))
        if ids := [prompt for _, some in gathered for prompt in some]:
            self._adamw.zero_grad()
            loss_sum = sum(part for part, _ in gathered)
            raise AlarmError(f"the loss is {loss_sum} (prompts {few(ids)}); nothing was updated")
        return self._merged(groups, pieces), sum(part for part, _ in gathered)

    def clip_gradients(self) -> float:
        """Scale the gradients down to `max_grad_norm`, and return their norm before that.

        Raises:
            AlarmError: if the norm is not finite; nothing has been updated, and the gradients are forgotten.
        """
        assert self._settings is not None, "a model that is only read has no gradients"
        assert self._adamw is not None, "settings come with an optimiser"
        norm = float(whole(nn.utils.clip_grad_norm_(self._trained(), self._settings.max_grad_norm)))
        if not math.isfinite(norm):
            self._adamw.zero_grad()
            raise AlarmError(
                f"the gradient norm is {norm} (batch of the prompts {few(self._asked)}); nothing was updated"
            )
        return norm

    def step(self, learning_rate: float) -> None:
        """Update the weights once with the gradients, and forget the gradients."""
        assert self._adamw is not None, "a model that is only read is never updated"
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the weights that are trained: one process's own, not copied; of shards, put
        together one after the other, in every process at once.
        """
        reshard(self._reading)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self._processes.note(f"the hand-over of {name}")
                yield name, whole(parameter.detach())

    def whole_state(self, *, is_copy: bool = False) -> dict[str, Tensor]:
        """The tensors by name that a saved model consists of: of an adapter, not those of the frozen model.

        Shards are put together in the first process's memory. Every process has to ask; others get nothing.

        Args:
            is_copy: whether they are to stay as they are when the model is trained on.
        """
        reshard(self._reading)
        state: dict[str, Tensor] = {}
        kept: dict[int, Tensor] = {}
        left_out = left_out_of_saves(self.model)
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name in left_out:
                continue
            # Tied weights stay one tensor.
            if id(tensor) not in kept:
                self._processes.note(f"the saving of {name}")
                put_together = whole(tensor.detach())
                if self._processes.rank > 0:
                    put_together = put_together.new_empty(0)
                elif is_copy:
                    put_together = put_together.to("cpu", copy=True)
                kept[id(tensor)] = put_together if self._processes.size == 1 else put_together.cpu()
            state[name] = kept[id(tensor)]
        return state if self._processes.rank == 0 else {}

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's tensors by `quantity.parameter`, for a checkpoint; zeros before the first step.

        On many processes they are in shards, as the weights are.
        """
        assert self._adamw is not None, "a model that is only read has no optimiser"
        reshard(self._reading)
        state: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            quantities: dict[str, Any] = self._adamw.state[parameter]
            if not quantities:
                quantities.update(
                    step=torch.zeros((), dtype=torch.float32, device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
            state.update({f"{quantity}.{name}": value for quantity, value in quantities.items()})
        return state

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _read(
        self, batch: MicroBatch, read: Callable[[nn.Module, MicroBatch], Output] | None = None
    ) -> Output:
        is_autocast = self.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_autocast):
            kind, values = self._reading(read or self._reader, batch)
        output: Output = kind(**values)
        return output

    def _passes(self, groups: Sequence[Group]) -> Iterator[MicroBatch]:
        """This process's micro-batches, and then empty ones, until it has made as many passes as any other.

        All processes have to be in a pass for the weights to come together.
        """
        size, rank = self._processes.size, self._processes.rank
        cut = partial(cuts, groups, self._micro_batch_tokens, shares_prompts=self._shares_prompts)
        hands = [cut(hand) for hand in deal([num_tokens(group) for group in groups], size)]
        own, num_passes = hands[rank], max(map(len, hands))
        for place in range(num_passes):
            self._processes.note(f"pass {place + 1} of {num_passes}")
            if place < len(own):
                yield pack(groups, own[place], self.device, shares_prompts=self._shares_prompts)
            else:
                yield filler(self.device, shares_prompts=self._shares_prompts)

    def _merged(self, groups: Sequence[Group], pieces: list[tuple[MicroBatch, Output]]) -> Output:
        """One output of the whole batch in row order, from the pieces of all processes."""
        own = [(batch.rows, output) for batch, output in pieces if not batch.is_filler]
        if self._processes.size > 1:
            own = [
                (rows.to(self.device), _moved(output, self.device))
                for part in self._processes.gather(
                    "outputs", [(rows.cpu(), _moved(output, torch.device("cpu"))) for rows, output in own]
                )
                for rows, output in part
            ]
        return _in_row_order(own, num_rows(groups))


def _detached(output: Output) -> Output:
    return type(output)(**{field.name: getattr(output, field.name).detach() for field in fields(output)})


def _moved(output: Output, device: torch.device) -> Output:
    return type(output)(**{field.name: getattr(output, field.name).to(device) for field in fields(output)})


def _nothing(output: Output) -> Tensor:
    """A loss of zero that has the whole output behind it."""
    values: list[Tensor] = [getattr(output, field.name) for field in fields(output)]
    return torch.stack([value.sum() for value in values if value.requires_grad]).sum() * 0.0


def _in_row_order(pieces: list[tuple[Tensor, Output]], total_rows: int) -> Output:
    """One output for the whole batch from pieces and their rows, padded with zeros to the longest."""
    kind = type(pieces[0][1])
    merged: dict[str, Tensor] = {}
    for field in fields(kind):
        values: list[Tensor] = [getattr(output, field.name) for _, output in pieces]
        shape = [
            total_rows,
            *(max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)),
        ]
        merged[field.name] = values[0].new_zeros(shape)
        for (rows, _), value in zip(pieces, values, strict=True):
            place = (rows, slice(value.shape[1])) if value.dim() == 2 else (rows,)
            merged[field.name][place] = value
    return kind(**merged)
