import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gadfly.data.dataset import (
    hold_out,
    load_rows,
    normalised_prompt,
    prompt_hash_fraction,
)
from gadfly.errors import DataError
from gadfly.records import Message, Row, TeacherResponse

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
GOOD = b'{"prompt": "a question", "response": "an answer"}'

needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"the real data sets are not at {REAL_DATA}"
)


def write(folder, *rows, name="rows.jsonl"):
    """Each row on its line: bytes as they are, anything else as JSON."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path = folder / name
    path.write_bytes(b"\n".join(lines))
    return str(path)


def load(folder, *rows, needs_response=True):
    return load_rows(write(folder, *rows), needs_response=needs_response)


def only_row(folder, fields, needs_response=True):
    dataset = load(folder, fields, needs_response=needs_response)
    assert dataset.bad == ()
    return dataset.rows[0]


def only_reason(folder, fields, needs_response=True):
    """The reason why a row beside a good one is bad."""
    dataset = load(folder, GOOD, fields, needs_response=needs_response)
    assert [row.prompt for row in dataset.rows] == ["a question"]
    (bad,) = dataset.bad
    assert bad.line == 2
    return bad.reason


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


# Fields.


def test_prompt_and_response_make_a_row(tmp_path):
    row = only_row(tmp_path, {"id": 7, "prompt": "2+2?", "response": "4", "teacher": "gpt-4"})
    assert row == Row("7", (Message("user", "2+2?"),), (TeacherResponse("4", True, "gpt-4"),))


@pytest.mark.parametrize("key", ["messages", "prompt", "content"])
def test_a_conversation_is_kept_whole_under_each_of_its_names(tmp_path, key):
    conversation = turns(("system", ""), ("user", "a"), ("assistant", "b"), ("user", "c"))
    row = only_row(tmp_path, {key: conversation, "teacher_response": "d"})
    assert [(m.role, m.content) for m in row.messages] == [
        ("system", ""),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    assert row.responses == (TeacherResponse("d"),)


def test_a_last_assistant_turn_is_the_response_where_no_other_is_given(tmp_path):
    conversation = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    row = only_row(tmp_path, {"messages": conversation, "response": None})
    assert [message.content for message in row.messages] == ["a", "b", "c"]
    assert row.responses == (TeacherResponse("d"),)


def test_messages_come_before_a_prompt_text_that_is_their_beginning(tmp_path):
    conversation = turns(("system", "s"), ("user", "a"), ("assistant", "b"))
    row = only_row(tmp_path, {"prompt": "a", "messages": conversation})
    assert row.messages == (Message("system", "s"), Message("user", "a"))


def test_the_published_lmsys_gpt5_schema_loads_unchanged(tmp_path):
    fields = {
        "id": "lmsys-1",
        "content": turns(("user", "Hi")),
        "teacher_response": "Hello!",
        "category": "chat",
        "grounded": False,
        "flaw": None,
        "agreement": True,
    }
    assert only_row(tmp_path, fields) == Row(
        "lmsys-1", (Message("user", "Hi"),), (TeacherResponse("Hello!"),)
    )


@pytest.mark.parametrize(
    "responses",
    [
        ["x", "y"],
        [{"response": "x"}, {"response": "y"}],
        [{"text": "x", "finish_reason": "stop"}, "y"],
        [{"content": "x"}, {"content": "y", "finish_reason": None}],
    ],
)
def test_several_responses_may_be_texts_or_objects(tmp_path, responses):
    row = only_row(tmp_path, {"prompt": "a", "responses": responses})
    assert row.responses == (TeacherResponse("x"), TeacherResponse("y"))


@pytest.mark.parametrize(
    "fields",
    [
        {"response": "x", "responses": ["x", "y"]},
        {"responses": ["x", "y"], "teacher_response": "y"},
        {"response": "x", "teacher_response": "y", "responses": ["x", "y"]},
        {"response": ["x", "y"], "responses": []},
    ],
)
def test_fields_that_repeat_a_response_say_it_once(tmp_path, fields):
    row = only_row(tmp_path, {"prompt": "a", **fields})
    assert row.responses == (TeacherResponse("x"), TeacherResponse("y"))


def test_a_prompt_whose_responses_are_ambiguous_is_kept_where_none_is_needed(tmp_path):
    fields = {"prompt": "a", "response": "b", "responses": ["c"]}
    dataset = load(tmp_path, fields, needs_response=False)
    assert [(row.prompt, row.responses) for row in dataset.rows] == [("a", ())]
    assert dataset.bad[0].detail == (
        "responses: ['c'], response: 'b'; put all responses to a prompt into one list"
    )


@pytest.mark.parametrize(
    ("fields", "finished"),
    [
        ({"response": "x", "finish_reason": "length"}, [False]),
        ({"response": "x", "finish_reason": "stop"}, [True]),
        ({"response": "x", "finish_reason": None}, [True]),
        ({"response": "x"}, [True]),
        ({"responses": ["x", "y"], "finish_reason": ["length", "stop"]}, [False, True]),
        ({"responses": ["x", "y"], "finish_reason": "length"}, [False, False]),
        ({"responses": ["x", {"text": "y", "finish_reason": "length"}]}, [True, False]),
    ],
)
def test_only_a_response_cut_at_the_length_limit_is_unfinished(tmp_path, fields, finished):
    row = only_row(tmp_path, {"prompt": "a", **fields})
    assert [response.finished for response in row.responses] == finished


def test_each_response_may_have_its_own_teacher(tmp_path):
    row = only_row(tmp_path, {"prompt": "a", "responses": ["x", "y"], "teacher": ["gpt-4", None]})
    assert [response.teacher for response in row.responses] == ["gpt-4", None]


def test_texts_are_kept_to_the_character(tmp_path):
    text = " \t\x00 a\u2028b\u0085c\r\nd \U0001f600 "
    line = json.dumps({"prompt": text, "response": text}, ensure_ascii=False).encode()
    dataset = load(tmp_path, line)
    assert dataset.rows[0].prompt == text
    assert dataset.rows[0].responses[0].text == text


# Bad rows.


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (["a"], "wrong-type"),
        ("a", "wrong-type"),
        ({"response": "b"}, "no-prompt"),
        ({"prompt": None, "response": "b"}, "no-prompt"),
        ({"instruction": "a", "output": "b"}, "no-prompt"),
        ({"prompt": " \n\u2003", "response": "b"}, "empty-prompt"),
        ({"prompt": [], "response": "b"}, "empty-prompt"),
        ({"messages": turns(("assistant", "b"))}, "empty-prompt"),
        ({"messages": turns(("user", ""), ("user", "a")), "response": "b"}, "empty-prompt"),
        ({"messages": turns(("user", "a"), ("system", "")), "response": "b"}, "empty-prompt"),
        ({"prompt": 5, "response": "b"}, "wrong-type"),
        ({"messages": "a", "response": "b"}, "wrong-type"),
        ({"messages": ["a"], "response": "b"}, "wrong-type"),
        ({"messages": [{"from": "human", "value": "a"}], "response": "b"}, "wrong-type"),
        ({"messages": turns(("user", None)), "response": "b"}, "wrong-type"),
        ({"messages": turns(("user", ["a"])), "response": "b"}, "wrong-type"),
        ({"messages": turns(("human", "a")), "response": "b"}, "bad-role"),
        ({"messages": turns(("user", "a"), ("assistant", "b")), "response": "c"}, "assistant-last"),
        ({"prompt": "a"}, "no-response"),
        ({"prompt": "a", "response": None}, "no-response"),
        ({"prompt": "a", "responses": []}, "no-response"),
        ({"prompt": "a", "responses": [{"finish_reason": "stop"}]}, "no-response"),
        ({"prompt": "a", "response": ""}, "empty-response"),
        ({"prompt": "a", "response": "\n"}, "empty-response"),
        ({"messages": turns(("user", "a"), ("assistant", ""))}, "empty-response"),
        ({"prompt": "a", "response": 5}, "wrong-type"),
        ({"prompt": "a", "response": "b", "responses": ["c", "d"]}, "ambiguous-response"),
        ({"prompt": "a", "response": "b", "teacher_response": "c"}, "ambiguous-response"),
        ({"prompt": "a", "response": "b", "finish_reason": 3}, "wrong-type"),
        ({"prompt": "a", "response": "b", "finish_reason": ["stop", "stop"]}, "wrong-type"),
        ({"prompt": "a", "response": "b", "teacher": 4}, "wrong-type"),
        ({"id": {"a": 1}, "prompt": "a", "response": "b"}, "wrong-type"),
        ({"prompt": "a", "response": "b", "finish_reason": "content_filter"}, "content-filter"),
        ({"prompt": "a", "response": None, "finish_reason": "content_filter"}, "no-response"),
        ({"prompt": " A\nQUESTION ", "response": "c"}, "duplicate-prompt"),
        ({"prompt": "half \ud800", "response": "b"}, "invalid-utf-8"),
        ({"prompt": "a", "response": "half \udfff"}, "invalid-utf-8"),
        ({"id": "\ud800", "prompt": "a", "response": "b"}, "invalid-utf-8"),
        ({"prompt": "a", "response": "b", "teacher": "\ud800"}, "invalid-utf-8"),
        (b"{", "broken-json"),
        (b'{"prompt": "a"} {"prompt": "b"}', "broken-json"),
        (b'\xef\xbb\xbf{"prompt": "a", "response": "b"}', "broken-json"),
        (b"[" * 100_000, "broken-json"),
        (b'{"prompt": "a", "response": ' + b"1" * 5000 + b"}", "broken-json"),
        (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "wrong-type"),
        (b'{"prompt": "a", "response": ' + b"[" * 500 + b"]" * 500 + b"}", "wrong-type"),
    ],
)
def test_a_bad_row_is_listed_with_its_line_and_reason(tmp_path, fields, reason):
    assert only_reason(tmp_path, fields) == reason


def test_one_invalid_utf8_line_is_counted_and_the_rest_is_read(tmp_path):
    dataset = load(tmp_path, GOOD, b'{"prompt": "\xff", "response": "b"}', {"prompt": "c", "response": "d"})
    assert [row.prompt for row in dataset.rows] == ["a question", "c"]
    assert dataset.bad_by_reason() == {"invalid-utf-8": 1}
    assert "byte 12" in dataset.bad[0].detail


def test_one_bad_response_of_several_is_dropped_alone_and_listed(tmp_path):
    fields = {"prompt": "a", "responses": ["x", "", 5], "finish_reason": ["length", "stop", "stop"]}
    dataset = load(tmp_path, fields)
    assert dataset.rows[0].responses == (TeacherResponse("x", finished=False),)
    assert [(bad.reason, bad.detail) for bad in dataset.bad] == [
        ("empty-response", "response 2 of 3: ''"),
        ("wrong-type", "response 3 of 3: response: 5"),
    ]


def test_a_row_without_response_is_kept_where_none_is_needed(tmp_path):
    dataset = load(tmp_path, {"prompt": "a"}, {"prompt": "b", "response": ""}, needs_response=False)
    assert [row.responses for row in dataset.rows] == [(), ()]
    assert dataset.bad_by_reason() == {"empty-response": 1}


def test_the_first_usable_row_of_a_prompt_is_kept(tmp_path):
    rows = [{"prompt": "a", "response": response} for response in ("", "first", "second")]
    dataset = load(tmp_path, *rows)
    assert [row.responses[0].text for row in dataset.rows] == ["first"]
    assert dataset.bad_by_reason() == {"empty-response": 1, "duplicate-prompt": 1}
    assert dataset.bad[1].detail == (
        f"as {tmp_path / 'rows.jsonl'}:2: 'a'; several responses to a prompt go into one row, as a list"
    )


def test_the_same_source_twice_is_all_duplicates(tmp_path):
    path = write(tmp_path, GOOD)
    dataset = load_rows([path, path], needs_response=True)
    assert len(dataset.rows) == 1
    assert dataset.bad_by_reason() == {"duplicate-prompt": 1}


def test_a_prompt_with_a_system_turn_is_another_prompt(tmp_path):
    conversation = turns(("system", "s"), ("user", "a"))
    rows = [{"prompt": "a", "response": "x"}, {"messages": conversation, "response": "x"}]
    assert len(load(tmp_path, *rows).rows) == 2


def test_bad_rows_come_as_records_that_json_can_hold(tmp_path):
    wide = [["y" * 1000] * 100] * 100
    long = {"prompt": "x" * 10_000_000}
    dataset = load(tmp_path, GOOD, b"\xff", {"prompt": "\ud800"}, long, {"prompt": wide})
    records = [asdict(row) for row in dataset.bad]
    assert [record["line"] for record in records] == [2, 3, 4, 5]
    for record in records:
        assert record.keys() == {"source", "line", "reason", "detail"}
        assert len(json.dumps(record, ensure_ascii=False).encode()) < 500


# Ids and fingerprint.


def test_a_row_without_id_gets_one_from_its_prompt_alone(tmp_path):
    ids = [row.id for row in load(tmp_path, {"prompt": "a"}, {"prompt": "b"}, needs_response=False).rows]
    again = load(tmp_path, {"prompt": "B "}, {"id": None, "prompt": "A"}, needs_response=False).rows
    assert ids == [row.id for row in reversed(again)]
    assert len(set(ids)) == 2


def test_an_id_given_to_several_prompts_is_made_unique_the_same_way_every_time(tmp_path):
    rows = [{"id": "x", "prompt": prompt} for prompt in "abc"]
    first, second = (load(tmp_path, *rows, needs_response=False).rows for _ in range(2))
    assert first == second
    assert first[0].id == "x"
    assert len({row.id for row in first}) == 3
    # Also when an id made here is itself given to another prompt.
    rows = [*rows, {"id": first[1].id, "prompt": "d"}, {"id": "", "prompt": "e"}]
    assert len({row.id for row in load(tmp_path, *rows, needs_response=False).rows}) == 5


def test_the_fingerprint_changes_with_any_content_and_nothing_else(tmp_path):
    fields = {"id": "1", "prompt": "a", "response": "b", "teacher": "t"}
    plain = load(tmp_path, fields).fingerprint
    (tmp_path / "elsewhere").mkdir()
    assert load(tmp_path / "elsewhere", b"broken", {**fields, "unread": 1}).fingerprint == plain
    changes = {"id": "2", "prompt": "A", "response": "c", "teacher": "u", "finish_reason": "length"}
    prints = {load(tmp_path, {**fields, key: value}).fingerprint for key, value in changes.items()}
    assert len(prints | {plain}) == len(changes) + 1


# Files.


def test_lines_end_at_line_feeds_alone(tmp_path):
    text = "a\u2028b\u2029c\u0085d"
    line = json.dumps({"prompt": text, "response": text}, ensure_ascii=False).encode()
    dataset = load(tmp_path, b"", b" \r", line + b"\r", b"\r", GOOD)
    assert [row.prompt for row in dataset.rows] == [text, "a question"]
    assert dataset.bad == ()


def test_blank_lines_count_in_line_numbers(tmp_path):
    assert [bad.line for bad in load(tmp_path, b"", GOOD, b"", b"x\r").bad] == [4]


def test_a_byte_order_mark_at_the_start_is_tolerated(tmp_path):
    assert len(load(tmp_path, b"\xef\xbb\xbf" + GOOD).rows) == 1


def test_a_list_of_sources_is_read_in_order(tmp_path):
    first = write(tmp_path, {"prompt": "a"}, name="1.jsonl")
    second = write(tmp_path, b"x", {"prompt": "b"}, name="2.JSON")
    dataset = load_rows([second, first], needs_response=False)
    assert [row.prompt for row in dataset.rows] == ["b", "a"]
    assert [(bad.source, bad.line) for bad in dataset.bad] == [(second, 1)]


def test_verl_style_parquet_loads_unchanged(tmp_path):
    path = tmp_path / "train.parquet"
    rows = [
        {
            "data_source": "lmsys",
            "prompt": turns(("system", "s"), ("user", f"question {number}")),
            "teacher_response": f"answer {number}",
            "reward_model": {"style": "rule", "ground_truth": "unused"},
            "extra_info": {"index": number},
        }
        for number in range(2500)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    dataset = load_rows(str(path), needs_response=True)
    assert dataset.bad == ()
    assert len(dataset.rows) == 2500
    assert dataset.rows[2499].messages == (Message("system", "s"), Message("user", "question 2499"))
    assert dataset.rows[2499].responses == (TeacherResponse("answer 2499"),)


def test_one_invalid_utf8_cell_of_parquet_is_counted_and_the_rest_is_read(tmp_path):
    prompts = pyarrow.array([b"a", b"\xff", b"c"], type=pyarrow.binary()).view(pyarrow.string())
    responses = pyarrow.array(["x", "y", None])
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": prompts, "response": responses})
    pyarrow.parquet.write_table(table, path)
    dataset = load_rows(str(path), needs_response=True)
    assert [row.prompt for row in dataset.rows] == ["a"]
    assert [(bad.line, bad.reason) for bad in dataset.bad] == [
        (2, "invalid-utf-8"),
        (3, "no-response"),
    ]


def test_a_time_that_python_cannot_hold_costs_its_row_alone(tmp_path):
    ids = pyarrow.array([0, 2**52], type=pyarrow.timestamp("s"))
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": ids, "prompt": ["a", "b"]}), path)
    dataset = load_rows(str(path), needs_response=False)
    assert [row.id for row in dataset.rows] == ["1970-01-01 00:00:00"]
    assert dataset.bad_by_reason() == {"wrong-type": 1}


def test_parquet_without_a_column_we_know_says_so(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["a", "b"]}), path)
    with pytest.raises(DataError, match=r"2 read, 2 no-prompt; .*fields: \['instruction'\]"):
        load_rows(str(path), needs_response=False)


def test_a_data_set_folder_is_read_by_split(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, {"prompt": "a", "response": "b", "id": 0.5}, name="train.jsonl")
    write(folder, {"prompt": "c", "response": "d", "id": 1.5}, {"prompt": "e"}, name="test.jsonl")
    assert [row.prompt for row in load_rows(str(folder), needs_response=True).rows] == ["a"]
    dataset = load_rows(f"{folder}:test", needs_response=True)
    assert [(row.id, row.prompt) for row in dataset.rows] == [("1.5", "c")]
    assert [(bad.line, bad.reason) for bad in dataset.bad] == [(2, "no-response")]
    with pytest.raises(DataError, match=r"split 'valid'.*Unknown split"):
        load_rows(f"{folder}:valid", needs_response=True)


def test_a_data_set_without_a_column_we_know_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", {"instruction": "a"}, name="train.jsonl")
    with pytest.raises(DataError, match=r"1 read, 1 no-prompt; .*fields: \['instruction'\]"):
        load_rows(str(tmp_path / "set"), needs_response=False)


# Errors.


@pytest.mark.parametrize(
    "source",
    [
        "gone.jsonl",
        "gone.JSON",
        "gone.parquet",
        "a/b/gone",
        "/gone",
        "./gone",
        "",
        ":",
        "a\0.jsonl",
    ],
)
def test_a_missing_file_is_an_error_and_no_hub_name(source):
    with pytest.raises(DataError, match="no such file; give a path"):
        load_rows(source, needs_response=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"prompt\na\n", r"neither \.jsonl, \.json nor \.parquet"),
        ("rows.parquet", b"not parquet", "not a readable Parquet file"),
        ("rows.parquet", b"", "not a readable Parquet file"),
        ("rows.jsonl", b"", r"no usable row; 0 read\. Each row needs a prompt and a response"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: {message}"):
        load_rows(str(path), needs_response=True)


@pytest.mark.parametrize("name", ["folder.jsonl", "folder.parquet", "x" * 300 + ".jsonl", "x" * 300])
def test_a_path_that_cannot_be_opened_is_an_error_that_says_why(tmp_path, name):
    with contextlib.suppress(OSError):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"cannot be read: .*(directory|too long)"):
        load_rows(str(tmp_path / name), needs_response=True)


def test_a_set_without_usable_row_is_an_error_that_names_file_counts_and_first_fault(tmp_path):
    path = write(tmp_path, b"x", {"prompt": "a", "response": ""}, {"prompt": "b", "response": " "})
    with pytest.raises(DataError) as error:
        load_rows(path, needs_response=True)
    assert str(error.value).startswith(
        f"{path}: no usable row; 3 read, 2 empty-response, 1 broken-json; the first: {path}:1: "
    )


def test_no_source_at_all_is_an_error():
    with pytest.raises(DataError, match="no source: no usable row; 0 read"):
        load_rows([], needs_response=True)


# Hostile input.


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.just(GOOD)), max_size=6))
def test_any_bytes_give_rows_or_a_data_error(tmp_path, lines):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    with contextlib.suppress(DataError):
        dataset = load_rows(str(path), needs_response=True)
        assert dataset.rows
        json.dumps([asdict(row) for row in dataset.bad], ensure_ascii=False).encode()


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "finish_reason"]), inner)
    ),
    max_leaves=6,
)
names = st.sampled_from(
    ["id", "prompt", "messages", "content", "response", "responses", "finish_reason", "teacher"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.dictionaries(names, values), max_size=4), st.booleans())
def test_any_json_gives_rows_that_keep_the_contract_or_a_data_error(tmp_path, rows, needs_response):
    with contextlib.suppress(DataError):
        dataset = load(tmp_path, *rows, needs_response=needs_response)
        for row in dataset.rows:
            assert row.id
            assert row.messages[-1].role != "assistant"
            assert row.responses or not needs_response
            assert all(response.text.strip() for response in row.responses)
            (row.prompt + row.id + "".join(r.text for r in row.responses)).encode()
        assert len({row.id for row in dataset.rows}) == len(dataset.rows)
        assert len({normalised_prompt(row.messages) for row in dataset.rows}) == len(dataset.rows)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.data())
def test_a_damaged_parquet_file_gives_rows_or_a_data_error(tmp_path, data):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": ["a", "b"], "response": ["x", "y"]})
    pyarrow.parquet.write_table(table, path)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        assert load_rows(str(path), needs_response=True).rows


# Splits.


def rows_of(prompts):
    return [Row(prompt, (Message("user", prompt),)) for prompt in prompts]


prompt_sets = st.lists(st.text("abc", min_size=1, max_size=6), unique=True, max_size=40)


@given(st.text(max_size=30))
def test_a_prompts_hash_fraction_ignores_case_width_and_white_space(text):
    fraction = prompt_hash_fraction([Message("user", text)])
    assert 0 <= fraction < 1
    spaced = [Message("user", f"\n {text.replace(' ', chr(0x3000))} ")]
    assert prompt_hash_fraction(spaced) == fraction
    assert prompt_hash_fraction([Message("system", text)]) != fraction


def test_the_hash_fraction_is_the_same_on_every_machine_and_for_ever():
    # The first 16 digits that `printf 'user: 2+2?' | sha256sum` prints, cut to 53 bits.
    assert prompt_hash_fraction([Message("user", "2+2?")]) == 0x3F8BB17F2C0B1082 // 2**11 / 2**53


def test_normalisation_keeps_roles_and_turns_apart():
    one = [Message("user", "a\nuser: b")]
    two = [Message("user", "a"), Message("user", "b")]
    assert normalised_prompt(one) == "user: a user: b"
    assert normalised_prompt(two) == "user: a\nuser: b"
    assert normalised_prompt([Message("user", "Straße \uff21B\u00a0\t①")]) == "user: strasse ab 1"


@given(prompt_sets, prompt_sets, st.floats(0, 1, exclude_max=True))
def test_a_prompt_keeps_its_side_whatever_the_other_rows_are(prompts, others, share):
    alone = hold_out(rows_of(prompts), share)
    more = hold_out(rows_of([*prompts, *(other for other in others if other not in prompts)]), share)
    border = {row.id for side in (alone, more) for part in side for row in part if len(part) == 1}
    for part, bigger in zip(alone, more, strict=True):
        assert {row.id for row in part} - border <= {row.id for row in bigger}


@given(prompt_sets, st.floats(0, 1, exclude_max=True))
def test_a_split_loses_no_row_keeps_the_order_and_leaves_no_side_empty(prompts, share):
    train, valid = hold_out(rows_of(prompts), share)
    assert sorted([*train, *valid], key=lambda row: prompts.index(row.id)) == rows_of(prompts)
    for part in (train, valid):
        assert [row.id for row in part] == [p for p in prompts if p in {row.id for row in part}]
    if share == 0:
        assert valid == ()
    elif len(prompts) > 1:
        assert train
        assert valid
    else:
        assert valid == ()


def test_a_share_too_small_for_the_set_holds_out_the_smallest_hash():
    rows = rows_of(["a", "b", "c"])
    _, valid = hold_out(rows, 1e-9)
    assert valid == (min(rows, key=lambda row: prompt_hash_fraction(row.messages)),)


def test_copies_of_a_prompt_are_never_on_both_sides():
    copies = rows_of(["a", "A", "a "])
    assert hold_out(copies, 0.5) == (tuple(copies), ())


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_an_error(share):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        hold_out([], share)


# Real files.


@needs_real_data
def test_every_real_file_loads_whole_and_its_text_is_unchanged():
    paths = [path for path in sorted(REAL_DATA.glob("*/*.jsonl")) if path.stat().st_size < 1e6]
    assert paths
    for path in paths:
        dataset = load_rows(str(path), needs_response=True)
        with open(path, encoding="utf-8", newline="\n") as lines:
            raw = [json.loads(line) for line in lines]
        assert len(dataset.rows) + len(dataset.bad) == len(raw)
        assert dataset.bad_by_reason().keys() <= {"duplicate-prompt"}
        kept = {row.id: row for row in dataset.rows}
        for fields in raw:
            if row := kept.get(fields["id"]):
                assert (row.prompt, row.responses[0].text) == (fields["prompt"], fields["response"])


@needs_real_data
def test_real_prompts_split_near_the_share():
    dataset = load_rows(str(REAL_DATA / "train" / "alpaca.text-davinci-003.jsonl"), needs_response=True)
    train, valid = hold_out(dataset.rows, 0.1)
    # Four standard deviations of a binomial share with some 10,000 prompts.
    assert len(valid) / len(dataset.rows) == pytest.approx(0.1, abs=0.012)
    assert len(train) + len(valid) == len(dataset.rows)


def test_a_marked_refusal_is_used_where_it_is_wanted(tmp_path):
    path = tmp_path / "teacher.jsonl"
    row = {"prompt": "Who?", "response": "I will not say.", "finish_reason": "refusal", "mark": "refusal"}
    other = {"prompt": "Why?", "response": "Because.", "mark": None}
    path.write_text(json.dumps(row) + "\n" + json.dumps(other) + "\n")
    without = load_rows(str(path), needs_response=True)
    assert ([row.prompt for row in without.rows], without.bad_by_reason()) == (["Why?"], {"refusal": 1})
    wanted = load_rows(str(path), needs_response=True, train_on=["refusal"])
    assert [row.prompt for row in wanted.rows] == ["Who?", "Why?"]


def test_samples_of_one_prompt_become_its_responses(tmp_path):
    path = tmp_path / "teacher.jsonl"
    rows = [{"id": "a", "prompt": "Who?", "response": f"I {n}.", "sample_index": n} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = load_rows(str(path), needs_response=True).rows
    assert [response.text for response in row.responses] == ["I 0.", "I 1.", "I 2."]


def test_a_file_that_is_one_json_array_is_refused_with_what_converts_it(tmp_path):
    for text in ('[{"prompt": "a", "response": "b"}]', '[\n {"prompt": "a", "response": "b"}\n]'):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(DataError, match=r"rows\.json: a JSON array, .* jq -c '\.\[\]' "):
            load_rows(str(tmp_path / "rows.json"), needs_response=True)
