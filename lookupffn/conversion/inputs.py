"""What models are measured on, as commands take it: a file and the columns that matter, ``FILE:first,second,score``."""

from __future__ import annotations

from pathlib import Path

from lookupffn.conversion.quality import Labelled, Pairs
from lookupffn.errors import InputError
from lookupffn.train.labelled import read_labelled
from lookupffn.train.rows import SUFFIXES, check_encoding, read_rows, suffix_of


def split_columns(argument: str, option: str, example: str) -> tuple[str, list[str]]:
    """The file and its columns, as many as in ``example``. Raises InputError for another form."""
    path, _, names = argument.rpartition(":")
    columns = names.split(",")
    if not path or len(columns) != len(example.split(",")):
        raise InputError(f"{option} {argument!r} is not FILE:{example}")
    return path, columns


def pairs_of(argument: str, encoding: str) -> Pairs:
    """Pairs of texts with scores, of ``FILE:first,second,score``. Raises InputError where it cannot be read."""
    path, columns = split_columns(argument, "--pairs", "first,second,score")
    found = read_labelled(path, ",".join(columns[:2]), columns[2], "regression", encoding=encoding)
    first, second = zip(*found.texts, strict=True)
    return Pairs(name_of(path), list(first), list(second), [float(score) for score in found.labels])


def labelled_of(argument: str, encoding: str) -> Labelled:
    """Texts of classes, of ``FILE:text,label``. Raises InputError where it cannot be read."""
    path, columns = split_columns(argument, "--labelled", "text,label")
    found = read_labelled(path, columns[0], columns[1], "single_label_classification", encoding=encoding)
    return Labelled(name_of(path), [text for (text,) in found.texts], found.labels)


def texts_of(argument: str, encoding: str) -> list[str]:
    """Different texts, one a line of ``FILE``, or of a table's column, ``FILE:column``; empty ones are left out.

    Raises:
        InputError: the file cannot be read, or holds fewer than two texts.
    """
    path, column = (argument, "") if Path(argument).is_file() else argument.rpartition(":")[::2]
    if (suffix_of(path) in SUFFIXES) != bool(column) or not Path(path).is_file():
        raise InputError(f"--texts {argument!r} is no FILE of lines and no FILE:column of {', '.join(SUFFIXES)}")
    encoding = check_encoding(encoding)
    try:
        if column:
            cells = (row.values or {} for row in read_rows(path, [column], text=[column], encoding=encoding))
            lines = [cell.get(column) or "" for cell in cells]
        else:
            lines = Path(path).read_text(encoding="utf-8-sig" if encoding == "utf-8" else encoding).split("\n")
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path} cannot be read as {encoding.upper()} text: {error}") from None
    texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(texts) < 2:
        raise InputError(f"{path} holds {len(texts)} texts: nearest others are looked for among two at least")
    return texts


def name_of(path: str) -> str:
    """A file's folder and name: those of several sets are often all called validation."""
    return f"{Path(path).resolve().parent.name}/{Path(path).stem}"
