"""SLIDE, MONGOOSE and YOSO against their papers' equations, written here token by token and neuron by neuron."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lookupffn.ffns.dense import DenseFFN
from lookupffn.ffns.hashed import hash_codes
from lookupffn.ffns.mongoose import MongooseFFN
from lookupffn.ffns.slide import SlideFFN
from lookupffn.ffns.yoso import YosoFFN
from lookupffn.reference import hadamard_matrix

D, H = 12, 20  # neither a power of two nor a multiple of 8
every_ffn = pytest.mark.parametrize("kind", [SlideFFN, MongooseFFN, YosoFFN])
retrieving = pytest.mark.parametrize("kind", [SlideFFN, MongooseFFN])


def make(kind, seed=0, width=D, inner=H, **options):
    torch.manual_seed(seed)
    if kind is not YosoFFN:
        options = {"num_tables": 5, "hash_bits": 2, "active": 7} | options
    ffn = kind(width, inner, dtype=torch.float64, **options)
    ffn.init_parameters(1.0)  # large, so that no gradient is lost in rounding
    return ffn


def tokens(*shape, seed=1, width=D):
    return torch.randn(*shape, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive_code(v, projection, table, bits):
    code = 0
    for j in range(bits):
        code = 2 * code + (sum(v[i] * projection[i, table * bits + j] for i in range(len(v))).item() > 0)
    return code


def naive_selection(ffn, x, projection, weight):
    """S(x) of one token as a set: most collisions first, ties cyclically from the neuron of the first code on."""
    codes = [naive_code(x, projection, t, ffn.hash_bits) for t in range(ffn.num_tables)]
    start = codes[0] * H // 2**ffn.hash_bits
    collisions = {
        j: sum(naive_code(weight[j], projection, t, ffn.hash_bits) == codes[t] for t in range(ffn.num_tables))
        for j in range(H)
    }
    return set(sorted(collisions, key=lambda j: (-collisions[j], (j - start) % H))[: ffn.active])


def naive_retrieving(ffn, x, projection, weight):
    """The output of the selected neurons only, differentiable, for tokens ``x (B, D)``."""
    outputs = []
    for token in x:
        y = ffn.down.bias
        for j in naive_selection(ffn, token.detach(), projection, weight):
            z = ffn.up.weight[j] @ token + ffn.up.bias[j]
            y = y + ffn.down.weight[:, j] * z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        outputs.append(y)
    return torch.stack(outputs)


def hashing(ffn):
    return (ffn.projection if isinstance(ffn, MongooseFFN) else ffn.hash_weight).detach().clone()


@retrieving
@pytest.mark.parametrize("options", [{}, {"active": 1}, {"active": H}, {"num_tables": 1, "hash_bits": 7}])
def test_only_retrieved_neurons_give_output_and_gradient(kind, options):
    ffn, x = make(kind, **options), tokens(3).requires_grad_()
    expected = naive_retrieving(ffn, x, hashing(ffn), ffn.up.weight.detach())
    for training in (False, True):
        torch.testing.assert_close(ffn.train(training)(x), expected, rtol=1e-12, atol=1e-12)
    wanted = [x, *ffn.up.parameters(), *ffn.down.parameters()]
    g = tokens(3, seed=2)
    ours = torch.autograd.grad(ffn(x), wanted, g)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, wanted, g), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    never = ~ffn.select(x).any(0)
    assert never.any() == (ffn.active < H)
    assert (ours[1][never] == 0).all()
    assert (ours[3][:, never] == 0).all()
    assert (ffn.select(x).sum(-1) == ffn.active).all()


@pytest.mark.parametrize("width", [1, 2, 3, 12, 43, 48, 49, 128])
def test_slide_projects_on_signs_two_thirds_of_them_zero(width):
    weight = SlideFFN(width, H, num_tables=4, hash_bits=3).hash_weight
    assert ((weight == 0) | (weight.abs() == 1)).all()
    assert (weight.abs().sum(0) == math.ceil(width / 3)).all()
    assert weight.unique().numel() == (3 if width > 1 else 2)


def test_autocast_moves_no_code():
    x, projection = torch.randn(200, D), torch.randn(D, 30)
    with torch.autocast("cpu", torch.bfloat16):
        codes = hash_codes(x, projection, 6)
    assert torch.equal(codes, hash_codes(x, projection, 6))


def test_slide_rehashes_on_the_exponential_schedule_and_keeps_codes_in_between():
    ffn, x = make(SlideFFN, rehash_period=3, rehash_growth=0.4), tokens(2)
    ffn.eval()(x)
    assert ffn.rehashes == 0  # evaluation moves nothing
    due = {0, *(math.ceil(sum(3 * math.exp(0.4 * i) for i in range(t))) for t in range(1, 5))}  # 0, 3, 8, 15, 24
    ffn.train()
    hashed = ffn.up.weight.detach().clone()
    for step in range(26):
        before = int(ffn.rehashes)
        with torch.no_grad():
            ffn.up.weight.copy_(tokens(H, seed=100 + step))
        expected_weights = ffn.up.weight.detach().clone() if step in due else hashed
        y = ffn(x)
        assert (int(ffn.rehashes) > before) == (step in due), step
        hashed = expected_weights
        torch.testing.assert_close(y, naive_retrieving(ffn, x, hashing(ffn), hashed), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ffn.eval()(x), y, rtol=0, atol=0)  # the tables as training left them
    assert ffn.step == 26


@retrieving
def test_few_neurons_share_the_ties(kind):
    ffn = make(kind, num_tables=1, hash_bits=4, active=3)
    share = ffn.eval().select(tokens(2000)).double().mean(0)
    assert share.max() < 0.5  # an order by index alone would give neurons 0 to 2 to nearly every token


def test_mongoose_rehashes_when_enough_codes_would_change_and_keeps_its_projection_until_then():
    ffn, x = make(MongooseFFN, rehash_threshold=0.3), tokens(3)
    ffn.train()(x)
    assert ffn.rehashes == 1
    built_with, built_from = hashing(ffn), ffn.up.weight.detach().clone()
    original = ffn.codes.clone()

    def changed(weight):
        new = [[naive_code(w, ffn.projection, t, ffn.hash_bits) for t in range(ffn.num_tables)] for w in weight]
        return (torch.tensor(new) != original).double().mean().item()

    with torch.no_grad():
        ffn.projection.add_(0.02 * tokens(10, seed=3).T)
        ffn.up.weight[:4] = -ffn.up.weight[:4]  # about a fifth of the codes
    assert 0.05 < changed(ffn.up.weight.detach()) < 0.3
    y = ffn(x)
    assert ffn.rehashes == 1
    torch.testing.assert_close(y, naive_retrieving(ffn, x, built_with, built_from), rtol=1e-12, atol=1e-12)

    with torch.no_grad():
        ffn.up.weight[4:8] = -ffn.up.weight[4:8]
    assert 0.3 < changed(ffn.up.weight.detach()) < 0.5
    y = ffn(x)
    assert ffn.rehashes == 2
    now = naive_retrieving(ffn, x, hashing(ffn), ffn.up.weight.detach())
    torch.testing.assert_close(y, now, rtol=1e-12, atol=1e-12)
    ffn(x)
    assert ffn.rehashes == 2  # compared with the new codes


def test_mongoose_builds_its_tables_at_the_first_step_whatever_the_threshold():
    ffn = make(MongooseFFN, rehash_threshold=1.0).train()
    ffn(tokens(2))
    assert ffn.rehashes == 1


def naive_triplet_loss(ffn, x, projection):
    weight, losses = ffn.up.weight.detach(), []

    def relaxed(v):
        return torch.tanh(math.sqrt(D) * v / v.norm() @ projection)

    def cosine(a, b):
        return a @ b / (a.norm() * b.norm())

    for token in x.detach():
        inner = (weight @ token).tolist()
        ranked = sorted(range(H), key=lambda j: -inner[j])
        selected = naive_selection(ffn, token, projection.detach(), weight)
        missed = [j for j in ranked[: ffn.active] if j not in selected]
        wrong = [j for j in ranked if inner[j] < sorted(inner)[(H - 1) // 2] and j in selected]
        if missed and wrong:
            near, far = (
                sum(cosine(relaxed(token), relaxed(weight[j])) for j in group) / len(group) for group in (missed, wrong)
            )
            losses.append(torch.clamp(far - near + ffn.margin, min=0))
    return ffn.auxiliary_weight * sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("margin", [1.0, 0.1])
def test_mongoose_learns_its_hash_by_the_triplet_loss_alone(margin):
    ffn, x = make(MongooseFFN, margin=margin, auxiliary_weight=0.5).train(), tokens(9).requires_grad_()
    y = ffn(x)
    projection = ffn.projection.detach().clone().requires_grad_()
    expected, counted = naive_triplet_loss(ffn, x, projection)
    assert counted > 0
    torch.testing.assert_close(ffn.auxiliary_loss, expected, rtol=1e-12, atol=1e-12)
    (ours,) = torch.autograd.grad(ffn.auxiliary_loss, ffn.projection, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, projection)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    ffn.auxiliary_loss.backward()
    assert x.grad is None
    assert all(p.grad is None for p in (*ffn.up.parameters(), *ffn.down.parameters()))
    assert torch.autograd.grad(y.sum(), ffn.projection, allow_unused=True) == (None,)


def test_mongoose_without_a_mistake_has_a_loss_of_zero():
    ffn = make(MongooseFFN, active=H).train()  # all neurons are selected: none is missed
    ffn(tokens(4))
    assert ffn.auxiliary_loss == 0
    ffn.eval()(tokens(4))
    assert ffn.auxiliary_loss is None


def test_mongoose_training_on_its_loss_retrieves_more_of_the_largest_neurons():
    ffn = make(MongooseFFN, num_tables=4, hash_bits=3, active=6, inner=40).train()
    x = tokens(64, width=3) @ tokens(3, seed=2) + 0.2 * tokens(64, seed=3)  # near a subspace, for there to be a gain

    def recall():
        ffn.rehash()
        largest = (x @ ffn.up.weight.T).topk(6).indices
        return ffn.select(x).gather(-1, largest).double().mean().item()

    before, optimizer = recall(), torch.optim.Adam([ffn.projection], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        ffn(x)
        ffn.auxiliary_loss.backward()
        optimizer.step()
    assert recall() > before + 0.1


def naive_rotations(ffn):
    """``(D, m tau)``: unit vectors, padded, through H D_3 H D_2 H D_1 of every repeat."""
    generator = torch.Generator().manual_seed(int(ffn.seed))
    signs = torch.randint(2, (3, ffn.repeats, ffn.padded), generator=generator).double() * 2 - 1
    hadamard, outs = hadamard_matrix(ffn.padded), []
    for r in range(ffn.repeats):
        matrix = torch.eye(ffn.padded, dtype=torch.float64)
        for stage in range(3):
            matrix = hadamard @ torch.diag(signs[stage, r]) @ matrix
        outs.append(matrix[:, :D].T)
    return torch.cat(outs, 1)[:, : ffn.num_hashes * ffn.hash_bits]


def yoso_codes(ffn, v):
    projection = naive_rotations(ffn)
    return [[naive_code(row, projection, i, ffn.hash_bits) for i in range(ffn.num_hashes)] for row in v.detach()]


def length_one(v):
    return v / v.norm() if v.norm() > 0 else v


@pytest.mark.parametrize(("num_hashes", "hash_bits"), [(9, 3), (1, 1), (4, 4), (30, 2)])
def test_yoso_is_the_average_of_collisions_with_the_lower_bound_as_gradient(num_hashes, hash_bits):
    ffn = make(YosoFFN, num_hashes=num_hashes, hash_bits=hash_bits).eval()
    with torch.no_grad():
        ffn.bias.normal_()
    x, g = tokens(5).requires_grad_(), tokens(5, seed=2)
    codes, key_codes = yoso_codes(ffn, x), yoso_codes(ffn, ffn.keys)
    collides = [[sum(map(int.__eq__, a, b)) / num_hashes for b in key_codes] for a in codes]
    share = torch.tensor(collides, dtype=torch.float64)  # B (tokens, H)
    assert share.sum() > 0
    attended = share @ ffn.values
    torch.testing.assert_close(ffn(x), torch.stack([length_one(a) for a in attended]) + ffn.bias)

    # The gradient: dL/dB by hand through l2, then times tau / 2 B, then through the cosine
    sums = attended.detach().requires_grad_()
    (dsums,) = torch.autograd.grad(torch.stack([length_one(a) for a in sums]), sums, g)
    dcosine = (dsums @ ffn.values.detach().T) * hash_bits / 2 * share
    cosine = torch.stack([torch.stack([length_one(a) @ length_one(k) for k in ffn.keys]) for a in x])
    dx, dkeys = torch.autograd.grad(cosine, (x, ffn.keys), dcosine)
    for ours, theirs in zip(
        torch.autograd.grad(ffn(x), (x, ffn.keys, ffn.values, ffn.bias), g),
        (dx, dkeys, share.T @ dsums, g.sum(0)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_yoso_equals_its_execution_by_tables():
    ffn, x = make(YosoFFN, num_hashes=7, hash_bits=3).eval(), tokens(4, 5)
    tables = torch.zeros(7, 2**3, D, dtype=torch.float64)
    for j, codes in enumerate(yoso_codes(ffn, ffn.keys)):
        for i, code in enumerate(codes):
            tables[i, code] += ffn.values[j].detach()
    rows = [
        length_one(sum(tables[i, code] for i, code in enumerate(codes))) for codes in yoso_codes(ffn, x.flatten(0, 1))
    ]
    torch.testing.assert_close(ffn(x), torch.stack(rows).view(4, 5, D) + ffn.bias, rtol=1e-12, atol=1e-12)


def test_yoso_estimates_the_probability_of_a_collision():
    ffn = make(YosoFFN, num_hashes=4000, hash_bits=4, inner=6, width=64).eval()
    x = tokens(3, width=64) + ffn.keys[:3].detach()  # at angles of about 45 and 90 degrees
    with torch.no_grad():
        ffn.values.copy_(torch.eye(6, 64))
        cosine = F.cosine_similarity(x[:, None], ffn.keys[None], dim=-1)
        expected = (1 - torch.arccos(cosine) / math.pi) ** 4
        torch.testing.assert_close(ffn(x)[:, :6], F.normalize(expected, dim=-1), rtol=0, atol=0.03)


def test_yoso_draws_its_hashes_anew_in_every_training_step_only():
    ffn, x = make(YosoFFN, num_hashes=6, hash_bits=3), tokens(8)
    first, second = ffn.train()(x), ffn(x)
    assert not torch.equal(first, second)
    assert torch.equal(ffn.eval()(x), second)
    assert torch.equal(ffn(x), second)
    assert not torch.equal(make(YosoFFN).projection(), make(YosoFFN, seed=1).projection())


@every_ffn
def test_resumed_training_is_the_same_bit_for_bit(kind):
    options = {SlideFFN: {"rehash_period": 2}, MongooseFFN: {"rehash_threshold": 0.05}, YosoFFN: {"num_hashes": 5}}[
        kind
    ]

    def train(ffn, steps):
        for step in steps:
            loss = ffn(tokens(6, seed=step)).square().mean()
            loss = loss + (ffn.auxiliary_loss or 0)
            loss.backward()
            with torch.no_grad():
                for p in ffn.parameters():
                    p.sub_(0.3 * p.grad)
                    p.grad = None
        return ffn

    whole = train(make(kind, **options).train(), range(9))
    half = train(make(kind, **options).train(), range(4))
    resumed = make(kind, seed=5, **options).train()
    resumed.load_state_dict(half.state_dict())
    train(resumed, range(4, 9))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert torch.equal(whole.eval()(tokens(3)), resumed.eval()(tokens(3)))
    if kind is not YosoFFN:
        assert whole.rehashes > half.rehashes > 0


@every_ffn
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_counts_a_step_once_and_recomputes_with_its_hash(kind, use_reentrant):
    options = {"rehash_period": 1} if kind is SlideFFN else {}
    results = []
    for checkpointed in (False, True):
        ffn, x = make(kind, **options).train(), tokens(6).requires_grad_()
        for _ in range(3):
            y = checkpoint(ffn, x, use_reentrant=use_reentrant) if checkpointed else ffn(x)
            extra = 0 if use_reentrant else ffn.auxiliary_loss or 0  # under the reentrant kind it has no graph
            (y.square().sum() + extra).backward()
        results.append([x.grad, *(p.grad for p in ffn.parameters() if p.grad is not None), *ffn.buffers()])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@every_ffn
def test_interface_of_an_ffn(kind):
    ffn = kind(D, H)
    for training in (True, False):
        ffn.train(training)
        for shape in ((0,), (1,), (2, 0, 3), ()):
            x = torch.randn(*shape, D, requires_grad=True)
            y = ffn(x)
            assert y.shape == x.shape
            assert y.dtype == torch.float32
            (y.sum() + (ffn.auxiliary_loss or 0)).backward()
            assert x.grad.isfinite().all()
        with torch.no_grad():
            assert ffn(torch.randn(3, D)).isfinite().all()
            x = torch.randn(4, 3, D)
            torch.testing.assert_close(ffn.eval()(x)[2, 1], ffn(x[2, 1]))
        with torch.autocast("cpu", torch.bfloat16):
            assert ffn(x).isfinite().all()
        with pytest.raises(RuntimeError, match=r"mat1 and mat2|size mismatch|must match"):
            ffn(torch.randn(2, D + 1))
    ffn.train()(torch.randn(2, D))
    copy.deepcopy(ffn.eval())  # a graph kept from training would not let itself be copied
    with torch.device("meta"):
        abstract = kind(100_000, 400_000)
    assert all(t.is_meta for t in (*abstract.parameters(), *abstract.buffers()))
    assert all(t.is_meta for t in kind(D, H, device="meta").state_dict().values())


@every_ffn
def test_same_seed_same_layer(kind):
    for (name, a), b in zip(make(kind).state_dict().items(), make(kind).state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@every_ffn
def test_init_parameters_draws_all_but_the_linear_layers(kind):
    ffn = make(kind, width=40, inner=90)
    with torch.no_grad():
        for tensor in ffn.state_dict().values():
            tensor.fill_(3)
    ffn.init_parameters(0.5)
    for name, tensor in ffn.state_dict().items():
        assert (tensor == 3).all() == name.startswith(("up.", "down.")), name
    if kind is YosoFFN:
        assert ffn.keys.std().item() == pytest.approx(0.5, rel=0.05)
        assert ffn.values.std().item() == pytest.approx(0.5, rel=0.05)
        assert (ffn.bias == 0).all()
    else:
        assert ffn.rehashes == 0
    if kind is MongooseFFN:
        assert ffn.projection.std().item() == pytest.approx(40**-0.5, rel=0.1)


def test_costs():
    slide = SlideFFN(D, H, num_tables=5, hash_bits=3, active=7)
    assert slide.flops(3) == 3 * 2 * (5 * 3 * 4 + 7 * 12 * 2)  # a third of 12 is 4
    assert slide.bytes_read(3) == 4 * (5 * 3 * 4 + 12 + 3 * 7 * (12 + 12 + 1))
    mongoose = MongooseFFN(D, H, num_tables=5, hash_bits=3, active=7)
    assert mongoose.flops(3) == 3 * 2 * (5 * 3 * 12 + 7 * 12 * 2)
    assert mongoose.bytes_read(3) == 4 * (5 * 3 * 12 + 12 + 3 * 7 * (12 + 12 + 1))
    yoso = YosoFFN(D, H, num_hashes=7, hash_bits=5, dtype=torch.float64)
    assert yoso.flops(3) == 3 * (3 * 3 * 16 * 4 + 2 * 7 * 12)  # 35 bits in 3 repeats of 16, each 3 times 16 log2(16)
    assert yoso.bytes_read(3) == 8 * (3 * 3 * 16 + 12 + 3 * 7 * 12)


@every_ffn
@pytest.mark.parametrize(("width", "inner"), [(128, 512), (512, 2048), (768, 3072)])
def test_by_default_about_six_times_fewer_operations_than_dense(kind, width, inner):
    ffn = kind(width, inner, device="meta")
    assert 5 < DenseFFN(width, inner, device="meta").flops(7) / ffn.flops(7) < 7.5


@pytest.mark.parametrize(
    ("kind", "option", "value", "expected"),
    [
        (SlideFFN, "num_tables", 0, "at least 1"),
        (SlideFFN, "hash_bits", 17, "1 to 16"),
        (SlideFFN, "active", 21, "1 to 20 (intermediate_size)"),
        (SlideFFN, "rehash_period", 0, "at least 1"),
        (SlideFFN, "rehash_growth", -0.1, "0 to 1"),
        (MongooseFFN, "active", 0, "1 to 20 (intermediate_size)"),
        (MongooseFFN, "rehash_threshold", 1.5, "0 to 1"),
        (MongooseFFN, "margin", -1, "0 to 2"),
        (MongooseFFN, "auxiliary_weight", math.nan, "at least 0"),
        (YosoFFN, "num_hashes", 0, "at least 1"),
        (YosoFFN, "hash_bits", 0, "1 to 16"),
    ],
)
def test_options_out_of_range_are_named(kind, option, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"{option} must be {expected}, not {value}")):
        kind(D, H, **{option: value})
