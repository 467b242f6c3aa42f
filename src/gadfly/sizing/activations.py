"""How many bytes one micro-batch takes in forward and backward pass, from a model's shape alone.

Derived for a Llama-like decoder: what autograd keeps of each operation of a layer, a term each. A layer is

    x -> norm -> q k v -> rotate -> attend -> o -> + x -> norm -> gate up -> silu(gate) * up -> down -> +

Weights and gradients of the model itself are in `memory_plan.py`.
"""

from dataclasses import dataclass

from gadfly.sizing.model_shape import ModelShape

_SINGLE, _HALF = 4, 2
# As `logprobs.py` has it: logits alive at once.
_CHUNK_LOGITS = 2**24


@dataclass(frozen=True)
class Packed:
    """A micro-batch: so many groups (a fraction, where texts are shorter than their caps), each a prompt once
    and its branches; lengths in tokens.
    """

    groups: float
    prompt_tokens: int
    branches: int
    response_tokens: int

    @property
    def rows(self) -> float:
        """Branches in all."""
        return self.groups * self.branches

    @property
    def tokens(self) -> float:
        """Tokens computed."""
        return self.groups * self.prompt_tokens + self.response_count

    @property
    def response_count(self) -> float:
        """Tokens of responses."""
        return self.rows * self.response_tokens

    @property
    def seen(self) -> int:
        """Tokens that the last of a branch sees."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class Passes:
    """How passes are made.

    Attributes:
        weight_bytes: of a number of the weights as they are computed with.
        lora_rank: of the adapters, which are in single precision; 0 where every weight is trained.
        is_autocast: whether products are in bfloat16.
        is_checkpointed: whether a layer's activations are computed again in the backward pass.
        is_sharded: whether weights are gathered from other processes, under autocast in half precision.
        is_flex: whether attention is FlexAttention over the sequence, not SDPA over padded tables.
    """

    weight_bytes: int
    lora_rank: int = 0
    is_autocast: bool = False
    is_checkpointed: bool = False
    is_sharded: bool = False
    is_flex: bool = False

    @property
    def product_bytes(self) -> int:
        """Of a number that a matrix product gives."""
        return _HALF if self.is_autocast else self.weight_bytes

    @property
    def attention_bytes(self) -> int:
        """Of a number that is attended with; on a CPU autocast attends in single precision."""
        return _SINGLE if self.is_autocast and not self.is_flex else self.product_bytes

    @property
    def casts_weights(self) -> bool:
        """Whether autocast makes copies of the weights, which the backward pass needs too."""
        return self.is_autocast and self.weight_bytes > _HALF


def kept_bytes(shape: ModelShape, packed: Packed, passes: Passes) -> float:
    """What a decoder's forward pass leaves for the backward pass, at its fullest."""
    tokens = packed.tokens
    # Cosine and sine of the positions, and three integers a token: its id and where attention finds it.
    shared = tokens * (2 * shape.head_channels * passes.weight_bytes + 3 * 8) + _bias_bytes(packed, passes)
    last_norm = _norm_bytes(shape.hidden, passes) * tokens
    if passes.is_checkpointed:
        # The input of every layer.
        return shared + last_norm + shape.layers * tokens * shape.hidden * passes.weight_bytes
    kept = shape.layers * _layer_bytes(shape, packed, passes) + shared + last_norm
    if passes.lora_rank:
        # The frozen embedding needs no gradient, nor does the first norm.
        kept -= _norm_bytes(shape.hidden, passes) * tokens
    return kept


def backward_bytes(shape: ModelShape, packed: Packed, passes: Passes) -> float:
    """What the backward pass of a feed-forward part holds besides: the widest place of a decoder."""
    again = _layer_bytes(shape, packed, passes) if passes.is_checkpointed else 0.0
    # Gradients of silu(gate) and up from that of their product, and of the residual stream.
    return again + packed.tokens * (
        2 * shape.intermediate * passes.product_bytes + shape.hidden * passes.weight_bytes
    )


def head_bytes(shape: ModelShape, packed: Packed, passes: Passes) -> float:
    """Most that log-probabilities take beside the decoder's activations: logits, in chunks, and the gradient
    of the map to logits.
    """
    states = packed.response_count * shape.hidden * passes.weight_bytes
    at_once = max(1, _CHUNK_LOGITS // shape.vocabulary)
    logits = min(at_once, packed.response_count) * shape.vocabulary
    cast = shape.head_parameters * _HALF if passes.casts_weights else 0
    # Logits, their log-softmax, its exponential, and the entropy's terms.
    forward = logits * (passes.product_bytes + 3 * _SINGLE) + cast
    # Log-softmax and the gradients after and before it.
    backward = logits * 3 * _SINGLE + cast
    if not passes.lora_rank:
        # Gradients of the chunks before, and of this one as it is made.
        before = shape.head_parameters * passes.weight_bytes if packed.response_count > at_once else 0
        new = shape.head_parameters * (passes.weight_bytes + (_HALF if cast else 0)) + cast
        backward = before + max(backward, new + logits * passes.product_bytes)
    # The last hidden states of the responses, and in the backward pass their gradient.
    return states + max(forward, states + backward)


def _layer_bytes(shape: ModelShape, packed: Packed, passes: Passes) -> float:
    """What one layer keeps."""
    queries, keys = shape.heads * shape.head_channels, shape.key_heads * shape.head_channels
    a_token = 2 * _norm_bytes(shape.hidden, passes)
    if shape.norms_heads:
        norms = shape.heads + shape.key_heads
        a_token += norms * _norm_bytes(shape.head_channels, passes)
    a_token += _linear_input_bytes(shape, queries, passes)
    # The gate before and after silu, and what it gates.
    a_token += 3 * shape.intermediate * passes.product_bytes
    # What lies between an adapter's two matrices.
    between = _HALF if passes.is_autocast else _SINGLE
    a_token += shape.num_linears * passes.lora_rank * between
    kept = packed.tokens * a_token + _attention_bytes(shape, queries, keys, packed, passes)
    if passes.casts_weights:
        kept += _HALF * shape.layer_parameters
    return kept


def _norm_bytes(channels: int, passes: Passes) -> int:
    """Of one token: the input and the root of its mean square in single precision; and where the norm's own
    weight is trained, what it is multiplied with.
    """
    trained = 0 if passes.lora_rank else channels * passes.weight_bytes
    return _SINGLE * channels + _SINGLE + trained


def _linear_input_bytes(shape: ModelShape, queries: int, passes: Passes) -> int:
    """Of one token: inputs of q, k and v, of gate and up, of o, and of down."""
    if passes.is_autocast:
        width = _HALF
        # Adapters that are gathered come in half precision.
        is_cast = passes.weight_bytes > _HALF or (passes.lora_rank > 0 and not passes.is_sharded)
    else:
        # Adapters read in single precision.
        width = _SINGLE if passes.lora_rank else passes.weight_bytes
        is_cast = width != passes.weight_bytes
    # A cast input is kept once for each that casts it; else q, k and v keep the same one, as do gate and up.
    times = 5 if is_cast else 2
    return width * (times * shape.hidden + queries + shape.intermediate)


def _attention_bytes(shape: ModelShape, queries: int, keys: int, packed: Packed, passes: Passes) -> float:
    """Queries, keys, values, what is attended, and the log of each query's sum."""
    width = passes.attention_bytes
    a_query = 2 * queries * width + shape.heads * _SINGLE
    if passes.is_flex:
        return packed.tokens * (a_query + 2 * keys * width)
    prompts = packed.groups * packed.prompt_tokens
    # Each branch has its prompt's keys and values beside its own.
    tables = (prompts + packed.rows * packed.seen) * 2 * keys * width
    return packed.tokens * a_query + tables


def _bias_bytes(packed: Packed, passes: Passes) -> float:
    """Who sees whom in attention over tables, a number a pair; made once a pass, for all layers."""
    return 0.0 if passes.is_flex else packed.response_count * packed.seen * passes.attention_bytes
