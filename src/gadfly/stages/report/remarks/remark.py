"""What one remark says."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Remark:
    """One thing worth a look."""

    what: str
    evidence: str
    cause: str
    change: str
