"""Which family a model belongs to by its name, since a judge favours answers like its own.

Judges prefer what models of their family write (MT-Bench, arXiv 2306.05685, section 3.3), and a
student imitates its teacher: a judge of the teacher's family marks the imitation up. Names are all
there is to go by, so a name that says nothing clear has no family: rather no warning than a false one.
"""

import re
from collections.abc import Mapping

# Each word stands by itself: no letter before or after it. GPT needs a version of OpenAI's (GPT-J,
# GPT-NeoX and Cerebras-GPT-13B are of others), an o-model must begin the name (Marco-o1 is Qwen's kin).
_PATTERNS = {
    "openai": r"chatgpt|gpt-?oss|gpt-?(?:35|[3-9](?:\.[0-9])?[ov]?)(?!\.?[0-9])|davinci"
    r"|(?:^|(?<=:))o[134](?![0-9.])",
    "anthropic": r"claude",
    "google": r"gemini|(?:code|med|pali|shield)?gemma",
    "meta": r"(?<!open[-_])(?:code)?llama",
    "qwen": r"(?:code)?qwen|qwq|qvq",
    "mistral": r"mistral|mixtral|ministral|magistral|codestral|devstral|pixtral",
    "deepseek": r"deepseek",
    "smollm": r"smollm",
    "phi": r"phi(?=-?[0-9]|-(?:mini|tiny|silica))",
    "xai": r"grok",
    "cohere": r"command-?[ar]|c4ai",
    "zhipu": r"(?:chat)?glm",
    "moonshot": r"kimi",
    "ai2": r"olmoe?",
    "ibm": r"granite",
}
_FAMILIES = {
    family: re.compile(rf"(?<![a-z])(?:{pattern})(?![a-z])") for family, pattern in _PATTERNS.items()
}


def family(model: str) -> str | None:
    """The family of a model by its name, as an API or a hub gives it, or by its folder; None if unknown.

    Of several families in a name the last counts, as names of distilled models go: the model whose
    weights it has.

    Example:
        >>> family("Qwen/Qwen2.5-7B-Instruct"), family("o3-mini"), family("foo10")
        ('qwen', 'openai', None)
        >>> family("deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
        'meta'
    """
    named = _named_families(model)
    return named[-1] if named else None


def shared_family(judge: str, others: Mapping[str, str]) -> dict[str, str]:
    """Those the judge may favour: of whom it shares a family, or is the very model.

    A name that holds several families shares each of them: a distilled model writes like its teacher.

    Args:
        judge: name of the judging model.
        others: name of the model of each role, such as teacher or student.

    Returns:
        The shared family (or the model's name, if its family is unknown) by role; empty if there is
        nothing to warn of.

    Example:
        >>> shared_family("gpt-4o", {"teacher": "openai/gpt-5-chat", "student": "Qwen/Qwen3-4B"})
        {'teacher': 'openai'}
    """
    judges = _named_families(judge)
    shared = {}
    for role, model in others.items():
        common = [name for name in _named_families(model) if name in judges]
        if common:
            shared[role] = common[-1]
        elif model.casefold() == judge.casefold():
            shared[role] = judge
    return shared


def _named_families(model: str) -> list[str]:
    """The families a name holds, in the order they stand there."""
    *folders, name = re.split(r"[/\\]+", model.lower().rstrip("/\\"))
    if named := _families_of(name):
        return named
    # A folder above (of a cache, of checkpoints) may carry the model's name, which goes on with a number;
    # a bare word is more likely a person's or an organisation's.
    for folder in reversed(folders):
        if named := _families_of(folder, numbered=True):
            return named
    return []


def _families_of(name: str, *, numbered: bool = False) -> list[str]:
    places = {
        family: found.start()
        for family, pattern in _FAMILIES.items()
        if (found := pattern.search(name)) and (not numbered or re.search("[0-9]", name[found.end() :]))
    }
    return sorted(places, key=lambda family: places[family])
