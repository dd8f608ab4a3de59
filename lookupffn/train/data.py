"""Text to blocks of tokens: read, split by document, train a tokeniser, pack, cache.

What differs from the usual script:
- The split looks at nothing but a document's text, so a document is never in both splits, and neither the
  order of the files nor the rest of the corpus moves it.
- Documents flow through in pieces and tokens go to disk, so memory does not grow with the corpus.
"""

import json
import logging
import os
import platform
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from lookupffn.errors import WriteError
from lookupffn.files import cache_folder, fsync, make_folder, writing
from lookupffn.hf.folders import check_folder
from lookupffn.train import rows
from lookupffn.train.rows import (
    BAD_SHARE,
    DamagedFileError,
    DataError,
    check_encoding,
    first_line,
    open_text,
    suffix_of,
)

EMBEDDED = "stdlib"
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # ids 0 to 4
SPLITS = ("train", "validation")
SUFFIXES = (".txt", *rows.SUFFIXES)

_FORMAT = 1  # raise it when the same source would give other blocks: it is part of every cache's name
_PIECE = 1 << 15  # characters: a longer document passes through in pieces of this size
_BATCH = 256  # pieces tokenised at a time, in parallel
_TOKENIZER_SAMPLE = 32 << 20  # characters
_EXAMPLES_PER_REASON = 3
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainingData:
    """A fast tokeniser and read-only, memory-mapped blocks (N, block_size) of uint16 or uint32 token ids.

    `summary` is JSON-able: source, documents and tokens of each split, vocab_size, block_size, skipped (count
    by reason), skipped_examples ("path: reason"), how many files and rows there were, and of these the unreadable
    ones (count by reason).
    """

    tokenizer: Any
    train: np.ndarray
    validation: np.ndarray
    summary: dict[str, Any]


def pretraining_data(
    source: str | Path = EMBEDDED,
    *,
    block_size: int = 128,
    vocab_size: int = 8192,
    tokenizer: str | Path | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.02,
    encoding: str = "utf-8",
    skip_bad: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> PretrainingData:
    """Turn a source of text into train and validation blocks of token ids, or map them if they are cached.

    `source` is "stdlib" (source and documentation of this Python's standard library), else an existing file
    or folder of .txt, .jsonl, .csv, .tsv (each also as .gz) and .parquet, else a Hugging Face dataset ("name" or
    "name:config"; its train split, streamed). A row is a document, as is a .txt file in a folder; a single .txt
    file holds documents separated by blank lines. Newlines at the end of a document are dropped. `encoding` is that
    of the text files; parquet has its own.

    What is skipped is counted by reason in the summary. Where more than 1 % of the files, or of the rows, cannot be
    read (not in the encoding, no JSON, no such column, ...), or a file is damaged, the source is refused, unless
    `skip_bad`. So little text is not missed: loss falls with the size of the data to the power of 0.095 ("Scaling
    laws for neural language models", equation 1.2), by 0.1 % for 1 %, which is below the standard error of an
    evaluation here. Files of other kinds and documents without text are counted and no fault.

    A document goes to validation iff the hash of its text (its first 2^15 characters, if longer) falls below
    `validation_fraction` of the hash's range. It becomes <s> tokens </s>; the documents of a split, joined,
    are cut in blocks of `block_size` tokens and the last partial block is dropped. `tokenizer` names a
    pretrained fast tokeniser; without it byte-level BPE of `vocab_size` is trained on the first 32 Mi
    characters, in reading order, of the train split.

    The result is kept in a folder of `cache_dir` (else of `files.cache_folder()`) named by a fingerprint of all
    that decides it: files by path, size and time, but a dataset of the hub by its name. A cache with a missing or
    truncated file is prepared again. Raises DataError for whatever it cannot use.
    """
    for name, value, least in (("block_size", block_size, 4), ("vocab_size", vocab_size, 261)):
        if not isinstance(value, int) or value < least:
            raise DataError(f"{name} is {value!r}: give an integer of at least {least}")
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction!r}: give a number between 0 and 1")

    encoding = check_encoding(encoding)
    found = _find(source)
    pretrained, vocabulary = None, vocab_size
    if tokenizer is not None:  # known by its content, since what a name stands for may change
        pretrained = load_tokenizer(tokenizer)
        vocabulary = [pretrained.backend_tokenizer.to_str(), pretrained.special_tokens_map]
    recipe = [_FORMAT, found.name, found.files, text_column, encoding, block_size, validation_fraction, vocabulary]
    cache = Path(cache_dir).expanduser() if cache_dir else cache_folder()
    folder = cache / f"{_hash(json.dumps(recipe, default=str)):016x}"

    if _damage(folder):
        read = partial(_Reader, found, text_column, validation_fraction, progress, encoding=encoding, skip_bad=skip_bad)
        try:
            make_folder(cache)
            # Of several ranks one prepares, the others find it done.
            with writing(folder), FileLock(f"{folder}.lock"):
                if damage := _damage(folder):
                    if folder.exists():
                        logger.warning("%s: damaged cache (%s), preparing it again", folder, damage)
                    _build(folder, read, pretrained, vocab_size, block_size)
        except WriteError as error:
            raise DataError(f"cannot write the cache ({error}); choose another folder by cache_dir") from error
    result = _load(folder)
    if not skip_bad:  # as it may have been when the cache was made
        refuse_bad(result.summary)
    return result


def documents(
    source: str | Path = EMBEDDED,
    *,
    text_column: str = "text",
    encoding: str = "utf-8",
    skip_bad: bool = False,
    progress: bool = False,
) -> Iterator[str]:
    """The documents of a source, as `pretraining_data` reads them, in its order; long ones in parts of 2^15 characters.

    Raises DataError for what it cannot use, where too much cannot be read when all has been.
    """
    reader = _Reader(_find(source), text_column, 0.0, progress, "reading", check_encoding(encoding), skip_bad)
    for _, piece in reader:
        yield piece.text
    if not skip_bad:
        refuse_bad(reader.summary())


def progress_bar(**options: Any) -> tqdm:
    """A bar that a terminal redraws ten times a second, and a log file gets a line of in half a minute."""
    return tqdm(**options, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 30)


# ---- Reading: a source to pieces of documents


class _Source(NamedTuple):
    name: str
    files: list[tuple[str, int, int]] | None  # (path, bytes, mtime in ns) in reading order; None: on the hub
    ignored: list[tuple[str, str]]  # (path, reason)
    is_file: bool


class _Piece(NamedTuple):
    """Part of a document's text, of at most `_PIECE` characters; most documents are one piece."""

    text: str
    starts: bool
    ends: bool


def _find(source: str | Path) -> _Source:
    """Decide what `source` means and list its files; folders behind symbolic links are not entered."""
    name, root, suffixes, left_out = str(source), os.path.expanduser(source), SUFFIXES, set()
    if source == EMBEDDED:
        name = f"{EMBEDDED} of {platform.python_implementation()} {platform.python_version()}"
        root, suffixes, left_out = sysconfig.get_path("stdlib"), (".py",), _STDLIB_LEFT_OUT
    elif not os.path.exists(root):
        return _Source(name, None, [], False)

    root, is_file = os.path.abspath(root), os.path.isfile(root)
    paths, files, ignored, unreadable = [root] if is_file else [], [], [], []
    for parent, folders, names in os.walk(root, onerror=unreadable.append) if not is_file else ():
        folders[:] = sorted(set(folders) - left_out)
        paths += [os.path.join(parent, name) for name in sorted(names)]
        links = [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
        ignored += [(path, "symbolic link to a folder") for path in links]
    ignored += [(error.filename, f"unreadable ({error.strerror})") for error in unreadable]
    for path in paths:
        if suffix_of(path) not in suffixes or path.lower().endswith(".parquet.gz"):
            ignored.append((path, f"not {', '.join(suffixes)}"))
        elif not os.path.isfile(path):
            ignored.append((path, "not a regular file"))
        else:
            stat = os.stat(path)
            files.append((path, stat.st_size, stat.st_mtime_ns))
    if not files:
        raise DataError(f"{root}: no {', '.join(suffixes)} file here; convert the text to one of these")
    return _Source(name, files, ignored, is_file)


@dataclass
class _Reader:
    """One walk over a source: iterating yields (split, piece) in a fixed order and keeps tallies."""

    source: _Source
    text_column: str
    validation_fraction: float
    progress: bool
    purpose: str  # what the progress bar says
    encoding: str = "utf-8"
    skip_bad: bool = False
    position: int = 0  # bytes of the source's files passed so far
    rows: int = 0  # read or not
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    unreadable: dict[str, Counter[str]] = field(default_factory=lambda: {"files": Counter(), "rows": Counter()})

    def __iter__(self) -> Iterator[tuple[str, _Piece]]:
        for path, reason in self.source.ignored:
            self._skip(path, reason)
        total = sum(size for _, size, _ in self.source.files or []) or None
        style = {"unit": "B", "unit_scale": True, "desc": self.purpose, "disable": not self.progress}
        with progress_bar(total=total, **style) as bar:
            for piece in self._hub() if self.source.files is None else self._files():
                if piece.starts:  # decides for the whole document
                    split = SPLITS[_hash(piece.text) < self.validation_fraction * 2**64]
                yield split, piece
                bar.update(self.position - bar.n)

    def _skip(self, where: str, reason: str, unreadable: str | None = None) -> None:
        """Counts what is skipped, and where it is one of the files or rows that cannot be read, that too."""
        self.skipped[reason] += 1
        if unreadable:
            self.unreadable[unreadable][reason] += 1
        if self.skipped[reason] <= _EXAMPLES_PER_REASON:
            self.examples.append(f"{where}: {reason}")

    def summary(self) -> dict[str, Any]:
        """What the summary of the data says of what was read and what was not."""
        return {
            "source": self.source.name,
            "files": len(self.source.files or ()),
            "rows": self.rows,
            "skipped": dict(self.skipped),
            "skipped_examples": list(self.examples),
            "unreadable": {what: dict(reasons) for what, reasons in self.unreadable.items()},
        }

    def _document(self, chunks: Iterable[str], where: str) -> Iterator[_Piece]:
        """Cut a document, given in chunks, into pieces that depend on its text alone."""
        held, starts = "", True
        for chunk in chunks:
            held, at = held + chunk, 0
            while len(held) - at > _PIECE:
                yield _Piece(held[at : at + _PIECE], starts, False)
                at, starts = at + _PIECE, False
            held = held[at:]
        held = held.rstrip("\n")
        if starts and not held.strip():
            self._skip(where, "empty")
        else:
            yield _Piece(held, starts, True)

    def _files(self) -> Iterator[_Piece]:
        end = 0
        for path, size, _ in self.source.files:
            end += size
            try:
                yield from self._rows(path) if suffix_of(path) in rows.SUFFIXES else self._text(path)
            except DamagedFileError as error:
                if not self.skip_bad:
                    raise
                self._skip(path, f"damaged ({str(error).removeprefix(path).lstrip(':0123456789 ')})", "files")
            except OSError as error:
                self._skip(path, f"unreadable ({error.strerror})", "files")
            self.position = end

    def _text(self, path: str) -> Iterator[_Piece]:
        before = self.position
        with open_text(path, self.encoding) as (file, raw):
            lines = partial(iter, partial(file.readline, _PIECE), "")  # a long line comes in several parts
            try:
                for _ in lines():  # all of it must decode before any of it is used
                    pass
            except UnicodeError:
                self._skip(path, f"not {self.encoding.upper()}", "files")
                return
            file.seek(0)
            if not self.source.is_file:
                yield from self._document(lines(), path)
                return
            for is_blank, paragraph in groupby(lines(), key=str.isspace):
                if not is_blank:
                    yield from self._document(paragraph, path)
                self.position = before + raw.tell()

    def _rows(self, path: str) -> Iterator[_Piece]:
        before, column = self.position, self.text_column
        for row in rows.read_rows(path, [column], text=[column], encoding=self.encoding):
            yield from self._row(row.where, row.values, row.reason)
            self.position = before + row.position

    def _row(self, where: str, values: dict[str, Any] | None, reason: str) -> Iterator[_Piece]:
        self.rows += 1
        if values is None:
            self._skip(where, reason, "rows")
        else:
            yield from self._document([values[self.text_column] or ""], where)

    def _hub(self) -> Iterator[_Piece]:
        name, _, config = self.source.name.partition(":")
        try:
            from datasets import load_dataset

            for number, row in enumerate(load_dataset(name, config or None, split="train", streaming=True)):
                where = f"{self.source.name}:row {number}"
                if self.text_column not in row:
                    there = ", ".join(row)
                    raise DataError(f"{where}: no column {self.text_column!r}; set text_column to one of: {there}")
                text = row[self.text_column]
                is_text = text is None or isinstance(text, str)
                reason = "" if is_text else f"column {self.text_column!r} is not text"
                yield from self._row(where, row if is_text else None, reason)
        except DataError:
            raise
        except Exception as error:  # a dozen types, from the network to the dataset's own configuration
            raise DataError(
                f"{self.source.name!r}: no such file or folder here, and as a Hugging Face dataset "
                f"it cannot be read ({first_line(error)})"
            ) from None


def refuse_bad(summary: dict[str, Any]) -> None:
    """Raises DataError where more than `BAD_SHARE` of the files, or of the rows, could not be read."""
    for what, reasons in summary["unreadable"].items():
        if sum(reasons.values()) > BAD_SHARE * summary[what]:
            examples = [text for text in summary["skipped_examples"] if text.endswith(tuple(reasons))]
            raise DataError(
                f"{summary['source']}: {sum(reasons.values()):,} of {summary[what]:,} {what} cannot be read: "
                f"{in_words(reasons)} ({'; '.join(examples[:_EXAMPLES_PER_REASON])}). Say the encoding, mend them, or "
                "go on without them by skip_bad"
            )


def in_words(skipped: dict[str, int]) -> str:
    """Counts by reason as a sentence has them."""
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items()) or "nothing"


def _hash(text: str) -> int:
    """64 bits that depend on the text alone, on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


# ---- Building: pieces to a folder of token files


def _build(folder: Path, read: Callable, pretrained: Any, vocab_size: int, block_size: int) -> None:
    """Prepare everything in a sibling folder, then rename it: a killed preparation leaves nothing in use."""
    draft = folder.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)  # a killed one's: the caller holds the lock
    draft.mkdir()
    try:
        tokenizer = pretrained or _train_tokenizer(read, vocab_size, block_size)
        tokenizer.save_pretrained(draft / "tokenizer")
        meta = _pack(draft, read("tokenising"), tokenizer, block_size)
        files = [path for path in draft.rglob("*") if path.is_file()]
        meta["files"] = {str(path.relative_to(draft)): path.stat().st_size for path in files}
        (draft / "meta.json").write_text(json.dumps(meta, indent=2))
        for path in [*draft.rglob("*"), draft]:
            fsync(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(draft, folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _train_tokenizer(read: Callable, vocab_size: int, block_size: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def sample() -> Iterator[str]:
        left = _TOKENIZER_SAMPLE
        reader = read("training the tokeniser")
        for split, piece in reader:
            if split == "train":
                yield piece.text
                left -= len(piece.text)
            if left <= 0:
                return
        if not reader.skip_bad:  # all of the source is read: no need to tokenise it first
            refuse_bad(reader.summary())

    bpe = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Training takes time quadratic in the longest word, and a megabyte without a space is one word.
    bpe.pre_tokenizer = pre_tokenizers.Sequence([bytes_, pre_tokenizers.FixedLength(64)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=bytes_.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sample(), trainer)
    bpe.pre_tokenizer, bpe.decoder = bytes_, decoders.ByteLevel()
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    mask = AddedToken("<mask>", lstrip=True)  # words carry the space before them, so the mask does too
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token", "cls_token", "sep_token")
    tokens = dict(zip(names, [*SPECIAL_TOKENS[:4], mask, "<s>", "</s>"], strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=block_size, **tokens)


def load_tokenizer(name: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        check_folder(str(name))
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a foreign folder or the network brings
        raise DataError(f"tokenizer {str(name)!r} cannot be loaded ({first_line(error)})") from None
    has = {
        "a fast implementation": tokenizer.is_fast,
        "a mask token": tokenizer.mask_token,
        "a pad token": tokenizer.pad_token,
        "an eos or sep token": _document_marks(tokenizer)[1],
    }
    if lacks := [what for what, value in has.items() if not value]:
        raise DataError(f"tokenizer {str(name)!r} lacks {', '.join(lacks)}; None trains one")
    return tokenizer


def _document_marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids before and after each document; BERT names them cls and sep; some have no first."""
    first = [tokenizer.bos_token_id, tokenizer.cls_token_id]
    last = [tokenizer.eos_token_id, tokenizer.sep_token_id]
    return [i for i in first if i is not None][:1], [i for i in last if i is not None][:1]


def _pack(folder: Path, reader: _Reader, tokenizer: Any, block_size: int) -> dict[str, Any]:
    """Write `<split>.bin`, whole blocks of little-endian token ids; return what meta.json says of them."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True  # a "<mask>" in the text is text
    encoder.no_truncation()
    encoder.no_padding()
    start, end = _document_marks(tokenizer)
    dtype = np.dtype("<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<u4")

    pieces = iter(reader)
    documents, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    with open(folder / "train.bin", "wb") as train, open(folder / "validation.bin", "wb") as validation:
        files = {"train": train, "validation": validation}
        for batch in iter(lambda: list(islice(pieces, _BATCH)), []):
            texts = [piece.text for _, piece in batch]
            encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)  # on all cores
            for (split, piece), encoding in zip(batch, encodings, strict=True):
                ids = np.array(start * piece.starts + encoding.ids + end * piece.ends, dtype)
                files[split].write(ids.tobytes())
                documents[split] += piece.starts
                tokens[split] += len(ids)
        read = reader.summary()
        for split in SPLITS:
            if tokens[split] < block_size:
                raise DataError(
                    f"{reader.source.name}: {tokens[split]} tokens of {documents[split]} {split} documents "
                    f"fill no block of {block_size} (skipped: {in_words(read['skipped'])}); use more text, smaller "
                    f"blocks or another validation_fraction"
                )
            tokens[split] -= tokens[split] % block_size
            files[split].truncate(tokens[split] * dtype.itemsize)
    if not reader.skip_bad:
        refuse_bad(read)
    summary = read | {"documents": documents, "tokens": tokens}
    summary |= {"vocab_size": len(tokenizer), "block_size": block_size}
    return {"dtype": dtype.str, "summary": summary}


def _damage(folder: Path) -> str | None:
    """What is wrong with a cached folder, None if every file has the size it was written with."""
    try:
        for name, size in json.loads((folder / "meta.json").read_text())["files"].items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes of {size}"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None


def _load(folder: Path) -> PretrainingData:
    meta = json.loads((folder / "meta.json").read_text())
    shape = (-1, meta["summary"]["block_size"])
    blocks = [np.memmap(folder / f"{split}.bin", meta["dtype"], mode="r").reshape(shape) for split in SPLITS]
    return PretrainingData(load_tokenizer(folder / "tokenizer"), *blocks, meta["summary"])
