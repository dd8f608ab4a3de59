"""Rows of .jsonl, .csv, .tsv and .parquet files, each with the place that it came from; what cannot be read is named.

A cell is what the file says: in .csv and .tsv all are text and none is missing, so that "NA" and "null" are words.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from itertools import count
from typing import Any, BinaryIO, NamedTuple

from lookupffn.errors import InputError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
BAD_SHARE = 0.01  # of files or rows

_LINE_LIMIT = 64 << 20  # characters: a longer line of .jsonl is skipped, never held
_CSV_BLOCK = 16 << 20  # bytes, and the longest row
_UNDECODABLE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are not in the encoding


class DataError(InputError):
    """Input that is refused; the message names the path, column or value and what to do."""


class DamagedFileError(DataError):
    """A file of which not even the rest can be read."""


class Row(NamedTuple):
    """``values`` by column, or None and the ``reason``; ``position`` is how many bytes of the file are behind it."""

    where: str
    values: dict[str, Any] | None
    reason: str
    position: int


def suffix_of(path: str) -> str:
    """The suffix that says what a file holds, in lower case: that before ``.gz`` where there is one."""
    name = os.path.basename(path).lower()
    return os.path.splitext(name.removesuffix(".gz"))[1]


def check_encoding(encoding: str) -> str:
    """The name by which Python knows the encoding. Raises DataError if it knows none."""
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        raise DataError(f"encoding {encoding!r} is not known: give one as utf-8, utf-16, latin-1 or cp1252") from None


def read_rows(path: str, columns: Sequence[str], *, text: Sequence[str] = (), encoding: str = "utf-8") -> Iterator[Row]:
    """Every row of a file, in order, with the named columns; those in ``text`` must hold strings.

    A row that cannot be read has a reason instead of values. Files may end in ``.gz`` after the suffix, but parquet.

    Raises:
        DataError: there is no such column, or there are two, or a column of ``text`` holds something else.
        DamagedFileError: the file is cut off or corrupt from some place on.
        OSError: the file cannot be opened or read.
    """
    readers = {".jsonl": _jsonl, ".parquet": _parquet}
    with _damage(path):
        yield from readers.get(suffix_of(path), _csv)(path, columns, text, encoding)


@contextlib.contextmanager
def _damage(path: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DamagedFileError(f"{path}: truncated or corrupt gzip") from None


@contextlib.contextmanager
def open_text(path: str, encoding: str, **options: Any) -> Iterator[tuple[TextIOWrapper, BinaryIO]]:
    """The text of a file, plain or ``.gz``, without a byte order mark; and the file itself, for its position."""
    with _damage(path), open(path, "rb") as raw:
        inner = gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw
        with TextIOWrapper(inner, "utf-8-sig" if encoding == "utf-8" else encoding, **options) as file:
            yield file, raw


def _require(where: str, columns: Sequence[str], text: Sequence[str], there: Sequence[str]) -> None:
    if not there:
        raise DataError(f"{where}: it is empty; the first row must name the columns")
    for column in columns:
        if there.count(column) != 1:
            found = f"{there.count(column)} columns" if column in there else "no column"
            setting = "text_column" if column in text else "label_column"
            raise DataError(f"{where}: {found} {column!r}; set {setting} to one of: {', '.join(there)}")


def _jsonl(path: str, columns: Sequence[str], text: Sequence[str], encoding: str) -> Iterator[Row]:
    is_first = True
    with open_text(path, encoding, errors="surrogateescape", newline="\n") as (file, raw):
        for number in count(1):
            try:
                line, where = file.readline(_LINE_LIMIT + 1), f"{path}:{number}"
            except UnicodeDecodeError:  # of an encoding of several bytes, whose errors leave no way on
                raise DamagedFileError(f"{path}:{number}: not {encoding.upper()} from here on") from None
            if not line:
                return
            if len(line) > _LINE_LIMIT:
                while line and not line.endswith("\n"):
                    line = file.readline(_LINE_LIMIT)
                yield Row(where, None, f"line of more than {_LINE_LIMIT} characters", raw.tell())
                continue
            line = line.strip().lstrip("\ufeff")
            if not line:
                continue
            row, reason = _parsed(line, encoding)
            if row is not None:
                if is_first:
                    _require(where, columns, text, list(row))
                is_first = False
                missing = [column for column in columns if column not in row]
                other = [column for column in text if not isinstance(row.get(column), str | None)]
                reason = f"no column {missing[0]!r}" if missing else f"column {other[0]!r} is not text" if other else ""
            yield Row(where, None if reason else {c: _whole(row[c]) for c in columns}, reason, raw.tell())


def _parsed(line: str, encoding: str) -> tuple[dict | None, str]:
    if _UNDECODABLE.search(line):
        return None, f"not {encoding.upper()}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None, "not JSON"
    return (row, "") if isinstance(row, dict) else (None, "not a JSON object")


def _whole(value: Any) -> Any:
    """JSON can spell half a surrogate pair, which no encoding can: it becomes U+FFFD."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def _csv(path: str, columns: Sequence[str], text: Sequence[str], encoding: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.csv as pc

    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    try:
        with open_text(path, encoding, errors="surrogateescape", newline="") as (file, _):
            header = next(csv.reader(file, delimiter=delimiter), [])
        "".join(header).encode()
    except (csv.Error, UnicodeError):
        raise DamagedFileError(f"{path}: its first row, the columns' names, is not {encoding.upper()} text") from None
    _require(path, columns, text, header)
    ragged: dict[int, str] = {}  # by row, the one below the header being the first

    def skip(row: Any) -> str:
        ragged[row.number - 1] = f"{row.actual_columns} cells where the first row has {row.expected_columns}"
        return "skip"

    # Cells are read as bytes and decoded one by one, so that one bad cell costs a row and not the file.
    options = {
        "read_options": pc.ReadOptions(use_threads=False, block_size=_CSV_BLOCK, encoding=encoding),
        "parse_options": pc.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip),
        "convert_options": pc.ConvertOptions(
            include_columns=list(columns), column_types=dict.fromkeys(columns, pa.binary()), strings_can_be_null=False
        ),
    }
    numbers = count(1)
    with open(path, "rb") as raw:
        inner = gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw
        try:
            for batch in pc.open_csv(inner, **options):
                cells = (batch.column(column).to_pylist() for column in columns)
                for values in zip(*cells, strict=True):
                    number = next(n for n in numbers if n not in ragged)
                    yield _decoded(f"{path}:row {number}", dict(zip(columns, values, strict=True)), raw.tell())
            for number, reason in ragged.items():
                yield Row(f"{path}:row {number}", None, reason, raw.tell())
        except (pa.ArrowException, UnicodeError) as error:
            raise DamagedFileError(f"{path}: not a table from row {next(numbers)} on ({first_line(error)})") from None


def _decoded(where: str, cells: dict[str, bytes], position: int) -> Row:
    try:
        return Row(where, {column: cell.decode() for column, cell in cells.items()}, "", position)
    except UnicodeDecodeError:
        return Row(where, None, "not UTF-8", position)


def _parquet(path: str, columns: Sequence[str], text: Sequence[str], encoding: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _require(path, columns, text, schema.names)
            for column in text:
                kind = schema.field(column).type
                values = kind.value_type if pa.types.is_dictionary(kind) else kind
                kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
                if not any(is_kind(values) for is_kind in kinds):
                    raise DataError(f"{path}: column {column!r} holds {kind}, not strings")
            bytes_per_row = os.path.getsize(path) / max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                batch.validate(full=True)  # that strings are UTF-8, which reading does not check
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:row {number}", values, "", int(number * bytes_per_row))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError | FileNotFoundError):
            raise
        raise DamagedFileError(f"{path}: truncated or corrupt parquet ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
