"""Rows from strangers: good ones are kept whatever stands beside them, and each bad one is counted."""

import json
import os
import pickle
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gadfly.data.dataset import load_rows
from gadfly.errors import DataError

# Lines that are no row, each with the reason it is counted under.
BAD: dict[bytes, str] = {
    b"[" * 100_000: "broken-json",
    b'{"prompt": ' + b'{"a":' * 50_000: "broken-json",
    b'{"prompt": "a", "response": "b"} {"prompt": "c", "response": "d"}': "broken-json",
    b"9" * 5000: "broken-json",
    b"\x00\x00": "broken-json",
    b"\xff\xfe{\x00}\x00": "invalid-utf-8",
    b'{"prompt": "a\xc0\x80", "response": "b"}': "invalid-utf-8",
    b'{"prompt": "\\ud800", "response": "b"}': "invalid-utf-8",
    b'{"prompt": "a", "response": "\\udfff"}': "invalid-utf-8",
    b"NaN": "wrong-type",
    b"1e999": "wrong-type",
    b'{"prompt": 1e999, "response": "b"}': "wrong-type",
    b'{"prompt": "a", "response": -Infinity}': "wrong-type",
    b'{"prompt": {"a": NaN}, "response": "b"}': "wrong-type",
    b'{"prompt": "a", "response": ' + b"9" * 4000 + b"}": "wrong-type",
    b'{"prompt": "a", "response": "b", "id": [1]}': "wrong-type",
    # Of keys given twice the last counts, as in every reader of JSON; here it is none.
    b'{"prompt": "a", "prompt": null, "response": "b"}': "no-prompt",
}


def good(number: int) -> bytes:
    return json.dumps({"prompt": f"question {number}", "response": f"answer {number}"}).encode()


def memory_kib() -> int:
    """The most that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


@pytest.mark.parametrize("line", BAD, ids=[f"{reason}-{n}" for n, reason in enumerate(BAD.values())])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_bad_line_costs_itself_alone(line: bytes, end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(end.join([b"\xef\xbb\xbf" + good(1), line, good(2)]))
    data = load_rows(str(path), needs_response=True)
    assert [row.prompt for row in data.rows] == ["question 1", "question 2"]
    assert [(bad.line, bad.reason) for bad in data.bad] == [(2, BAD[line])]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(junk=st.lists(st.binary(max_size=30) | st.sampled_from(sorted(BAD)), max_size=5), data=st.data())
def test_good_rows_survive_whatever_stands_between_them(
    tmp_path: Path, junk: list[bytes], data: st.DataObject
) -> None:
    # A line feed within makes two lines of one, which is all the same.
    lines = data.draw(st.permutations([*junk, *(good(number) for number in range(3))]))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = load_rows(str(path), needs_response=True)
    assert {f"question {number}" for number in range(3)} <= {row.prompt for row in found.rows}
    whole = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    blank = sum(not line.strip() for line in whole)
    assert len({row.line for row in found.rows} | {bad.line for bad in found.bad}) == len(whole) - blank


def test_ten_megabytes_on_one_line_are_one_row_or_one_bad_row_in_bounded_memory(tmp_path: Path) -> None:
    size = 10_000_000
    texts = ["x" * size, "\u202e" * (size // 3), "<script>" * (size // 8), "\x1b[31m" * (size // 5)]
    lines = [json.dumps({"prompt": f"{n}", "response": text}).encode() for n, text in enumerate(texts)]
    lines += [b"[" * size, b'"' + b"\\" * size, b"\xff" * size, b"{" + b'"a":1,' * (size // 6)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good(1), *lines, good(2)]))
    before, began = memory_kib(), time.monotonic()
    data = load_rows(str(path), needs_response=True)
    assert [row.line for row in data.rows] == [1, 2, 3, 4, 5, 10]
    assert [row.responses[0].text for row in data.rows[1:-1]] == texts
    assert [bad.line for bad in data.bad] == [6, 7, 8, 9]
    assert all(len(bad.detail) < 300 for bad in data.bad)
    # The texts, and some copies of one line at a time.
    assert memory_kib() - before < 400_000
    assert time.monotonic() - began < 60


ODD_COLUMNS: dict[str, Any] = {
    "dates": pyarrow.array([10**18], pyarrow.timestamp("ns")),
    "far dates": pyarrow.array([2**60], pyarrow.timestamp("ms")),
    "decimals": pyarrow.array([1], pyarrow.decimal128(38, 0)),
    "bytes": pyarrow.array([b"\xff\xfe"]),
    "nulls": pyarrow.nulls(1),
    "numbers": pyarrow.array([float("nan")]),
    "words of a dictionary": pyarrow.array(["a"]).dictionary_encode(),
    "maps": pyarrow.array([[("role", "user")]], pyarrow.map_(pyarrow.string(), pyarrow.string())),
    "structs of nulls": pyarrow.array([{"role": None}], pyarrow.struct([("role", pyarrow.null())])),
    "lists of lists": pyarrow.array([[[["a"]]]]),
    "durations": pyarrow.array([2**62], pyarrow.duration("s")),
}


@pytest.mark.parametrize("kind", ODD_COLUMNS)
@pytest.mark.parametrize("name", ["prompt", "messages", "response", "id", "finish_reason", "teacher", "mark"])
def test_a_parquet_column_of_any_type_gives_rows_or_counted_bad_ones(
    kind: str, name: str, tmp_path: Path
) -> None:
    plain = {"prompt": pyarrow.array(["a"]), "response": pyarrow.array(["b"])}
    pyarrow.parquet.write_table(pyarrow.table({**plain, name: ODD_COLUMNS[kind]}), tmp_path / "rows.parquet")
    # A whole table of bad rows is told as one; another row, and it is counted beside that.
    more = {"prompt": "other", "response": "c"}
    (tmp_path / "more.jsonl").write_text(json.dumps(more) + "\n", encoding="utf-8")
    sources = [str(tmp_path / name) for name in ("rows.parquet", "more.jsonl")]
    data = load_rows(sources, needs_response=True)
    assert len(data.rows) + len(data.bad) == 2
    assert data.rows[-1].prompt == "other"


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 8 + b"PAR1", b"\x00" * 10**6])
def test_what_is_called_parquet_and_is_none_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file: .*; write it anew$"):
        load_rows(str(tmp_path / "rows.parquet"), needs_response=True)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pickle", "FOLDER.py", "dataset.py"])
def test_a_data_folder_with_code_in_it_runs_none(name: str, tmp_path: Path) -> None:
    folder, mark = tmp_path / "data", tmp_path / "mark"
    folder.mkdir()
    code = f"import os\nos.mkdir({str(mark)!r})\n".encode()
    file = folder / name.replace("FOLDER", folder.name)
    file.write_bytes(code if file.suffix == ".py" else pickle.dumps(Bomb(mark)))
    with pytest.raises(DataError, match="not readable as a Hugging Face data set"):
        load_rows(str(folder), needs_response=True)
    assert not mark.exists()
