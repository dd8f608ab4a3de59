"""The baselines of the literature: each against its paper's equations, written token by token in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lookupffn.ffns.block_diagonal import BlockDiagonalFFN
from lookupffn.ffns.dense import DenseFFN
from lookupffn.ffns.fast_feedforward import FastFeedForward
from lookupffn.ffns.low_rank import LowRankFFN
from lookupffn.ffns.memory_former import MemoryFormerFFN
from lookupffn.ffns.monarch import MonarchFFN
from lookupffn.ffns.product_key import ProductKeyFFN
from lookupffn.ffns.switch import SwitchFFN
from lookupffn.reference import bucket_signs

# Awkward sizes: no power of two, options that are neither defaults nor each other.
SMALL = {
    LowRankFFN: (7, 10, {"rank": 3}),
    BlockDiagonalFFN: (12, 30, {"up_blocks": 3, "down_blocks": 2}),
    MonarchFFN: (12, 30, {"num_blocks": 3}),
    SwitchFFN: (7, 10, {"num_experts": 3, "expert_size": 5}),
    ProductKeyFFN: (7, 10, {"num_heads": 2, "num_keys": 5, "key_size": 6, "top_k": 3}),
    FastFeedForward: (7, 10, {"depth": 2, "leaf_size": 5}),
    MemoryFormerFFN: (12, 30, {"tau": 3}),
}
every_baseline = pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)


def small(kind, dtype=torch.float64, **changes):
    """A small layer whose biases and norms are random too, so that a forgotten or misplaced one shows."""
    hidden_size, intermediate_size, options = SMALL[kind]
    ffn = kind(hidden_size, intermediate_size, **options | changes, dtype=dtype)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.5)
    return ffn


def tokens(ffn_or_kind, *shape, dtype=torch.float64):
    kind = ffn_or_kind if isinstance(ffn_or_kind, type) else type(ffn_or_kind)
    return torch.randn(*shape, SMALL[kind][0], dtype=dtype)


def gelu(z):
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


# ---- The equations ---------------------------------------------------------------------------------------------------


def test_low_rank_is_its_equation_and_its_matrices_have_the_rank():
    ffn = small(LowRankFFN)
    x = tokens(ffn, 2, 3)
    up, down = ffn.up_u @ ffn.up_v, ffn.down_u @ ffn.down_v
    assert torch.linalg.matrix_rank(up) == torch.linalg.matrix_rank(down) == 3
    torch.testing.assert_close(ffn(x), gelu(x @ up.T + ffn.up_bias) @ down.T + ffn.down_bias)


def test_block_diagonal_is_its_equation_with_the_shuffle_of_shufflenet():
    ffn = small(BlockDiagonalFFN)
    x = tokens(ffn, 2, 3)
    up, down = torch.block_diag(*ffn.up), torch.block_diag(*ffn.down)
    z = gelu(x @ up.T + ffn.up_bias)
    shuffled = torch.empty_like(z)
    for group in range(3):
        for channel in range(10):
            shuffled[..., channel * 3 + group] = z[..., group * 10 + channel]
    torch.testing.assert_close(ffn(x), shuffled @ down.T + ffn.down_bias)


def test_block_diagonal_lets_every_output_see_every_input():
    ffn = small(BlockDiagonalFFN)
    jacobian = torch.autograd.functional.jacobian(ffn, tokens(ffn, 1))[0, :, 0]
    assert (jacobian != 0).all()


def transposition(rows, columns):
    """The permutation matrix that reads a vector as (rows, columns) and transposes it."""
    matrix = torch.zeros(rows * columns, rows * columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            matrix[j * rows + i, i * columns + j] = 1
    return matrix


def monarch_matrix(monarch, num_blocks):
    left, right = torch.block_diag(*monarch.left), torch.block_diag(*monarch.right)
    out_features, middle = left.shape
    return (
        transposition(num_blocks, out_features // num_blocks)
        @ left
        @ transposition(middle // num_blocks, num_blocks)
        @ right
    )


def test_monarch_is_its_equation_with_rectangular_matrices():
    ffn = small(MonarchFFN)
    x = tokens(ffn, 2, 3)
    up, down = monarch_matrix(ffn.up, 3), monarch_matrix(ffn.down, 3)
    assert up.shape == (30, 12)
    assert down.shape == (12, 30)
    assert (up != 0).all()
    torch.testing.assert_close(ffn(x), gelu(x @ up.T + ffn.up.bias) @ down.T + ffn.down.bias)


def test_square_monarch_is_that_of_the_paper():
    ffn = MonarchFFN(9, 9, num_blocks=3, dtype=torch.float64)
    p = transposition(3, 3)
    left, right = torch.block_diag(*ffn.up.left), torch.block_diag(*ffn.up.right)
    x = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(ffn.up(x), x @ (p @ left @ p.T @ right).T)  # M = P L P^T R


@pytest.mark.parametrize("num_experts", [1, 3, 8])  # with 8 some expert has no token
def test_switch_is_its_equation(num_experts):
    ffn = small(SwitchFFN, num_experts=num_experts)
    x = tokens(ffn, 2, 5)
    chosen = ffn.router(x).argmax(-1).unique()
    assert (len(chosen) < num_experts) == (num_experts == 8)
    expected = torch.empty_like(x)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        token = x[tuple(index)]
        logits = ffn.router.weight @ token
        p = logits.exp() / logits.exp().sum()
        i = int(p.argmax())
        expert = gelu(ffn.up[i] @ token + ffn.up_bias[i]) @ ffn.down[i] + ffn.down_bias[i]
        expected[tuple(index)] = p[i] * expert
    torch.testing.assert_close(ffn(x), expected)


def test_switch_balances_its_load():
    ffn = small(SwitchFFN, load_balancing=0.3)
    x = tokens(ffn, 2, 5)
    ffn(x)
    p = (x.flatten(0, 1) @ ffn.router.weight.T).softmax(-1)
    total = 0
    for i in range(3):
        f = sum(float(row.argmax() == i) for row in p) / 10
        total = total + f * p[:, i].mean()
    torch.testing.assert_close(ffn.auxiliary_loss, 0.3 * 3 * total)
    (gradient,) = torch.autograd.grad(ffn.auxiliary_loss, ffn.router.weight)
    assert gradient.abs().max() > 0
    ffn.router.weight.data.zero_()  # every p is 1/3, whatever the shares: the loss is alpha
    ffn(x)
    torch.testing.assert_close(ffn.auxiliary_loss.item(), 0.3)


def product_key(ffn, query):
    """The memory over all n^2 keys of one token's normed query (paper, equations 1 to 3 and section 3.2)."""
    y = 0
    for q, (first, second) in zip(query.chunk(2), ffn.keys, strict=True):
        scores = torch.stack([q @ torch.cat([c, d]) for c in first for d in second])
        best = scores.argsort(descending=True)[:3]
        weights = scores[best].exp() / scores[best].exp().sum()
        y = y + weights @ ffn.values[best]
    return y


def test_product_key_is_its_equation_over_all_keys():
    ffn = small(ProductKeyFFN).eval()
    norm = ffn.query_norm
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = tokens(ffn, 2, 3)
    query = x @ ffn.query.weight.T
    query = (query - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    expected = torch.stack([product_key(ffn, q) for q in query.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(ffn(x), expected)


def test_product_key_norms_its_queries_over_the_batch_in_training():
    ffn = small(ProductKeyFFN)
    norm = ffn.query_norm
    x = tokens(ffn, 2, 4)
    query = (x @ ffn.query.weight.T).flatten(0, 1)
    mean, var = query.mean(0), query.var(0, unbiased=False)
    normed = (query - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    expected = torch.stack([product_key(ffn, q) for q in normed]).view_as(x)
    torch.testing.assert_close(ffn(x), expected)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * query.var(0))
    before = norm.running_mean.clone()
    ffn(x[:1, :1])  # one token has no variance: it uses the statistics and leaves them
    assert torch.equal(norm.running_mean, before)
    torch.testing.assert_close(ffn(x[:1, :1]), ffn.eval()(x[:1, :1]))
    assert {"query_norm.running_mean", "query_norm.running_var"} <= ffn.state_dict().keys()


def leaf_output(ffn, i, token):
    return gelu(ffn.up[i] @ token + ffn.up_bias[i]) @ ffn.down[i] + ffn.down_bias[i]


def soft(ffn, token, level=0, n=0):
    """FORWARD_T of algorithm 1."""
    if level == ffn.depth:
        return leaf_output(ffn, n, token)
    node = 2**level - 1 + n
    c = torch.sigmoid(ffn.nodes.weight[node] @ token + ffn.nodes.bias[node])
    return c * soft(ffn, token, level + 1, 2 * n + 1) + (1 - c) * soft(ffn, token, level + 1, 2 * n)


def hard(ffn, token, level=0, n=0):
    """FORWARD_I of algorithm 1."""
    if level == ffn.depth:
        return leaf_output(ffn, n, token)
    node = 2**level - 1 + n
    c = torch.sigmoid(ffn.nodes.weight[node] @ token + ffn.nodes.bias[node])
    return hard(ffn, token, level + 1, 2 * n + 1 if c >= 0.5 else 2 * n)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_fast_feedforward_is_its_algorithm(depth):
    ffn = small(FastFeedForward, depth=depth)
    x = tokens(ffn, 3, 5)
    torch.testing.assert_close(ffn(x), torch.stack([soft(ffn, t) for t in x.flatten(0, 1)]).view_as(x))
    ffn.eval()
    torch.testing.assert_close(ffn(x), torch.stack([hard(ffn, t) for t in x.flatten(0, 1)]).view_as(x))


def test_a_hardened_tree_is_the_same_in_training_and_evaluation():
    ffn = small(FastFeedForward)
    ffn.nodes.weight.data *= 1e6
    x = tokens(ffn, 6)
    soft_y = ffn(x)
    assert ffn.auxiliary_loss.item() == 0  # finite, where log(p) is not
    torch.testing.assert_close(soft_y, ffn.eval()(x))


def test_fast_feedforward_hardens_by_the_entropy_of_its_nodes():
    ffn = small(FastFeedForward, hardening=0.7)
    x = tokens(ffn, 2, 5)
    ffn(x)
    p = torch.sigmoid(x @ ffn.nodes.weight.T + ffn.nodes.bias)
    entropy = -p * p.log() - (1 - p) * (1 - p).log()
    torch.testing.assert_close(ffn.auxiliary_loss, 0.7 * entropy.mean())
    (gradient,) = torch.autograd.grad(ffn.auxiliary_loss, ffn.nodes.weight)
    assert gradient.abs().max() > 0


def memory_layer(layer, token, bits):
    """A lookup layer on one token, its weights by the softmax over all sign patterns."""
    y = layer.bias
    for table, z in zip(layer.tables, token.split(bits), strict=True):
        p = (bucket_signs(bits) @ z).softmax(-1)
        y = y + p.max() * table[p.argmax()]
    return y


def test_memory_former_is_its_equation():
    ffn = small(MemoryFormerFFN)
    assert ffn.memory_1.tables.shape == (4, 8, 20)
    assert ffn.memory_2.tables.shape == (4, 32, 12)
    x = tokens(ffn, 2, 3)
    expected = []
    for token in x.flatten(0, 1):
        middle = memory_layer(ffn.memory_1, token, 3)
        middle = (middle - middle.mean()) / (middle.var(unbiased=False) + 1e-5).sqrt()
        expected.append(memory_layer(ffn.memory_2, middle * ffn.norm.weight + ffn.norm.bias, 5))
    torch.testing.assert_close(ffn(x), torch.stack(expected).view_as(x))


# ---- The interface ---------------------------------------------------------------------------------------------------


@every_baseline
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (2, 3)])
def test_any_leading_shape_keeps_its_shape_and_dtype(kind, dtype, training, shape):
    ffn = small(kind, dtype).train(training)
    x = tokens(kind, *shape, dtype=dtype)
    with torch.no_grad():
        y = ffn(x)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.isfinite().all()
    loss = getattr(ffn, "auxiliary_loss", None)
    if training and kind in (SwitchFFN, FastFeedForward):
        assert loss.shape == ()
        assert loss.isfinite()
        assert loss.item() > 0 or x.numel() == 0
    else:
        assert loss is None


@pytest.mark.parametrize("kind", [SwitchFFN, FastFeedForward])
def test_evaluation_forgets_the_loss_of_training(kind):
    ffn = small(kind)
    ffn(tokens(kind, 3))
    assert ffn.auxiliary_loss is not None
    ffn.eval()(tokens(kind, 3))
    assert ffn.auxiliary_loss is None


@every_baseline
def test_a_token_has_one_output_in_any_batch(kind):
    ffn = small(kind).eval()
    x = tokens(kind, 9)
    torch.testing.assert_close(ffn(x), torch.cat([ffn(x[:4]), ffn(x[4:5]), ffn(x[5:])]))
    torch.testing.assert_close(ffn(x.view(3, 3, -1).transpose(0, 1)), ffn(x).view(3, 3, -1).transpose(0, 1))


@every_baseline
@pytest.mark.parametrize("count", [0, 1, 40])
def test_every_parameter_gets_a_gradient(kind, count):
    ffn = small(kind)
    x = tokens(kind, count).requires_grad_()
    loss = ffn(x).square().sum()
    if getattr(ffn, "auxiliary_loss", None) is not None:
        loss = loss + ffn.auxiliary_loss
    loss.backward()
    for name, parameter in ffn.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if count == 40:
            assert parameter.grad.abs().max() > 1e-6, name  # more than rounding
    assert x.grad.shape == x.shape


@every_baseline
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_finite_differences(kind, training):
    ffn = small(kind).train(training)
    names = list(dict(ffn.named_parameters()))

    def call(x, *parameters):
        y = torch.func.functional_call(ffn, dict(zip(names, parameters, strict=True)), (x,))
        extra = getattr(ffn, "auxiliary_loss", None)
        return y if extra is None else y + extra

    x = tokens(kind, 4).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *ffn.parameters()), fast_mode=True)


@every_baseline
def test_float32_is_float64_rounded(kind):  # the sum of rows runs in the kernels in the one, in PyTorch in the other
    narrow = kind(128, 512)
    wide = kind(128, 512, dtype=torch.float64)
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(50, 128)
    y, expected = narrow(x), wide(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        close = torch.allclose(p.grad.double(), q.grad, rtol=1e-3, atol=1e-4 * q.grad.abs().max().item())
        assert close, name


@every_baseline
def test_initialisation_follows_the_seed_and_the_model(kind):
    hidden_size, intermediate_size, options = SMALL[kind]
    torch.manual_seed(3)
    first = kind(hidden_size, intermediate_size, **options)
    torch.manual_seed(3)
    again = kind(hidden_size, intermediate_size, **options)
    for name, value in again.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
    torch.manual_seed(3)
    first.init_parameters(0.02)
    initial = {name: p.clone() for name, p in first.named_parameters()}
    torch.manual_seed(3)
    first.init_parameters(0.08)
    ratios = {p.std().item() / initial[n].std().item() for n, p in first.named_parameters() if initial[n].std() > 0}
    grows = {ProductKeyFFN: 1, MemoryFormerFFN: 1, LowRankFFN: 2, MonarchFFN: 2}.get(kind, 4)
    assert max(ratios) == pytest.approx(grows)


def as_the_model_does(module):
    for child in module.modules():
        if isinstance(child, torch.nn.Linear):
            torch.nn.init.normal_(child.weight, 0.0, 0.02)
            if child.bias is not None:
                torch.nn.init.zeros_(child.bias)
    return module


@pytest.mark.parametrize("kind", [k for k in SMALL if k not in (ProductKeyFFN, MemoryFormerFFN)])
def test_the_output_starts_as_large_as_the_dense_one(kind):
    dense = as_the_model_does(DenseFFN(128, 512))
    x = torch.randn(1000, 128)
    ffn = as_the_model_does(kind(128, 512)).eval()
    with torch.no_grad():
        y = ffn(x)
        if kind is SwitchFFN:  # its gate comes on top
            y = y / ffn.router(x).softmax(-1).amax(-1, keepdim=True)
        assert y.std().item() == pytest.approx(dense(x).std().item(), rel=0.2)


def test_memories_start_as_the_authors():
    memory = ProductKeyFFN(128, 512)
    assert memory.values.std().item() == pytest.approx(128**-0.5, rel=0.01)
    assert memory.keys.abs().max().item() == pytest.approx(8**-0.5, rel=0.01)
    y = memory(torch.randn(1000, 128))
    assert y.std().item() == pytest.approx((4 / (16 * 128)) ** 0.5, rel=0.2)
    former = MemoryFormerFFN(128, 512)
    assert former.memory_1.tables.std().item() == pytest.approx(0.02, rel=0.01)
    assert former.memory_2.tables.std().item() == pytest.approx(0.02, rel=0.01)
    y = former(torch.randn(1000, 128))
    assert y.std().item() == pytest.approx(0.02 * (16 * 0.6266**10) ** 0.5, rel=0.2)


@every_baseline
def test_construction_on_the_meta_device(kind):
    ffn = kind(512, 2048, device="meta")
    assert all(p.device.type == "meta" for p in ffn.parameters())
    assert all(b.device.type == "meta" for b in ffn.buffers())


# ---- Costs -----------------------------------------------------------------------------------------------------------


@every_baseline
@pytest.mark.parametrize("count", [0, 1, 13])
def test_flops_are_those_that_pytorch_counts(kind, count):
    ffn = small(kind, torch.float32).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ffn(tokens(kind, count, dtype=torch.float32))
    assert ffn.flops(count) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("kind", "multiply_adds", "once", "each"),
    [
        (LowRankFFN, 3 * 2 * 17, 3 * 2 * 17 + 17, 0),
        (BlockDiagonalFFN, 360 / 3 + 360 / 2, 300 + 42, 0),
        (MonarchFFN, 2 * (360 + 144) / 3, 336 + 42, 0),
        (SwitchFFN, 7 * 3 + 2 * 7 * 5, 21, 2 * 35 + 5 + 7),
        (ProductKeyFFN, 2 * (7 * 6 + 5 * 6 + 3 * 7), 84 + 24 + 60, 2 * 3 * 7),
        (FastFeedForward, 2 * 7 + 2 * 7 * 5, 0, 2 * 8 + 2 * 35 + 5 + 7),
        (MemoryFormerFFN, 4 * 20 + 4 * 12, 20 + 12 + 40, 4 * 20 + 4 * 12),
    ],
)
def test_costs_by_hand(kind, multiply_adds, once, each):
    for dtype, size in ((torch.float32, 4), (torch.float64, 8)):
        ffn = small(kind, dtype)
        assert ffn.flops(11) == 2 * 11 * multiply_adds
        assert ffn.bytes_read(0) == size * once
        assert ffn.bytes_read(11) == size * (once + 11 * each)


@every_baseline
@pytest.mark.parametrize("sizes", [(128, 512), (512, 2048)])
def test_the_defaults_are_about_six_times_cheaper_than_dense(kind, sizes):
    ratio = DenseFFN(*sizes, device="meta").flops(1) / kind(*sizes, device="meta").flops(1)
    most = {ProductKeyFFN: 11, MemoryFormerFFN: 29}.get(kind, 7.5)
    assert 5 <= ratio <= most


# ---- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "option", "value", "message"),
    [
        (LowRankFFN, "rank", 0, "rank must be 1 to 24 .*, not 0"),
        (LowRankFFN, "rank", 25, "rank must be 1 to 24 .*, not 25"),
        (BlockDiagonalFFN, "up_blocks", 9, "up_blocks must .* divide hidden_size 24 and intermediate_size 36, not 9"),
        (BlockDiagonalFFN, "down_blocks", 9, "down_blocks must .* divide hidden_size 24 .*, not 9"),
        (BlockDiagonalFFN, "down_blocks", 8, "down_blocks must .* intermediate_size 36, not 8"),
        (BlockDiagonalFFN, "up_blocks", 0, "up_blocks must be at least 1 .*, not 0"),
        (MonarchFFN, "num_blocks", 9, "num_blocks must .* divide hidden_size 24 and intermediate_size 36, not 9"),
        (MonarchFFN, "num_blocks", 8, "num_blocks must .* intermediate_size 36, not 8"),
        (MonarchFFN, "num_blocks", -1, "num_blocks must be at least 1 .*, not -1"),
        (SwitchFFN, "num_experts", 0, "num_experts must be at least 1, not 0"),
        (SwitchFFN, "expert_size", 0, "expert_size must be at least 1, not 0"),
        (SwitchFFN, "load_balancing", -0.1, r"load_balancing must be at least 0, not -0\.1"),
        (ProductKeyFFN, "num_heads", 0, "num_heads must be at least 1, not 0"),
        (ProductKeyFFN, "num_keys", 0, "num_keys must be at least 1, not 0"),
        (ProductKeyFFN, "key_size", 5, "key_size must be even and at least 2, not 5"),
        (ProductKeyFFN, "key_size", 0, "key_size must be even and at least 2, not 0"),
        (ProductKeyFFN, "top_k", 129, r"top_k must be 1 to 128 \(num_keys\), not 129"),
        (ProductKeyFFN, "top_k", 0, r"top_k must be 1 to 128 \(num_keys\), not 0"),
        (FastFeedForward, "depth", 0, "depth must be 1 to 16, not 0"),
        (FastFeedForward, "depth", 17, "depth must be 1 to 16, not 17"),
        (FastFeedForward, "leaf_size", 0, "leaf_size must be at least 1, not 0"),
        (FastFeedForward, "hardening", float("nan"), "hardening must be at least 0, not nan"),
        (MemoryFormerFFN, "tau", 5, "tau must be 1 to 14 and divide hidden_size 24, not 5"),
        (MemoryFormerFFN, "tau", 0, "tau must be 1 to 14 .*, not 0"),
        (MemoryFormerFFN, "tau", 24, "tau must be 1 to 14 .*, not 24"),
    ],
)
def test_an_option_out_of_range_names_itself_its_value_and_the_range(kind, option, value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind(24, 36, **{option: value})


@every_baseline
def test_a_wrong_width_is_an_error(kind):
    ffn = small(kind)
    with pytest.raises(RuntimeError):
        ffn(tokens(kind, 4)[:, :-1])


def test_gelu_is_the_exact_one():
    z = torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(gelu(z), F.gelu(z))
