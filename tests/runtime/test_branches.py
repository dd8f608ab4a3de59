"""What stands beside a lookup's tables: rows by ids and a low rank, in PyTorch and in the runtime."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from lookupffn import InputError, LookupConfig, LookupFFN, Session, export, native
from lookupffn.branches import BranchedLookupFFN, LowRank, TokenContext, TokenRows, token_rows_of

if not native.available():
    pytest.skip("the runtime is a compiled library", allow_module_level=True)

VOCAB = 211
WINDOWS = ((0, 0, VOCAB), (1, 0, 97), (2, 1, 1000), (0, 8, 5))  # before, after, rows


def rows_by_hand(ids, before, after, rows):
    found = []
    for i in range(len(ids)):
        if before + after == 0 and rows >= VOCAB:
            found.append(ids[i])
            continue
        h = 0
        for j in range(i - before, i + after + 1):
            h = (h + (ids[j] + 1 if 0 <= j < len(ids) else 0)) * 2654435769 % 2**32
            h ^= h >> 15
        found.append(h * rows // 2**32)
    return found


@pytest.mark.parametrize("window", [*WINDOWS, (0, 0, 7), (3, 3, 1 << 20)])
def test_rows_of_tokens_are_those_of_the_equation_whatever_the_padding(window):
    before, after, rows = window
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (6, 19), generator=generator)
    lengths = [19, 1, 2, 7, 8, 18]
    mask = torch.arange(19) < torch.tensor(lengths)[:, None]
    found = token_rows_of(ids, mask, before, after, rows, VOCAB)
    for text, length in enumerate(lengths):
        assert found[text, :length].tolist() == rows_by_hand(ids[text, :length].tolist(), before, after, rows)
    assert found.min() >= 0
    assert found.max() < max(rows, VOCAB)


def test_a_hole_in_a_mask_is_no_token():
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(0, VOCAB, (7, 23), generator=generator), torch.rand(7, 23, generator=generator) < 0.6
    found = token_rows_of(ids, mask, 2, 1, 1000, VOCAB)
    for text in range(7):
        assert found[text][mask[text]].tolist() == rows_by_hand(ids[text][mask[text]].tolist(), 2, 1, 1000)


def test_pairs_meet_rarely():
    """Of 30,000 pairs in 65,536 rows, as many collide as a random function has."""
    ids = torch.stack([torch.arange(30000) % 300, torch.arange(30000) // 300], 1)
    found = token_rows_of(ids, None, 1, 0, 65536, VOCAB)[:, 1]
    expected = 65536 * (1 - (1 - 1 / 65536) ** 30000)
    assert abs(len(found.unique()) - expected) < 5 * expected**0.5


def model(rank=12, windows=WINDOWS):
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100, "num_hidden_layers": 2}
    torch.manual_seed(1)
    bert, context = BertModel(BertConfig(vocab_size=VOCAB, max_position_embeddings=160, **sizes)).eval(), TokenContext()
    for layer in bert.encoder.layer:
        token_rows = [TokenRows(r, 48, VOCAB, context, before=b, after=a) for b, a, r in windows]
        lookup = LookupFFN(LookupConfig(48, 48, num_tables=20, reads=2, block_size=16))
        branched = BranchedLookupFFN(lookup, LowRank(48, 48, rank) if rank else None, token_rows)
        for parameter in branched.parameters():
            if parameter.dim() < 5:
                torch.nn.init.normal_(parameter, std=0.1)
        layer.intermediate, layer.output.dense = torch.nn.Identity(), branched
    return bert, context


def hidden(bert, context, ids, mask):
    context.ids, context.mask = ids, mask
    with torch.no_grad():
        return bert(ids, attention_mask=mask).last_hidden_state[mask.bool()]


def batch():
    ids = torch.randint(0, VOCAB, (5, 37), generator=torch.Generator().manual_seed(0))
    return ids, (torch.arange(37) < torch.tensor([37, 1, 2, 20, 36])[:, None]).long()


@pytest.mark.parametrize(("rank", "windows"), [(12, WINDOWS), (0, WINDOWS[:1]), (70, ()), (0, ())])
def test_the_runtime_has_every_branch(rank, windows, tmp_path):
    bert, context = model(rank, windows)
    ids, mask = batch()
    expected = hidden(bert, context, ids, mask)
    folder = export(bert, tmp_path, linears="float32", tables="float32")
    found = Session(folder)(ids, mask)
    assert (found[mask == 1] - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert torch.equal(Session(folder, threads=3)(ids, mask), found)
    assert torch.equal(Session(folder)(ids[3:4, :20])[0], found[3, :20])


@pytest.mark.parametrize(("tables", "bound"), [("int8", 1 / 254), ("int4", 0.06)])
def test_integers_of_rows_by_ids(tables, bound, tmp_path):
    """Against a model whose rows were rounded to the same integers: what is left is float32's rounding."""
    bert, context = model(0, WINDOWS)
    with torch.no_grad():  # so that rows by ids alone are rounded
        for layer in bert.encoder.layer:
            layer.output.dense.lookup.tables.zero_()
    ids, mask = batch()
    exact = Session(export(bert, tmp_path / "exact", linears="float32", tables=tables))(ids, mask)
    before = [rows.rows.clone() for rows in bert.modules() if isinstance(rows, TokenRows)]
    most = {"int8": 127, "int4": 7}[tables]
    with torch.no_grad():
        for rows in (module for module in bert.modules() if isinstance(module, TokenRows)):
            best, least = None, None
            for share in torch.linspace(1, 0.3, 36, dtype=torch.float64) if tables == "int4" else [1.0]:
                scale = (rows.rows.double().abs().amax(1, keepdim=True) / most * share).float().double()
                rounded = (rows.rows.double() / scale).round().clamp(-most, most) * scale
                error = (rounded - rows.rows).square().sum(1, keepdim=True)
                best = rounded if best is None else torch.where(error < least, rounded, best)
                least = error if least is None else torch.minimum(error, least)
            rows.rows.copy_(best)
    for rounded, rows in zip((r.rows for r in bert.modules() if isinstance(r, TokenRows)), before, strict=True):
        error = (rounded - rows).square().mean() / rows.square().mean()
        assert error.sqrt() <= bound * 3
        assert error > 0
    expected = hidden(bert, context, ids, mask)
    assert (exact[mask == 1] - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_row_by_ids_that_is_not_finite_is_named(tmp_path):
    bert, _ = model()
    with torch.no_grad():
        bert.encoder.layer[1].output.dense.token_rows[0].rows[3, 4] = float("inf")
    with pytest.raises(InputError, match=r"layers\.1\.token_rows\.0\.rows holds values that are not finite"):
        export(bert, tmp_path)


def test_damaged_branches_are_refused_and_never_crash(tmp_path):
    bert, _ = model()
    file = export(bert, tmp_path) / "model.safetensors"
    raw, (ids, _) = file.read_bytes(), batch()
    header = 8 + int.from_bytes(raw[:8], "little")
    places = np.frombuffer(raw[header + 192 :], "<i8", 2 * int.from_bytes(raw[header + 24 : header + 28], "little"))
    starts = [header + int(place) for place in places[::2]]
    starts = [start for start in starts if raw[start + 8] == 2 and raw[start + 12] in (2, 6, 7)]
    generator, refused = np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[int(generator.choice(starts)) + int(generator.integers(8, 64))] ^= 1 << int(generator.integers(8))
        file.write_bytes(bytes(damaged))
        refused += 1
        try:
            Session(tmp_path)(ids)
            refused -= 1
        except InputError:
            pass
    assert refused > 250


def test_accounting_of_branches():
    branched = model()[0].encoder.layer[0].output.dense
    lookup = branched.lookup
    assert branched.flops(3) == lookup.flops(3) + 3 * (2 * 2 * 48 * 12 + 4 * 48)
    assert branched.bytes_read(3) == lookup.bytes_read(3) + 4 * 2 * 48 * 12 + 3 * 4 * 48 * 4
    with pytest.raises(ValueError, match="before must be an int, 0 to 8, not 9"):
        TokenRows(4, 5, 6, TokenContext(), before=9)
    with pytest.raises(ValueError, match=r"ids of shape None for hidden states \[2, 48\]"):
        TokenRows(4, 48, 6, TokenContext())(torch.zeros(2, 48))
