"""Prompts with teacher responses: read from any source, told apart, counted, and split by prompt.

Two prompts are the same if their turns are equal after Unicode NFKC, case folding and collapsing of
white space. Duplicates, made-up ids and the held-out side all follow from the SHA-256 of that text,
never from a row's place or from chance.
"""

import hashlib
import json
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from gadfly.data.row_formats import BadField, excerpt, parse_row
from gadfly.data.row_sources import read_rows
from gadfly.errors import DataError
from gadfly.records import Message, Row


@dataclass(frozen=True)
class BadRow:
    """A row, or one of its responses, that was left out.

    Example:
        >>> BadRow("train.jsonl", 3, "empty-response", "''").reason
        'empty-response'
    """

    source: str
    line: int
    """Line of a JSONL file (blank lines count), or row of a table; the first is 1."""
    reason: str
    """A fixed slug: one of `row_formats.BadField`'s."""
    detail: str
    """Where in the row, with a short excerpt."""


@dataclass(frozen=True)
class Dataset:
    """The usable rows of one or more sources, and what was left out.

    Example:
        >>> rows = (Row("7", (Message("user", "2+2?"),)),)
        >>> Dataset(rows, (BadRow("a.jsonl", 2, "empty-prompt", "''"),)).bad_by_reason()
        {'empty-prompt': 1}
    """

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the content and order of the rows, in hexadecimal."""
        digest = hashlib.sha256()
        for row in self.rows:
            content = {"id": row.id, "messages": row.messages, "responses": row.responses}
            digest.update(json.dumps(content, default=asdict).encode() + b"\n")
        return digest.hexdigest()

    def bad_by_reason(self) -> dict[str, int]:
        """How many rows or responses were left out, the commonest reason first."""
        return dict(Counter(row.reason for row in self.bad).most_common())


def load_rows(sources: str | list[str], *, needs_response: bool, train_on: Collection[str] = ()) -> Dataset:
    """Read all rows of the sources, one after the other; `row_formats` says what a row may be.

    The first row of a prompt is kept, and further samples of it (rows with a `sample_index`, as
    `collect` writes them) add their responses to it. An id that was already taken by another prompt
    gets that prompt's hash appended; a row without id gets the hash alone.

    Args:
        sources: files (`.jsonl`, `.json`, `.parquet`) or Hugging Face data sets (`name` or
            `name:split`).
        needs_response: whether a row without a usable teacher response is bad.
        train_on: marks of collected rows that are used nonetheless.

    Raises:
        DataError: a source cannot be read, or no row of them all can be used.
    """
    names = [sources] if isinstance(sources, str) else sources
    numbered = ((source, line, fields) for source in names for line, fields in read_rows(source))
    return gather(names, numbered, needs_response=needs_response, train_on=train_on)


def gather(
    names: Sequence[str],
    numbered: Iterable[tuple[str, int, object]],
    *,
    needs_response: bool,
    train_on: Collection[str] = (),
) -> Dataset:
    """A data set of undigested rows, each with its source and line; otherwise as `load_rows`.

    Raises:
        DataError: no row can be used.
    """
    rows: dict[str, Row] = {}
    bad: list[BadRow] = []
    taken: set[str] = set()
    num_read = 0
    for source, line, fields in numbered:
        num_read += 1
        if isinstance(fields, BadField):
            row, faults = None, [fields]
        else:
            row, faults = parse_row(fields, needs_response=needs_response, train_on=train_on)
        if row is not None:
            prompt = _prompt_digest(row.messages).hex()
            first = rows.get(prompt)
            if first is None:
                unique = _unique_id(row.id, prompt[:16], taken)
                rows[prompt] = replace(row, id=unique, source=source, line=line)
            elif isinstance(fields, Mapping) and "sample_index" in fields and row.id == first.id:
                rows[prompt] = replace(first, responses=first.responses + row.responses)
            else:
                same = f"as {first.source}:{first.line}: {excerpt(row.prompt)}"
                if row.responses:
                    same += "; several responses to a prompt go into one row, as a list"
                faults.append(BadField("duplicate-prompt", same))
        bad += [BadRow(source, line, fault.reason, fault.detail) for fault in faults]
    dataset = Dataset(tuple(rows.values()), tuple(bad))
    if not rows:
        raise DataError(_no_usable_row(names, num_read, dataset, needs_response))
    return dataset


def _unique_id(given: str, prompt_hash: str, taken: set[str]) -> str:
    unique = given or prompt_hash
    while unique in taken:
        unique = f"{unique}-{prompt_hash}"
    taken.add(unique)
    return unique


def _no_usable_row(names: Sequence[str], num_read: int, dataset: Dataset, needs_response: bool) -> str:
    needed = "a prompt and a response" if needs_response else "a prompt"
    counts = ", ".join(f"{count} {reason}" for reason, count in dataset.bad_by_reason().items())
    message = f"{', '.join(names) or 'no source'}: no usable row; {num_read} read"
    if dataset.bad:
        bad = dataset.bad[0]
        message += f", {counts}; the first: {bad.source}:{bad.line}: {bad.reason}: {bad.detail}"
    return f"{message}. Each row needs {needed}."


def normalised_prompt(messages: Sequence[Message]) -> str:
    r"""The prompt with everything removed that does not make it another prompt, a line a turn.

    Example:
        >>> normalised_prompt([Message("user", "What  is\n WAR?")])
        'user: what is war?'
    """
    return "\n".join(
        f"{message.role}: " + " ".join(unicodedata.normalize("NFKC", message.content).casefold().split())
        for message in messages
    )


def prompt_hash_fraction(messages: Sequence[Message]) -> float:
    """A number in [0, 1) that depends on the prompt alone and is uniform over prompts."""
    # 53 bits are what a float holds exactly; more could round up to 1.
    return (int.from_bytes(_prompt_digest(messages)[:8]) >> 11) / 2**53


def hold_out(rows: Sequence[Row], share: float) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Split into training and validation rows: those whose hash fraction is below `share`.

    So a prompt never changes sides, whatever the other rows are. The exception is a set so small
    that one side would be empty: then the prompt nearest to the border crosses it. A lone prompt
    is trained on.

    Args:
        rows: in any order, which both sides keep.
        share: expected share held out, in [0, 1); 0 holds out none.

    Raises:
        ValueError: `share` is not in that range.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share = {share}: must be at least 0 and below 1")
    fractions = [prompt_hash_fraction(row.messages) for row in rows]
    prompts = sorted(set(fractions))
    least = 1 if share > 0 else 0
    num_held_out = min(max(bisect_left(prompts, share), least), max(len(prompts) - 1, 0))
    held_out = set(prompts[:num_held_out])
    train = tuple(row for row, at in zip(rows, fractions, strict=True) if at not in held_out)
    valid = tuple(row for row, at in zip(rows, fractions, strict=True) if at in held_out)
    return train, valid


def _prompt_digest(messages: Sequence[Message]) -> bytes:
    return hashlib.sha256(normalised_prompt(messages).encode()).digest()
