"""The compiled kernels of training: hash and gather of a trainable layer, forward and backward.

Every operator on every implementation is held against float64 by a bound on its rounding and against the plain PyTorch
that runs without the kernels. The score of a given bucket is, in float64, ``<z, S> prod_j sigmoid(2 z_j S_j)``: the
softmax over all sign patterns ``S`` is a product over the bits, so this needs no search and has autograd's gradient.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookupffn import LookupConfig, LookupFFN, native, ops, reference

F64 = torch.float64
EPS = 2.0**-24
BF16 = 2.0**-8  # the rounding to bfloat16, relative to the number
LEAST = 1e-37  # below this float32 loses digits
IMPLEMENTATIONS = [i["name"] for i in native.implementations() if i["runs_here"]]
TOKENS = [0, 1, 2, 255, 256, 257, 300]
TABLES = [1, 3, 16, 17]
BITS = [1, 2, 8, 16]
WIDTHS = [1, 3, 16, 33, 64, 130]
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = [
    pytest.mark.skipif(os.environ.get("LOOKUPFFN_NATIVE") == "0", reason="LOOKUPFFN_NATIVE=0"),
    pytest.mark.usefixtures("one_thread"),
]
every_implementation = pytest.mark.parametrize("isa", IMPLEMENTATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EXAMPLES = int(os.environ.get("LOOKUPFFN_TEST_EXAMPLES", "0"))  # of all property tests together; 0: a short run
property_test = settings(max_examples=EXAMPLES // 8 or 25, deadline=None, derandomize=not EXAMPLES, database=None)


@pytest.fixture
def without_kernels(monkeypatch):
    """A function that runs another one in plain PyTorch."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            return function(*args)

    return run


def native_ops():
    n = torch.ops.lookupffn
    return n.native_hash_codes, n.native_hash_codes_backward, n.native_gather, n.native_gather_backward


def assert_within(got, exact, bound):
    assert got.shape == exact.shape
    over = (got.double() - exact).abs() - bound
    assert (over <= 0).all(), f"{over.max().item():.3g} over its bound"


# ---- Hash ------------------------------------------------------------------------------------------------------------


def score_of_buckets(z, codes):
    """Scores (B, T, N) of given buckets (B, T, N), in float64 and differentiable in ``z (B, T, tau)``."""
    shifts = torch.arange(z.shape[-1] - 1, -1, -1)
    signs = (codes[..., None] >> shifts & 1) * 2.0 - 1  # (B, T, N, tau)
    along = z[:, :, None] * signs
    probability = torch.sigmoid(2 * along).prod(-1)
    return along.sum(-1) * probability, probability


def check_hash(isa, z, reads, plain_codes):
    hash_codes, hash_codes_backward, _, _ = native_ops()
    tau = z.shape[-1]
    codes, scores = hash_codes(z, reads, isa)
    assert codes.dtype == torch.int32
    assert codes.shape == scores.shape == (*z.shape[:2], reads)
    exact_z = z.double().requires_grad_()
    exact, probability = score_of_buckets(exact_z, codes)
    total = z.double().abs().sum(-1, keepdim=True)
    unit = (8 * tau + 20 + 4 * total) * EPS  # the last: what rounding an exponent of 2 m / ln 2 costs
    least = LEAST * (1 + total)  # probabilities stop at 2**-126, and are multiplied by sums of |z|
    assert_within(scores, exact.detach(), unit * total * probability + least)

    # The codes: the sign pattern, then patterns that are no less probable than those of plain PyTorch, none twice.
    shifts = torch.arange(tau - 1, -1, -1)
    assert torch.equal(codes[..., 0], ((z > 0) << shifts).sum(-1, dtype=torch.int32))
    signs, best_signs = ((c[..., None] >> shifts & 1) * 2.0 - 1 for c in (codes, plain_codes))
    inner, best = ((s * z.double()[:, :, None]).sum(-1) for s in (signs, best_signs))
    assert ((inner - best).abs() <= 8 * EPS * total).all()
    assert (codes.sort(-1).values.diff(dim=-1) != 0).all()

    grad = torch.randn_like(scores)
    grad_z = hash_codes_backward(grad, z, codes, isa)
    (expected,) = torch.autograd.grad(exact, exact_z, grad.double())
    size = (grad.double().abs() * probability * (1 + 2 * total)).sum(-1, keepdim=True)  # of each summand of a gradient
    least = LEAST * ((1 + 2 * total) * (1 + grad.double().abs())).sum(-1, keepdim=True)
    assert_within(grad_z, expected, 2 * unit * reads * size + least)
    return codes, scores, grad, grad_z


@every_implementation
@pytest.mark.parametrize("tau", BITS)
def test_hash_and_its_gradient_equal_float64(tau, isa, without_kernels):
    for i, tokens in enumerate(TOKENS):
        for tables in TABLES[i % 2 :: 2] if tokens else TABLES:
            z = torch.randn(tokens, tables, tau)
            for reads in range(1, min(4, 2**tau) + 1):
                plain_codes, plain_scores = without_kernels(ops._hash_codes, z, reads)
                codes, scores, grad, grad_z = check_hash(isa, z, reads, plain_codes)
                same = (codes == plain_codes).all(-1)
                assert same.sum() >= 0.99 * same.numel()
                torch.testing.assert_close(scores[same], plain_scores[same], rtol=1e-4, atol=1e-6)
                plain = without_kernels(ops._hash_codes_backward, grad, z, codes)
                torch.testing.assert_close(grad_z, plain, rtol=1e-4, atol=1e-5)


@property_test
@given(
    isa=st.sampled_from(IMPLEMENTATIONS),
    tokens=st.integers(0, 40),
    tables=st.integers(1, 40),
    tau=st.integers(1, 16),
    reads=st.integers(1, 4),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**32),
)
def test_hash_of_any_shape(isa, tokens, tables, tau, reads, scale, seed):
    z = torch.randn(tokens, tables, tau, generator=torch.Generator().manual_seed(seed)) * scale
    reads = min(reads, 2**tau)
    check_hash(isa, z, reads, ops._hash_codes(z.double(), reads)[0])  # float64: plain PyTorch


@every_implementation
def test_hash_on_boundaries_and_ties(isa):
    hash_codes, hash_codes_backward, _, _ = native_ops()
    z = torch.tensor([[[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]], [[-1.0, 1.0, -1.0]], [[-0.0, 2.0, 1.0]]])
    codes, scores = hash_codes(z, 3, isa)
    assert codes[:, 0].tolist() == [[0, 4, 2], [7, 3, 5], [2, 6, 0], [3, 7, 2]]
    assert scores[0].abs().max() == 0
    grad_z = hash_codes_backward(torch.ones_like(scores), z, codes, isa)
    assert (grad_z[z == 0] == 0).all()  # the sign of 0, as in plain PyTorch
    assert (grad_z[1] != 0).all()


@every_implementation
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_number_stays_in_its_row_of_the_hash(bad, isa):
    hash_codes, hash_codes_backward, _, _ = native_ops()
    z, grad = torch.randn(40, 3, 5), torch.randn(40, 3, 4)
    clean = hash_codes(z, 4, isa)
    clean_grad = hash_codes_backward(grad, z, clean[0], isa)
    z[17, 1, 2] = bad
    codes, scores = hash_codes(z, 4, isa)
    grad_z = hash_codes_backward(grad, z, codes, isa)
    others = torch.ones(40, 3, dtype=torch.bool)
    others[17, 1] = False
    assert torch.equal(codes[others], clean[0][others])
    assert torch.equal(scores[others], clean[1][others])
    assert torch.equal(grad_z[others], clean_grad[others])
    assert 0 <= codes.min() <= codes.max() < 32
    assert not scores[17, 1, 0].isfinite()


# ---- Gather ----------------------------------------------------------------------------------------------------------


def gather_case(tokens, tables, rows, reads, width, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, rows, (tokens, tables, reads), dtype=torch.int32, generator=g)
    scores = torch.randn(tokens, tables, reads, generator=g)
    table = torch.randn(tables, rows, width, generator=g).to(dtype)
    return table, codes, scores, torch.randn(tokens, width, generator=g).to(dtype)


def check_gather(isa, table, codes, scores, grad):
    _, _, gather, gather_backward = native_ops()
    tables, rows, width = table.shape
    columns = codes.shape[1] * codes.shape[2]
    rounding = BF16 if table.dtype == torch.bfloat16 else EPS
    doubles = table.double().requires_grad_(), scores.double().requires_grad_()
    exact = reference.gather(doubles[0], codes, doubles[1])
    size = reference.gather(table.double().abs(), codes, scores.double().abs())
    y = gather(table, codes, scores, isa)
    assert y.dtype == table.dtype
    assert_within(y, exact.detach(), 2 * columns * EPS * size + rounding * exact.detach().abs() + LEAST)

    grad_tables, grad_scores = gather_backward(grad, table, codes, scores, isa)
    assert (grad_tables.dtype, grad_scores.dtype) == (table.dtype, torch.float32)
    exact_tables, exact_scores = torch.autograd.grad(exact, doubles, grad.double())
    # How many summands an element of grad_tables has, and the sum of their sizes.
    flat = (codes + torch.arange(tables)[:, None] * rows).flatten().long()
    token = torch.arange(codes.shape[0]).repeat_interleave(columns)
    count = torch.bincount(flat, minlength=tables * rows).view(tables, rows, 1)
    size = torch.zeros(tables * rows, width, dtype=F64)
    size.index_add_(0, flat, (scores.double().flatten()[:, None] * grad.double()[token]).abs())
    bound = 2 * (count + 1) * EPS * size.view(table.shape)
    assert_within(grad_tables, exact_tables, bound + rounding * exact_tables.abs() + LEAST * (count > 0))
    rows_read = table.double().abs().flatten(0, 1)[flat].view(*codes.shape, width)
    size = (rows_read * grad.double().abs()[:, None, None]).sum(-1)
    assert_within(grad_scores, exact_scores, 2 * (width + 4) * EPS * size + LEAST)
    return y, grad_tables, grad_scores


# T, N, K: fewer and more rows than tokens, so packed slices and single rows; K need not be a power of two.
GATHER_SHAPES = [(1, 1, 2**16), (3, 3, 2**8), (17, 2, 2**8), (16, 1, 2), (3, 4, 4), (16, 4, 2), (3, 1, 100)]


@every_implementation
@every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_gather_and_its_gradients_equal_float64(width, dtype, isa, without_kernels):
    bound = 0.1 if dtype == torch.bfloat16 else 1e-5  # plain PyTorch rounds every partial sum to bfloat16
    for i, (tables, reads, rows) in enumerate(GATHER_SHAPES):
        rows = min(rows, 2**20 // width)
        for tokens in TOKENS[i % 2 :: 2]:
            case = gather_case(tokens, tables, rows, reads, width, dtype, seed=i)
            table, codes, scores, grad = case
            ours = check_gather(isa, *case)
            plain = (
                without_kernels(ops._gather, table, codes, scores),
                *without_kernels(ops._gather_backward, grad, table, codes, scores),
            )
            for a, b in zip(ours, plain, strict=True):
                assert (a.double() - b.double()).norm() <= bound * b.double().norm()


@property_test
@given(
    isa=st.sampled_from(IMPLEMENTATIONS),
    tokens=st.integers(0, 70),
    tables=st.integers(1, 20),
    rows=st.integers(1, 40),
    reads=st.integers(1, 5),
    width=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_gather_of_any_shape(isa, tokens, tables, rows, reads, width, dtype, seed):
    check_gather(isa, *gather_case(tokens, tables, rows, reads, width, dtype, seed))


@every_implementation
@every_dtype
def test_gather_of_a_token_alone_is_the_same_bits_as_in_any_batch(dtype, isa):
    gather = native_ops()[2]
    for rows, width, reads in ((16, 130, 1), (4, 33, 3), (2, 7, 2)):  # 300 tokens go through packed slices, few do not
        table, codes, scores, _ = gather_case(300, 17, rows, reads, width, dtype)
        whole = gather(table, codes, scores, isa)
        for first, last in ((0, 1), (299, 300), (5, 7), (0, 256), (1, 258)):
            assert torch.equal(gather(table, codes[first:last], scores[first:last], isa), whole[first:last])


@every_implementation
@every_dtype
def test_a_nan_stays_in_its_token(dtype, isa):
    _, _, gather, gather_backward = native_ops()
    for tokens, rows in ((40, 4), (40, 256)):
        table, codes, scores, grad = gather_case(tokens, 17, rows, 2, 70, dtype)
        clean, clean_scores = gather(table, codes, scores, isa), gather_backward(grad, table, codes, scores, isa)[1]
        scores[39, 4, 1] = grad[39, 3] = float("nan")
        y = gather(table, codes, scores, isa)
        assert torch.equal(y[:39], clean[:39])
        assert y[39].isnan().all()
        grad_tables, grad_scores = gather_backward(grad, table, codes, scores, isa)
        assert torch.equal(grad_scores[:39], clean_scores[:39])
        assert grad_scores[39].isnan().all()
        read = torch.zeros(17, rows, dtype=torch.bool)
        read[torch.arange(17).repeat_interleave(2), codes[39].flatten().long()] = True
        assert grad_tables[read].isnan().any(-1).all()
        assert not grad_tables[~read].isnan().any()


def test_a_row_that_nobody_reads_gets_zero_whatever_it_holds():
    _, _, gather, gather_backward = native_ops()
    table, codes, scores, grad = gather_case(33, 3, 5, 1, 20, torch.float32)
    codes.clamp_(1)
    table[:, 0] = float("nan")  # where the kernels' own padding would read
    assert gather(table, codes, scores, "").isfinite().all()
    grad_tables, grad_scores = gather_backward(grad, table, codes, scores, "")
    assert grad_scores.isfinite().all()
    assert (grad_tables[:, 0] == 0).all()


@every_implementation
def test_denormals_are_kept(isa):
    _, _, gather, gather_backward = native_ops()
    codes, scores = torch.zeros(1, 1, 1, dtype=torch.int32), torch.full((1, 1, 1), 2.0**-100)
    table, grad = torch.full((1, 1, 16), 2.0**-40), torch.full((1, 16), 2.0**-40)
    assert (gather(table, codes, scores, isa) == 2.0**-140).all()
    assert (gather_backward(grad, table, codes, scores, isa)[0] == 2.0**-140).all()


# ---- The same bits ---------------------------------------------------------------------------------------------------


def everything(z, reads, table, grad, isa):
    hash_codes, hash_codes_backward, gather, gather_backward = native_ops()
    codes, scores = hash_codes(z, reads, isa)
    y = gather(table, codes, scores, isa)
    grad_tables, grad_scores = gather_backward(grad, table, codes, scores, isa)
    return codes, scores, y, grad_tables, grad_scores, hash_codes_backward(grad_scores, z, codes, isa)


def whole_case(tokens, tables, tau, width, dtype):
    z, table, grad = torch.randn(tokens, tables, tau), torch.randn(tables, 2**tau, width), torch.randn(tokens, width)
    return z, table.to(dtype), grad.to(dtype)


# More work than is left to one thread; one slice and several, one table and many, packed slices and single rows.
@every_dtype
@pytest.mark.parametrize(
    ("tokens", "tables", "tau", "width", "reads"),
    [(700, 17, 8, 33, 1), (300, 40, 7, 130, 3), (5000, 1, 2, 64, 2), (257, 17, 8, 300, 2)],
)
def test_any_number_of_threads_gives_the_same_bits(tokens, tables, tau, width, reads, dtype):
    z, table, grad = whole_case(tokens, tables, tau, width, dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything(z, reads, table, grad, ""))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_hundred_runs_give_the_same_bits():
    torch.set_num_threads(2)
    z, table, grad = whole_case(300, 33, 7, 130, torch.float32)
    first = everything(z, 2, table, grad, "")
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(z, 2, table, grad, ""), strict=True))


def test_hash_is_the_same_bits_alone_and_on_every_implementation():
    hash_codes, hash_codes_backward, _, _ = native_ops()
    for tau in BITS:
        z, reads = torch.randn(37, 5, tau), min(4, 2**tau)
        grad = torch.randn(37, 5, reads)
        results = []
        for isa in IMPLEMENTATIONS:
            codes, scores = hash_codes(z, reads, isa)
            grad_z = hash_codes_backward(grad, z, codes, isa)
            results.append((codes, scores, grad_z))
            alone = hash_codes(z[20:21], reads, isa)
            assert torch.equal(alone[0], codes[20:21])
            assert torch.equal(alone[1], scores[20:21])
            assert torch.equal(hash_codes_backward(grad[20:21], z[20:21], codes[20:21], isa), grad_z[20:21])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- Within the layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LookupConfig(40, 33, num_tables=17, code_bits=5, block_size=8),
        LookupConfig(40, 70, num_tables=9, code_bits=7, projection="dense", reads=3),
        LookupConfig(24, 16, num_tables=6, code_bits=4, projection="none", reads=4),
    ],
    ids=lambda c: f"{c.projection}-N{c.reads}",
)
@pytest.mark.parametrize("tokens", [3, 150])
def test_gradients_of_the_whole_layer_equal_float64(tokens, config):
    layer = LookupFFN(config)
    exact = LookupFFN(config, dtype=F64)
    exact.load_state_dict(layer.state_dict())
    x, grad = torch.randn(tokens, config.in_features), torch.randn(tokens, config.out_features)

    def codes_and_gradients(layer, x, grad):
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(grad)
        z = layer.projection(x.detach()).detach().view(tokens, config.num_tables, config.code_bits)
        return ops.hash_codes(z, config.reads)[0], y.detach(), x.grad, *(p.grad for p in layer.parameters())

    ours = codes_and_gradients(layer, x, grad)
    theirs = codes_and_gradients(exact, x.double(), grad.double())
    assert torch.equal(ours[0], theirs[0])  # the seed is one at which no number lies that near to zero
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert (a.double() - b).norm() <= 2e-6 * b.norm()


def test_the_layers_operators_run_in_the_kernels(without_kernels):
    """Bit for bit the native operators for float32 and bfloat16, and plain PyTorch elsewhere."""
    n = torch.ops.lookupffn
    z, table, grad = whole_case(70, 5, 6, 40, torch.float32)
    codes, scores, y, grad_tables, grad_scores, grad_z = everything(z, 2, table, grad, "")
    leaves = z.clone().requires_grad_(), table.clone().requires_grad_()
    got_codes, got_scores = n.hash_codes(leaves[0], 2)
    got_y = n.gather(leaves[1], got_codes, got_scores)
    got_grads = torch.autograd.grad(got_y, (got_scores, *leaves), grad)
    expected = codes, scores, y, grad_scores, grad_z, grad_tables
    assert all(map(torch.equal, (got_codes, got_scores, got_y, *got_grads), expected))
    assert not torch.equal(without_kernels(n.hash_codes, z, 2)[1], scores)  # other roundings, so another path
    narrow = table.bfloat16()
    assert torch.equal(n.gather(narrow, codes, scores), n.native_gather(narrow, codes, scores, ""))
    for tables, code in ((table.double(), codes), (table, codes.long())):
        assert torch.equal(n.gather(tables, code, scores), without_kernels(n.gather, tables, code, scores))
    assert torch.equal(n.hash_codes(z.double(), 2)[1], without_kernels(n.hash_codes, z.double(), 2)[1])


def test_rows_that_lie_apart_give_the_same():
    hash_codes, hash_codes_backward, gather, gather_backward = native_ops()
    z, table, grad = whole_case(50, 5, 4, 40, torch.float32)
    codes, scores, y, grad_tables, grad_scores, grad_z = everything(z, 2, table, grad, "")

    def apart(t):
        return t.repeat_interleave(2, -1)[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)

    z, table, grad, codes, scores, grad_in = map(apart, (z, table, grad, codes, scores, grad_scores))
    assert not any(t.is_contiguous() for t in (z, table, grad, codes, scores, grad_in))
    for a, b in zip(hash_codes(z, 2, ""), (codes, scores), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(hash_codes_backward(grad_in, z, codes, ""), grad_z)
    assert torch.equal(gather(table, codes, scores, ""), y)
    assert torch.equal(gather_backward(grad, table, codes, scores, "")[0], grad_tables)
    assert torch.equal(gather_backward(grad, table, codes, scores, "")[1], grad_scores)
    ones = torch.ones(()).expand(50, 40)  # as the gradient of a sum comes
    assert torch.equal(
        gather_backward(ones, table, codes, scores, "")[0],
        gather_backward(ones.contiguous(), table, codes, scores, "")[0],
    )


# ---- Errors ----------------------------------------------------------------------------------------------------------


def test_hash_refuses_what_does_not_fit():
    hash_codes, hash_codes_backward, _, _ = native_ops()
    z = torch.randn(4, 3, 5)
    codes, scores = hash_codes(z, 2, "")
    for bad in (z[0], z.double(), z.bfloat16(), torch.zeros(4, 3, 17), torch.zeros(4, 3, 0)):
        with pytest.raises(RuntimeError, match=r"z must be \(B, T, 1 to 16\) in float32"):
            hash_codes(bad, 1, "")
    for reads, one in ((0, z), (5, z), (-1, z), (3, z[:, :, :1])):
        with pytest.raises(RuntimeError, match=f"reads must be 1 to 4 and at most the number of buckets, not {reads}"):
            hash_codes(one, reads, "")
    for grad, code in (
        (scores.double(), codes),
        (scores, codes.long()),
        (scores[:3], codes),
        (scores[:3], codes[:3]),
        (scores[:, :, :1], codes),
        (scores[:, :2], codes[:, :2]),
        (scores.repeat(1, 1, 3), codes.repeat(1, 1, 3)),
    ):
        with pytest.raises(RuntimeError, match=r"grad \(float32\) and codes \(int32\) must be"):
            hash_codes_backward(grad, z, code, "")
    with pytest.raises(RuntimeError, match="there is no implementation 'sse9'"):
        hash_codes(z, 1, "sse9")


def test_gather_refuses_what_does_not_fit():
    _, _, gather, gather_backward = native_ops()
    table, codes, scores, grad = gather_case(4, 3, 8, 2, 5, torch.float32)

    def refused(message, table=table, codes=codes, scores=scores, grad=None):
        if grad is None:
            with pytest.raises(RuntimeError, match=message):
                gather(table, codes, scores, "")
        with pytest.raises(RuntimeError, match=message):
            gather_backward(torch.zeros(4, 5) if grad is None else grad, table, codes, scores, "")

    for bad in (table[0], table.double(), table.half(), table[:, :0], table[:, :, :0], table[:0]):
        refused("tables must be", table=bad)
    for bad in (codes.long(), codes[:3], codes[:, :2], codes[0], codes[:, :, :1]):
        refused("codes .* and scores", codes=bad)
    for bad in (scores.double(), scores.bfloat16(), scores[:3]):
        refused("codes .* and scores", scores=bad)
    refused("codes .* and scores", codes=codes[:, :2], scores=scores[:, :2])
    refused("codes .* and scores", codes=codes[:, :, :0], scores=scores[:, :, :0])
    for bad in (grad[:3], grad[:, :4], grad.double(), grad.bfloat16(), grad[0]):
        refused("grad must be", grad=bad)


@pytest.mark.parametrize("bad", [8, -1, 2**31 - 1, -(2**31)])
def test_gather_checks_every_code(bad):
    _, _, gather, gather_backward = native_ops()
    table, codes, scores, grad = gather_case(900, 3, 8, 2, 5, torch.float32)
    for place in (0, 7, 2500, codes.numel() - 1):
        wrong = codes.clone()
        wrong.view(-1)[place] = bad
        for call in (lambda c: gather(table, c, scores, ""), lambda c: gather_backward(grad, table, c, scores, "")):
            with pytest.raises(RuntimeError, match=f"code {bad} of token {place // 6} lies outside tables of 8 rows"):
                call(wrong)
