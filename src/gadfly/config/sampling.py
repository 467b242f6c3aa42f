"""Where and how responses are sampled: the section `sampling` of a recipe."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from gadfly.config.section import Count, Section


def _url(url: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
        raise ValueError("give an address as http://host:8000")
    return url


Url = Annotated[str, AfterValidator(_url)]


class SamplingConfig(Section):
    """How the student's responses are drawn, and what fits into a prompt and a response."""

    temperature: Annotated[float, Field(ge=0.01)] = 0.8
    """Of the samples trained on. Log-probabilities are those of the distribution at this temperature."""
    max_prompt_tokens: Count = 2048
    """A longer prompt is dropped and counted, never cut."""
    max_response_tokens: Count = 1536
    """Cap of samples and of teacher responses; what is cut counts as unfinished."""
    max_parallel_responses: Count = 256
    """Responses decoded at once: speed and memory, and the samples only by rounding."""
    backend: Literal["auto", "local", "vllm"] = "auto"
    """What samples: `local`, plain PyTorch with the student's own weights in memory; or `vllm`, an engine
    of its own beside them, which needs `pip install 'gadfly[vllm]'`. Both draw from the same distribution,
    with random numbers of their own; only with `local`, and on a CPU, is a resumed run the same
    byte for byte. `auto`: `vllm` where it is installed and knows the model, on a GPU; `local` on a CPU, where
    starting it takes longer than many a small run samples, for LoRA students, and
    on several processes: there `servers` are the way to vLLM."""
    servers: list[Url] = []
    """vLLM servers on other machines to sample on, as in `["http://host:8000"]`, whatever `backend` says; how
    to start them is in docs/scaling.md. Weights go there by NCCL where this process has a GPU and vLLM, else
    through `weights` in the run folder, which the servers must see by the same path."""

    @model_validator(mode="after")
    def _servers_are_not_local(self) -> "SamplingConfig":
        if self.servers and self.backend == "local":
            raise ValueError('servers: they sample with vLLM, and backend = "local" does not; leave out one')
        return self
