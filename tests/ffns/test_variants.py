"""LookupVariantFFN: each option against its formula, and the paper's layer where none is given."""

import pytest
import torch

from lookupffn import LookupConfig, LookupFFN, pack, reference
from lookupffn.ffns.variants import LookupVariantFFN

F64 = torch.float64
SHAPE = {"num_tables": 5, "code_bits": 3, "block_size": 4, "reads": 2}


def variant(**options):
    torch.manual_seed(3)
    layer = LookupVariantFFN(12, 48, dtype=F64, **SHAPE | options)
    with torch.no_grad():
        for name in ("log_temperature", "scale", "offset"):
            if getattr(layer, name) is not None:
                getattr(layer, name).add_(0.3 * torch.randn(5, dtype=F64))
        layer.projection.bias.normal_()
    return layer


def reference_rows(layer, x, z=None, weights=lambda scores: scores):
    """The sum of rows by ``reference.py`` for the given ``z``, its scores changed by ``weights``."""
    projection = layer.projection
    if z is None:
        z = reference.bh4(x, projection.weight, projection.decay, 15) + projection.bias
    codes, scores = reference.nearest_buckets(z.view(-1, 5, 3), 2)
    return reference.gather(layer.tables, codes, weights(scores)) + layer.bias


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(9, 12, dtype=F64)


def test_without_options_it_is_the_papers_layer_to_the_bit(x):
    layer = variant()
    plain = LookupFFN(LookupConfig(12, 12, **SHAPE), dtype=F64)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    assert layer.flops(7) == plain.flops(7)
    assert layer.bytes_read(7) == plain.bytes_read(7)
    assert layer.auxiliary_loss is None


def test_stages_shorten_the_product(x):
    layer = variant(stages=2)
    assert layer.projection.weight.shape == (1, 2, 4, 4, 4)
    torch.testing.assert_close(layer(x), reference_rows(layer, x))
    assert layer.flops(1) == 2 * (2 * 16 * 4 + 5 * 2 * 12)


def test_temperature_scales_z(x):
    layer = variant(temperature=True)
    z = reference.bh4(x, layer.projection.weight, 0.7, 15) + layer.projection.bias
    z = z.view(-1, 5, 3) * layer.log_temperature.exp()[:, None]
    torch.testing.assert_close(layer(x), reference_rows(layer, x, z))


def test_scale_and_offset_change_the_scores(x):
    layer = variant(scale=True, offset=True)
    expected = reference_rows(layer, x, weights=lambda s: s * layer.scale[:, None] + layer.offset[:, None])
    torch.testing.assert_close(layer(x), expected)
    only = variant(offset=True)
    torch.testing.assert_close(only(x), reference_rows(only, x, weights=lambda s: s + only.offset[:, None]))


def test_centring_takes_the_batchs_mean_in_training_and_a_running_one_after(x):
    layer = variant(centred=True)
    z = reference.bh4(x, layer.projection.weight, 0.7, 15) + layer.projection.bias
    torch.testing.assert_close(layer.train()(x), reference_rows(layer, x, z - z.mean(0)))
    torch.testing.assert_close(layer.mean, 0.01 * z.mean(0))
    torch.testing.assert_close(layer.eval()(x), reference_rows(layer, x, z - 0.01 * z.mean(0)))
    assert layer.train()(x[:0]).shape == (0, 12)  # an empty batch has no mean
    assert layer.mean.isfinite().all()


def test_differences_of_coordinates_replace_them(x):
    layer = variant(differences=True)
    z = (reference.bh4(x, layer.projection.weight, 0.7, 15) + layer.projection.bias).view(-1, 5, 3)
    z = torch.stack([z[..., j] - z[..., (j + 1) % 3] for j in range(3)], -1) / 2**0.5
    torch.testing.assert_close(layer(x), reference_rows(layer, x, z))
    with pytest.raises(ValueError, match="one with differences"):
        layer.for_inference()


def test_shared_rows_are_read_by_several_tables_and_learn_from_all(x):
    layer = variant(num_tables=6, shared=3)
    assert layer.tables.shape == (2, 8, 12)
    plain = layer.for_inference()
    assert torch.equal(plain.tables[4], layer.tables[0])
    torch.testing.assert_close(layer(x), plain(x))
    assert (layer.flops(2), layer.bytes_read(2)) == (plain.flops(2), plain.bytes_read(2))
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(layer.tables.grad, plain.tables.grad.view(3, 2, 8, 12).sum(0))


def test_table_dropout_leaves_whole_tables_out_and_keeps_the_mean(x):
    layer = variant(table_dropout=0.4)
    assert torch.equal(layer.eval()(x), variant()(x))
    one = x[:1].expand(4000, -1)
    kept = layer.train()(one) - layer.bias  # each token drops its own tables
    mean = layer.eval()(one[:1]) - layer.bias
    torch.testing.assert_close(kept.mean(0, keepdim=True), mean, rtol=0.1, atol=2e-3)
    codes, scores = reference.nearest_buckets(layer.project(x[:1]), 2)
    parts = torch.stack(
        [reference.gather(layer.tables[t : t + 1], codes[:, t : t + 1], scores[:, t : t + 1])[0] for t in range(5)]
    )
    subsets = torch.tensor([[i >> t & 1 for t in range(5)] for i in range(32)], dtype=F64) @ parts / 0.6
    assert (torch.cdist(kept, subsets).min(1).values < 1e-6).all()


def test_smoothness_is_the_mean_square_difference_of_rows_one_bit_apart(x):
    layer = variant(smoothness=0.25)
    pairs = [(k, k ^ 1 << j) for k in range(8) for j in range(3)]
    differences = [(layer.tables[:, k] - layer.tables[:, other]).square().sum(-1) for k, other in pairs]
    layer.train()(x)
    torch.testing.assert_close(layer.auxiliary_loss, 0.25 * torch.stack(differences).mean())
    layer.auxiliary_loss.backward()
    assert layer.tables.grad.abs().sum() > 0
    layer.eval()(x)
    assert layer.auxiliary_loss is None


def test_narrow_rows_and_a_dense_part(x):
    layer = variant(row_size=7, dense_size=6)
    assert layer.tables.shape == (5, 8, 7)
    rows = reference_rows(layer, x)
    expected = rows @ layer.row_output.weight.T + layer.dense(x)
    torch.testing.assert_close(layer(x), expected)
    extra = 7 * 12 + 2 * 6 * 12
    assert layer.flops(3) == 2 * 3 * (4 * 16 * 4 + 5 * 2 * 7 + extra)
    once = sum(p.numel() for p in layer.parameters()) - layer.tables.numel()
    assert layer.bytes_read(3) == 8 * (once + 3 * 5 * 2 * 7)


def test_tables_start_with_the_given_spread_and_the_rest_at_its_law():
    own = {"temperature": True, "scale": True, "offset": True, "centred": True}
    layer = LookupVariantFFN(32, 1, num_tables=64, block_size=4, table_std=0.3, z_std=3.0, **own)
    assert layer.tables.std().item() == pytest.approx(0.3, rel=0.01)
    assert layer.projection.weight[:, :-1].std().item() == pytest.approx(0.5, rel=0.05)
    assert layer.projection.weight[:, -1].std().item() == pytest.approx(1.5, rel=0.05)
    dense = LookupVariantFFN(32, 1, num_tables=64, projection="dense", z_std=3.0)
    assert dense.projection.weight.std().item() == pytest.approx(3 * 32**-0.5, rel=0.05)
    for values, start in ((layer.log_temperature, 0), (layer.scale, 1), (layer.offset, 0), (layer.mean, 0)):
        assert values.eq(start).all()


def test_what_folds_away_leaves_a_plain_layer_and_what_does_not_is_named(x):
    layer = variant(scale=True, centred=True, table_dropout=0.1, smoothness=0.1)
    layer.train()(x)
    plain = layer.eval().for_inference()
    assert type(plain) is LookupFFN
    torch.testing.assert_close(plain(x), layer(x))
    with pytest.raises(ValueError, match="no plain LookupFFN equals one with temperature, offset, row_size, dense_siz"):
        variant(temperature=True, offset=True, row_size=3, dense_size=2).for_inference()
    with pytest.raises(ValueError, match="one with stages"):
        variant(stages=3).for_inference()
    with pytest.raises(ValueError, match="one with centred"):
        LookupVariantFFN(12, 1, projection="none", num_tables=4, code_bits=3, centred=True).for_inference()
    with pytest.raises(ValueError, match="one with offset"):
        pack(variant(offset=True).float())
    packed = pack(layer.float(), "float32")
    torch.testing.assert_close(packed(x.float()), plain(x).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 0}, "stages must be at least 1, not 0"),
        ({"z_std": 0.0}, "z_std must be more than 0, not 0.0"),
        ({"table_std": 0.0}, "table_std must be more than 0"),
        ({"table_dropout": 1.0}, "table_dropout must be at least 0 and less than 1, not 1.0"),
        ({"shared": 2}, "shared must be a divisor of 5 tables, not 2"),
        ({"smoothness": -1.0}, "smoothness must be at least 0"),
        ({"row_size": 13}, r"row_size must be 0 to 12 \(hidden_size\), not 13"),
        ({"dense_size": -1}, "dense_size must be at least 0"),
        ({"reads": 5}, "reads must be 1 to 4"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        variant(**options)
