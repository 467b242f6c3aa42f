"""Own inference weights: `sample` responses, `update` after each step of the student."""

from gadfly.samplers.local import LocalSampler
from gadfly.samplers.sampler import Request, Sample, Sampler, requests_for
from gadfly.samplers.vllm import VllmSampler, suits_vllm

__all__ = ["LocalSampler", "Request", "Sample", "Sampler", "VllmSampler", "requests_for", "suits_vllm"]
