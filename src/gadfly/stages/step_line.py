"""The line that the console shows of a step."""

from collections.abc import Mapping

# What the console line of a step shows, if the step has it: (metric, text around the value).
_SHOWN = (
    ("discriminator/accuracy", "told apart {:.0%}"),
    ("discriminator/score_gap", "gap {:.2f}"),
    ("student/loss", "loss {:.3f}"),
    ("student/kl_nats", "kl {:.3f}"),
    ("rollout/response_tokens", "{:.0f} tok"),
    ("rollout/finished_fraction", "finished {:.0%}"),
)


def step_line(
    stage: str, step: int, total_steps: int, metrics: Mapping[str, float], seconds_left: float
) -> str:
    """Where a stage is, its few metrics of most interest, and the time it still takes.

    Example:
        >>> step_line("gad", 3, 10, {"student/kl_nats": 0.0123}, 75.0)
        'gad 3/10  kl 0.012  1:15 left'
    """
    shown = "  ".join(text.format(metrics[name]) for name, text in _SHOWN if name in metrics)
    minutes, seconds = divmod(round(seconds_left), 60)
    return f"{stage} {step}/{total_steps}  {shown}  {minutes}:{seconds:02d} left"
