"""A session: a packed model mapped into memory, run in one native call, without torch."""

from __future__ import annotations

import ctypes as c
import json
import os
import sys
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lookupffn.errors import InputError
from lookupffn.extras import require
from lookupffn.files import check_inside
from lookupffn.runtime.handles import register
from lookupffn.runtime.records import POOLINGS, read_metadata

MODEL_FILE = "model.safetensors"
TOKENS_AT_ONCE = 1 << 14  # in a batch of `embed`
TEXTS_AT_ONCE = 1 << 14  # that are sorted by length, so that memory does not grow with the list
LOGITS_AT_ONCE = 1 << 23  # of `fill`, as far as a text alone has no more


class _Description(c.Structure):
    _fields_ = [
        (name, c.c_int32)
        for name in (
            "vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions", "type_vocab_size",
            "first_position", "pooling", "normalised", "lookup_layers", "pooled_size", "head",
        )
    ]  # fmt: skip


class _Batch(c.Structure):
    _fields_ = [
        ("texts", c.c_int64),
        ("lengths", c.c_void_p),
        ("ids", c.c_void_p),
        ("positions", c.c_void_p),
        ("types", c.c_void_p),
        ("offsets", c.c_void_p),
        ("places", c.c_int64),
        ("place", c.c_void_p),
    ]


@cache
def library() -> c.CDLL:
    """The runtime's library (csrc/include/lookupffn.h). Raises InputError where it was not built."""
    names = {"darwin": "liblookupffn_runtime.dylib", "win32": "lookupffn_runtime.dll"}
    name = names.get(sys.platform, "liblookupffn_runtime.so")
    folders = (Path(__file__).parents[1], Path(sysconfig.get_path("platlib")) / "lookupffn")
    path = next((path for folder in folders if (path := folder / name).exists()), None)
    if path is None:
        raise InputError(f"{name} was not built: install a C++ compiler, then lookupffn again")
    found = c.CDLL(str(path))
    for function, arguments in {
        "lookupffn_open": (c.c_char_p, c.c_void_p),
        "lookupffn_workspace": (c.c_void_p, c.c_void_p, c.c_int, c.c_void_p),
        "lookupffn_run": (*[c.c_void_p] * 5, c.c_size_t, c.c_void_p),
        "lookupffn_isa": (c.c_void_p,),
    }.items():
        getattr(found, function).argtypes = arguments
        getattr(found, function).restype = c.c_char_p
    found.lookupffn_close.argtypes = [c.c_void_p]
    found.lookupffn_describe.argtypes = [c.c_void_p, c.c_void_p]
    found.lookupffn_pool_new.argtypes, found.lookupffn_pool_new.restype = [c.c_int], c.c_void_p
    found.lookupffn_pool_free.argtypes = [c.c_void_p]
    return found


def _check(error: bytes | None) -> None:
    if error:
        raise InputError(error.decode())


class Session:
    """Runs a packed encoder (:func:`lookupffn.export`): token ids to hidden states, texts to vectors.

    The file is mapped read-only, so that processes share it. A text's result has the same bits alone and in any batch,
    with any padding, on any number of threads. Several threads may call one session; pickled or forked, it opens its
    file again.

    Raises:
        InputError: the folder holds no packed model, or a damaged one; the message has the file and the reason.
    """

    def __init__(self, folder: str | os.PathLike, threads: int = 1):
        self.folder, self.threads = Path(folder), threads
        if threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}")
        path = next(  # of a converted model beside the form that trains
            (p for p in (self.folder / "packed" / MODEL_FILE, self.folder / MODEL_FILE) if p.is_file()),
            self.folder / MODEL_FILE,
        )
        if not path.is_file():
            raise InputError(f"{self.folder} holds no {MODEL_FILE}: give a folder that lookupffn.export wrote")
        check_inside(path, self.folder)
        self._file, self.metadata = path, read_metadata(path)
        self._lib, self._model, self._pool = library(), c.c_void_p(), None
        _check(self._lib.lookupffn_isa(c.byref(c.c_char_p())))  # a wrong LOOKUPFFN_ISA is an error here, not in a call
        _check(self._lib.lookupffn_open(os.fsencode(path), c.byref(self._model)))
        self._described = _Description()
        self._lib.lookupffn_describe(self._model, c.byref(self._described))
        self._check_words(path)
        self._pool = self._lib.lookupffn_pool_new(threads) if threads > 1 else None
        if threads > 1 and not self._pool:
            raise InputError(f"the system gives no {threads} threads")
        self._local = threading.local()  # a workspace a thread, kept from call to call
        self._tokenizer: Any = None
        self._handle, self._width = register(self, path), self.hidden_size  # what compilers read: ctypes they cannot

    def _check_words(self, path: Path) -> None:
        """What the header says in words against the records' sizes."""
        d, mask_token = self._described, int(self.metadata.get("mask_token_id", 0))
        if self.labels and len(self.labels) != d.pooled_size:
            raise InputError(f"{path} is damaged: {len(self.labels)} labels for {d.pooled_size} outputs")
        if not 1 <= (longest := int(self.metadata["max_length"])) <= d.max_positions:
            raise InputError(f"{path} is damaged: max_length {longest} with {d.max_positions} positions")
        if not 0 <= mask_token < d.vocab_size:
            raise InputError(f"{path} is damaged: mask_token_id {mask_token} with {d.vocab_size} ids")

    def __del__(self) -> None:
        if getattr(self, "_pool", None):
            self._lib.lookupffn_pool_free(self._pool)
        if getattr(self, "_model", None):
            self._lib.lookupffn_close(self._model)

    def __reduce__(self) -> tuple:
        return Session, (self.folder, self.threads)

    @property
    def hidden_size(self) -> int:
        return self._described.hidden_size

    @property
    def pooling(self) -> str:
        return next(name for name, number in POOLINGS.items() if number == self._described.pooling)

    @property
    def labels(self) -> list[str]:
        """Of a sequence classifier's logits; empty for an encoder."""
        return json.loads(self.metadata.get("labels", "[]"))

    # ---- Ids ---------------------------------------------------------------------------------------------------------

    def __call__(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> Any:
        """Hidden states ``(batch, length, hidden_size)`` float32, 0 where the mask is 0; torch in, torch out.

        ``input_ids``, ``attention_mask`` and ``token_type_ids`` are integers ``(batch, length)``; without a mask every
        position counts. Positions that are masked are neither computed nor attended to. To torch.compile and
        torch.export a call is one operator.
        """
        if not _is_tensor(input_ids):
            return self._hidden(input_ids, attention_mask, token_type_ids)
        import torch

        if torch.compiler.is_compiling():
            from lookupffn.runtime.compiled import call

            return call(input_ids, attention_mask, token_type_ids, self._handle, self._width)
        return torch.from_numpy(self._hidden(input_ids, attention_mask, token_type_ids))

    def _hidden(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> np.ndarray:
        ids, mask, types = (_array(x) for x in (input_ids, attention_mask, token_type_ids))
        ids, mask = _checked(ids, mask, types)
        hidden, _ = self._run(ids, mask, types, hidden=True, pooled=False)
        if mask.all():
            return hidden.reshape(*ids.shape, self.hidden_size)
        out = np.zeros((*ids.shape, self.hidden_size), np.float32)
        out[mask] = hidden
        return out

    def pool(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> np.ndarray:
        """Pooled vectors ``(batch, hidden_size)`` float32, as the model pools and normalises; a classifier's logits."""
        if self.pooling == "tokens":
            raise InputError(f"{self.folder} is a language model, which answers for tokens: call logits, or fill")
        ids, mask, types = (_array(x) for x in (input_ids, attention_mask, token_type_ids))
        ids, mask = _checked(ids, mask, types)
        return self._run(ids, mask, types, hidden=False, pooled=True)[1]

    def logits(
        self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None, *, places: Any
    ) -> np.ndarray:
        """A language model's logits ``(places.sum(), vocab_size)`` float32 for the tokens where ``places`` is true.

        ``places`` is boolean ``(batch, length)``, false where the mask is 0; rows of the result are in its order.
        """
        if self.pooling != "tokens":
            raise InputError(f"{self.folder} is no language model: export one with its head")
        ids, mask, types = (_array(x) for x in (input_ids, attention_mask, token_type_ids))
        ids, mask = _checked(ids, mask, types)
        places = _array(places)
        if places.shape != ids.shape or places.dtype != bool or (places & ~mask).any():
            raise InputError(
                f"places must be boolean {list(ids.shape)} and false where the mask is 0, not {places.dtype} "
                f"{list(places.shape)}"
            )
        return self._run(ids, mask, types, hidden=False, pooled=True, places=places)[1]

    def _run(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        types: np.ndarray | None,
        *,
        hidden: bool,
        pooled: bool,
        places: np.ndarray | None = None,
    ) -> tuple:
        rule, d = self.metadata["position_rule"], self._described
        lengths = mask.sum(1, dtype=np.int32)
        if len(ids) and not lengths.all():
            raise InputError(f"text {int(np.argmin(lengths))} has no tokens: every text needs at least one")
        positions = None
        if rule == "ids":
            real = ids != int(self.metadata["pad_token_id"])
            positions = (np.cumsum(real, 1) * real + d.first_position - 1).clip(0)
        elif rule in ("index", "first") and not (mask[:, :-1] >= mask[:, 1:]).all():  # padding on the left, or holes
            positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape) + d.first_position
            if rule == "first":
                positions = positions - mask.argmax(1)[:, None]
        offsets = None
        if (np.diff(mask, axis=1) & mask[:, 1:]).sum(1).max(initial=0) + mask[:, :1].max(initial=0) > 1:  # holes
            offsets = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        arrays = [
            lengths,
            *(None if x is None else np.ascontiguousarray(x[mask], np.int32) for x in (ids, positions, types, offsets)),
        ]
        place = None if places is None else np.ascontiguousarray(places[mask].nonzero()[0], np.int64)
        answers = len(ids) if place is None else len(place)
        _check_range(ids[mask], "input_ids", d.vocab_size)
        if types is not None and d.type_vocab_size:
            _check_range(types[mask], "token_type_ids", d.type_vocab_size)
        batch = _Batch(
            len(ids),
            *(None if x is None else x.ctypes.data for x in arrays),
            0 if place is None else len(place),
            None if place is None else place.ctypes.data,
        )
        count = int(lengths.sum())
        out = np.empty((count, d.hidden_size), np.float32) if hidden else None
        vectors = np.empty((answers, d.pooled_size), np.float32) if pooled else None
        size = c.c_size_t()
        _check(self._lib.lookupffn_workspace(self._model, c.byref(batch), self.threads, c.byref(size)))
        workspace = getattr(self._local, "workspace", None)
        if workspace is None or workspace.nbytes < size.value:
            workspace = self._local.workspace = np.empty(size.value, np.uint8)
        _check(
            self._lib.lookupffn_run(
                self._model,
                c.byref(batch),
                None if out is None else out.ctypes.data,
                None if vectors is None else vectors.ctypes.data,
                workspace.ctypes.data,
                workspace.nbytes,
                self._pool,
            )
        )
        return out, vectors

    # ---- Texts -------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            require("hf", "Session.embed")
            from tokenizers import Tokenizer

            path = self._file.parent / "tokenizer.json"
            if not path.is_file():
                raise InputError(f"{self.folder} holds no tokenizer.json: export the model with its tokenizer")
            check_inside(path, self.folder)
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # its errors have no other class
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"{path} is no tokenizer ({reason}): export the model with its own") from None
            tokenizer.no_padding()
            side = (tokenizer.truncation or {}).get("direction", "right")
            tokenizer.enable_truncation(int(self.metadata["max_length"]), direction=side)
            self._tokenizer = tokenizer  # whole, as another thread may be here
        return self._tokenizer

    def embed(self, texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
        """Vectors ``(len(texts), hidden_size)`` float32 of texts, in their order, pooled as the model says."""
        if self.pooling == "none":
            raise InputError(f"{self.folder} has no pooling: export it as a sentence transformer, or with pooling=")
        if self.labels:
            raise InputError(f"{self.folder} is a classifier of {', '.join(self.labels)}: call classify")
        if self.pooling == "tokens":
            raise InputError(f"{self.folder} is a language model: call fill, or export it with pooling=")
        return self._pooled(_texts(texts, "texts"), progress)

    def classify(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, progress: bool = False
    ) -> np.ndarray:
        """Logits ``(len(texts), len(labels))`` float32 of texts, or of each with its second text, as a reranker reads
        a query and a passage."""
        if not self.labels:
            raise InputError(f"{self.folder} is no classifier: export a model for sequence classification")
        if pairs is not None and len(pairs) != len(texts):
            raise InputError(f"{len(texts)} texts and {len(pairs)} second texts: each needs one")
        texts = _texts(texts, "texts")
        return self._pooled(texts if pairs is None else list(zip(texts, _texts(pairs, "pairs"), strict=True)), progress)

    def fill(
        self, texts: Sequence[str], *, top: int = 5, progress: bool = False
    ) -> list[list[list[tuple[str, float]]]]:
        """For each text, for each mask token in it, the ``top`` likeliest tokens with their log probabilities in nats.

        A masked LM's ``log softmax(logits)``; a text without a mask has an empty list. Masks behind the model's longest
        text are cut off with the rest of it.
        """
        if "mask_token_id" not in self.metadata or self.pooling != "tokens":
            raise InputError(f"{self.folder} is no masked LM with a mask token: export one with its tokenizer")
        if not 1 <= top <= self._described.pooled_size:
            raise InputError(f"top must be 1 to {self._described.pooled_size}, not {top}")
        texts, mask_token = _texts(texts, "texts"), int(self.metadata["mask_token_id"])
        filled: list[list[list[tuple[str, float]]]] = [[] for _ in texts]
        for group, ids, mask, types in self._batches(texts, progress, mask_token):
            places = (ids == mask_token) & mask
            logits = self._run(ids, mask, types, hidden=False, pooled=True, places=places)[1]
            for row, scores in zip(places.nonzero()[0], logits.astype(np.float64), strict=True):
                best = np.argsort(-scores, kind="stable")[:top]
                total = scores[best[0]] + np.log(np.exp(scores - scores[best[0]]).sum())
                tokens = [(self.tokenizer.id_to_token(int(i)) or "", float(scores[i] - total)) for i in best]
                filled[group[row]].append(tokens)
        return filled

    def _pooled(self, texts: list, progress: bool) -> np.ndarray:
        vectors = np.empty((len(texts), self._described.pooled_size), np.float32)
        for group, ids, mask, types in self._batches(texts, progress):
            vectors[group] = self._run(ids, mask, types, hidden=False, pooled=True)[1]
        return vectors

    def _batches(self, texts: list, progress: bool, mask_token: int | None = None) -> Iterator[tuple]:
        """Places in the list, ids, mask and types of texts of one length or nearly so; where their ``mask_token`` is
        given, few enough of these to be answered at once."""
        with _bar(len(texts), progress) as bar:
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                encodings = self.tokenizer.encode_batch_fast(texts[start : start + TEXTS_AT_ONCE])
                for i, encoding in enumerate(encodings):
                    if not encoding.ids:  # by its place in the list, which _run does not know
                        raise InputError(f"text {start + i} has no tokens: every text needs at least one")
                for group in self._groups(encodings, mask_token):
                    length = len(encodings[group[-1]].ids)
                    ids, mask = np.zeros((len(group), length), np.int32), np.zeros((len(group), length), bool)
                    types = np.zeros_like(ids)
                    for row, i in enumerate(group):
                        size = len(encodings[i].ids)
                        ids[row, :size], types[row, :size] = encodings[i].ids, encodings[i].type_ids
                        mask[row, :size] = True
                    yield [start + i for i in group], ids, mask, types
                    bar.update(len(group))

    def _groups(self, encodings: list, mask_token: int | None) -> list[list[int]]:
        most = max(1, LOGITS_AT_ONCE // self._described.pooled_size)
        groups: list[list[int]] = []
        masks = 0
        for i in sorted(range(len(encodings)), key=lambda i: len(encodings[i].ids)):
            count = 0 if mask_token is None else encodings[i].ids.count(mask_token)
            masks += count
            if not groups or (len(groups[-1]) + 1) * len(encodings[i].ids) > TOKENS_AT_ONCE or masks > most:
                groups.append([])
                masks = count
            groups[-1].append(i)
        return groups


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="text", disable=not shown)


def _texts(texts: Sequence[str], name: str) -> list[str]:
    if isinstance(texts, str | bytes):  # whose characters would be texts
        raise InputError(f"{name} must be a list of strings, not one: [{texts[:40]!r}]")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{name}[{i}] is {type(text).__name__}, not a string")
    return list(texts)


def _is_tensor(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "torch"  # which only then is imported


def _array(x: Any) -> Any:
    """None as it is, all else as numpy has it; a tensor shares its memory."""
    if _is_tensor(x) and x.device.type != "cpu":
        raise InputError(f"a tensor is on {x.device}: a session runs on the CPU, move it there")
    return None if x is None else np.asarray(x)


def _check_range(values: np.ndarray, name: str, size: int) -> None:
    """Before they are narrowed to 32 bits, where a number too large would become another."""
    if values.size and not (values.min() >= 0 and values.max() < size):
        at = int(np.argmax((values < 0) | (values >= size)))
        raise InputError(
            f"{name}: token {at} has {'id' if name == 'input_ids' else 'type'} {values[at]}, not 0 to {size - 1}"
        )


def _checked(ids: Any, mask: Any, types: Any) -> tuple[np.ndarray, np.ndarray]:
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"input_ids must be integers (batch, length), not {ids.dtype} {list(ids.shape)}")
    if types is not None and not np.issubdtype(types.dtype, np.integer):
        raise InputError(f"token_type_ids must be integers, not {types.dtype}")
    for name, x in (("attention_mask", mask), ("token_type_ids", types)):
        if x is not None and x.shape != ids.shape:
            raise InputError(f"{name} is {list(x.shape)}, input_ids {list(ids.shape)}")
    return ids, np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
