"""A random Llama that vLLM can serve, for the tests of both of its samplers."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM


def wide_llama(
    folder: Path, tokenizer: Path, *, is_tied: bool, generation_config: GenerationConfig | None = None
) -> Path:
    """Save one with heads as wide as vLLM's least.

    Args:
        folder: where to.
        tokenizer: a folder with the one it gets, of at most 259 tokens.
        is_tied: whether its output has the embedding's weights.
        generation_config: what it says of how to sample from it.
    """
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=512,
        tie_word_embeddings=is_tied,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    if generation_config is not None:
        model.generation_config = generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
