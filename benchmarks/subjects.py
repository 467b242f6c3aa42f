"""What is measured: Llamas in random weights, and random prompts and responses of fixed lengths.

Equal lengths leave no padding, which favours every rival: padding is what packing saves besides.
"""

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gadfly.attention import open_attention
from gadfly.chat_template import Renderer, load_renderer
from gadfly.discriminator import Discriminator
from gadfly.groups import Branch, Group, teacher_group
from gadfly.records import Message, Row, TeacherResponse
from gadfly.stages.examples import Example

TEMPERATURE = 0.8


@dataclass(frozen=True)
class Size:
    """Of a Llama whose head is its embedding."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int


TINY = Size(hidden=16, intermediate=16, layers=1, heads=2, key_heads=1, vocabulary=32)
DEMO = Size(hidden=64, intermediate=192, layers=2, heads=4, key_heads=4, vocabulary=120)
# Large enough for matrix products to count for more than the calls around them.
MIDDLE = Size(hidden=256, intermediate=768, layers=6, heads=8, key_heads=8, vocabulary=2048)
SMOLLM2 = Size(hidden=576, intermediate=1536, layers=30, heads=9, key_heads=3, vocabulary=49152)


@dataclass(frozen=True)
class Shape:
    """Of a batch: P prompts of so many tokens with G responses of so many, and one of the teacher."""

    prompts: int
    group_size: int
    prompt_tokens: int
    response_tokens: int


QUICK = Shape(prompts=2, group_size=2, prompt_tokens=5, response_tokens=4)


def new_model(size: Size, *, shares_prompts: bool) -> LlamaForCausalLM:
    """A model in eval mode, the same for the same size, with a place for our attention or without.

    Nothing that it can draw ends a response.
    """
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    if shares_prompts:
        assert open_attention(model), "a Llama goes through the interface"
    return model


def new_discriminator(size: Size, *, shares_prompts: bool) -> Discriminator:
    """One on a model of a size."""
    return Discriminator(new_model(size, shares_prompts=shares_prompts).model, seed=0).eval()


def new_renderer(size: Size) -> Renderer:
    """One word a token; the end of a turn is beyond what a model of the size can draw."""
    words = {f"w{number}": number for number in range(size.vocabulary)}
    inner = Tokenizer(WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="w0",
        eos_token="<end>",
        pad_token="<end>",
        chat_template="{{ messages | map(attribute='content') | join(' ') }}",
    )
    return load_renderer(tokenizer, None)


def new_examples(shape: Shape, renderer: Renderer, size: Size, seed: int = 0) -> list[Example]:
    """Random prompts, each with a cut response of the teacher."""
    rng = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(f"w{rng.randrange(1, size.vocabulary)}" for _ in range(length))

    rows = [
        Row(
            str(number),
            (Message("user", text(shape.prompt_tokens)),),
            (TeacherResponse(text(shape.response_tokens), finished=False),),
        )
        for number in range(shape.prompts)
    ]
    return [Example(row, teacher_group(row, renderer, shape.response_tokens)) for row in rows]


def new_groups(shape: Shape, size: Size, seed: int = 0) -> list[Group]:
    """Random groups with both roles' responses, in tokens alone."""
    rng = random.Random(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(size.vocabulary), k=length))

    def branches(count: int) -> tuple[Branch, ...]:
        return tuple(Branch(tokens(shape.response_tokens), False, "") for _ in range(count))

    return [
        Group(str(number), tokens(shape.prompt_tokens), branches(1), branches(shape.group_size))
        for number in range(shape.prompts)
    ]
