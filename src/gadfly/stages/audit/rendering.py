"""Whether the student's template and tokenizer keep what is said: opening, end of turn, and the way back."""

from collections.abc import Sequence
from typing import Any

from gadfly.analysis.audit_findings import Finding
from gadfly.chat_template import Renderer
from gadfly.records import TeacherResponse
from gadfly.statistics import share

# Nobody says these, and no template changes them.
_QUESTION, _ANSWER = "gadflyquestion", "gadflyanswer"
_HABIT = 0.01


def control_strings(renderer: Renderer) -> frozenset[str]:
    """The special tokens of a tokenizer, as text, but for those that look like words or white space."""
    return frozenset(
        token
        for token in renderer.tokenizer.all_special_tokens
        if len(token) >= 3 and not token.strip().isalnum() and token.strip()
    )


def template_findings(renderer: Renderer) -> list[Finding]:
    """What is wrong with a chat template, by what it writes around one question and its answer."""
    opened = _rendered(renderer, [("user", _QUESTION)], opens=True)
    closed = _rendered(renderer, [("user", _QUESTION)], opens=False)
    whole = _rendered(renderer, [("user", _QUESTION), ("assistant", _ANSWER)], opens=False)
    if opened is None or whole is None or _QUESTION not in opened or _ANSWER not in whole:
        # Some templates refuse such a conversation; then there is nothing to compare with.
        return []
    found = []
    header = whole.rpartition(_ANSWER)[0].rpartition(_QUESTION)[2]
    written = opened.rpartition(_QUESTION)[2]
    # Where the turn's end is all there is before an answer, as in Mistral's template, nothing is missing.
    if opened == closed and header.startswith(written) and header[len(written) :].strip():
        evidence = f"before an answer the template writes {header!r}, before a sample only {written!r}"
        found.append(Finding("no-generation-prompt", evidence, is_mechanical=True))
    after = renderer.tokenizer(whole.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
    special = [token for token in after if token in renderer.tokenizer.all_special_ids]
    if special and not renderer.end_ids.intersection(special):
        names = renderer.tokenizer.convert_ids_to_tokens([special[0], *sorted(renderer.end_ids)])
        evidence = f"after an answer the template writes {names[0]}, samples end in {' or '.join(names[1:])}"
        found.append(Finding("other-end-of-turn", evidence))
    return found


def token_findings(
    renderer: Renderer, responses: Sequence[TeacherResponse], tokens: Sequence[Sequence[int]]
) -> list[Finding]:
    """Whether the teacher's answers, in these tokens, end as they should and say what they said."""
    found = []
    ends = [list(ids[-1:]) for ids, response in zip(tokens, responses, strict=True) if response.finished]
    endless = share([not renderer.end_ids.intersection(end) for end in ends]) if ends else None
    if endless is not None and endless.value > _HABIT:
        evidence = f"{round(endless.value * endless.n):,} of {endless.n:,} finished answers"
        found.append(Finding("no-end-of-turn", evidence, is_mechanical=True))
    changed = [
        response.text
        for ids, response in zip(tokens, responses, strict=True)
        if renderer.response_text(ids) != response.text
    ]
    if len(changed) > _HABIT * len(responses):
        found.append(Finding("round-trip", f"{len(changed):,} of {len(responses):,} answers"))
    return found


def _rendered(renderer: Renderer, turns: Sequence[tuple[str, str]], *, opens: bool) -> str | None:
    """A conversation as the template writes it; None if it refuses."""
    conversation: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(
            renderer.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=opens)
        )
    except Exception:
        # A template is a program of the model's author and may raise anything.
        return None
