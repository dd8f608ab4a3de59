"""The settings of pretraining and of fine-tuning: their names, defaults, meaning and limits, in one place.

The command line makes its flags from these records, a YAML file uses the same names, ``pretrain.py`` and
``finetune.py`` read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lookupffn.errors import InputError, check
from lookupffn.train.glue import TASKS


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
GLUE = Limit(lambda value: value in TASKS, f"one of {', '.join(TASKS)}")
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
            if (limit := field.metadata["limit"]) and value is not None:
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

    model: str = _setting("runs/pretrain/model", "folder or name of a pretrained encoder, dense or converted")
    task: str | None = _setting(None, "a task of GLUE, which decides columns, metrics and files", GLUE)
    data: str | None = _setting(
        None, "of --task: folder of train.parquet and validation.parquet [the Hugging Face hub]"
    )
    train: str | None = _setting(
        None, "labelled texts to learn from: .parquet, .jsonl, .csv or .tsv (or .gz) [train.parquet]"
    )
    test: str | None = _setting(None, "labelled texts to measure on [test.parquet]")
    output_dir: str = _setting("runs/finetune", "folder of checkpoints, metrics and the final model")
    text_column: str | None = _setting(None, "column of text; two with a comma for pairs of sentences [text]")
    label_column: str | None = _setting(
        None, "column of the class, number or list of classes; or several of 0 and 1 [label]"
    )
    problem_type: str | None = _setting(None, f"one of {', '.join(PROBLEMS)} [the first]", PROBLEM_TYPES)
    encoding: str = _setting("utf-8", "of text files, a name that Python knows")
    skip_bad: bool = _setting(False, "leave out rows that cannot be used, instead of refusing their file")
    pooling: str | None = _setting(
        None,
        "what the head looks at where a model has the choice: mean of all tokens, or cls, the first [mean]",
        POOLINGS,
    )
    max_length: int = _setting(256, "longer texts are cut to this many tokens", AT_LEAST_1)
    epochs: int = _setting(3, "passes over the training texts, at most", AT_LEAST_1)
    batch_size: int = _setting(32, "texts a step", AT_LEAST_1)
    learning_rate: float | None = _setting(
        None, "peak; after the warm-up linear to 0 [3e-4 for our own models, 5e-5 for others]", POSITIVE
    )
    lookup_learning_rate_multiplier: float = _setting(
        3.0,
        "of a converted model: its lookups' learning rate over the rest's; the tables' is a multiple of it",
        POSITIVE,
    )
    warmup_fraction: float = _setting(0.06, "share of the steps in which the learning rate rises", SHARE_OR_0)
    save_every: int = _setting(500, "steps between checkpoints; 0: none; with --patience at evaluations", AT_LEAST_0)
    patience: int = _setting(
        0,
        "stop after so many evaluations without a gain, and keep the best checkpoint; 0: train to the end",
        AT_LEAST_0,
    )
    evaluate_every: int = _setting(0, "with --patience: steps between evaluations; 0: after each epoch", AT_LEAST_0)
    seed: int = _setting(0, "of the head, the order of texts and dropout", AT_LEAST_0)
    seeds: str | None = _setting(None, "one run a seed, with commas between, each in its own folder; then their mean")

    def __post_init__(self):
        super().__post_init__()
        task = TASKS.get(self.task)
        if task is None and self.data is not None:
            raise InputError(f"data {self.data!r} is for a task: give train and test, or task")
        for name in ("train", "test") if task else ():
            if getattr(self, name) is not None:
                raise InputError(f"{name} {getattr(self, name)!r}: task {self.task} takes its files from data")
        if task and self.problem_type not in (None, task.problem_type):
            raise InputError(f"problem_type {self.problem_type!r}: task {self.task} is {task.problem_type}")
        if self.evaluate_every and not self.patience:
            raise InputError(f"evaluate_every {self.evaluate_every} needs patience: without it the end is evaluated")
        defaults = {"text_column": "text", "label_column": "label", "problem_type": PROBLEMS[0]}
        if task:
            defaults |= {"text_column": task.text_column, "problem_type": task.problem_type}
        else:
            defaults |= {"train": "train.parquet", "test": "test.parquet"}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self.each_seed()

    def each_seed(self) -> list[FinetuneConfig]:
        """The settings of each run of ``seeds``. Raises InputError where these are no different whole numbers."""
        if self.seeds is None:
            return []
        parts = [part.strip() for part in self.seeds.split(",")]
        if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
            raise InputError(f"seeds must be different whole numbers with commas between, not {self.seeds!r}")
        return [
            dataclasses.replace(self, seeds=None, seed=seed, output_dir=str(Path(self.output_dir) / f"seed-{seed}"))
            for seed in map(int, parts)
        ]


def _typed(name: str, kind: str, value):
    """``value`` as a field of the annotated type takes it; YAML reads 1e-3 as text, and an empty entry as None."""
    if kind.endswith(" | None"):
        return None if value is None else _typed(name, kind.removesuffix(" | None"), value)
    if kind == "dict":
        value = {} if value is None else value
    elif kind == "float" and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    types = {"int": int, "bool": bool, "dict": dict, "str": str}
    if kind not in types or not isinstance(value, types[kind]) or (kind == "int" and isinstance(value, bool)):
        raise InputError(f"{name} must be of type {kind}, not {value!r}")
    return value
