"""Labelled texts: rows of a file to texts and what is to be predicted of them, each row checked."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lookupffn.errors import InputError
from lookupffn.train.rows import SUFFIXES, DataError, check_encoding, read_rows, suffix_of

_INTEGER = re.compile(r"-?(0|[1-9]\d*)")
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
_EXAMPLES = 3


class LabelledTexts(NamedTuple):
    """A file's texts, tuples of as many as there are text columns, with a label each; what was left out by reason."""

    path: str
    texts: list[tuple[str, ...]]
    labels: list[Any]
    skipped: dict[str, int]


def columns_of(setting: str, value: str) -> list[str]:
    """The columns that a setting names, with commas between them. Raises InputError for none, or one named twice."""
    columns = [column.strip() for column in value.split(",") if column.strip()]
    twice = sorted(column for column, times in Counter(columns).items() if times > 1)
    if not columns or twice:
        raise InputError(f"{setting} {value!r} names {f'{twice[0]!r} twice' if twice else 'no column'}")
    return columns


def read_labelled(
    path: str,
    text_column: str,
    label_column: str,
    problem_type: str,
    *,
    encoding: str = "utf-8",
    skip_bad: bool = False,
) -> LabelledTexts:
    """The labelled texts of a file, in order; a label is by ``problem_type``

    - of ``single_label_classification`` an int, a bool or a word, all of a file of one type;
    - of ``multi_label_classification`` the list of the names that hold: of one column of lists of ints or words, or of
      several columns of 0 and 1 those with 1;
    - of ``regression`` a finite float.

    In .csv and .tsv whole numbers are ints, and every other cell is a word, "NA" and "null" too. A row that cannot be
    used, for it has no text, no label, or one that does not fit, refuses the file: a row that is missing from a test
    set changes what is measured. With ``skip_bad`` such rows are left out and counted.

    Raises:
        InputError: the file, its columns or a row cannot be used; the message names the row.
    """
    texts, labels = columns_of("text_column", text_column), columns_of("label_column", label_column)
    if both := sorted(set(texts) & set(labels)):
        raise InputError(f"column {both[0]!r} is the label: as text too it would give the answer away")
    if suffix_of(path) not in SUFFIXES or not Path(path).is_file():
        raise InputError(f"{path}: give an existing file that ends in {', '.join(SUFFIXES)}")
    encoding = check_encoding(encoding)
    is_table = suffix_of(path) in (".csv", ".tsv")
    label_of = {"regression": _number, "multi_label_classification": _names}.get(problem_type, _class)
    if len(labels) > 1 and problem_type != "multi_label_classification":
        raise InputError(f"label_column {label_column!r} names {len(labels)} columns, which {problem_type} has not")

    found, reasons, examples = LabelledTexts(path, [], [], {}), Counter(), []
    places = []
    try:
        for row in read_rows(path, [*texts, *labels], text=texts, encoding=encoding):
            reason, label = row.reason, None
            if row.values is not None:
                text = tuple(row.values[column] for column in texts)
                empty = [column for column, cell in zip(texts, text, strict=True) if not (cell or "").strip()]
                label, reason = label_of({column: row.values[column] for column in labels})
                reason = f"no text in column {empty[0]!r}" if empty else reason
            if reason:
                reasons[reason] += 1
                examples += [f"{row.where}: {reason}"][: _EXAMPLES - len(examples)]
            else:
                found.texts.append(text)
                found.labels.append(label)
                places.append(row.where)
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror})") from None
    if reasons and not skip_bad:
        total, rows = sum(reasons.values()), "row" if sum(reasons.values()) == 1 else "rows"
        raise DataError(
            f"{total:,} {rows} cannot be used ({'; '.join(examples)}): say the encoding, mend them, or leave them out "
            "by skip_bad"
        )
    if not found.texts:
        raise DataError(f"{path}: no labelled text is in it")
    for i, column in enumerate(texts) if is_table else ():
        if all(_NUMBER.fullmatch(text[i]) for text in found.texts):
            first = found.texts[0][i]
            raise DataError(f"{places[0]}: column {column!r} holds numbers, {first!r} here, in every row, not text")
    if problem_type == "single_label_classification":
        _check_classes(path, label_column, found.labels, places, is_table)
    return found._replace(skipped=dict(reasons))


def _class(cells: dict[str, Any]) -> tuple[Any, str]:
    ((column, cell),) = cells.items()
    return (None, f"no label in column {column!r}") if cell is None or cell == "" else (cell, "")


def _number(cells: dict[str, Any]) -> tuple[float | None, str]:
    ((column, cell),) = cells.items()
    try:
        if isinstance(cell, bool | None) or not math.isfinite(number := float(cell)):
            raise ValueError
    except (TypeError, ValueError):
        return None, f"column {column!r} holds {cell!r}, no number"
    return number, ""


def _names(cells: dict[str, Any]) -> tuple[list | None, str]:
    if len(cells) > 1:
        if wrong := [column for column, cell in cells.items() if str(cell) not in ("0", "1", "True", "False")]:
            return None, f"column {wrong[0]!r} holds {cells[wrong[0]]!r}, not 0 or 1"
        return [column for column, cell in cells.items() if str(cell) in ("1", "True")], ""
    ((column, cell),) = cells.items()
    if not isinstance(cell, list) or not all(type(name) in (int, str) for name in cell):
        return None, f"column {column!r} holds {cell!r}, no list of labels; or name several columns of 0 and 1"
    return sorted(set(cell), key=str), ""


def _check_classes(path: str, column: str, labels: list[Any], places: Sequence[str], is_table: bool) -> None:
    """Makes whole numbers of a table's cells, and refuses what is neither these nor words."""
    if is_table and all(_INTEGER.fullmatch(label) for label in labels):
        labels[:] = map(int, labels)
    elif is_table and all(map(_NUMBER.fullmatch, labels)) and not all(label.isdigit() for label in labels):  # not "01"
        labels[:] = map(float, labels)
    kinds = {type(label) for label in labels}
    if kinds <= {int, bool} or kinds <= {str}:
        return
    fits = (int, bool) if isinstance(labels[0], int) else (str,)
    odd = next(i for i, label in enumerate(labels) if not isinstance(label, fits))
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise InputError(
        f"{path}: column {column!r} must hold whole numbers or words only, not {names} ({places[odd]} has "
        f"{labels[odd]!r}); numbers with a fraction are predicted by problem_type regression"
    )
