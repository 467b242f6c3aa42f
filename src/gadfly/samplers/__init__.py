"""Own inference weights: `sample` responses, `update` after each step of the student."""

from gadfly.samplers.canary import Canary, StudentLogprobs
from gadfly.samplers.dealt import DealtSampler
from gadfly.samplers.decoding_copy import packing_dtype
from gadfly.samplers.deferred import DeferredSampler
from gadfly.samplers.local import LocalSampler
from gadfly.samplers.sampler import Request, Sample, Sampler, requests_for
from gadfly.samplers.vllm import VllmSampler, suits_vllm
from gadfly.samplers.vllm_servers import VllmServers

__all__ = [
    "Canary",
    "DealtSampler",
    "DeferredSampler",
    "LocalSampler",
    "Request",
    "Sample",
    "Sampler",
    "StudentLogprobs",
    "VllmSampler",
    "VllmServers",
    "packing_dtype",
    "requests_for",
    "suits_vllm",
]
