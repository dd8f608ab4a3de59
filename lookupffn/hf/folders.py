"""What a model's folder may say and hold, checked before a library opens it: numbers and known names, never code.

Transformers and sentence-transformers take more from a folder than they must: classes by their paths, kernels and base
models by their repositories, pickles by an index, and memory for weights that the files do not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils import cached_file

from lookupffn.errors import check
from lookupffn.files import check_inside
from lookupffn.plugin import METHOD

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = (
    "tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers; others import what their config names
OPTIONS = [f"{part}_{kind}" for part in ("model", "tokenizer", "processor", "config") for kind in ("args", "kwargs")]


def find(name: str, file: str, part: str = "") -> Path | None:
    """A file in the folder, or in the repository of that name; None where there is none."""
    try:
        path = cached_file(name, file, subfolder=part)
    except OSError:
        return None
    return None if path is None else Path(path)


def read_json(name: str, file: str, kind: type = dict, part: str = "") -> Any:
    """The contents of a JSON file, which are a dict, or a list; None where there is no such file."""
    path = find(name, file, part)
    if path is None:
        return None
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {file} is no JSON: {error}") from None
    if not isinstance(contents, kind):
        expected = "an object" if kind is dict else "a list"
        raise ValueError(f"its {file} must hold {expected}, not {type(contents).__name__}")
    return contents


def check_folder(name: str, part: str = "") -> None:
    """Refuses what would choose code, other repositories or other files, in the folder or in its part of that name.

    Raises:
        ValueError: the message has the file, the entry and what to do.
    """
    if (folder := Path(name) / part).is_dir():  # the part of a module without settings is often not there
        for path in folder.iterdir():
            if not path.is_dir():
                check_inside(path, Path(name))
    if find(name, "adapter_config.json", part):
        raise ValueError("it holds an adapter, adapter_config.json: merge it into its model, merge_and_unload()")
    if config := read_json(name, "config.json", part=part):
        _check_config(config)
    _check_code(read_json(name, "tokenizer_config.json", part=part) or {}, "tokenizer_config.json")
    files = {"sentence_bert_config.json"} | {f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert")}
    for file in sorted(files):
        said = read_json(name, file, part=part) or {}
        for option in OPTIONS:
            check(not said.get(option), f"{option} in its {file}", said.get(option), "left out")
        for way in said.get("modality_config", {}).values():
            check(way["method"] == "forward", f"method in its {file}", way["method"], "'forward'")


def _check_code(said: dict, file: str) -> None:
    if "auto_map" in said:
        raise ValueError(f"its {file} has auto_map, which names code of its own, and that is never run: take a model "
                         "of an architecture that transformers has")  # fmt: skip


def _check_config(said: dict) -> None:
    """Of ``config.json`` and of the configs in it."""
    file = "config.json"
    _check_code(said, file)
    for key in ("attn_implementation", "_attn_implementation"):  # others would be fetched
        check(said.get(key) in (None, "eager", "sdpa"), f"{key} in its {file}", said.get(key), "eager or sdpa")
    for key in ("dtype", "torch_dtype"):
        dtype = said.get(key)
        fits = dtype is None or (isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype))
        check(fits, f"{key} in its {file}", dtype, "the name of a dtype of torch")
    weights = said.get("transformers_weights")
    check(weights is None, f"transformers_weights in its {file}", weights, f"left out: weights are in {WEIGHTS}")
    for key in ("hidden_act", "hidden_activation", "activation", "classifier_activation"):
        function = said.get(key)
        fits = function is None or (isinstance(function, str) and function in ACT2FN)
        check(fits, f"{key} in its {file}", function, "an activation of transformers")
    types, names = said.get("model_type", ""), said.get("architectures") or []
    check(isinstance(types, str), f"model_type in its {file}", types, "a string")
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
    check(fits, f"architectures in its {file}", names, "a list of strings")
    if quantised := said.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        if method != METHOD:  # whose library would be imported, and whose weights are no numbers here
            raise ValueError(
                f"quant_method in its {file} is {method!r}: give the model as it was before it was quantised"
            )
    for key, inner in said.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(inner, dict):
            _check_config(inner)


def check_modules(modules: list) -> None:
    """Refuses modules of a SentenceTransformer that are not in MODULES, or lie outside of its folder."""
    for module in modules:
        kind, part = (module.get(key) for key in ("type", "path")) if isinstance(module, dict) else (module, "")
        package, _, name = kind.rpartition(".") if isinstance(kind, str) else ("", "", "")
        if not package.startswith("sentence_transformers."):  # version 5 would run a local folder's code
            raise ValueError(f"its module {kind} is none of sentence-transformers")
        if name not in MODULES:
            raise ValueError(f"its module {kind} is not known here: {', '.join(MODULES)} are")
        fits = isinstance(part, str) and not Path(part).is_absolute() and ".." not in Path(part).parts
        check(fits, f"the path of its module {name}", part, "a folder in it")


def weight_files(name: str, part: str = "") -> list[Path]:
    """The safetensors files of a folder's weights, one or several by an index, which may name nothing else."""
    if path := find(name, WEIGHTS, part):
        return [path]
    index = read_json(name, INDEX, part=part)
    if index is None:
        raise ValueError(f"no file named {WEIGHTS}: save the model by save_pretrained; pickles (.bin) are never read")
    named = index.get("weight_map")
    fits = isinstance(named, dict) and bool(named)
    check(fits, f"weight_map in its {INDEX}", named, "a map of weights to files")
    for file in named.values():
        fits = isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file
        check(fits, f"weight_map in its {INDEX}", file, "to safetensors files beside it")
    found = {file: find(name, file, part) for file in sorted(set(named.values()))}
    if missing := [file for file, path in found.items() if path is None]:
        raise ValueError(f"its {INDEX} names {', '.join(missing)}, which is not there")
    return [path for path in found.values() if path is not None]


def stored_shapes(files: Iterable[str | Path]) -> dict[str, list[int]]:
    """The shape of each tensor in safetensors files, by their headers alone."""
    shapes = {}
    for path in files:
        check(str(path).endswith(".safetensors"), "a model's weights", str(path), "in safetensors, never in pickles")
        try:
            with safe_open(str(path), framework="pt") as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): get or save it again") from None
    return shapes


def check_model(config: Any, task: Any, name: str, part: str = "") -> None:
    """Refuses a config whose model, by the Auto class ``task``, its files do not have the weights of."""
    shapes = stored_shapes(weight_files(name, part))
    _check_layers(config, shapes)
    if getattr(config, "quantization_config", None) is None:  # else PackedQuantizer does it, of the layers that it puts
        with torch.device("meta"):
            check_sizes(task.from_config(config), shapes)


def _check_layers(config: Any, shapes: dict[str, list[int]]) -> None:
    """Refuses more layers than there are tensors, before they are built."""
    layers = getattr(config, "num_hidden_layers", 0)
    fits = not isinstance(layers, int) or layers <= len(shapes)
    check(fits, "num_hidden_layers", layers, f"at most the {len(shapes)} tensors in its files")


def check_sizes(model: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Refuses a model on the meta device that is far larger than its files: the rest would be made up, in memory.

    Up to twice the size is left to transformers, which says what is missing.
    """
    held = sum(torch.Size(shape).numel() for shape in shapes.values())
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if wanted > 2 * held:
        raise ValueError(f"its config.json asks for {wanted:,} numbers, its files hold {held:,}: save the model again")
