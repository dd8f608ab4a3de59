"""The runtime: packed encoders against the models that they were exported from, the same bits whatever the batch."""

import contextlib
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from encoders import POSITIONS, SIZES, SMALL, VOCAB, albert, batch, bert, electra, modernbert, randomised
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizerFast,
    LongformerConfig,
    LongformerModel,
)
from typer.testing import CliRunner

from lookupffn import Session, export, native
from lookupffn.__main__ import app
from lookupffn.errors import InputError
from lookupffn.runtime.session import MODEL_FILE

if not native.available():
    pytest.skip("the runtime is a compiled library", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


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
