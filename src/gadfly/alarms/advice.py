"""Advice in the words of a stage: it names settings that the stage reads, and no others."""

RATES = {
    "seqkd-equal-time.learning_rate": "seqkd.equal_time_learning_rate",
    "discriminator-lm.learning_rate": "discriminator.lm_learning_rate",
}
"""Learning rates of stages that have no section of their name."""

_RESTS = 'let it rest (alarms.action = "skip_discriminator")'


def in_words_of(stage: str, advice: str) -> str:
    """Advice for a stage.

    Args:
        stage: its name, for `{stage}`.
        advice: where `{rate}` is the stage's learning rate, `{hold}` what keeps a student in place, `{rest}`
            what stops a discriminator for a while, and `{replay}` nothing but in gad, which alone has it.

    Example:
        >>> in_words_of("gad", "Read the samples; {hold}.")
        'Read the samples; raise gad.kl_coefficient, or lower gad.learning_rate.'
        >>> in_words_of("discriminator-lm", "Read the samples; {hold}.")
        'Read the samples; lower discriminator.lm_learning_rate.'
    """
    rate = f"{stage}.learning_rate"
    rate = RATES.get(rate, rate)
    words = {"hold": f"lower {rate}", "rest": _RESTS, "replay": ""}
    if stage == "gad":
        words = {
            "hold": f"raise gad.kl_coefficient, or lower {rate}",
            "rest": f"set gad.discriminator_rests_above, or {_RESTS}",
            "replay": ", or set gad.replay",
        }
    return advice.format(stage=stage, rate=rate, **words)
