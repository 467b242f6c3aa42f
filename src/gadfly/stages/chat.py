"""A conversation with a trained student, turn by turn."""

from gadfly.checkpoint import student_of
from gadfly.errors import UserError
from gadfly.models import load_language_model
from gadfly.records import Message
from gadfly.samplers import LocalSampler, Request
from gadfly.stages.examples import positions_of


class Chat:
    """Keeps the turns so far; the student answers as it was trained to, through the same renderer.

    Args:
        checkpoint: a stage of a run (its latest checkpoint), a checkpoint, or a model's folder or name.
        system: a system turn to begin with.
        temperature: 0 is greedy.
        max_tokens: of an answer.
        seed: the same seed and turns give the same answers.

    Raises:
        UserError: if the student cannot be opened.
    """

    def __init__(
        self, checkpoint: str, *, system: str | None, temperature: float, max_tokens: int, seed: int
    ):
        model, self._renderer = load_language_model(student_of(checkpoint), "float32")
        self._sampler, self._positions = LocalSampler(model, self._renderer.end_ids), positions_of(model)
        self._turns = [] if system is None else [Message("system", system)]
        self._temperature, self._max_tokens, self._seed = temperature, max_tokens, seed

    def answer(self, text: str) -> str:
        """The student's answer to a user turn; both become part of the conversation.

        Raises:
            UserError: if the chat template refuses the conversation, or it is too long for the student.
        """
        turns = [*self._turns, Message("user", text)]
        tokens = tuple(self._renderer.prompt_tokens(turns))
        cap = self._max_tokens
        if self._positions is not None:
            cap = min(cap, self._positions - len(tokens))
        if cap < 1:
            raise UserError(
                f"a conversation of {len(tokens)} tokens leaves no room for an answer in the student's "
                f"{self._positions} positions; begin anew"
            )
        request = Request(tokens, 1, f"{self._seed}\x00chat\x00{len(turns)}")
        ((sample,),) = self._sampler.sample([request], temperature=self._temperature, max_response_tokens=cap)
        answer = self._renderer.response_text(sample.tokens)
        self._turns = [*turns, Message("assistant", answer)]
        return answer
