"""The settings of pretraining and of fine-tuning: their names, defaults, meaning and limits, in one place.

The command line makes its flags from these records, a YAML file uses the same names, ``pretrain.py`` and
``finetune.py`` read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from lookupffn.errors import InputError, check


class Limit(NamedTuple):
    """What a setting may be: a test of its value, and the words for it."""

    fits: Callable[[object], bool]
    expected: str


AT_LEAST_0 = Limit(lambda value: value >= 0, "at least 0")
AT_LEAST_1 = Limit(lambda value: value >= 1, "at least 1")
POSITIVE = Limit(lambda value: value > 0, "more than 0")
SHARE = Limit(lambda value: 0 < value < 1, "between 0 and 1")
SHARE_OR_0 = Limit(lambda value: 0 <= value < 1, "at least 0 and less than 1")
OBJECTIVES = Limit(lambda value: value in ("masked", "causal"), "one of masked, causal")
POOLINGS = Limit(lambda value: value in ("mean", "cls"), "one of mean, cls")
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")  # names of transformers
PROBLEM_TYPES = Limit(lambda value: value in PROBLEMS, f"one of {', '.join(PROBLEMS)}")
SCHEDULES = Limit(lambda value: value in ("linear", "constant"), "one of linear, constant")


FOLDERS = ("output_dir", "cache_dir")  # settings that decide where a run is, not what it is


def _setting(default, help: str, limit: Limit | None = None):
    """A field of a record of settings with the text that the command line shows for it, and its limit."""
    metadata = {"help": help, "limit": limit}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """What pretraining and fine-tuning share: AdamW with a rate of their own for the tables."""

    table_learning_rate_multiplier: float = _setting(3.0, "the tables' learning rate over the others'", POSITIVE)
    weight_decay: float = _setting(0.01, "of matrices; norms, biases and tables have none", AT_LEAST_0)
    adam_beta1: float = _setting(0.9, "AdamW's decay of the mean", SHARE_OR_0)
    adam_beta2: float = _setting(0.98, "AdamW's decay of the variance", SHARE_OR_0)
    adam_epsilon: float = _setting(1e-6, "AdamW's epsilon", POSITIVE)
    max_grad_norm: float = _setting(1.0, "gradients are clipped to this norm", POSITIVE)
    bf16: bool = _setting(False, "autocast to bfloat16")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _typed(field.name, field.type, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            if limit := field.metadata["limit"]:
                check(limit.fits(value), field.name, value, limit.expected, InputError)

    def changes(self, written: dict) -> list[str]:
        """How these settings differ from those that a run has written, in words; folders do not count.

        A setting that is newer than the run had its default then.
        """
        defaults = {f.name: {} if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(self)}
        asked = dataclasses.asdict(self)
        for name in FOLDERS:
            asked.pop(name, None)
        return [
            f"{name}: {written.get(name, defaults[name])!r} there, {value!r} asked"
            for name, value in asked.items()
            if written.get(name, defaults[name]) != value
        ]


@dataclasses.dataclass(frozen=True)
class PretrainConfig(Optimisation):
    """Everything that decides a pretraining run; `lookupffn pretrain` has a flag for each, a YAML file the same names.

    Raises:
        InputError: a setting has the wrong type or is out of range; the message names it and what would be right.
    """

    output_dir: str = _setting("runs/pretrain", "folder of checkpoints, metrics and the final model")
    preset: str = _setting("small", "model size, a name in lookupffn.hf.PRESETS")
    ffn: str = _setting("lookup", "feed-forward layer, a name in lookupffn.ffns.names()")
    ffn_options: dict = _setting({}, "options of that layer over the preset's, as NAME=VALUE")
    model: dict = _setting({}, "further fields of LookupRobertaConfig over the preset's, as NAME=VALUE")
    data: str = _setting(
        "stdlib",
        "stdlib, a file or folder of .txt .jsonl .csv .tsv (or .gz of these) .parquet, or a Hugging Face dataset",
    )
    text_column: str = _setting("text", "column of text where the data has columns")
    encoding: str = _setting("utf-8", "of text files, a name that Python knows")
    skip_bad: bool = _setting(False, "go on though more than 1 % of files or rows cannot be read, or a file is damaged")
    cache_dir: str | None = _setting(None, "folder of prepared data [$LOOKUPFFN_CACHE or ~/.cache/lookupffn]")
    tokenizer: str | None = _setting(None, "pretrained tokenizer instead of one trained on the data")
    sequence_length: int = _setting(128, "tokens in a block", AT_LEAST_1)
    validation_fraction: float = _setting(0.02, "share of documents held out, chosen by their hash", SHARE)
    steps: int = _setting(1000, "optimizer steps", AT_LEAST_1)
    batch_size: int = _setting(32, "sequences a step, over all processes and micro-batches", AT_LEAST_1)
    accumulation: int = _setting(1, "micro-batches a step", AT_LEAST_1)
    learning_rate: float = _setting(1e-3, "peak; after the warm-up linear to 0", POSITIVE)
    table_schedule: str = _setting("linear", "the tables' rate after the warm-up: linear to 0, or constant", SCHEDULES)
    warmup_steps: int = _setting(100, "steps of linear warm-up", AT_LEAST_0)
    objective: str = _setting("masked", "masked, or causal: predict each next token with a decoder", OBJECTIVES)
    mask_probability: float = _setting(0.15, "share of tokens to predict: 80 % masked, 10 % random, 10 % kept", SHARE)
    evaluation_sequences: int = _setting(512, "validation blocks evaluated, evenly spaced; 0: all", AT_LEAST_0)
    evaluate_every: int = _setting(250, "steps between evaluations", AT_LEAST_1)
    log_every: int = _setting(50, "steps between lines in metrics.jsonl", AT_LEAST_1)
    save_every: int = _setting(500, "steps between checkpoints; 0: none", AT_LEAST_0)
    seed: int = _setting(0, "of initialisation, data order, masks and dropout", AT_LEAST_0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("evaluate_every", "save_every"):
            if getattr(self, name) % self.log_every:  # or a resumed run would log other means than an unbroken one
                raise InputError(f"{name} {getattr(self, name)} must be a multiple of log_every {self.log_every}")

    def model_config(self, tokenizer=None):
        """The ``LookupRobertaConfig``, with the vocabulary of ``tokenizer`` once there is one.

        Raises:
            InputError: no model can be built of it; the message says why.
        """
        import torch
        from huggingface_hub.errors import StrictDataclassError

        from lookupffn.hf import LookupRobertaConfig, LookupRobertaModel

        tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
        if taken := sorted({"ffn", "ffn_options", "is_decoder", "sparse_prediction", *tokens} & self.model.keys()):
            raise InputError(f"model cannot set {', '.join(taken)}: the other settings and the tokenizer decide it")
        fields = self.model | {"ffn": self.ffn, "ffn_options": self.ffn_options, "sparse_prediction": True}
        fields["is_decoder"] = self.objective == "causal"
        if tokenizer is not None:
            fields |= {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in tokens}
        try:
            config = LookupRobertaConfig.preset(self.preset, **fields)
            with torch.device("meta"):  # every size is checked, no memory touched
                LookupRobertaModel(config)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise InputError(f"model: {' '.join(str(error).split())}") from error
        if self.sequence_length > config.max_position_embeddings:
            raise InputError(
                f"sequence_length {self.sequence_length} must be at most the model's max_position_embeddings, "
                f"{config.max_position_embeddings}"
            )
        return config

    def load_data(self):
        """The token blocks of ``data`` (``data.PretrainingData``), from the cache where they are there already."""
        from lookupffn.train.data import pretraining_data

        vocab_size = self.model_config().vocab_size  # first, so that no text is read for a model that cannot be
        return pretraining_data(
            self.data,
            block_size=self.sequence_length,
            vocab_size=vocab_size,
            tokenizer=self.tokenizer,
            text_column=self.text_column,
            validation_fraction=self.validation_fraction,
            encoding=self.encoding,
            skip_bad=self.skip_bad,
            cache_dir=self.cache_dir,
        )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Optimisation):
    """Everything that decides a fine-tuning run; `lookupffn finetune` has a flag for each, a YAML file the same names.

    Raises:
        InputError: a setting has the wrong type or is out of range; the message names it and what would be right.
    """

    model: str = _setting("runs/pretrain/model", "folder of a pretrained model with its tokenizer")
    train: str = _setting("train.parquet", "labelled texts to learn from: .parquet, .jsonl, .csv or .tsv (or .gz)")
    test: str = _setting("test.parquet", "labelled texts to measure on")
    output_dir: str = _setting("runs/finetune", "folder of checkpoints, metrics and the final model")
    text_column: str = _setting("text", "column of text; two with a comma for pairs of sentences")
    label_column: str = _setting("label", "column of the class, number or list of classes; or several of 0 and 1")
    problem_type: str = _setting("single_label_classification", f"one of {', '.join(PROBLEMS)}", PROBLEM_TYPES)
    encoding: str = _setting("utf-8", "of text files, a name that Python knows")
    skip_bad: bool = _setting(False, "leave out rows that cannot be used, instead of refusing their file")
    pooling: str = _setting("mean", "what the head looks at: mean of all tokens, or cls, the first one", POOLINGS)
    max_length: int = _setting(256, "longer texts are cut to this many tokens", AT_LEAST_1)
    epochs: int = _setting(3, "passes over the training texts", AT_LEAST_1)
    batch_size: int = _setting(32, "texts a step", AT_LEAST_1)
    learning_rate: float = _setting(3e-4, "peak; after the warm-up linear to 0", POSITIVE)
    warmup_fraction: float = _setting(0.06, "share of the steps in which the learning rate rises", SHARE_OR_0)
    save_every: int = _setting(500, "steps between checkpoints; 0: none", AT_LEAST_0)
    seed: int = _setting(0, "of the head, the order of texts and dropout", AT_LEAST_0)


def _typed(name: str, kind: str, value):
    """``value`` as a field of the annotated type takes it; YAML reads 1e-3 as text, and an empty entry as None."""
    if kind == "dict":
        value = {} if value is None else value
    elif kind == "float" and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    types = {"int": int, "bool": bool, "dict": dict, "str": str, "str | None": (str, type(None))}
    if kind not in types or not isinstance(value, types[kind]) or (kind == "int" and isinstance(value, bool)):
        raise InputError(f"{name} must be of type {kind}, not {value!r}")
    return value
