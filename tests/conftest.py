"""Shared by the tests: tiny models and data made on the spot, and where the real ones lie."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples at every run: a test that fails fails for all, and for what was changed.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

# Small work on shared cores: a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Qwen2 and a byte tokenizer with ChatML, PAD equal to EOS as in SmolLM2."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    vocabulary |= {character: index + 3 for index, character in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=2,
        bos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty prompts, each with a short answer that always ends the same way."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"id": f"p{n}", "prompt": f"say {n}", "response": f"{n}{n} ok"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_recipe: str) -> Path:
    """A recipe of every training stage that ends in seconds."""
    path = tmp_path / "recipe.toml"
    path.write_text(tiny_recipe, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_recipe(tiny_model: Path, teacher_file: Path) -> str:
    """What `recipe_file` says, for fixtures that outlive a test."""
    return f"""
name = "tiny"
[data]
train = "{teacher_file}"
valid_share = 0.2
test = {{ same = "{teacher_file}" }}
[student]
model = "{tiny_model}"
max_grad_norm = 1.0
[discriminator]
learning_rate = 1e-3
[sampling]
max_response_tokens = 12
[seqkd]
learning_rate = 1e-3
batch_prompts = 8
max_steps = 6
save_every = 2
evaluate_every = 3
[warmup]
learning_rate = 1e-3
batch_prompts = 8
group_size = 2
max_steps = 4
discriminator_only_steps = 2
discriminator_final_steps = 2
save_every = 3
evaluate_every = 4
[gad]
learning_rate = 1e-3
batch_prompts = 4
group_size = 4
max_steps = 6
save_every = 2
evaluate_every = 3
[evaluation]
prompts = 4
[audit]
allow = ["leak-into-test"]  # its test set is its training set
"""
