"""What flows between the parts as text: conversations, teacher responses, generations."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Example:
        >>> Message(role="user", content="Who are you?").role
        'user'
    """

    role: str
    content: str


@dataclass(frozen=True)
class TeacherResponse:
    """One answer of the teacher, as recorded: no template and no end-of-turn token.

    `finished` is false only where the teacher's own limit cut the answer; unknown counts as
    finished.
    """

    text: str
    finished: bool = True
    teacher: str | None = None


@dataclass(frozen=True)
class Row:
    """One prompt (system, user and earlier assistant turns) and the teacher's K responses to it.

    Example:
        >>> row = Row("7", (Message("user", "2+2?"),), (TeacherResponse("4"),))
        >>> row.prompt
        '2+2?'
    """

    id: str
    messages: tuple[Message, ...]
    responses: tuple[TeacherResponse, ...] = ()
    source: str = field(default="", compare=False)
    """File or hub name it was read from."""
    line: int = field(default=0, compare=False)
    """Its line or row there, counted from 1."""

    @property
    def prompt(self) -> str:
        """The prompt as a person reads it: the text of a lone user turn, else every turn with its role."""
        if len(self.messages) == 1 and self.messages[0].role == "user":
            return self.messages[0].content
        return "\n\n".join(f"[{message.role}] {message.content}" for message in self.messages)


@dataclass(frozen=True)
class Generation:
    """One response of a model to a held-out prompt: a line of `generations/SET.jsonl`."""

    model: str
    """Which arm wrote it: base, seqkd, warmup, gad, or the name of a further arm."""
    checkpoint: str
    """What it was written by in full: `gad/step-000400 (DIGEST)`, or a model as `model_identity` knows it."""
    id: str
    prompt: str
    response: str
    finished: bool


def generations_file(test_set: str, temperature: float) -> str:
    """What the generations of a test set at a temperature are called: `generations/NAME.jsonl`.

    Example:
        >>> generations_file("vicuna", 0.0), generations_file("vicuna", 0.8)
        ('vicuna', 'vicuna-t0.8')
    """
    return test_set if temperature == 0 else f"{test_set}-t{temperature:g}"
