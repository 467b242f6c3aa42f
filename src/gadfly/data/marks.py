"""Which answers of a teacher are kept but not trained on, and why: one mark each.

| mark | what |
|---|---|
| `cut` | the teacher's limit cut it |
| `content-filter` | the provider withheld it |
| `refusal` | the teacher would not answer |
| `empty` | no text |
| `rejected` | the server turned the question down for good |
"""

import re

CUT = frozenset({"length", "max_tokens", "model_length"})
"""What providers call an answer that the limit cut; compared without case."""
WITHHELD = frozenset({"content_filter", "safety"})
"""And one that was withheld."""

# Longer texts that begin like this go on to answer.
_REFUSAL_CHARACTERS = 400
# "I can't help but agree" and "I can't help falling in love" refuse nothing.
_INDEED = r"\b(?! help (but|\w+ing)\b)"
_NOT = rf"(can('t| ?not)|unable|won't|not able){_INDEED}"
_REFUSAL = re.compile(
    rf"(i'?m |i am )?(very |so |truly )?(sorry|afraid)\b.{{0,60}}?\b{_NOT}"
    rf"|i (can('t| ?not)|won't|must decline|am unable|am not able){_INDEED}.{{0,40}}?"
    r"\b(assist|help|comply|fulfil|provide|create|generate|write|engage|support|answer|do that|discuss)"
    rf"|(unfortunately,? )?as an ai\b.{{0,80}}?\b{_NOT}",
    re.IGNORECASE | re.DOTALL,
)


def mark_of(text: str, finish_reason: str | None = None, refusal: str | None = None) -> str | None:
    """Why an answer is not to be trained on; None if it may be.

    A refusal is what the API calls one, or a short answer that opens like one: a guess, which is why marked
    answers are kept and counted.

    Example:
        >>> mark_of("I'm sorry, but I can't help with that."), mark_of("Sorry is the hardest word.")
        ('refusal', None)
    """
    reason = (finish_reason or "").casefold()
    if reason in WITHHELD:
        return "content-filter"
    plain = text.strip().replace("\u2019", "'")
    if refusal or reason == "refusal" or (len(plain) <= _REFUSAL_CHARACTERS and _REFUSAL.match(plain)):
        return "refusal"
    if not plain:
        return "empty"
    return "cut" if reason in CUT else None
