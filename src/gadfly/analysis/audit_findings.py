"""What an audit can find, by name: what it is, where it comes from, and what to do.

A cause is *mechanical* where no training can mend it, and where it gives the discriminator something to tell
the roles by that is not in what they say: a run does not go on with it unless the recipe allows it by name.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue."""

    what: str
    cause: str
    advice: str


CATALOGUE: dict[str, Entry] = {
    "no-end-of-turn": Entry(
        "Finished answers of the teacher do not end in an end-of-turn token",
        "another renderer than gadfly's made these tokens, or the tokenizer's end token is none to the model",
        "set eos_token in tokenizer_config.json to a token that generation_config.json names too",
    ),
    "other-end-of-turn": Entry(
        "The chat template ends an answer in a token that does not end a sample",
        "neither the generation config nor the tokenizer names the token the template writes",
        "add that token to eos_token_id in generation_config.json",
    ),
    "no-generation-prompt": Entry(
        "The prompt ends where the user's turn ends: nothing opens the assistant's",
        "the chat template does nothing with add_generation_prompt",
        "give the tokenizer a template that does; that of the model's instruct version mostly fits",
    ),
    "teacher-cut": Entry(
        "Answers of the teacher stop before they end",
        "the limit on its tokens when they were collected",
        "raise teacher.max_response_tokens and collect again, or leave these rows out",
    ),
    "cap-cuts-teacher": Entry(
        "The cap is below answers of the teacher",
        "sampling.max_response_tokens is below the teacher's lengths",
        "raise sampling.max_response_tokens towards the proposed cap, or leave such answers out by "
        "data.over_long_responses = 'drop'",
    ),
    "student-runs-on": Entry(
        "The student runs into the cap where the teacher ends",
        "an untrained student rambles; a warmed-up one has too short a cap, or learnt from cut answers",
        "raise sampling.max_response_tokens, or warm up longer on whole answers",
    ),
    "white-space": Entry(
        "One role's answers begin or end in white space, the other's do not",
        "the teacher's answers were not stripped, or a template ends in white space that the student adds to",
        "strip the answers in the data; for the student, warm up longer",
    ),
    "thinking-tags": Entry(
        "One role thinks aloud in tags, the other does not",
        "a reasoning model on one side, or a template that opens a thought",
        "remove the thoughts from the data, or choose a template or model that does not think",
    ),
    "control-strings": Entry(
        "One role's texts hold strings of a chat template",
        "answers were exported with their template, or the student goes on past the end of its turn",
        "remove them from the data; for the student, name all its end tokens in generation_config.json",
    ),
    "control-strings-in-prompts": Entry(
        "Prompts hold strings that spell control tokens of the tokenizer",
        "prompts were exported with their template, or someone tries to steer the model",
        "remove these strings from the prompts",
    ),
    "identical-text": Entry(
        "The same text scores differently as the teacher's and as the student's",
        "the roles are not rendered alike: under discriminator.reads = 'tokens', a sample keeps odd tokens",
        "set discriminator.reads = 'text'",
    ),
    "round-trip": Entry(
        "Answers of the teacher come back changed from the student's tokens",
        "the tokenizer lower-cases, normalises or drops characters",
        "accept that these characters cannot be learnt, or choose a student with another tokenizer",
    ),
    "mis-paired": Entry(
        "Answers are no more like their own prompts than like others",
        "rows have slipped: one column sorted, filtered or shifted without the other",
        "look at a few rows, and pair prompts and answers again by their ids",
    ),
    "leak-into-test": Entry(
        "Test prompts are in the training data",
        "the same source was used twice, or a split by row instead of by prompt",
        "take these prompts out of the training data",
    ),
    "leak-into-valid": Entry(
        "Held-out prompts are in the training data",
        "the same source was used twice, or a split by row instead of by prompt",
        "take them out of data.valid, or leave data.valid out: gadfly then splits by prompt",
    ),
    "test-in-valid": Entry(
        "Test prompts are held-out prompts too",
        "the same source was used twice",
        "take them out of data.valid: the best checkpoint is chosen there, and would be chosen on them",
    ),
    "near-duplicates": Entry(
        "Prompts of a test or held-out set are nearly the same as training prompts",
        "prompts made from one another, or forms with one word changed",
        "read some pairs in audit.json; take out what tests nothing new",
    ),
    "over-long-prompts": Entry(
        "Prompts are over the cap and are left out",
        "sampling.max_prompt_tokens is below their lengths",
        "raise sampling.max_prompt_tokens",
    ),
    "refusals": Entry(
        "The teacher refuses",
        "its provider's rules, or prompts that ask for it",
        "leave these rows out, unless the student is to refuse too",
    ),
    "lengths-differ": Entry(
        "One role's answers are much longer than the other's",
        "an untrained student; after warmup, too few steps of it",
        "warm up longer; length is the first thing a discriminator reads",
    ),
    "told-by-surface": Entry(
        "The surface of an answer alone tells the roles apart",
        "an untrained student, or a habit of layout or ending on one side",
        "look at the features that carry it; if it lasts after warmup, make the sides alike in these",
    ),
    "does-not-fit": Entry(
        "By formula the run does not fit into this machine",
        "model, batch and lengths together",
        "see `gadfly plan` for what would make it fit",
    ),
}
"""All findings by name."""


@dataclass(frozen=True)
class Finding:
    """Something that an audit found.

    Example:
        >>> Finding("refusals", "31 of 400 answers (7.8 %)").what
        'The teacher refuses'
    """

    name: str
    evidence: str
    is_mechanical: bool = False

    @property
    def what(self) -> str:
        """In one sentence."""
        return CATALOGUE[self.name].what

    def as_record(self) -> dict[str, Any]:
        """As `audit.json` holds it."""
        entry = CATALOGUE[self.name]
        return {
            "name": self.name,
            "mechanical": self.is_mechanical,
            "what": entry.what,
            "evidence": self.evidence,
            "cause": entry.cause,
            "advice": entry.advice,
        }
