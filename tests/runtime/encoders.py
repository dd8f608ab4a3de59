"""Encoders of every family with random weights and of awkward sizes, and a batch for them."""

import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ElectraConfig,
    ElectraForSequenceClassification,
    ElectraModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    MPNetConfig,
    MPNetForSequenceClassification,
    MPNetModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from lookupffn.hf import LookupRobertaConfig, LookupRobertaForSequenceClassification, LookupRobertaModel

VOCAB, POSITIONS = 211, 160
SMALL = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100, "num_hidden_layers": 2}


def bert(width=48, heads=3, inner=100, layers=2, act="gelu"):
    sizes = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
    }
    config = BertConfig(vocab_size=VOCAB, max_position_embeddings=POSITIONS, hidden_act=act, **sizes)
    return randomised(BertModel(config))


TOKEN_ROWS = [{"rows": VOCAB, "before": 0, "after": 0}, {"rows": 500, "before": 1, "after": 1}]


def own(ffn="lookup", causal=False, **changes):
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100, "ffn": ffn}
    if ffn == "lookup":
        changes["ffn_options"] = {"num_tables": 20, "reads": 2, "block_size": 16}
    return randomised(LookupRobertaModel(LookupRobertaConfig.preset("small", **sizes, is_decoder=causal, **changes)))


def randomised(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        if "LayerNorm.weight" in name or "norm.weight" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        if name.endswith(("tables", ".rows")):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def roberta(kind=RobertaModel, config=RobertaConfig):
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100, "num_hidden_layers": 2}
    sizes |= {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS + 2, "pad_token_id": 1, "type_vocab_size": 1}
    return randomised(kind(config(**sizes)))


def distilbert():
    sizes = {"dim": 48, "n_heads": 3, "hidden_dim": 100, "n_layers": 2, "max_position_embeddings": POSITIONS}
    return randomised(DistilBertModel(DistilBertConfig(vocab_size=VOCAB, **sizes)))


def mpnet(**changes):
    return randomised(
        MPNetModel(MPNetConfig(vocab_size=VOCAB, max_position_embeddings=POSITIONS + 2, **SMALL | changes))
    )


def electra(embedding_size=24, **changes):
    sizes = SMALL | {"embedding_size": embedding_size, "max_position_embeddings": POSITIONS} | changes
    return randomised(ElectraModel(ElectraConfig(vocab_size=VOCAB, **sizes)))


def deberta_config(**changes):
    """Buckets of distances, the far ones by their logarithm, and texts longer than they tell apart."""
    sizes = SMALL | {"max_position_embeddings": POSITIONS, "relative_attention": True, "position_buckets": 10}
    sizes |= {"position_biased_input": False, "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm"}
    sizes |= {"share_att_key": True, "type_vocab_size": 0, "pooler_hidden_size": SMALL["hidden_size"]}
    sizes |= {"legacy": False}
    return DebertaV2Config(**{"vocab_size": VOCAB} | sizes | changes)


def deberta(**changes):
    model = randomised(DebertaV2Model(deberta_config(**changes)))
    torch.nn.init.normal_(model.encoder.rel_embeddings.weight)
    return model


def albert(embedding_size=24, **changes):
    sizes = SMALL | {"embedding_size": embedding_size, "max_position_embeddings": POSITIONS} | changes
    return randomised(AlbertModel(AlbertConfig(vocab_size=VOCAB, **sizes)))


def modernbert(**changes):
    """A window far smaller than the texts, and layers of both kinds on both sides of a global one."""
    sizes = SMALL | {"num_hidden_layers": 5, "local_attention": 22} | changes
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = ModernBertConfig(vocab_size=VOCAB, max_position_embeddings=POSITIONS, **tokens, **sizes)
    return randomised(ModernBertModel(config))


MODELS = {
    "bert": bert,
    "roberta": roberta,
    "xlm-roberta": lambda: roberta(XLMRobertaModel, XLMRobertaConfig),
    "distilbert": distilbert,
    "mpnet": mpnet,
    "electra": electra,
    "electra, odd sizes": lambda: electra(70, hidden_size=40, num_attention_heads=2, intermediate_size=7),
    "electra, no projection": lambda: electra(48),
    "albert": albert,
    "albert, odd sizes": lambda: albert(70, hidden_size=40, num_attention_heads=2, intermediate_size=7),
    "albert, groups": lambda: albert(48, num_hidden_layers=5, num_hidden_groups=2, inner_group_num=2),
    "deberta": deberta,
    "deberta, odd sizes": lambda: deberta(
        hidden_size=66, num_attention_heads=2, intermediate_size=7, type_vocab_size=2
    ),
    "deberta, apart, no buckets": lambda: deberta(share_att_key=False, position_buckets=-1, max_relative_positions=30),
    "deberta, queries alone": lambda: deberta(pos_att_type="c2p", norm_rel_ebd="none"),
    "deberta, keys alone": lambda: deberta(pos_att_type="p2c", position_buckets=100),
    "modernbert": modernbert,
    "modernbert, biases, all global": lambda: modernbert(
        attention_bias=True, mlp_bias=True, norm_bias=True, layer_types=["full_attention"] * 5
    ),
    "modernbert, odd sizes": lambda: modernbert(hidden_size=66, intermediate_size=35, hidden_activation="silu"),
    "bert, odd sizes": lambda: bert(width=66, heads=2, inner=7, layers=1),
    "bert, tanh": lambda: bert(act="gelu_new"),
    "bert, relu": lambda: bert(act="relu"),
    "bert, silu": lambda: bert(act="silu"),
    "own, dense": lambda: own("dense"),
    "own, dense, rows by ids": lambda: own("dense", token_rows=TOKEN_ROWS),
    "own, none, rows by ids": lambda: own("none", token_rows=TOKEN_ROWS),
    "own, lookup, rows by ids": lambda: own(token_rows=TOKEN_ROWS),
    "own, none": lambda: own("none"),
    "own, lookup": own,
    "own, causal": lambda: own("dense", causal=True),
}


TYPED = (AlbertModel, BertModel, DebertaV2Model, ElectraModel)  # which have token types


def batch(texts=5, length=37):
    """Ids, types and a mask with padding on the right, on the left, and holes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (texts, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    mask[1, : length // 4] = 0
    mask[2, length // 8 : length // 3] = 0
    return ids, mask, torch.randint(0, 2, ids.shape, generator=generator)


def hidden(model, ids, mask, types=None):
    given = {} if types is None or not isinstance(model, TYPED) else {"token_type_ids": types}
    with torch.no_grad():
        return model(ids, attention_mask=mask, **given).last_hidden_state


def own_classifier():
    config = own().config
    config.num_labels, config.classifier_pooling = 3, "mean"
    return LookupRobertaForSequenceClassification(config)


SIZES = {"vocab_size": VOCAB, "num_labels": 3}
CLASSIFIERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, **SMALL)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, **SMALL, pad_token_id=1)),
    "mpnet": lambda: MPNetForSequenceClassification(MPNetConfig(**SIZES, **SMALL)),
    "albert": lambda: AlbertForSequenceClassification(AlbertConfig(**SIZES, **SMALL, embedding_size=24)),
    "deberta": lambda: DebertaV2ForSequenceClassification(deberta_config(num_labels=3)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**SIZES, **SMALL, embedding_size=24)),
    "modernbert": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(**SIZES, **SMALL, pad_token_id=1, classifier_pooling="mean", classifier_bias=True)
    ),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(**SIZES, dim=48, n_heads=3, n_layers=2, hidden_dim=100)
    ),
    "own": lambda: own_classifier(),
}
