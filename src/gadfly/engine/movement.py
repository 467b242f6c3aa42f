"""Whether training moves the weights: a learning rate of 0, a frozen module or half precision shows here."""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Elements of a tensor that are looked at.
_LOOKED_AT = 1024


class Movement:
    """Which trained tensors of a model have moved since they were last looked at.

    Of each tensor a fixed sample of at most 1,024 elements is kept, so it costs kilobytes and microseconds a
    tensor. Tensors of one element are not looked at, unless there are no others: the bias of a score head, on
    which no difference of scores depends, moves by rounding or not at all. On many processes each looks at
    its shards; all of them have to ask, and get the same answer.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> movement = Movement(model)
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(1)
        >>> movement.since_last(), movement.since_last()
        (0.5, 1.0)
    """

    def __init__(self, model: nn.Module):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._tensors = [parameter for parameter in trained if parameter.numel() > 1] or trained
        self._seen, self._owners = self._look()

    def since_last(self) -> float:
        """The share of the trained tensors in which no element of the sample has changed since the last call,
        or since the movement began to be watched.

        A tensor without a gradient is still, as is one whose steps are smaller than its rounding. At the
        first step of a new adapter half of its matrices may be so by nature: the others are still zero.

        Raises:
            ValueError: the model trains nothing.
        """
        if not self._tensors:
            raise ValueError("no tensor of the model is trained")
        seen, _ = self._look()
        # Counts, since processes can add them up.
        changed = torch.zeros(len(self._tensors), device=seen.device)
        changed.index_add_(0, self._owners, (seen != self._seen).float())
        self._seen = seen
        first = self._tensors[0]
        if isinstance(first, DTensor):
            dist.all_reduce(changed, group=first.device_mesh.get_group())
        return float((changed == 0).double().mean())

    def _look(self) -> tuple[Float[Tensor, " looked"], Int[Tensor, " looked"]]:
        """The elements that are looked at, and which tensor each is of."""
        samples = [_sample(tensor.detach()) for tensor in self._tensors]
        device = samples[0].device if samples else torch.device("cpu")
        counts = torch.tensor([len(sample) for sample in samples], dtype=torch.int64, device=device)
        owners = torch.repeat_interleave(torch.arange(len(samples), device=device), counts)
        return torch.cat([*samples, torch.empty(0, device=device)]), owners


def _sample(tensor: Tensor) -> Float[Tensor, " looked"]:
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    # An odd stride does not stay in one column of a matrix, whose widths are even.
    stride = -(-own.numel() // _LOOKED_AT) | 1
    return own.flatten()[::stride]
