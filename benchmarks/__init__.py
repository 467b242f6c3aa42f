"""Measurements of what the design promises: `python -m benchmarks [NAME …] [--json]`, in its folder.

A benchmark is a module named in `__main__.py`. Its `CASES` are the names of its cases ("" where there is but
one), and `run(case, quick)` measures one; `quick` is a trial at a tiny size, whose figures mean nothing.
"""
