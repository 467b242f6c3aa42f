"""How a model behind an OpenAI-compatible API is asked: the teacher of `collect`, the judge of `judge`."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from gadfly.config.section import Count, Section, Text

# What a request is made of besides, or what would change the kind of reply.
_OWN_FIELDS = frozenset({"model", "messages", "n", "stream", "temperature", "top_p", "max_tokens"})

Dollars = Annotated[float, Field(ge=0)]


def _environment_variable(name: str) -> str:
    # Capitals only: a key pasted here by mistake is refused, and the message must not repeat it.
    if name and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ValueError(
            "give the NAME of an environment variable (capitals, digits, '_'), not the key itself"
        )
    return name


def _address(url: str) -> str:
    if not re.match(r"https?://[^/\s]", url):
        raise ValueError("must begin with http:// or https://, as in http://localhost:8000/v1")
    if "?" in url or "#" in url:
        raise ValueError("must end with the path, as in http://localhost:8000/v1, without ? or #")
    if "@" in url.split("//", 1)[1].split("/", 1)[0]:
        raise ValueError(
            "must hold no user name or password; put the key into the variable api_key_env names"
        )
    return url


def _further_fields(fields: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(_OWN_FIELDS & fields.keys()):
        raise ValueError(f"{', '.join(taken)}: not here; the request has its own from other settings")
    return fields


class Price(Section):
    """What a million tokens cost, in dollars."""

    input: Dollars
    """Of what is asked."""
    output: Dollars
    """Of what is answered."""


class Budget(Section):
    """Limits that are never crossed. What is on disk from earlier runs counts too."""

    dollars: Dollars | None = None
    """Needs `price` and `max_response_tokens`, since an answer's cost must be bounded before it is asked."""
    requests: Count | None = None
    """Requests sent, repeated ones included."""
    tokens: Count | None = None
    """Tokens of questions and answers together; needs `max_response_tokens`."""


class ApiConfig(Section):
    """A model behind an OpenAI-compatible API, and how fast and how dearly it may be asked."""

    base_url: Annotated[Text, AfterValidator(_address)] = "https://api.openai.com/v1"
    """Address of the API, up to and including `/v1`."""
    model: Text | None = None
    """The model's name there."""
    api_key_env: Annotated[str, AfterValidator(_environment_variable)] = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key. Empty: none is sent."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Of the answers. Default: the server's."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus of the answers. Default: the server's."""
    max_response_tokens: Count | None = None
    """Cap of an answer, sent as `max_tokens` (or as `max_completion_tokens` where the server wants that).
    Default: the server's."""
    extra_body: Annotated[dict[str, Any], AfterValidator(_further_fields)] = {}
    """Further fields of each request, as they are: `{ reasoning_effort = "low" }`. A judge's own answers are
    requests too."""
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 16
    """Requests in flight at once."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Pace. Without it, what the server's rate-limit headers say is kept to."""
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Pace in tokens of questions and answers, estimated before they are asked."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long one request may take."""
    max_attempts: Count = 6
    """How often one request is sent when the server fails; refusals for going too fast do not count."""
    give_up_seconds: Annotated[float, Field(gt=0)] = 300.0
    """The server is given up when it has refused every request for going too fast for as long as this."""
    price: Price | None = None
    """Dollars for a million tokens, to show and to bound what is spent."""
    budget: Budget = Budget()
    """Where to stop."""

    @model_validator(mode="after")
    def _budgets_can_be_kept(self) -> "ApiConfig":
        if self.budget.dollars is not None and self.price is None:
            raise ValueError("budget.dollars needs price = { input = …, output = … }, dollars for 1e6 tokens")
        if self.max_response_tokens is None and (self.budget.dollars, self.budget.tokens) != (None, None):
            raise ValueError(
                "a budget in dollars or tokens needs max_response_tokens, else an answer has no bound"
            )
        return self


class TeacherConfig(ApiConfig):
    """The black box that `collect` asks. Without `model`, the teacher's responses come from `data.train`."""

    system_prompt: Text | None = None
    """Instruction to the teacher alone: the student never sees it. A prompt's own system turn follows it."""
    samples_per_prompt: Count = 1
    """Answers to each prompt, each a request of its own. More than one needs a temperature above 0."""
    batch: bool = False
    """Ask through the batch endpoint: cheaper at large providers, and answered within a day."""
    batch_poll_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between looks at a batch."""
    train_on: list[Literal["cut", "refusal"]] = []
    """Marked answers to train on nonetheless: those cut by the teacher's limit, or refusals."""

    @model_validator(mode="after")
    def _samples_can_differ(self) -> "TeacherConfig":
        if self.samples_per_prompt > 1 and self.temperature == 0:
            raise ValueError("samples_per_prompt > 1 at temperature = 0 would pay for the same answer again")
        return self


class JudgeConfig(ApiConfig):
    """How generations are judged. `tell` needs no API; the other methods need `model`."""

    method: (
        Literal["score", "pairwise", "tell"]
        | Annotated[list[Literal["score", "pairwise", "tell"]], Field(min_length=1)]
    ) = "tell"
    """`score`: the paper's 1-10 protocol against the judge's own answer. `pairwise`: two models' answers side
    by side. `tell`: whether an independent classifier can tell the student's answers from the teacher's."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    """Of the verdicts, and of the judge's own answers."""
    reference_max_tokens: Count | None = None
    """Cap of the judge's own answers. Default: that of the generations."""
    max_response_tokens: Count | None = 1024
    """Cap of a verdict."""
    models: list[Text] = []
    """Models to judge, as `generate` names them, or `teacher`. Default: all that were generated, and the
    teacher where the test set has its responses."""
    both_orders: bool = True
    """Ask for `score` in both orders and average. False: once, the student's answer second."""
    pairs: list[Annotated[list[Text], Field(min_length=2, max_length=2)]] = []
    """Pairs of models for `pairwise`. Default: GAD against both SeqKD's, base
    and teacher, where they are."""
    score_prompt: Text | None = None
    """File with another prompt for `score`. Default: the paper's."""
    pairwise_prompt: Text | None = None
    """File with another prompt for `pairwise`."""
    tell_model: Text | None = None
    """Hugging Face model whose hidden states `tell` classifies by, best of another family than the student's.
    Default: a bag of n-grams."""
