"""Labelled texts: what each kind of file says, and one sentence with file, column and row where it says nothing."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from lookupffn.errors import InputError
from lookupffn.train.labelled import read_labelled
from lookupffn.train.metrics import measured

CLASSES, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"


def table(path, *rows, header=("text", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
    return str(path)


def lines(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def labels(path, problem_type=CLASSES, text="text", label="label", **options):
    return read_labelled(path, text, label, problem_type, **options).labels


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_labels_of_a_table(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    words = ["None", "null", "NA", "nan", "N/A", "yes"]
    assert labels(table(path, *(("a b", word) for word in words))) == words  # a csv reader's nulls are classes here
    assert labels(table(path, ("a", "0"), ("b", "1"), ("c", "-1"))) == [0, 1, -1]
    assert labels(table(path, ("a", "0"), ("b", "01"))) == ["0", "01"]
    assert labels(table(path, ("a", "0"), ("b", "other"))) == ["0", "other"]
    assert labels(table(path, ("a", "0.5"), ("b", "-1e3")), NUMBER) == [0.5, -1000.0]


def test_labels_of_other_files(tmp_path):
    assert labels(lines(tmp_path / "a.jsonl", {"text": "a", "label": True}, {"text": "b", "label": False})) == [
        True,
        False,
    ]
    assert labels(parquet(tmp_path / "a.parquet", text=["a", "b"], label=[3, 4])) == [3, 4]
    assert labels(parquet(tmp_path / "b.parquet", text=["a", "b"], label=[[4, 3], []]), SEVERAL) == [[3, 4], []]
    path = parquet(tmp_path / "c.parquet", text=["a", "b"], x=[0, 1], y=[True, False])
    assert labels(path, SEVERAL, label="x,y") == [["y"], ["x"]]
    assert labels(path, NUMBER, label="x") == [0.0, 1.0]


def test_text_may_look_like_a_null(tmp_path):
    path = table(tmp_path / "a.csv", ("None", "x"), ("NA", "y"))
    assert read_labelled(path, "text", "label", CLASSES).texts == [("None",), ("NA",)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "", "label": "x"}, "no text in column 'text'"),
        ({"text": None, "label": "x"}, "no text in column 'text'"),
        ({"text": " \n", "label": "x"}, "no text in column 'text'"),
        ({"text": 3, "label": "x"}, "column 'text' is not text"),
        ({"text": "a", "label": None}, "no label in column 'label'"),
        ({"text": "a", "label": ""}, "no label in column 'label'"),
        ({"text": "a"}, "no column 'label'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_or_left_out(tmp_path, row, reason):
    path = lines(tmp_path / "a.jsonl", {"text": "b", "label": "y"}, row, {"text": "c", "label": "z"})
    with pytest.raises(
        InputError, match=rf"1 row cannot be used \({path}:2: {reason}\): say the encoding, mend them, or .* skip_bad"
    ):
        labels(path)
    found = read_labelled(path, "text", "label", CLASSES, skip_bad=True)
    assert (found.labels, found.skipped) == (["y", "z"], {reason: 1})


def test_an_empty_cell_of_every_kind_of_file(tmp_path):
    paths = [
        table(tmp_path / "a.csv", ("a", "x"), ("", "y")),
        table(tmp_path / "a.tsv", ("a", "x"), ("", "y")),
        parquet(tmp_path / "a.parquet", text=["a", None], label=["x", "y"]),
        parquet(tmp_path / "b.parquet", text=pa.array(["a", None]).dictionary_encode(), label=["x", "y"]),
    ]
    for path in paths:
        with pytest.raises(InputError, match=rf"{path}:row 2: no text in column 'text'"):
            labels(path)


@pytest.mark.parametrize(
    ("text", "label", "problem", "message"),
    [
        ("text,text", "label", CLASSES, "text_column 'text,text' names 'text' twice"),
        (" , ", "label", CLASSES, "text_column ' , ' names no column"),
        ("text", "text", CLASSES, "column 'text' is the label: as text too it would give the answer away"),
        ("text,label", "label", CLASSES, "column 'label' is the label"),
        (
            "text",
            "label,n",
            CLASSES,
            "label_column 'label,n' names 2 columns, which single_label_class",
        ),
        ("n", "label", CLASSES, r"a\.csv:row 1: column 'n' holds numbers, '1' here, in every row, not text"),
        (
            "text",
            "half",
            CLASSES,
            r"'half' must hold whole numbers or words only, not float \(.*:row 1 has 0\.5\)",
        ),
        ("text", "label", NUMBER, r"row 1: column 'label' holds 'good', no number"),
        ("text", "label", SEVERAL, r"row 1: column 'label' holds 'good', no list of labels; or name several columns"),
        ("text", "n,label", SEVERAL, r"row 1: column 'label' holds 'good', not 0 or 1"),
        ("body", "label", CLASSES, r"a\.csv: no column 'body'; set text_column to one of: text, label, n, half"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, text, label, problem, message):
    header = ("text", "label", "n", "half")
    path = table(tmp_path / "a.csv", ("fine", "good", 1, 0.5), ("dull", "bad", 0, 1.5), header=header)
    with pytest.raises(InputError, match=message):
        labels(path, problem, text=text, label=label)


def test_numeric_text_in_columns_with_types(tmp_path):
    with pytest.raises(InputError, match=r"a\.parquet: column 'text' holds int64, not strings"):
        labels(parquet(tmp_path / "a.parquet", text=[1, 2], label=["x", "y"]))
    with pytest.raises(InputError, match=r"must hold whole numbers or words only, not int, str \(.*:2 has 'x'\)"):
        labels(lines(tmp_path / "b.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": "x"}))


def test_a_number_that_is_none_is_not_learnt(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["a", "b", "c"], label=[0.5, float("nan"), None])
    with pytest.raises(InputError, match=r"2 rows cannot be used \(.*row 2: column 'label' holds nan, no number"):
        labels(path, NUMBER)


# ---- Metrics, by their definitions -----------------------------------------------------------------------------------


def test_metrics_of_two_classes_by_counts():
    guess, truth = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0, 0, 1, 1])
    found = measured(CLASSES, np.eye(2)[guess], truth)
    true, false, missed, rest = 3, 1, 1, 3
    assert found["accuracy"] == 6 / 8
    assert found["accuracy_standard_error"] == pytest.approx((0.75 * 0.25 / 8) ** 0.5)
    assert found["f1"] == pytest.approx(2 * true / (2 * true + false + missed))
    product = (true + false) * (true + missed) * (rest + false) * (rest + missed)
    assert found["matthews_correlation"] == pytest.approx((true * rest - false * missed) / product**0.5)


def test_metrics_of_several_labels_by_counts():
    logits = np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
    truth = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = measured(SEVERAL, logits, truth)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["f1_macro"] == pytest.approx((0.8 + 0.0) / 2)


def test_metrics_of_numbers():
    guess, truth = np.array([[0.1], [0.4], [0.35], [2.0]], np.float32), np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    found = measured(NUMBER, guess, truth)
    assert found["pearson"] == pytest.approx(np.corrcoef(guess[:, 0], truth)[0, 1])
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # ranks 1 3 2 4 and 1 2 3 4
    assert found["spearman"] == pytest.approx(stats.spearmanr(guess[:, 0], truth).statistic)
    assert found["mean_squared_error"] == pytest.approx(float(((guess[:, 0] - truth) ** 2).mean()))
    assert np.isnan(measured(NUMBER, np.zeros((4, 1)), truth)["spearman"])
