"""Pre-norm RoBERTa with a choice of feed-forward layer, as Hugging Face model classes: encoder and language models.

Differs from `transformers`' RoBERTa: layer norms stand in front of attention and FFN and once at the end; position
ids count the tokens of the mask from 0, whatever the padding id; no token types; attention is one fused projection.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.roberta.modeling_roberta import eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from lookupffn.branches import NoFFN, TokenContext, TokenRows
from lookupffn.ffns import build_ffn
from lookupffn.hf.configuration import LookupRobertaConfig
from lookupffn.hf.packed import mark_packed


class PositionEmbedding(nn.Embedding):
    """Learned positions that start as :func:`sinusoids`; a class of its own so that initialisation can tell it."""


class Embeddings(nn.Module):
    """Word and position embeddings, normed: ids (batch, length) to (batch, length, hidden_size)."""

    def __init__(self, config: LookupRobertaConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = PositionEmbedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor | None) -> Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length, longest = words.shape[1], self.position_embeddings.num_embeddings
        if length > longest:
            raise ValueError(f"the input has {length} tokens, max_position_embeddings is {longest}: shorten the input")
        if position_ids is None:
            position_ids = torch.arange(length, device=words.device)
        return self.dropout(self.LayerNorm(words + self.position_embeddings(position_ids)))


def sinusoids(length: int, width: int, device=None) -> Tensor:
    """Sines and cosines of falling frequency, of mean square 1: ``(length, width)`` ("Attention is all you need", 3.5).

    The start of the learned positions: a shift is one linear map for all of them, so attention to a neighbour is
    learned once and not once for every position, and a masked LM leaves its plateau several times sooner.
    """
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    angle = torch.arange(length, device=device)[:, None] * frequency
    return math.sqrt(2) * torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


class SelfAttention(nn.Module):
    """Multi-head attention of every token to every token that is not padding, nor after it with ``is_decoder``."""

    def __init__(self, config: LookupRobertaConfig):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size {config.hidden_size} must be a multiple of num_attention_heads, "
                f"which is {config.num_attention_heads}"
            )
        self.config = config
        self.is_causal = config.is_decoder
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        qkv = self.query_key_value(hidden_states).unflatten(-1, (3, -1, self.head_dim))  # (B, L, 3, heads, head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, head_dim)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.head_dim**-0.5, **kwargs
        )  # (B, L, heads, head_dim)
        return self.output(context.flatten(-2)), weights


class Layer(GradientCheckpointingLayer):
    """One pre-norm block: ``x + attention(norm(x))``, then ``x + ffn(norm(x)) + rows by ids``."""

    def __init__(self, config: LookupRobertaConfig, context: TokenContext):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = build_ffn(config)
        self.ffn_norm.requires_grad_(not isinstance(self.ffn, NoFFN))  # else nothing depends on it
        self.token_rows = nn.ModuleList(
            TokenRows.from_config(rows, config.hidden_size, config.vocab_size, context) for rows in config.token_rows
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        found = self.ffn(self.ffn_norm(hidden_states))
        for rows in self.token_rows:
            found = found + rows(hidden_states)
        return hidden_states + self.dropout(found)

    def ffn_bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that the feed-forward layer and the rows by ids beside it read for so many tokens."""
        rows = sum(r.rows.shape[1] * r.rows.element_size() for r in self.token_rows)
        return self.ffn.bytes_read(tokens) + tokens * rows


class LookupRobertaPreTrainedModel(PreTrainedModel):
    config: LookupRobertaConfig
    config_class = LookupRobertaConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Layer"]
    _can_record_outputs = {"hidden_states": Layer, "attentions": SelfAttention}

    def save_pretrained(self, *args, **kwargs) -> None:
        """As every model's; one that holds packed layers comes back packed, the same bits, by ``from_pretrained``."""
        mark_packed(self)
        super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As every model's. Raises ValueError with rows by ids, whose hash is of the vocabulary's size."""
        if self.config.token_rows:
            raise ValueError(f"a model with rows by ids (token_rows) keeps its vocabulary of {self.config.vocab_size}")
        return super().resize_token_embeddings(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linear and word embedding weights N(0, initializer_range^2), positions sinusoids of that size, norms 1,
        biases 0; what an FFN holds outside such modules by its own law (``init_parameters``)."""
        super()._init_weights(module)
        if hasattr(module, "init_parameters"):
            module.init_parameters(self.config.initializer_range)
        elif isinstance(module, PositionEmbedding):
            waves = sinusoids(*module.weight.shape, device=module.weight.device)
            initialization.copy_(module.weight, self.config.initializer_range * waves)


class LookupRobertaModel(LookupRobertaPreTrainedModel):
    """The encoder: token ids to one vector a token."""

    def __init__(self, config: LookupRobertaConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        if config.is_decoder and any(rows.get("after") for rows in config.token_rows):
            rows = config.token_rows
            raise ValueError(f"token_rows {rows} of a decoder see tokens that it is to predict: after must be 0")
        self.token_context = TokenContext()
        self.layers = nn.ModuleList(Layer(config, self.token_context) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Ids or embeddings ``(batch, length[, hidden_size])``; a mask ``(batch, length)``, 1 for tokens.

        Positions count the tokens of the mask, so that padding on the left gives what padding on the right gives.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if self.config.token_rows:
            if input_ids is None:
                raise ValueError("rows by ids (token_rows) need input_ids, not inputs_embeds")
            self.token_context.ids, self.token_context.mask = input_ids, attention_mask
        hidden_states = self.embeddings(input_ids, inputs_embeds, position_ids)
        masks = {"config": self.config, "inputs_embeds": hidden_states, "attention_mask": attention_mask}
        mask = (
            create_causal_mask(**masks, past_key_values=None)
            if self.config.is_decoder
            else create_bidirectional_mask(**masks)
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_states))

    def take_auxiliary_loss(self) -> Tensor | float:
        """Sum of what the feed-forward layers add to the training loss; 0 where they add nothing. They forget it."""
        total = 0.0
        for layer in self.layers:
            if getattr(layer.ffn, "auxiliary_loss", None) is not None:
                total = total + layer.ffn.auxiliary_loss
                layer.ffn.auxiliary_loss = None  # its graph would keep the model from being copied
        return total

    def flops(self, tokens: int, length: int) -> int:
        """Floating-point operations of the encoder over ``tokens`` tokens in sequences of ``length``.

        Products only, two a multiply-add: projections ``4 D^2`` and attention ``2 L D`` multiply-adds a token and
        layer, plus each FFN's own count.
        """
        width = self.config.hidden_size
        attention = 2 * tokens * (4 * width**2 + 2 * length * width)
        return sum(attention + layer.ffn.flops(tokens) for layer in self.layers)

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that the encoder reads for ``tokens`` tokens: rows of embeddings and tables per token,
        everything else once."""
        embeddings = {id(e.weight) for e in self.embeddings.modules() if isinstance(e, nn.Embedding)}
        ffns = {id(p) for layer in self.layers for m in (layer.ffn, layer.token_rows) for p in m.parameters()}
        once = [p for p in self.parameters() if id(p) not in embeddings | ffns]
        rows = 2 * tokens * self.config.hidden_size * self.embeddings.word_embeddings.weight.element_size()
        return (
            rows + sum(p.numel() * p.element_size() for p in once) + sum(x.ffn_bytes_read(tokens) for x in self.layers)
        )


class LanguageModelHead(nn.Module):
    """RoBERTa's head, ``decoder(norm(gelu(dense(x))))``; the decoder's weight is the word embedding."""

    def __init__(self, config: LookupRobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(hidden_states))))


class LookupRobertaForMaskedLM(LookupRobertaPreTrainedModel):
    """The encoder with a masked-language-model head whose decoder is tied to the word embeddings."""

    _tied_weights_keys = {"lm_head.decoder.weight": "encoder.embeddings.word_embeddings.weight"}

    def __init__(self, config: LookupRobertaConfig):
        super().__init__(config)
        self.encoder = LookupRobertaModel(config)
        self.lm_head = LanguageModelHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head.decoder = value

    def targets(self, labels: Tensor) -> Tensor:
        """The token to predict at each position, or -100, given ``labels`` as ``forward`` takes them."""
        return labels

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """``labels (batch, length)`` holds the token to predict, or -100; the loss is its mean negative
        log-likelihood in nats over labelled tokens, or their sum over ``num_items_in_batch`` where that is given; in
        training with the FFNs' own losses, in the labelled tokens' share."""
        outputs = self.encoder(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        hidden_states, loss = outputs.last_hidden_state, None
        if labels is not None:
            labels = self.targets(labels)
            if self.config.sparse_prediction:
                hidden_states, labels = hidden_states[labels != -100], labels[labels != -100]
        logits = self.lm_head(hidden_states)
        if labels is not None:
            here = (labels != -100).sum()
            total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum")
            loss = (total + here * self.encoder.take_auxiliary_loss()) / (
                here if num_items_in_batch is None else num_items_in_batch
            )
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LookupRobertaForCausalLM(LookupRobertaForMaskedLM):
    """The same model as a decoder, which predicts every next token; ``config.is_decoder`` must be set.

    ``labels`` are the input's ids, or -100, as everywhere in transformers: shifted here. For training and scoring;
    it has no cache of keys and values to generate from.

    Raises:
        ValueError: ``config.is_decoder`` is not set, so that a token would see what it is to predict.
    """

    def __init__(self, config: LookupRobertaConfig):
        if not config.is_decoder:
            raise ValueError("LookupRobertaForCausalLM needs is_decoder=True in its config")
        super().__init__(config)

    def targets(self, labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=-100)
