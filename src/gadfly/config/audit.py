"""What `audit` looks at, and what it lets pass."""

from typing import Annotated

from pydantic import AfterValidator

from gadfly.analysis.audit_findings import CATALOGUE
from gadfly.config.section import Count, Section


def _finding(name: str) -> str:
    if name not in CATALOGUE:
        raise ValueError(f"no finding of the audit; there are {', '.join(sorted(CATALOGUE))}")
    return name


class AuditConfig(Section):
    """What is looked at before training, and again after warmup."""

    prompts: Count = 64
    """Prompts that the student is asked, once each."""
    rows: Count = 2000
    """Training rows whose answers and prompts are looked at. Leaks are looked for in all."""
    allow: list[Annotated[str, AfterValidator(_finding)]] = []
    """Mechanical findings that do not stop the run, by name, as in `["teacher-cut"]`."""
