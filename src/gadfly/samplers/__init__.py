"""Own inference weights: `sample` responses, `update` after each step of the student."""

from gadfly.samplers.local import LocalSampler
from gadfly.samplers.sampler import Request, Sample, Sampler, requests_for

__all__ = ["LocalSampler", "Request", "Sample", "Sampler", "requests_for"]
