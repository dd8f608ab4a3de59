"""Rows of files: every kind gives the same cells, each with its place; what cannot be read costs a row, not a file."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lookupffn.train.rows import DamagedFileError, DataError, check_encoding, read_rows, suffix_of

COLUMNS = ("text", "label")


def read(path, columns=COLUMNS, **options):
    return [
        (row.where.removeprefix(str(path)), row.values or row.reason)
        for row in read_rows(str(path), columns, **options)
    ]


def test_cells_of_a_table_of_text_are_text_and_none_is_missing(tmp_path):
    cells = [('a, "b"\nc', "NA"), ("", "null"), ("None", "nan"), (" é ", "1")]
    lines = ["text,label", '"a, ""b""\nc",NA', ",null", "None,nan", " é ,1"]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    expected = [(f":row {n}", dict(zip(COLUMNS, cell, strict=True))) for n, cell in enumerate(cells, 1)]
    assert read(tmp_path / "a.csv") == expected
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-8-sig")  # as a spreadsheet saves it
    assert read(tmp_path / "a.csv") == expected
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-16")
    assert read(tmp_path / "a.csv", encoding="utf-16") == expected
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    assert read(tmp_path / "a.csv.gz") == expected


def test_a_bad_cell_or_row_costs_that_row_and_has_its_place(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\none,1\ntwo\nd\xe9j\xe0,3\nfour,4,4\nfive,5\n")
    assert sorted(read(tmp_path / "a.csv")) == [
        (":row 1", {"text": "one", "label": "1"}),
        (":row 2", "1 cells where the first row has 2"),
        (":row 3", "not UTF-8"),
        (":row 4", "3 cells where the first row has 2"),
        (":row 5", {"text": "five", "label": "5"}),
    ]
    assert read(tmp_path / "a.csv", encoding="latin-1")[1] == (":row 3", {"text": "déjà", "label": "3"})


def test_json_lines_in_another_encoding(tmp_path):
    rows = [{"text": "déjà", "label": 1}, {"text": "vu", "label": None}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(text, encoding="latin-1")
    assert read(tmp_path / "a.jsonl") == [(":1", "not UTF-8"), (":2", rows[1])]
    assert [row for _, row in read(tmp_path / "a.jsonl", encoding="latin-1")] == rows
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-16")
    assert [row for _, row in read(tmp_path / "a.jsonl", encoding="utf-16")] == rows
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8-sig")
    assert [row for _, row in read(tmp_path / "a.jsonl")] == rows


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "null"])
def test_every_kind_of_text_column_in_parquet(tmp_path, kind):
    texts = [None, None] if kind == "null" else ["déjà", None]
    column = pa.array(texts, pa.null() if kind == "null" else pa.string())
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"text": column, "label": [1, 2]}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", text=["text"])
    assert found == [(":row 1", {"text": texts[0], "label": 1}), (":row 2", {"text": None, "label": 2})]


def test_what_is_no_text_in_parquet_is_refused_by_column(tmp_path):
    pq.write_table(pa.table({"text": [1, 2], "label": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column 'text' holds int64, not strings"):
        read(tmp_path / "a.parquet", text=["text"])


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt", "not gzip"])
def test_damaged_gzip(tmp_path, name, damage):
    line = "x,1\n" if "csv" in name else '{"text": "x", "label": 1}\n'
    raw = gzip.compress((("text,label\n" if "csv" in name else "") + line * 10**5).encode())
    broken = {"truncated": raw[:-20], "corrupt": raw[:300] + b"\x81" * 50 + raw[350:], "not gzip": b"text,label\nx,1\n"}
    (tmp_path / name).write_bytes(broken[damage])
    with pytest.raises(DamagedFileError, match=rf"{name}: truncated or corrupt gzip"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.csv: it is empty; the first row must name the columns"),
        (b"body,label\n", r"a\.csv: no column 'text'; set text_column to one of: body, label"),
        (b"text,score\n", r"a\.csv: no column 'label'; set label_column to one of: text, score"),
        (b"text,text,label\n", r"a\.csv: 2 columns 'text'"),
        (b"text,l\xe4bel\n", r"a\.csv: its first row, the columns' names, is not UTF-8 text"),
    ],
)
def test_columns_that_are_not_there_or_twice(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv", text=["text"])


def test_names_of_files_and_encodings():
    assert [suffix_of(name) for name in ("a.TXT", "b/c.csv.gz", "d.tar.gz", "e", ".gz")] == [
        ".txt",
        ".csv",
        ".tar",
        "",
        "",
    ]
    assert check_encoding("UTF8") == "utf-8"
