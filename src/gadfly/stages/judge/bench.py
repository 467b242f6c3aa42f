"""Puts questions to the judge and reads its verdicts: asked again where one cannot be read, then given up."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from gadfly.api.asking import ask
from gadfly.api.chat_request import ChatRequest, Question, parameters_of
from gadfly.api.paid_answers import PaidAnswers
from gadfly.config import JudgeConfig
from gadfly.errors import ConfigError
from gadfly.records import Message
from gadfly.run_folder import Record
from gadfly.stages.run import Run

ANSWERS_FILE = "verdicts/answers.jsonl"
"""Everything the judge was paid for: its own answers and its verdicts, by key."""

_ATTEMPTS = 3
# At temperature 0 the same question would get the same unreadable answer.
_AGAIN_TEMPERATURE = 1.0

Place = TypeVar("Place")
Verdict = TypeVar("Verdict")


class Bench:
    """The judge of a run, with everything it has answered so far."""

    def __init__(self, run: Run, method: str):
        """Find the judge.

        Raises:
            ConfigError: `judge.model` is not given.
        """
        config = run.recipe.judge
        if config.model is None:
            raise ConfigError(
                f'judge.model: must be given to judge by "{method}" (judge.method, checkpoints.best_by); '
                f'"tell" needs none'
            )
        self.config: JudgeConfig = config
        self.model = config.model
        self.answers = PaidAnswers(run.folder, ANSWERS_FILE)

    def ask(self, label: str, questions: Mapping[Place, Question]) -> dict[Place, Record]:
        """The judge's answer to each question, paid for once.

        Raises:
            ApiError: the judge cannot be asked, or left questions unanswered.
            UserError: its budget is spent.
        """
        ask(self.config, "judge", list(questions.values()), self.answers, label)
        return {place: self.answers.by_key[question.request.key] for place, question in questions.items()}

    def verdicts(
        self,
        label: str,
        cases: Mapping[Place, Sequence[Message]],
        read: Callable[[Place, str], Verdict | None],
    ) -> tuple[dict[Place, Verdict | None], dict[Place, str]]:
        """The verdict on each case, None where three answers could not be read; and the last text.

        A case that the judge's server turns down, as one too long for it, has no verdict and an empty text.
        """
        found: dict[Place, Verdict | None] = dict.fromkeys(cases)
        texts: dict[Place, str] = {}
        unread = dict(cases)
        for attempt in range(_ATTEMPTS):
            asked = {place: self._question(label, messages, attempt) for place, messages in unread.items()}
            for place, row in self.ask(label, asked).items():
                texts[place] = row["response"]
                found[place] = read(place, row["response"])
                if found[place] is not None or row.get("mark") == "rejected":
                    del unread[place]
        return found, texts

    def own_answer(self, messages: Sequence[Message], max_tokens: int) -> Question:
        """The question for the judge's own answer to a prompt."""
        parameters = {**parameters_of(self.config), "max_tokens": max_tokens}
        return Question(ChatRequest(self.model, tuple(messages), parameters), {"for": "reference"})

    def _question(self, label: str, messages: Sequence[Message], attempt: int) -> Question:
        parameters = parameters_of(self.config)
        if attempt and parameters.get("temperature") == 0:
            parameters["temperature"] = _AGAIN_TEMPERATURE
        return Question(ChatRequest(self.model, tuple(messages), parameters, attempt), {"for": label})
