"""Where rows come from: lines of JSON, Parquet, or a Hugging Face data set. Judges none of them.

A row that cannot be decoded costs that row alone; a source that cannot be read is a `DataError`.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from gadfly.data.row_formats import FIELDS, BadField, excerpt
from gadfly.errors import DataError
from gadfly.model_identity import may_be_hub_name


def read_rows(source: str) -> Iterator[tuple[int, object]]:
    """Every row of one source, undigested, with its line or row number from 1.

    A row that cannot be decoded comes as the `BadField` that says why. What ends in `.jsonl`,
    `.json` or `.parquet` is a file; another name is a folder that `datasets` can read or a hub
    name, with a split after a colon (`name:split`; default `train`).

    Raises:
        DataError: there is no such file or data set, or it cannot be read.
    """
    name, _, split = source.partition(":")
    try:
        if "\0" in source:
            raise FileNotFoundError
        if Path(source).suffix.lower() in (".jsonl", ".json"):
            yield from _read_lines(source)
        elif Path(source).suffix.lower() == ".parquet":
            yield from _read_parquet(source)
        elif Path(source).is_file():
            raise DataError(f"{source}: neither .jsonl, .json nor .parquet; convert or rename it")
        elif source and Path(source).is_dir():
            yield from _read_hub(source, source, "train")
        elif may_be_hub_name(name) or (name and Path(name).is_dir()):
            yield from _read_hub(source, name, split or "train")
        else:
            raise FileNotFoundError
    except FileNotFoundError:
        raise DataError(
            f"{source!r}: no such file; give a path that exists "
            f"(a relative one counts from the recipe's folder)"
        ) from None
    except OSError as failure:
        reason = failure.strerror or failure
        raise DataError(f"{source}: cannot be read: {reason}; check the path and its rights") from None


def _read_lines(source: str) -> Iterator[tuple[int, object]]:
    # Bytes, since text mode ends lines at \r as well and gives up at the first invalid byte.
    with open(source, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                _refuse_array(source, line)
            if line.strip():
                yield number, _decode_line(line)


def _refuse_array(source: str, first_line: bytes) -> None:
    """Tell a file that is one JSON array at its first line: its rows would be broken, all but the last."""
    if source.lower().endswith(".json") and first_line.lstrip().startswith(b"["):
        raise DataError(
            f"{source}: a JSON array, where one object a line is read; convert it: jq -c '.[]' {source}"
        )


def _decode_line(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as invalid:
        near = line[max(0, invalid.start - 20) : invalid.start + 20]
        return BadField("invalid-utf-8", f"byte {invalid.start}: {excerpt(near)}")
    except (ValueError, RecursionError) as invalid:
        # ValueError is more than JSONDecodeError: an integer of 5,000 digits is refused as well.
        return BadField("broken-json", f"{invalid}: {excerpt(line.decode('utf-8').strip())}")


def _read_parquet(source: str) -> Iterator[tuple[int, object]]:
    import pyarrow.parquet  # noqa: PLC0415  only Parquet files need it

    # Opened here, so that what fails below is the file's content and not its path.
    with open(source, "rb") as content:
        try:
            with pyarrow.parquet.ParquetFile(content) as file:
                columns = _known(file.schema_arrow.names)
                yield from _table_rows(file.iter_batches(batch_size=1000, columns=columns))
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as broken:
            raise DataError(
                f"{source}: not a readable Parquet file: {_first_line(broken)}; write it anew"
            ) from None


def _read_hub(source: str, name: str, split: str) -> Iterator[tuple[int, object]]:
    import datasets  # noqa: PLC0415  slow, and seldom needed

    try:
        data = datasets.load_dataset(name, split=split)
    # Hub, network, unknown split, broken file: each its own class, from three packages.
    except Exception as failure:
        causes = (failure, failure.__cause__)
        reason = ": ".join(_first_line(cause) for cause in causes if cause)
        raise DataError(
            f"{source!r}: no such file, and not readable as a Hugging Face data set "
            f"(split {split!r}): {reason}; check the name (NAME or NAME:SPLIT), or give a file"
        ) from None
    data = data.select_columns(_known(data.column_names))
    yield from _table_rows(data.with_format("arrow").iter(batch_size=1000))


def _known(columns: list[str]) -> list[str]:
    """The columns worth reading; all where none is known, so that the complaint can name them."""
    return [name for name in columns if name in FIELDS] or columns


def _first_line(failure: BaseException) -> str:
    return str(failure).strip().split("\n")[0]


def _table_rows(tables: Iterable[Any]) -> Iterator[tuple[int, object]]:
    return enumerate(chain.from_iterable(map(_decode_table, tables)), start=1)


def _decode_table(table: Any) -> list[object]:
    """The rows of an Arrow table or batch; if any cannot be decoded, all are tried one by one."""
    try:
        return list(table.to_pylist())
    except (ValueError, OverflowError):
        return [_decode_row(table.slice(number, 1)) for number in range(table.num_rows)]


def _decode_row(table: Any) -> object:
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError as invalid:
        return BadField("invalid-utf-8", excerpt(invalid.object))
    except (ValueError, OverflowError) as invalid:
        return BadField("wrong-type", f"cannot be read: {invalid}")
