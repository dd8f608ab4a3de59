"""The runtime: packed encoders against the models that they were exported from, the same bits whatever the batch."""

import contextlib
import hashlib
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ElectraConfig,
    ElectraForSequenceClassification,
    ElectraModel,
    LongformerConfig,
    LongformerModel,
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
from typer.testing import CliRunner

from lookupffn import Session, export, native
from lookupffn.__main__ import app
from lookupffn.errors import InputError
from lookupffn.hf import LookupRobertaConfig, LookupRobertaForSequenceClassification, LookupRobertaModel
from lookupffn.runtime.session import MODEL_FILE

if not native.available():
    pytest.skip("the runtime is a compiled library", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

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
        if name.endswith("tables"):
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
    "own, lookup": own,
    "own, causal": lambda: own("dense", causal=True),
}


TYPED = (AlbertModel, BertModel, ElectraModel)  # which have token types


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a model and the model, each exported once."""
    made = {}

    def get(name, linears="float32", **options):
        key = (name, linears, *options.items())
        if key not in made:
            model, folder = MODELS[name](), tmp_path_factory.mktemp("model")
            made[key] = export(model, folder, linears=linears, tables=linears, **options), model
        return made[key]

    return get


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


@pytest.mark.parametrize("name", MODELS)
def test_float32_is_the_model(name, exported):
    folder, model = exported(name)
    ids, mask, types = batch()
    types = types if isinstance(model, TYPED) else None
    expected, session = hidden(model, ids, mask, types), Session(folder)
    found = session(ids, mask, types)
    assert (found[mask == 0] == 0).all()
    error = (found - expected)[mask == 1].abs().max()
    assert error <= 2e-5 * expected.abs().max()
    for length in (1, 2, 15, 16, 17, POSITIONS):
        ids, mask, _ = batch(4, length)
        mask[:] = 1
        expected = hidden(model, ids, mask)
        limit = 2e-5 * expected.abs().max()
        assert np.abs(session(ids.numpy()) - expected.numpy()).max() <= limit


@pytest.mark.parametrize(
    "name", ["bert", "bert, odd sizes", "own, dense", "mpnet", "modernbert, odd sizes", "electra", "albert"]
)
def test_int8_is_near_the_model(name, exported):
    folder, model = exported(name, "int8")
    ids, mask, _ = batch()
    expected, found = hidden(model, ids, mask), Session(folder)(ids, mask)
    cosine = torch.nn.functional.cosine_similarity(found[mask == 1], expected[mask == 1])
    assert cosine.min() > 0.999


@pytest.mark.parametrize("name", ["bert", "modernbert, odd sizes"])
def test_bfloat16_rounds_the_weights_alone(name, tmp_path):
    model = MODELS[name]()
    session, (ids, mask, _) = Session(export(model, tmp_path, linears="bfloat16")), batch()
    with torch.no_grad():
        for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
            linear.weight.copy_(linear.weight.bfloat16())
    expected, found = hidden(model, ids, mask), session(ids, mask)
    error = (found - expected)[mask == 1].abs().max()  # queries are scaled before they are rounded
    assert error <= 3e-2 * expected.abs().max()
    assert (found - expected)[mask == 1].square().mean().sqrt() <= 2e-3 * expected.std()


def test_an_input_that_is_far_larger_than_the_others_does_not_take_their_integers(tmp_path):
    """As one of MiniLM's dimensions is: without its exact product the error is ten times as large."""
    model = bert(width=64, heads=2, inner=64, layers=1)
    with torch.no_grad():
        model.encoder.layer[0].attention.output.LayerNorm.bias[7] = 60.0
        model.embeddings.LayerNorm.weight[3] = 50.0
    ids, mask, _ = batch()
    expected = hidden(model, ids, mask)
    found = Session(export(model, tmp_path, linears="int8"))(ids, mask)
    error = (found - expected)[mask == 1]
    assert error.square().mean().sqrt() < 0.02 * expected[mask == 1].std()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalise", [False, True])
def test_pooled_vectors(pooling, normalise, exported):
    folder, model = exported("bert", pooling=pooling, normalise=normalise)
    ids, mask, _ = batch()
    states = hidden(model, ids, mask)
    rows = [state[here == 1] for state, here in zip(states, mask, strict=True)]
    expected = torch.stack([row.mean(0) if pooling == "mean" else row[0] for row in rows])
    if normalise:
        expected = torch.nn.functional.normalize(expected)
    torch.testing.assert_close(torch.from_numpy(Session(folder).pool(ids, mask)), expected, rtol=0, atol=1e-5)


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
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**SIZES, **SMALL, embedding_size=24)),
    "modernbert": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(**SIZES, **SMALL, pad_token_id=1, classifier_pooling="mean", classifier_bias=True)
    ),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(**SIZES, dim=48, n_heads=3, n_layers=2, hidden_dim=100)
    ),
    "own": lambda: own_classifier(),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_gives_its_logits(name, tmp_path):
    model = randomised(CLASSIFIERS[name]())
    session = Session(export(model, tmp_path, linears="float32", tables="float32"))
    ids = torch.randint(2, VOCAB, (60, 37), generator=torch.Generator().manual_seed(0))  # more than a tile of them
    mask = (torch.arange(37) < torch.arange(1, 61)[:, None]).long()
    ids[mask == 0] = 1
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits.numpy()
    got = session.pool(ids, mask)
    assert session.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert np.abs(got - expected).max() <= 3e-5 * np.abs(expected).max()
    assert np.array_equal(session.pool(ids[7:8], mask[7:8]), got[7:8])
    assert np.array_equal(Session(tmp_path, threads=3).pool(ids, mask), got)


def test_texts_and_pairs_are_classified(sentence_transformer, tmp_path):
    tokenizer = sentence_transformer.tokenizer
    model = randomised(BertForSequenceClassification(BertConfig(**SIZES | {"vocab_size": len(tokenizer)}, **SMALL)))
    session = Session(export(model, tmp_path / "fast", linears="float32", tokenizer=tokenizer))
    texts, others = ["w1 w2", "w3 w4 w5", "w6"], ["w7 w8 w9", "w1", "w2 w3"]
    for pairs in (None, others):
        inputs = tokenizer(texts, pairs, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        assert np.abs(session.classify(texts, pairs) - expected).max() <= 3e-5 * np.abs(expected).max()
    with pytest.raises(InputError, match="3 texts and 1 second texts"):
        session.classify(texts, ["a"])
    with pytest.raises(InputError, match="is a classifier of LABEL_0, LABEL_1, LABEL_2: call classify"):
        session.embed(texts)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    reranker = CrossEncoder(str(tmp_path / "model"), device="cpu")
    again = Session(export(reranker, tmp_path / "reranker", linears="float32"))
    assert np.array_equal(again.classify(texts, others), session.classify(texts, others))
    encoder = Session(export(bert(), tmp_path / "encoder"))
    with pytest.raises(InputError, match="is no classifier"):
        encoder.classify(texts)


GOLDEN_MODELS = {  # family, type of the linears: the first 8 bytes of a SHA-256
    ("bert", "float32"): "3d38c06270ddc03e",
    ("bert", "int8"): "0187e432b45073f4",
    ("albert", "int8"): "2511623558e3a35c",
}


@pytest.mark.parametrize(("family", "linears"), GOLDEN_MODELS)
def test_all_bytes_of_a_small_model_are_those_of_version_2(family, linears, tmp_path):
    """docs/format.md: a change here is a new version."""
    model = CLASSIFIERS[family]()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(((torch.arange(parameter.numel()) * (i + 3) % 31 - 15) / 64).view_as(parameter))
    data = (export(model, tmp_path, linears=linears) / MODEL_FILE).read_bytes()
    assert hashlib.sha256(data).hexdigest()[:16] == GOLDEN_MODELS[family, linears]


def test_layers_that_are_shared_are_stored_once(tmp_path):
    sizes = {
        layers: export(albert(num_hidden_layers=layers), tmp_path / str(layers)).joinpath(MODEL_FILE).stat().st_size
        for layers in (1, 12)
    }
    assert sizes[12] - sizes[1] < 2000  # eleven times the places of six records


@pytest.mark.parametrize(("labels", "said"), [(b"{}", r"labels '\{\}'"), (b"[1,2,3]", "3 labels for 48 outputs")])
def test_labels_that_do_not_fit_are_refused(labels, said, tmp_path):
    file = export(bert(), tmp_path) / MODEL_FILE
    data, added = file.read_bytes(), len(labels) - 2
    data = data.replace(b'"labels":"[]"', b'"labels":"' + labels + b'"')
    file.write_bytes(data.replace(b" " * added, b"", 1) if added else data)
    with pytest.raises(InputError, match=said):
        Session(tmp_path)


def test_a_tokenizer_of_another_model_is_not_taken_over(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds a tokenizer\.json"):
        export(bert(), tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_a_head_that_is_left_out_is_said(tmp_path):
    with pytest.warns(UserWarning, match="the head of BertForTokenClassification is left out"):
        export(BertForTokenClassification(BertConfig(vocab_size=VOCAB, **SMALL)), tmp_path)


def test_a_session_is_shared_pickled_and_forked(exported):
    folder, _ = exported("bert", "int8")
    session, (ids, mask, _) = Session(folder, threads=2), batch(16, 64)
    expected = session(ids, mask)
    results = [None] * 8

    def work(i):
        for _ in range(5):
            results[i] = session(ids, mask)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(result, expected) for result in results)
    assert torch.equal(pickle.loads(pickle.dumps(session))(ids, mask), expected)
    if pid := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    else:
        os._exit(0 if torch.equal(session(ids, mask), expected) else 1)


def test_torch_in_torch_out_and_nothing_in_nothing_out(exported):
    session = Session(exported("bert")[0])
    ids = np.zeros((2, 3), np.int64)
    assert isinstance(session(ids), np.ndarray)
    assert isinstance(session(torch.from_numpy(ids)), torch.Tensor)
    assert session(np.zeros((0, 5), int)).shape == (0, 5, 48)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[0, VOCAB]], None, rf"token 1 has id {VOCAB}, not 0 to {VOCAB - 1}"),
        ([[-1, 3]], None, "token 0 has id -1"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], "text 1 has no tokens"),
        ([[1] * (POSITIONS + 1)], None, rf"text 0 has {POSITIONS + 1} tokens, the model has positions for {POSITIONS}"),
        ([1, 2], None, r"input_ids must be integers \(batch, length\)"),
        ([[0.5]], None, "input_ids must be integers"),
        ([[5, 2**32 + 7]], None, f"token 1 has id {2**32 + 7}, not 0 to {VOCAB - 1}"),
        ([[1, 2]], [[1]], r"attention_mask is \[1, 1\], input_ids \[1, 2\]"),
    ],
)
def test_input_that_does_not_fit_is_named(ids, mask, message, exported):
    with pytest.raises(InputError, match=message):
        Session(exported("bert")[0])(np.array(ids), None if mask is None else np.array(mask))


def test_what_cannot_be_exported_is_named(tmp_path):
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 60, "num_hidden_layers": 1}
    with pytest.raises(InputError, match="model_type 'longformer' cannot be exported; known are albert, bert,"):
        export(LongformerModel(LongformerConfig(vocab_size=99, attention_window=8, **sizes)), tmp_path)
    with pytest.raises(InputError, match=r"modernbert with layer_types \['full_attention', 'full_attention', 'sliding"):
        export(modernbert(layer_types=["full_attention"] * 2 + ["sliding_attention"] * 3), tmp_path)
    with pytest.raises(InputError, match="linears must be one of float32, int8, bfloat16, not 'int3'"):
        export(bert(), tmp_path, linears="int3")
    with pytest.raises(InputError, match="tables must be one of float32, bfloat16, int8, int4, not 'int2'"):
        export(bert(), tmp_path, tables="int2")
    with pytest.raises(InputError, match=r"hidden_act|activation 'quick_gelu' is none of"):
        export(bert(act="quick_gelu"), tmp_path)
    with pytest.raises(InputError, match="electra as a decoder cannot be exported"):
        export(electra(is_decoder=True), tmp_path)
    with pytest.raises(InputError, match="layers: activation 'quick_gelu' is none of"):
        export(albert(hidden_act="quick_gelu"), tmp_path)
    sizes = {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    with pytest.raises(InputError, match="modernbert with rope_type 'dynamic' cannot be exported"):
        export(modernbert(rope_parameters=sizes, layer_types=["full_attention"] * 5), tmp_path)
    adapted = bert()
    adapted.encoder.layer[1].attention.self.query.base_layer = torch.nn.Identity()
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.attention\.self\.query is wrapped by another library"):
        export(adapted, tmp_path)
    broken = electra()
    for linear, said in (
        (broken.encoder.layer[0].intermediate.dense, r"layers\.0\.up"),
        (broken.embeddings_project, "embedding_projection"),
    ):
        with torch.no_grad():
            linear.weight[3, 4] = float("nan")
        with pytest.raises(InputError, match=f"{said} holds values that are not finite"):
            export(broken, tmp_path)
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        Session(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["own, lookup", "electra", "albert, groups"])
def test_damaged_files_are_refused_and_never_crash(name, exported, tmp_path):
    """Every byte of headers and places changed in turn, and the file cut off anywhere: an error, or an answer."""
    folder, _ = exported(name, "int8")
    raw = (folder / MODEL_FILE).read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    generator, refused = np.random.default_rng(0), 0
    ids, _, _ = batch(3, 9)
    cuts = [
        raw[:n] for n in (0, 7, 8, 100, header, header + 63, header + 200, len(raw) // 2, len(raw) - 64, len(raw) - 1)
    ]
    starts = [header, *(header + int(place) for place in np.frombuffer(raw[header + 192 : header + 320], "<i8")[::2])]
    changed = []
    for _ in range(400):
        damaged = bytearray(raw)
        at = int(generator.choice(starts)) + int(generator.integers(0, 192))
        damaged[at] ^= 1 << int(generator.integers(8))
        changed.append(bytes(damaged))
    for damaged in [*cuts, *changed]:
        (tmp_path / MODEL_FILE).write_bytes(damaged)
        refused += 1
        with contextlib.suppress(InputError):
            Session(tmp_path)(ids)
            refused -= 1
    assert refused > len(cuts) + 100  # the others changed a weight


# ---- Texts and the command line --------------------------------------------------------------------------------------


@pytest.fixture
def sentence_transformer(tmp_path):
    modules = pytest.importorskip("sentence_transformers.models")
    words = [f"w{i}" for i in range(VOCAB - 5)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    model = bert()
    model.save_pretrained(tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=32).save_pretrained(tmp_path / "bert")
    parts = [modules.Transformer(str(tmp_path / "bert")), modules.Pooling(48, "mean"), modules.Normalize()]
    return SentenceTransformer(modules=parts, device="cpu")


def test_texts_of_a_sentence_transformer(sentence_transformer, tmp_path):
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in generator.integers(0, 190, n)) for n in (3, 0, 20, 1, 7, 40, 7, 2)]
    session = Session(export(sentence_transformer, tmp_path / "fast", linears="float32"))
    vectors = session.embed(texts)
    np.testing.assert_allclose(vectors, sentence_transformer.encode(texts), rtol=0, atol=1e-5)
    for i, text in enumerate(texts):
        assert np.array_equal(session.embed([text])[0].view(np.int32), vectors[i].view(np.int32))
    assert session.embed([]).shape == (0, 48)
    with pytest.raises(InputError, match="has no pooling"):
        Session(export(bert(), tmp_path / "bare")).embed(["w1"])


def test_export_and_embed_from_a_shell(sentence_transformer, tmp_path):
    sentence_transformer.save(str(tmp_path / "st"))
    done = CliRunner().invoke(app, ["export", str(tmp_path / "st"), "--output", str(tmp_path / "fast")])
    assert done.exit_code == 0, done.output
    (tmp_path / "texts.txt").write_text("w1 w2\nw3\n\nw4 w5 w6\n")
    arguments = [str(tmp_path / "fast"), str(tmp_path / "texts.txt"), "--output", str(tmp_path / "out" / "v.npy")]
    done = CliRunner().invoke(app, ["embed", *arguments])
    assert done.exit_code == 0, done.output
    vectors = np.load(tmp_path / "out" / "v.npy")
    assert np.array_equal(vectors, Session(tmp_path / "fast").embed(["w1 w2", "w3", "", "w4 w5 w6"]))
    with pytest.raises(InputError, match=r"nowhere\.txt cannot be read as UTF-8 text"):
        CliRunner().invoke(app, ["embed", arguments[0], "nowhere.txt", *arguments[2:]], catch_exceptions=False)


# ---- Every instruction set -------------------------------------------------------------------------------------------


COMPARE = """
import sys
import numpy as np
from lookupffn import Session
given = np.load(sys.argv[1])
for folder, expected in zip(sys.argv[2:], ("float32", "int8"), strict=True):
    found = Session(folder, 2)(given["ids"], given["mask"])
    error = np.abs(found - given[expected])[given["mask"] == 1].max()
    assert error <= (2e-5 if expected == "float32" else 0.02) * np.abs(given[expected]).max(), (folder, error)
"""


@pytest.mark.parametrize("isa", [i["name"] for i in native.implementations() if i["runs_here"]])
@pytest.mark.parametrize("name", ["bert", "own, causal", "mpnet", "modernbert", "electra"])
def test_every_implementation(isa, name, exported, tmp_path):
    folders = [exported(name, linears)[0] for linears in ("float32", "int8")]
    model = exported(name)[1]
    ids, mask, _ = batch(6, 70)
    states = hidden(model, ids, mask).numpy()
    np.savez(tmp_path / "given.npz", ids=ids, mask=mask, float32=states, int8=Session(folders[1])(ids, mask))
    command = [sys.executable, "-c", COMPARE, str(tmp_path / "given.npz"), *map(str, folders)]
    done = subprocess.run(command, env=os.environ | {"LOOKUPFFN_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
