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
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from lookupffn.errors import InputError
from lookupffn.files import fsync

EMBEDDED = "stdlib"
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # ids 0 to 4
SPLITS = ("train", "validation")
SUFFIXES = (".txt", ".jsonl", ".parquet")

_FORMAT = 1  # raise it when the same source would give other blocks: it is part of every cache's name
_PIECE = 1 << 15  # characters: a longer document passes through in pieces of this size
_BATCH = 256  # pieces tokenised at a time, in parallel
_LINE_LIMIT = 64 << 20  # bytes: a longer line of .jsonl is skipped, never held
_TOKENIZER_SAMPLE = 32 << 20  # characters
_EXAMPLES_PER_REASON = 3
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}

logger = logging.getLogger(__name__)


class DataError(InputError):
    """Input that is refused; the message names the path, column or value and what to do."""


@dataclass(frozen=True)
class PretrainingData:
    """A fast tokeniser and read-only, memory-mapped blocks (N, block_size) of uint16 or uint32 token ids.

    `summary` is JSON-able: source, documents and tokens of each split, vocab_size, block_size, skipped (count
    by reason) and skipped_examples ("path: reason").
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
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> PretrainingData:
    """Turn a source of text into train and validation blocks of token ids, or map them if they are cached.

    `source` is "stdlib" (source and documentation of this Python's standard library), else an existing file
    or folder of .txt, .jsonl and .parquet, else a Hugging Face dataset ("name" or "name:config"; its train
    split, streamed). A row is a document, as is a .txt file in a folder; a single .txt file holds documents
    separated by blank lines. Newlines at the end of a document are dropped.

    A document goes to validation iff the hash of its text (its first 2^15 characters, if longer) falls below
    `validation_fraction` of the hash's range. It becomes <s> tokens </s>; the documents of a split, joined,
    are cut in blocks of `block_size` tokens and the last partial block is dropped. `tokenizer` names a
    pretrained fast tokeniser; without it byte-level BPE of `vocab_size` is trained on the first 32 Mi
    characters, in reading order, of the train split.

    The result is kept in a folder of `cache_dir` ($LOOKUPFFN_CACHE, else ~/.cache/lookupffn) named by a
    fingerprint of all that decides it: files by path, size and time, but a dataset of the hub by its name. A
    cache with a missing or truncated file is prepared again. Raises DataError for whatever it cannot use.
    """
    for name, value, least in (("block_size", block_size, 4), ("vocab_size", vocab_size, 261)):
        if not isinstance(value, int) or value < least:
            raise DataError(f"{name} is {value!r}: give an integer of at least {least}")
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction!r}: give a number between 0 and 1")

    found = _find(source)
    pretrained, vocabulary = None, vocab_size
    if tokenizer is not None:  # known by its content, since what a name stands for may change
        pretrained = load_tokenizer(tokenizer)
        vocabulary = [pretrained.backend_tokenizer.to_str(), pretrained.special_tokens_map]
    recipe = [_FORMAT, found.name, found.files, text_column, block_size, validation_fraction, vocabulary]
    cache = Path(cache_dir or os.environ.get("LOOKUPFFN_CACHE") or "~/.cache/lookupffn").expanduser()
    folder = cache / f"{_hash(json.dumps(recipe, default=str)):016x}"

    if _damage(folder):
        read = partial(_Reader, found, text_column, validation_fraction, progress)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):  # of several ranks one prepares, the others find it done
                if damage := _damage(folder):
                    if folder.exists():
                        logger.warning("%s: damaged cache (%s), preparing it again", folder, damage)
                    _build(folder, read, pretrained, vocab_size, block_size)
        except OSError as error:
            raise DataError(f"{folder}: cannot write the cache ({error}); choose another cache_dir") from None
    return _load(folder)


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
        if not path.lower().endswith(suffixes):
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
    position: int = 0  # bytes of the source's files passed so far
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[str, _Piece]]:
        for path, reason in self.source.ignored:
            self._skip(path, reason)
        total = sum(size for _, size, _ in self.source.files or []) or None
        style = {"unit": "B", "unit_scale": True, "desc": self.purpose, "disable": not self.progress}
        with tqdm(total=total, **style) as bar:
            for piece in self._hub() if self.source.files is None else self._files():
                if piece.starts:  # decides for the whole document
                    split = SPLITS[_hash(piece.text) < self.validation_fraction * 2**64]
                yield split, piece
                bar.update(self.position - bar.n)

    def _skip(self, where: str, reason: str) -> None:
        self.skipped[reason] += 1
        if self.skipped[reason] <= _EXAMPLES_PER_REASON:
            self.examples.append(f"{where}: {reason}")

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

    def _row(self, row: Any, where: str, is_first: bool) -> Iterator[_Piece]:
        """A document from a row; a source's first row must have the column, later ones are skipped."""
        if not isinstance(row, dict):
            self._skip(where, "not a JSON object")
        elif self.text_column not in row:
            if is_first:
                raise self._no_column(where, row)
            self._skip(where, f"no column {self.text_column!r}")
        elif not isinstance(text := row[self.text_column], str):
            self._skip(where, f"column {self.text_column!r} is not text")
        else:  # JSON can spell half a surrogate pair, which no encoding can: it becomes U+FFFD
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield from self._document([text], where)

    def _no_column(self, where: str, columns: Iterable[str]) -> DataError:
        there = ", ".join(columns)
        return DataError(f"{where}: no column {self.text_column!r}; set text_column to one of: {there}")

    def _files(self) -> Iterator[_Piece]:
        end = 0
        for path, size, _ in self.source.files:
            end += size
            readers = {".jsonl": self._jsonl, ".parquet": self._parquet}
            try:
                yield from readers.get(Path(path).suffix.lower(), self._text)(path)
            except OSError as error:
                self._skip(path, f"unreadable ({error.strerror})")
            self.position = end

    def _text(self, path: str) -> Iterator[_Piece]:
        with open(path, encoding="utf-8-sig") as file:
            lines = partial(iter, partial(file.readline, _PIECE), "")  # a long line comes in several parts
            try:
                for _ in lines():  # all of it must decode before any of it is used
                    pass
            except UnicodeDecodeError:
                self._skip(path, "not UTF-8")
                return
            file.seek(0)
            if not self.source.is_file:
                yield from self._document(lines(), path)
                return
            for is_blank, paragraph in groupby(lines(), key=str.isspace):
                if not is_blank:
                    yield from self._document(paragraph, path)
                self.position = file.buffer.tell()

    def _jsonl(self, path: str) -> Iterator[_Piece]:
        before, is_first = self.position, True
        with open(path, "rb") as file:
            for number in count(1):
                line, where = file.readline(_LINE_LIMIT + 1), f"{path}:{number}"
                if not line:
                    return
                if len(line) > _LINE_LIMIT:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(_LINE_LIMIT)
                    self._skip(where, f"line of more than {_LINE_LIMIT} bytes")
                    continue
                self.position = before + file.tell()
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    self._skip(where, "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON")
                    continue
                yield from self._row(row, where, is_first)
                is_first = False

    def _parquet(self, path: str) -> Iterator[_Piece]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        before, row = self.position, 0
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                if self.text_column not in schema.names:
                    raise self._no_column(path, schema.names)
                kind = schema.types[schema.names.index(self.text_column)]
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise DataError(f"{path}: column {self.text_column!r} holds {kind}, not strings")
                bytes_per_row = os.path.getsize(path) / max(file.metadata.num_rows, 1)
                for batch in file.iter_batches(batch_size=256, columns=[self.text_column]):
                    batch.validate(full=True)  # that strings are UTF-8, which reading does not check
                    for text in batch.column(0).to_pylist():
                        row += 1
                        yield from self._document([text or ""], f"{path}:row {row}")
                    self.position = before + int(row * bytes_per_row)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: truncated or corrupt parquet ({_first_line(error)})") from None

    def _hub(self) -> Iterator[_Piece]:
        name, _, config = self.source.name.partition(":")
        try:
            from datasets import load_dataset

            rows = load_dataset(name, config or None, split="train", streaming=True)
            for number, row in enumerate(rows):
                yield from self._row(row, f"{self.source.name}:row {number}", number == 0)
        except DataError:
            raise
        except Exception as error:  # a dozen types, from the network to the dataset's own configuration
            raise DataError(
                f"{self.source.name!r}: no such file or folder here, and as a Hugging Face dataset "
                f"it cannot be read ({_first_line(error)})"
            ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
        for split, piece in read("training the tokeniser"):
            if split == "train":
                yield piece.text
                left -= len(piece.text)
            if left <= 0:
                return

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
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a foreign folder or the network brings
        raise DataError(f"tokenizer {str(name)!r} cannot be loaded ({_first_line(error)})") from None
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
        for split in SPLITS:
            if tokens[split] < block_size:
                skipped = ", ".join(f"{n} {reason}" for reason, n in reader.skipped.items()) or "nothing"
                raise DataError(
                    f"{reader.source.name}: {tokens[split]} tokens of {documents[split]} {split} documents "
                    f"fill no block of {block_size} (skipped: {skipped}); use more text, smaller blocks or "
                    f"another validation_fraction"
                )
            tokens[split] -= tokens[split] % block_size
            files[split].truncate(tokens[split] * dtype.itemsize)
    summary = {"source": reader.source.name, "documents": documents, "tokens": tokens}
    summary |= {"vocab_size": len(tokenizer), "block_size": block_size}
    summary |= {"skipped": dict(reader.skipped), "skipped_examples": reader.examples}
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
