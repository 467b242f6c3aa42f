"""LoRA roles: student, discriminator and reference as adapters of one frozen model in memory.

Every role is a model of its own, with its own layers and its own adapter in them; only the tensors of the
frozen weights are the same ones. So there is no adapter to be switched on, and none that can be on at the
wrong time, in a forward pass, a backward pass or while sampling.

Source: arXiv 2106.09685. An adapter adds `alpha / rank * B A x` to every linear layer of the decoder, with B
zero at first; embeddings and the map to logits have none.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from gadfly.chat_template import Renderer
from gadfly.errors import CheckpointError, UserError
from gadfly.stored_json import check_fields, parse_object

_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
# What an adapter made elsewhere by peft may have that a role's does not.
_MORE = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
# What peft puts before the names of the weights in a file, and what it calls an adapter in a model.
STORED, ADAPTER = "base_model.model.", "default"


class SharedBase:
    """A frozen language model, and the roles that are adapters of it.

    Args:
        model: a language model, whose weights are frozen here and shared.
        renderer: the renderer for its tokenizer, and so for every role's.
        name: what it was opened by, a folder or a Hugging Face name; saved adapters point there.
        rank: columns of the two matrices of an adapter.
        alpha: an adapter counts `alpha / rank` times.
        seed: decides a new adapter.

    Raises:
        UserError: if the model was an adapter itself.
    """

    def __init__(
        self, model: PreTrainedModel, renderer: Renderer, name: str, *, rank: int, alpha: int, seed: int
    ):
        if adapted_model(name) is not None:
            raise UserError(
                f"student.lora_rank = {rank}: student.model = {name!r} is an adapter already; give the whole "
                f"model it belongs to"
            )
        self.renderer = renderer
        self._model = model
        self._name = name
        self._rank, self._alpha, self._seed = rank, alpha, seed

    def language_model(self, source: str | Path) -> PreTrainedModel:
        """A role that writes: the frozen model with an adapter of its own, which alone takes gradients.

        Args:
            source: the model's name for a new adapter, with which it computes what it did before; or the
                folder of a saved one.

        Raises:
            CheckpointError: if the folder holds no adapter of this model, rank and alpha.
            UserError: if the model has no linear layers that peft can put an adapter into.
        """
        return self._role(self._model, source)

    def decoder(self, source: str | Path) -> PreTrainedModel:
        """The same without the map to logits; the saved adapter may be one of a role that writes."""
        return self._role(self._model.base_model, source)

    def _role(self, model: nn.Module, source: str | Path) -> PreTrainedModel:
        # A copy of everything but the weights.
        role = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
        assert isinstance(role, PreTrainedModel), "a decoder of transformers' own is one"
        role.name_or_path = self._name
        config = LoraConfig(
            r=self._rank,
            lora_alpha=self._alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM" if role.can_generate() else None,
        )
        _add_adapter(role, config)
        self._draw(role)
        if str(source) != self._name:
            self._load(role, Path(source))
        role.eval()
        return role

    def _draw(self, role: PreTrainedModel) -> None:
        """New weights: A as peft draws them but from the seed, on the CPU, and B zero."""
        random_numbers = torch.Generator().manual_seed(self._seed)
        for name, weight in _adapter(role):
            # Small steps would be lost in the rounding of half precision.
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32)).zero_()
            if ".lora_A." in name:
                bound = 1 / math.sqrt(weight.shape[1])
                drawn = torch.empty(weight.shape, dtype=weight.dtype)
                weight.data.copy_(drawn.uniform_(-bound, bound, generator=random_numbers))

    def _load(self, role: PreTrainedModel, folder: Path) -> None:
        stored = _read(folder, self._rank, self._alpha)
        prefix = f"{self._model.base_model_prefix}."
        own = {name.replace(f".{ADAPTER}.", "."): weight.data for name, weight in _adapter(role)}
        if own.keys() != stored.keys():
            # The language model the discriminator starts from has a name for its decoder.
            stored = {name.removeprefix(prefix): weight for name, weight in stored.items()}
        shapes = {name: tuple(weight.shape) for name, weight in own.items()}
        if shapes != {name: tuple(weight.shape) for name, weight in stored.items()}:
            raise CheckpointError(f"{folder}: the adapter is of another model than {self._name}")
        for name, weight in own.items():
            weight.copy_(stored[name])


def stored_adapter(folder: str | Path) -> tuple[str, int, int] | None:
    """Model, rank and alpha of the adapter that a folder holds; None if it holds none that can be read, or
    one that is more than a product of two matrices times alpha over rank.
    """
    try:
        config = parse_object((Path(folder) / _CONFIG_FILE).read_bytes())
        check_fields(config, {"base_model_name_or_path": str, "r": int, "lora_alpha": int})
    except (OSError, ValueError):
        # What opens the folder as it is says what is wrong with it.
        return None
    if any(config.get(more) for more in _MORE):
        return None
    return config["base_model_name_or_path"], config["r"], config["lora_alpha"]


def adapted_model(name: str) -> str | None:
    """What the adapter of a name or folder is an adapter of; None if it is none."""
    file = find_adapter_config_file(name)
    if file is None:
        return None
    config = parse_object(Path(file).read_bytes())
    check_fields(config, {"base_model_name_or_path": str})
    base: str = config["base_model_name_or_path"]
    return base


def left_out_of_saves(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that a role is saved without: if it is an adapter, all of the frozen model."""
    adapted = [
        (f"{place}." if place else "", part)
        for place, part in model.named_modules()
        if isinstance(part, PreTrainedModel) and part._hf_peft_config_loaded
    ]
    return frozenset(
        f"{prefix}{name}" for prefix, part in adapted for name in part.state_dict() if ".lora_" not in name
    )


def merge_adapter(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model with a saved adapter added to its weights: an ordinary model again."""
    with warnings.catch_warnings():
        # That it draws at random what is missing peft says as no more than a warning, as it does that it asks
        # transformers in an old-fashioned way.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        merged: PreTrainedModel = PeftModel.from_pretrained(model, name).merge_and_unload()
    return merged.requires_grad_(True)


def _add_adapter(model: PreTrainedModel, config: LoraConfig) -> None:
    try:
        with warnings.catch_warnings():
            # GPT-2's linear layers lie the other way round, which peft takes care of, with a warning.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            model.add_adapter(config, ADAPTER)
    except ValueError as refusal:
        raise UserError(
            f"student.lora_rank = {config.r}: {model.name_or_path!r} has no linear layers that peft can put "
            f"an adapter into ({str(refusal).splitlines()[0]}); set student.lora_rank = 0"
        ) from refusal
    # In one order, so that equal adapters are equal files.
    config.target_modules = sorted(config.target_modules or ())


def _adapter(role: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained: peft has frozen all else."""
    return ((name, weight) for name, weight in role.named_parameters() if weight.requires_grad)


def _read(folder: Path, rank: int, alpha: int) -> dict[str, Tensor]:
    """The weights of a saved adapter, by the names of the model's layers."""
    try:
        config = parse_object((folder / _CONFIG_FILE).read_bytes())
        found = (config["r"], config["lora_alpha"])
        stored = load_file(folder / _WEIGHTS_FILE)
    except FileNotFoundError as missing:
        raise CheckpointError(
            f"{folder}: no {Path(str(missing.filename or _WEIGHTS_FILE)).name}, so this is no adapter, and "
            f"student.lora_rank = {rank} goes on from none but an adapter"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as damage:
        raise CheckpointError(f"{folder}: the adapter cannot be read: {damage}") from damage
    if found != (rank, alpha):
        raise CheckpointError(
            f"{folder}: an adapter of rank {found[0]} and alpha {found[1]}, while the recipe has rank {rank} "
            f"and alpha {alpha}; set student.lora_rank and student.lora_alpha to what it was saved with"
        )
    return {name.removeprefix(STORED): weight for name, weight in stored.items()}
