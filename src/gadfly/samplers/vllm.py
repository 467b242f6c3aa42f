"""vLLM as the sampler: an engine of its own in this process, whose weights follow the student's.

A sample's random numbers follow from its request alone, as the local sampler's do, but vLLM computes in
batches of its own choosing, and a rounding that turns out otherwise can flip a token. So a run that was
resumed is the same byte for byte with the local sampler only.
"""

import gc
import importlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadfly.errors import UserError
from gadfly.samplers.canary import Canary, canary_text
from gadfly.samplers.sampler import Request, Sample

# Types of weights that vLLM and gadfly have in common.
_DTYPES = (torch.float32, torch.bfloat16)
_CANARY_PROMPT, _CANARY_ANSWER = 8, 24

# Of the memory, for keys and values at most: the rest is the trainer's. With less of it fewer responses are
# decoded at once.
_MEMORY_SHARE = 0.2
# Tokens in a block of them on a CPU, where vLLM's default of 128 would share no shorter prompt.
_CPU_BLOCK_TOKENS = 32


def suits_vllm(model: PreTrainedModel) -> bool:
    """Whether `sampling.backend = "auto"` means vLLM for a student.

    It does where vLLM is installed and knows the model and its type of weights, on a GPU. On a CPU it does
    not: starting vLLM takes half a minute, longer than many a small run samples, and only the local
    sampler goes on byte for byte where it was stopped.
    """
    if not _is_installed() or model.device.type != "cuda" or model.dtype not in _DTYPES:
        return False
    known = _vllm().ModelRegistry.get_supported_archs()
    return any(name in known for name in model.config.architectures or ())


class VllmSampler:
    """Samples with vLLM, each prompt computed once through its prefix cache.

    A canary compares it with the student at first and after every update.

    Args:
        source: the folder or Hugging Face name the student was opened from.
        model: the student itself, for its sizes.
        end_ids: every token that ends a response.
        canary: asks the student.
        max_tokens: of a prompt and its response together; more than the model has positions is no use.
        max_parallel_responses: responses decoded at once, at most.

    Raises:
        UserError: vLLM is not installed, or cannot run this model.
        AlarmError: vLLM computes other log-probabilities than the student.
    """

    def __init__(
        self,
        source: str,
        model: PreTrainedModel,
        end_ids: frozenset[int],
        canary: Canary,
        *,
        max_tokens: int,
        max_parallel_responses: int = 256,
    ):
        if not _is_installed():
            raise UserError(
                "sampling.backend = \"vllm\": vLLM is not installed; pip install 'gadfly[vllm]', "
                'or set sampling.backend = "local"'
            )
        if model.dtype not in _DTYPES:
            raise UserError(
                f'sampling.backend = "vllm": vLLM has no weights of type {_name(model.dtype)}; set '
                f'student.dtype to one of {", ".join(map(_name, _DTYPES))}, or sampling.backend = "local"'
            )
        self._canary, self._device = canary, model.device
        self._end_ids = sorted(end_ids)
        self._engine = _open_engine(source, model, max_tokens, max_parallel_responses)
        start = canary_text(model.config.get_text_config().vocab_size, _CANARY_PROMPT)
        request = Request(start, 1, "canary")
        ((answer,),) = self.sample([request], temperature=0.0, max_response_tokens=_CANARY_ANSWER)
        # What the student itself would say: in half precision, unlikely tokens are mostly rounding.
        self._text = [*start, *answer.tokens]
        self._compare()

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the student's weights.

        Raises:
            AlarmError: vLLM computes other log-probabilities than the student afterwards.
        """
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if self._device.type == "cpu":
            self._engine.apply_model(_repack_head)
        was_reset = self._engine.reset_prefix_cache()
        assert was_reset, "no request is under way between two calls"
        self._compare()

    def sample(
        self, requests: Sequence[Request], *, temperature: float, max_response_tokens: int
    ) -> list[list[Sample]]:
        """The samples of each request, in order. Temperature 0 is greedy; vLLM takes 0.01 for one between."""
        draws = [(request, sample) for request in requests for sample in range(request.num_samples)]
        if not draws:
            return [[] for _ in requests]
        parameters = [
            _vllm().SamplingParams(
                temperature=temperature,
                seed=request.seed(sample),
                max_tokens=max_response_tokens,
                stop_token_ids=self._end_ids,
                # Without it the end tokens that the model's folder names would end a response too.
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for request, sample in draws
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_tokens)} for request, _ in draws]
        outputs = iter(self._engine.generate(prompts, parameters, use_tqdm=False))
        return [[_read(next(outputs)) for _ in range(request.num_samples)] for request in requests]

    def _compare(self) -> None:
        """The canary: the same text in vLLM and in the student."""
        parameters = _vllm().SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
        (output,) = self._engine.generate({"prompt_token_ids": self._text}, parameters, use_tqdm=False)
        # The first token follows nothing.
        following = self._text[1:]
        places = zip(output.prompt_logprobs[1:], following, strict=True)
        theirs = [place[token].logprob for place, token in places]
        self._canary.check(f"vLLM {_vllm().__version__}", self._text, theirs)


def _is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


@cache
def _vllm() -> Any:
    """The library, imported."""
    # An engine in another process would need copies of the weights sent to it.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Reports of use to vLLM's authors are for the user to switch on.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # On a stack of its own: vLLM keeps errors of imports that it can do without, and with an error all frames
    # below it; whatever they hold, the student too, would stay in memory.
    with ThreadPoolExecutor(1) as importer:
        vllm = importer.submit(importlib.import_module, "vllm").result()
        importer.submit(getattr, vllm, "LLM").result()
    return vllm


def _open_engine(source: str, model: PreTrainedModel, max_tokens: int, max_parallel_responses: int) -> Any:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_tokens
    max_tokens = min(max_tokens, positions)
    on_cpu = model.device.type == "cpu"
    # The engine of an earlier stage refers to itself, and vLLM had the collector of garbage overlook it.
    gc.unfreeze()
    gc.collect()
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        return _vllm().LLM(
            source,
            skip_tokenizer_init=True,
            dtype=_name(model.dtype),
            max_model_len=max_tokens,
            max_num_seqs=max_parallel_responses,
            enable_prefix_caching=True,
            block_size=_CPU_BLOCK_TOKENS if on_cpu else None,
            logprobs_mode="processed_logprobs",
            # Else the model's own top-k, top-p or penalties would be the defaults.
            generation_config="vllm",
            # Compiled for a CPU, opening a small model takes minutes.
            enforce_eager=on_cpu,
            gpu_memory_utilization=_MEMORY_SHARE,
            kv_cache_memory_bytes=_cache_bytes(model, max_tokens, max_parallel_responses),
            use_tqdm_on_load=False,
        )
    except Exception as failure:
        # Which models, types and sizes go together is checked all over vLLM, with errors of every kind.
        reason = (str(failure).strip() or repr(failure)).splitlines()[0]
        raise UserError(
            f'sampling.backend = "vllm": vLLM cannot open {source!r}: {reason}; '
            f'set sampling.backend = "local"'
        ) from failure
    finally:
        # vLLM takes over the threads of the whole process, the trainer's too.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


def _cache_bytes(model: PreTrainedModel, max_tokens: int, max_parallel_responses: int) -> int:
    """Memory for keys and values: what all responses take at full length, if there is that much."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    token_bytes: int = 2 * config.num_hidden_layers * key_heads * channels * model.dtype.itemsize
    # A response leaves its last block unfilled, and one block is vLLM's own.
    num_tokens = (max_parallel_responses + 1) * (max_tokens + _CPU_BLOCK_TOKENS)
    if model.device.type == "cuda":
        memory, _ = torch.cuda.mem_get_info(model.device)
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(num_tokens * token_bytes, int(_MEMORY_SHARE * memory))


def _repack_head(model: nn.Module) -> None:
    """Renew the packed copy that a CPU's map to logits has of weights it shares with the embedding.

    A reload renews the packed copies of layers that have weights of their own.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # noqa: PLC0415

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _read(output: Any) -> Sample:
    (completion,) = output.outputs
    assert completion.finish_reason in ("stop", "length"), f"vLLM gave up: {completion.finish_reason}"
    tokens = tuple(completion.token_ids)
    logprobs = tuple(place[token].logprob for place, token in zip(completion.logprobs, tokens, strict=True))
    return Sample(tokens, logprobs, completion.finish_reason == "stop")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
