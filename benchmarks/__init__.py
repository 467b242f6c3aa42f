"""Measurements of what the design promises: `python -m benchmarks [NAME …] [--json]`, in its folder.

Each module with a `run() -> Result` is a benchmark of its own name.
"""
