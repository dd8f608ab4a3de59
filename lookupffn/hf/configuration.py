"""Configuration of the pre-norm RoBERTa encoder, and the sizes that have a name."""

import dataclasses

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class LookupRobertaConfig(PreTrainedConfig):
    r"""A pre-norm RoBERTa encoder whose feed-forward layer is chosen by `ffn`.

    Sizes follow `transformers.RobertaConfig`. `max_position_embeddings` counts tokens (no offset for padding).

    Args:
        ffn: a name in `lookupffn.ffns.names()`.
        ffn_options: numbers and words for that layer, by the names of its constructor; for `"lookup"` the fields of
            [`lookupffn.LookupConfig`]. What is not given has the layer's own default.
        token_rows: tables of rows by ids beside each feed-forward layer, each with its `rows` and how many neighbours
            `before` and `after` a token choose one of them with it ([`lookupffn.branches.TokenRows`]); by default none.
        is_decoder: a token attends to itself and to those before it, not to those after.
        classifier_pooling: what a classifier looks at, `"cls"`, the first token, or `"mean"`, that of all of the text.
        sparse_prediction: with labels, compute logits of labelled positions only; `logits` is then
            (labelled tokens, vocab_size). Saves most of the head's work in pretraining.
    """

    model_type = "lookup_roberta"

    vocab_size: int = 50265
    hidden_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    ffn: str = "lookup"
    ffn_options: dict[str, int | float | bool | str] = dataclasses.field(default_factory=dict)
    token_rows: list[dict[str, int]] = dataclasses.field(default_factory=list)
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    classifier_pooling: str = "cls"
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    is_decoder: bool = False
    sparse_prediction: bool = False

    @classmethod
    def preset(cls, name: str, **changes) -> "LookupRobertaConfig":
        """The configuration called `name` in `PRESETS`, with `changes` applied.

        A preset has options for several FFNs; those of the chosen one are taken, and `changes` wins over them.

        Raises:
            ValueError: there is no such preset, or no such field.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {name!r}")
        if unknown := sorted(changes.keys() - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
        fields = PRESETS[name] | changes
        options = PRESETS[name]["ffn_options"].get(fields.get("ffn", cls.ffn), {})
        fields["ffn_options"] = options | changes.get("ffn_options", {})
        return cls(**fields)


# The last comment of each: feed-forward multiply-adds, dense over lookup.
PRESETS = {
    # leaves the plateau of unigram guessing within minutes on two cores: for the demo and first runs
    "small": dict(
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        ffn_options={"lookup": {"num_tables": 32, "block_size": 8, "reads": 3}},  # docs/quality.md
        initializer_range=0.06,  # 0.02 suits wide models; at this width attention would start all but uniform
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),  # 6.4
    # the authors' small-512, lookup-t128-s8-bh4
    "small-512": dict(
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=2048,
        ffn_options={"lookup": {"num_tables": 128}},
    ),  # 6.4
    # RoBERTa-base, with tables for about the same saving
    "base": dict(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        ffn_options={"lookup": {"num_tables": 256}},
    ),  # 6.5
}
