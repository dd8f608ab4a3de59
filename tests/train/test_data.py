"""Data: what is read, skipped and refused; the split; packing; the cache; masks. Small corpora made here."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lookupffn.train import data
from lookupffn.train.data import pretraining_data
from lookupffn.train.rows import DataError

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "tree",
    "river",
    "sees",
    "eats",
    "finds",
    "old",
    "green",
    "small",
    "under",
    "runs",
]
RNG = np.random.default_rng(0)
DOCUMENTS = [f"Story {i}: " + " ".join(RNG.choice(WORDS, 40)) for i in range(300)]
SMALL = {"block_size": 16, "vocab_size": 300, "validation_fraction": 0.2, "progress": False}


def write_jsonl(path, documents, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in documents))
    return path


def write_parquet(path, documents, column="text"):
    pq.write_table(pa.table({column: documents, "n": list(range(len(documents)))}), path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOKUPFFN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return pretraining_data(write_jsonl(folder / "a.jsonl", DOCUMENTS), cache_dir=folder / "cache", **SMALL)


def documents_of(result, split):
    """The documents of a split, in order, from its blocks; the last one may be cut short."""
    text = result.tokenizer.decode(getattr(result, split).reshape(-1).astype(int))
    return text.replace("<s>", "").split("</s>")


# ---- Sources, split, packing


def test_result(prepared):
    assert [prepared.tokenizer.convert_tokens_to_ids(token) for token in data.SPECIAL_TOKENS] == [
        0,
        1,
        2,
        3,
        4,
    ]
    for split in data.SPLITS:
        blocks = getattr(prepared, split)
        assert blocks.dtype == np.uint16
        assert isinstance(blocks, np.memmap)
        assert not blocks.flags.writeable
        assert blocks.shape == (prepared.summary["tokens"][split] // 16, 16)
    assert sum(prepared.summary["documents"].values()) == len(DOCUMENTS)
    assert prepared.summary["vocab_size"] == len(prepared.tokenizer) == 300
    assert json.loads(json.dumps(prepared.summary)) == prepared.summary
    assert prepared.tokenizer.decode(prepared.tokenizer("A cat.").input_ids) == "<s>A cat.</s>"


def test_packing_loses_nothing_and_splits_are_disjoint(prepared):
    train, validation = documents_of(prepared, "train"), documents_of(prepared, "validation")
    expected = {split: [] for split in data.SPLITS}
    for text in DOCUMENTS:
        expected[data.SPLITS[data._hash(text) < 0.2 * 2**64]].append(text)
    for found, split in ((train, "train"), (validation, "validation")):
        joined = "</s>".join(expected[split]) + "</s>"
        assert joined.startswith("</s>".join(found))  # all but the partial block at the end
        assert len(found) >= len(expected[split]) - 1
        assert len(expected[split]) == prepared.summary["documents"][split]
    assert not set(train[:-1]) & set(validation[:-1])


def test_special_tokens_in_text_are_text(tmp_path):
    odd = ["a <mask> in <s>the</s> text \u00e9\u4e2d\U0001f600 é中"] * 200  # equal documents: one split
    result = pretraining_data(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS + odd), **SMALL)
    for blocks in (result.train, result.validation):
        assert not np.isin(blocks, [1, 3, 4]).any()
    starts = sum(int((blocks == 0).sum()) for blocks in (result.train, result.validation))
    assert len(DOCUMENTS) + 200 - 2 <= starts <= len(DOCUMENTS) + 200


def test_same_documents_from_every_kind_of_file(tmp_path):
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / "folder" / f"{i:03}.txt").write_text(text + "\n")
    (tmp_path / "a.txt").write_text("\n\n \n".join(DOCUMENTS))
    for path in (tmp_path / "a.csv", tmp_path / "a.tsv"):
        with path.open("w", newline="") as file:
            table = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            table.writerows([("n", "text"), *enumerate(DOCUMENTS)])
    for name in ("a.txt", "a.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    sources = [
        tmp_path / "folder",
        tmp_path / "a.csv",
        tmp_path / "a.tsv",
        tmp_path / "a.txt.gz",
        tmp_path / "a.csv.gz",
        tmp_path / "a.txt",
        write_jsonl(tmp_path / "a.jsonl", DOCUMENTS),
        write_parquet(tmp_path / "a.PARQUET", DOCUMENTS),
    ]
    first, *others = [pretraining_data(source, **SMALL) for source in sources]
    for other in others:
        assert np.array_equal(first.train, other.train)
        assert np.array_equal(first.validation, other.validation)


def test_order_moves_no_document_to_the_other_split(tmp_path, prepared):
    result = pretraining_data(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[::-1] + DOCUMENTS[:7]), **SMALL)
    found = set(documents_of(result, "validation")[1:-1])
    assert len(found) > 30
    assert found <= set(documents_of(prepared, "validation")) | {
        text for text in DOCUMENTS if data._hash(text) < 0.2 * 2**64
    }
    total = Counter(data._hash(text) < 0.2 * 2**64 for text in DOCUMENTS + DOCUMENTS[:7])
    assert result.summary["documents"] == {"train": total[False], "validation": total[True]}


def test_long_document_in_pieces_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_PIECE", 50)
    one_line, lines = " ".join(DOCUMENTS), "\n".join(DOCUMENTS)
    for i, text in enumerate([one_line, lines]):
        (tmp_path / f"{i}.txt").write_text(text)
    reader = data._Reader(data._find(tmp_path), "text", 0.5, False, "")
    pieces = list(reader)
    assert max(len(piece.text) for _, piece in pieces) <= 50
    assert "".join(piece.text for _, piece in pieces) == one_line + lines
    assert [piece.starts for _, piece in pieces].count(True) == 2
    assert [piece.ends for _, piece in pieces].count(True) == 2
    for text in (one_line, lines):  # the split is that of the first piece, whatever later ones would say
        own = {split for split, piece in pieces if piece.text in text}
        assert data.SPLITS[data._hash(text[:50]) < 2**63] in own
    boundary = next(i for i, (_, piece) in enumerate(pieces) if piece.ends) + 1
    assert len({split for split, _ in pieces[:boundary]}) == len({split for split, _ in pieces[boundary:]}) == 1


def test_no_learnt_token_comes_of_a_word_longer_than_64(tmp_path):
    # Without that bound training is quadratic in a file of a megabyte without a space: ten minutes and more.
    words = ["a" * (4096 + i) for i in range(20)]
    result = pretraining_data(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS + words), **SMALL)
    longest = max(result.tokenizer.get_vocab(), key=len)
    assert longest == "a" * 64


def test_stdlib(tmp_path, monkeypatch):
    for name in ("mod.py", "site-packages/bad.py", "test/bad.py", "sub/__pycache__/bad.py", "sub/good.py"):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(DOCUMENTS) if "bad" not in name else "BAD " * 500
        (tmp_path / "lib" / name).write_text(text + name)
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / "lib" / f"m{i}.py").write_text(text)
    (tmp_path / "lib" / "data.bin").write_bytes(b"\0")
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    result = pretraining_data(**SMALL)
    assert sum(result.summary["documents"].values()) == 302
    assert result.summary["skipped"] == {"not .py": 1}
    assert result.summary["source"].startswith("stdlib of ")
    assert "BAD" not in result.tokenizer.decode(result.train.reshape(-1).astype(int))


def test_hugging_face_dataset(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train-00000-of-00001.parquet", DOCUMENTS, "body")
    real, seen = datasets.load_dataset, []

    def load(name, config, **options):
        seen.append((name, config, options))
        return real(str(tmp_path / "set"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    result = pretraining_data("org/set:part", text_column="body", **SMALL)
    assert seen[0] == ("org/set", "part", {"split": "train", "streaming": True})
    assert sum(result.summary["documents"].values()) == 300
    with pytest.raises(DataError, match=r"org/set:row 0: no column 'text'.*body, n"):
        pretraining_data("org/set", **SMALL)


# ---- Bad input: counted or refused


def test_bad_input_is_counted(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_parquet(folder / "good.parquet", [*DOCUMENTS, None, ""])
    (folder / "latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "page.html").write_text("x")
    (folder / "loop").symlink_to(folder)
    (folder / "itself.txt").symlink_to(folder / "itself.txt")
    os.mkfifo(folder / "pipe.txt")  # opening it would wait for ever
    lines = [
        b'{"text": "good one"}',
        b'{"other": 1}',
        b'{"text": 3}',
        b"[1]",
        b"{nonsense",
        b"\xff\xfe",
        b"[" * 10**5,
    ]
    (folder / "rows.jsonl").write_bytes(b"\n".join([*lines, rb'{"text": "half \ud800 pair"}']))
    summary = pretraining_data(folder, skip_bad=True, **SMALL).summary
    assert summary["skipped"] == {
        "symbolic link to a folder": 1,
        "not .txt, .jsonl, .csv, .tsv, .parquet": 1,
        "not a regular file": 2,
        "empty": 3,
        "not UTF-8": 2,
        "no column 'text'": 1,
        "column 'text' is not text": 1,
        "not a JSON object": 1,
        "not JSON": 2,
    }
    assert sum(summary["documents"].values()) == 302
    assert f"{folder}/latin1.txt: not UTF-8" in summary["skipped_examples"]
    assert f"{folder}/rows.jsonl:6: not UTF-8" in summary["skipped_examples"]


def test_examples_of_skipped_are_few(tmp_path):
    rows = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS + [""] * 50)
    summary = pretraining_data(rows, **SMALL).summary
    assert summary["skipped"] == {"empty": 50}
    assert len(summary["skipped_examples"]) == 3


def test_huge_line_is_skipped_without_holding_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lookupffn.train.rows._LINE_LIMIT", 1 << 16)
    huge = json.dumps({"text": "x" * (8 << 20)})
    rows = tmp_path / "a.jsonl"
    rows.write_text(huge + "\n" + json.dumps({"text": "short"}) + "\n" + huge)
    reader = data._Reader(data._find(rows), "text", 0.5, False, "")
    import tracemalloc

    tracemalloc.start()
    assert [piece.text for _, piece in reader] == ["short"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reader.skipped == {"line of more than 65536 characters": 2}
    assert peak < 2 << 20


def test_unreadable_file_is_counted(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    found = data._find(tmp_path)
    (tmp_path / "a.jsonl").unlink()  # as root may read anything, let it be gone instead
    reader = data._Reader(found, "text", 0.5, False, "")
    assert list(reader) == []
    assert reader.skipped == {"unreadable (No such file or directory)": 1}


@pytest.mark.parametrize(("bad", "of"), [(141, 201), (1, 40)])
def test_more_than_a_hundredth_unreadable_is_refused_until_told_to_go_on(tmp_path, bad, of):
    (tmp_path / "in").mkdir()
    for i in range(of):
        text = DOCUMENTS[i] + " déjà vu"
        (tmp_path / "in" / f"{i}.txt").write_bytes(text.encode("latin-1" if i < bad else "utf-8"))
    message = (
        rf"in: {bad} of {of} files cannot be read: {bad} not UTF-8 \(.*/in/0\.txt: not UTF-8.*\)\. Say the encoding"
    )
    with pytest.raises(DataError, match=message):
        pretraining_data(tmp_path / "in", **SMALL)
    result = pretraining_data(tmp_path / "in", skip_bad=True, **SMALL)
    assert sum(result.summary["documents"].values()) == of - bad
    assert (result.summary["files"], result.summary["unreadable"]["files"]) == (of, {"not UTF-8": bad})
    with pytest.raises(DataError, match=message):  # though the cache is there
        pretraining_data(tmp_path / "in", **SMALL)


def test_a_hundredth_of_the_rows_may_be_unreadable(tmp_path):
    lines = [json.dumps({"text": text}) for text in DOCUMENTS[:99]]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "no JSON"]))
    assert pretraining_data(tmp_path / "a.jsonl", **SMALL).summary["unreadable"]["rows"] == {"not JSON": 1}
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:98], "no JSON", '{"text": 1}']))
    with pytest.raises(DataError, match=r"2 of 100 rows cannot be read: 1 not JSON, 1 column 'text' is not text"):
        pretraining_data(tmp_path / "a.jsonl", **SMALL)


def test_documents_without_text_and_files_of_other_kinds_are_no_fault(tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", DOCUMENTS + [""] * 300)
    for i in range(9):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"\x89PNG")
    skipped = pretraining_data(tmp_path / "in", **SMALL).summary["skipped"]
    assert skipped == {"not .txt, .jsonl, .csv, .tsv, .parquet": 9, "empty": 300}


def test_a_damaged_file_among_others_is_refused_or_counted(tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", DOCUMENTS)
    path = write_parquet(tmp_path / "in" / "b.parquet", DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"b\.parquet: truncated or corrupt parquet"):
        pretraining_data(tmp_path / "in", **SMALL)
    summary = pretraining_data(tmp_path / "in", skip_bad=True, **SMALL).summary
    assert sum(summary["unreadable"]["files"].values()) == 1
    assert sum(summary["documents"].values()) == len(DOCUMENTS)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-32"])
def test_text_in_another_encoding(tmp_path, encoding):
    documents = [f"déjà vu {text}" for text in DOCUMENTS]
    (tmp_path / "utf8.txt").write_text("\n\n".join(documents))
    (tmp_path / "other.txt").write_text("\n\n".join(documents), encoding=encoding)
    first = pretraining_data(tmp_path / "utf8.txt", **SMALL)
    other = pretraining_data(tmp_path / "other.txt", encoding=encoding, **SMALL)
    assert np.array_equal(first.train, other.train)
    with pytest.raises(DataError, match=r"encoding 'utf-9' is not known"):
        pretraining_data(tmp_path / "utf8.txt", encoding="utf-9", **SMALL)


def test_missing_column(tmp_path):
    for source in (
        write_jsonl(tmp_path / "a.jsonl", DOCUMENTS, "body"),
        write_parquet(tmp_path / "a.parquet", DOCUMENTS, "body"),
    ):
        with pytest.raises(DataError, match=r"a\.\w+(:1)?: no column 'text'; set text_column to one of: body"):
            pretraining_data(source, **SMALL)
        assert pretraining_data(source, text_column="body", **SMALL).summary["documents"]["train"] > 0
    with pytest.raises(DataError, match=r"a\.parquet: column 'n' holds int64, not strings"):
        pretraining_data(tmp_path / "a.parquet", text_column="n", **SMALL)


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "empty", "not UTF-8"])
def test_bad_parquet(tmp_path, damage):
    path = write_parquet(tmp_path / "a.parquet", DOCUMENTS)
    raw = path.read_bytes()
    if damage == "not UTF-8":
        invalid = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"text": invalid}), path)
    else:
        broken = {"truncated": raw[:-100], "corrupt": b"PAR1" + b"\x81" * 4000 + raw[4004:], "empty": b""}
        path.write_bytes(broken[damage])
    with pytest.raises(DataError, match=r"a\.parquet: truncated or corrupt parquet \(.+\)"):
        pretraining_data(path, **SMALL)


def test_refused_sources(tmp_path):
    (tmp_path / "a.html").write_text("x")
    for source in (tmp_path, tmp_path / "a.html"):
        with pytest.raises(DataError, match=rf"{source}: no \.txt, \.jsonl, \.csv, \.tsv, \.parquet file here"):
            pretraining_data(source, **SMALL)
    (tmp_path / "a.txt").write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match=r"a\.txt: 1 of 1 files cannot be read: 1 not UTF-8 .*skip_bad"):
        pretraining_data(tmp_path / "a.txt", **SMALL)
    with pytest.raises(DataError, match=r"'/no/such\.txt': no such file or folder here, and as a Hugging Face") as info:
        pretraining_data("/no/such.txt", **SMALL)
    assert "\n" not in str(info.value)
    assert info.value.__cause__ is None
    assert info.value.__suppress_context__
    with pytest.raises(DataError, match="no such file or folder"):
        pretraining_data("", **SMALL)


def test_too_little_text_says_what_to_change(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one short document"])
    with pytest.raises(DataError, match=r"documents fill no block of 16 .*validation_fraction"):
        pretraining_data(source, **SMALL)


@pytest.mark.parametrize(
    "bad", [{"block_size": 0}, {"block_size": 8.0}, {"vocab_size": 260}, {"validation_fraction": 1.0}]
)
def test_bad_arguments(bad):
    with pytest.raises(DataError, match=f"{next(iter(bad))} is {next(iter(bad.values()))}: give"):
        pretraining_data(**{**SMALL, **bad})


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the cache"):
        pretraining_data(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), cache_dir=tmp_path / "file", **SMALL)


# ---- Pretrained tokenisers


def test_pretrained_tokenizer(tmp_path, prepared):
    prepared.tokenizer.save_pretrained(tmp_path / "good")
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    result = pretraining_data(source, tokenizer=tmp_path / "good", **{**SMALL, "vocab_size": 999})
    assert np.array_equal(result.train, prepared.train)

    from transformers import PreTrainedTokenizerFast

    backend = prepared.tokenizer.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(tmp_path / "bad")
    with pytest.raises(DataError, match="bad' lacks a mask token, an eos or sep token"):
        pretraining_data(source, tokenizer=tmp_path / "bad", **SMALL)
    with pytest.raises(DataError, match="tokenizer '/no/such' cannot be loaded"):
        pretraining_data(source, tokenizer="/no/such", **SMALL)


def test_vocabulary_beyond_16_bits(tmp_path, prepared):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    spec = json.loads(prepared.tokenizer.backend_tokenizer.to_str())
    spec["model"]["vocab"].update({f"unused{i}": i for i in range(300, 70_000)})
    wide = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
    )
    wide.save_pretrained(tmp_path / "wide")
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    result = pretraining_data(source, tokenizer=tmp_path / "wide", **SMALL)
    assert result.train.dtype == np.uint32
    assert np.array_equal(result.train, prepared.train)


# ---- Cache


def test_cache_is_reused_and_its_key_sees_every_change(tmp_path, cache, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    builds = []
    build = data._build
    monkeypatch.setattr(data, "_build", lambda *args: (builds.append(1), build(*args)))
    first = pretraining_data(source, **SMALL)
    again = pretraining_data(source, **SMALL)
    assert len(builds) == 1
    assert again.summary == first.summary
    assert np.array_equal(again.train, first.train)
    for change in ({"block_size": 17}, {"vocab_size": 301}, {"validation_fraction": 0.3}):
        pretraining_data(source, **{**SMALL, **change})
    write_jsonl(source, DOCUMENTS[1:])
    pretraining_data(source, **SMALL)
    assert len(builds) == 5


@pytest.mark.parametrize("name", ["train.bin", "tokenizer/tokenizer.json", "meta.json"])
@pytest.mark.parametrize("keep", [None, 10])
def test_damaged_cache_is_prepared_again(tmp_path, cache, prepared, caplog, name, keep):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    pretraining_data(source, **SMALL)
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    os.truncate(folder / name, keep) if keep else os.remove(folder / name)
    assert np.array_equal(pretraining_data(source, **SMALL).train, prepared.train)
    assert "damaged cache" in caplog.text


def test_killed_preparation_leaves_nothing_in_use(tmp_path, cache, prepared):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    code = (
        "import os, sys, time; from lookupffn.train import data\n"
        "def hang(path): print('here', flush=True); time.sleep(100)\n"
        "data.fsync = hang  # all files are written, nothing is renamed\n"
        f"data.pretraining_data({str(source)!r}, **{SMALL!r})"
    )
    victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert victim.stdout.readline() == b"here\n"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    left = [path for path in cache.iterdir() if path.is_dir()]
    assert [path.suffix for path in left] == [".draft"]
    assert np.array_equal(pretraining_data(source, **SMALL).train, prepared.train)
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [""]


def test_two_processes_at_once_prepare_once_and_as_this_one_did(tmp_path, cache, prepared):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    code = f"""
import os
from lookupffn.train import data
build = data._build
data._build = lambda *given: (os.write(1, (name + " built\\n").encode()), build(*given))
for name in ("first", "second"):  # forked here, so that both are there at once
    if not os.fork():
        data.pretraining_data({str(source)!r}, **{SMALL!r})
        os.write(1, (name + " done\\n").encode())
        os._exit(0)
os._exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)))
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    by_process = [[what for who, what in lines if who == name] for name in ("first", "second")]
    assert sorted(by_process) == [["built", "done"], ["done"]]
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    assert np.array_equal(np.fromfile(folder / "train.bin", "<u2"), prepared.train.reshape(-1))
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    assert tokenizer == json.loads(prepared.tokenizer.backend_tokenizer.to_str())
