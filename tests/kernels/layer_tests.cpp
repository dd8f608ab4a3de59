// Whole layers: their parts one by one, then forward() for every batch, tiling and number of threads.
#include "groups.h"
#include "reference.h"

namespace {

// forward() on tokens [begin, end) must give the rows of `y`, and leave all else as it was. With a poisoned token, this
// row must not be finite anywhere.
void check_forward(const Kernels& k, const Layer& l, const Input& in, int begin, int end, bool y_bf16,
                   const std::vector<float>& y, Random& random, int poisoned = -1) {
  const Tiling tiling = random_tiling(random);
  const int count = random.pick({1, 1, 2, 3, 5});
  const std::string what = text(
      "%s, tokens %d to %d, tile %d, %d groups a block, prefetch distance %d, serial to %d, %d threads", k.name, begin,
      end, tiling.tile_tokens, tiling.groups_per_block, tiling.prefetch_distance, tiling.serial_tokens, count);
  Output out(end - begin, l.h.out_features, y_bf16, random);
  Rows x = in.rows;
  x.data = static_cast<uint8_t*>(x.data) + begin * x.stride * (x.bfloat16 ? 2 : 4);
  if (random.one_in(8)) {  // timed
    const Plan plan = make_plan(l, end - begin, tiling, 1);
    const Guarded workspace(plan.workspace_bytes());
    const auto start = std::chrono::steady_clock::now();
    const StageSeconds seconds = run_timed(k, l, plan, x, out.rows, workspace.data());
    const double whole = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const double parts = seconds.project + seconds.hash + seconds.gather;  // every stage within the call
    EXPECT(std::min({seconds.project, seconds.hash, seconds.gather}) >= 0 && parts <= whole &&
               (parts > 0) == (end > begin),
           "%s: stages of %g, %g and %g s in a call of %g", what.c_str(), seconds.project, seconds.hash, seconds.gather,
           whole);
  } else {
    FloatMode mode(kOddState);
    forward(k, l, x, out.rows, end - begin, tiling, count);
    if (float_state() != kOddState) state_changed = true;
  }
  EXPECT(!state_changed, "%s: the caller's floating-point state is not what it was", what.c_str());
  for (int t = begin; t < end; t++) {
    if (t != poisoned) out.check(t - begin, &y[size_t(t) * l.h.out_features], what);
    for (int e = 0; t == poisoned && e < l.h.out_features; e++)
      EXPECT(!std::isfinite(out.at(t - begin, e)), "%s: y of the token that is not finite is", what.c_str());
  }
  out.check_margins(what);
}

struct CaseSource {
  Deck tables{1, 2, 3, 7, 15, 16, 17, 33}, bits{1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13, 14, 15, 16};
  Deck outs{1, 3, 63, 64, 65, 130}, stages{0, 1, 4, 4}, reads{1, 2, 3, 4}, blocks{1, 2, 4, 8, 16, 32},
      widths{16, 32, 64};
  Deck dense{1, 3, 15, 16, 17, 31, 64, 100, 130, 257}, tokens{0, 1, 2, 3, 5, 6, 7, 8, 23, 24, 25, 97};

  Case draw(int types, Random& random) {
    Case c = {};
    c.weights = WeightType(types % 3);
    c.tables = TableType(types / 3 % 4);
    c.num_tables = tables.deal(random);
    c.code_bits = bits.deal(random);
    c.out_features = outs.deal(random);
    c.stages = stages.deal(random);
    c.reads = std::min(reads.deal(random), 1 << c.code_bits);
    c.tokens = tokens.deal(random);
    c.slice = random.pick({64, 128}) * (c.tables == TableType::kInt4 ? 2 : 1);
    c.x_bf16 = random.one_in(3);
    c.y_bf16 = random.one_in(3);
    while (c.num_tables > 1 && size_t(c.num_tables) << c.code_bits > 1 << 14) c.num_tables /= 2;
    if (c.code_bits > 12) c.out_features = std::min(c.out_features, 65);
    const int codes = c.num_tables * c.code_bits;
    c.repeats = c.blocks = 1;
    if (c.stages == 0) {
      c.in_features = codes;
    } else if (c.stages == 1 && random.below(3)) {  // dense
      c.in_features = dense.deal(random);
      c.block_in = int(round_up(c.in_features, 16));
      c.block_out = int(round_up(codes, codes > 48 ? 64 : 16));
    } else {
      c.blocks = blocks.deal(random);
      c.block_in = c.block_out = widths.deal(random);
      const int width = c.blocks * c.block_in;
      c.in_features = std::max(1, width - random.pick({0, 0, 1, 15, width / 2 - 1}));
      c.repeats = (codes + width - 1) / width + random.one_in(8);
    }
    const int64_t products = int64_t(c.repeats) * c.stages * c.blocks * c.block_in * c.block_out;
    while (c.tokens > 8 && products * c.tokens > 3000000) c.tokens /= 2;
    return c;
  }
};

}  // namespace

std::string test_layers(const Options& options) {
  Random random = {options.seed};
  CaseSource source;
  const std::vector<const Kernels*> implementations = running_here();
  const Kernels& scalar = *implementations[0];
  const int cases = options.is_long ? 12 * 1000 : 12 * 60, checked = options.is_long ? 24 : 6;
  double most = 0;
  for (int i = 0; i < cases; i++) {
    const Case c = source.draw(i, random);
    set_case(c.name());
    const Packed packed = pack(c, random);
    const Layer& l = packed.l;
    Input in = make_input(c.tokens, c.in_features, c.x_bf16, random);
    const bool integer = c.stages == 0 || c.weights != WeightType::kFloat32;
    std::vector<int> tokens;  // for which the reference is computed
    for (int t = 0; t < c.tokens && t < checked; t++)
      tokens.push_back(c.tokens <= checked ? t : random.below(c.tokens));
    std::vector<std::vector<Approx>> z;
    for (size_t j = 0; j < tokens.size() && !integer; j++) z.push_back(reference_z(l, in.values[tokens[j]]));

    const Parts expected = run_parts(scalar, l, in, c.tokens);
    for (int t : tokens) {
      FloatMode mode(kFlushing);
      const std::vector<float> exact = !integer   ? std::vector<float>()
                                       : c.stages ? exact_z(l, in.values[t])
                                                  : in.values[t];
      for (size_t i = 0; i < exact.size(); i++) {
        const float value = expected.z[size_t(t) * l.z_stride + i];
        EXPECT(same_bits(value, exact[i]), "z[%d, %zu] is %.9g, not %.9g", t, i, double(value), double(exact[i]));
      }
      check_hash(l, expected, t);
      if (is_integer(c.tables)) check_quantised(l, expected, t);
    }
    for (const Kernels* k : implementations) {
      set_case(std::string(k->name) + ", " + c.name());
      const Parts own = run_parts(*k, l, in, c.tokens);
      for (size_t j = 0; j < z.size(); j++)
        most = std::max(most, check_z(z[j], &own.z[size_t(tokens[j]) * l.z_stride]));
      if (integer) {
        for (int t = 0; t < c.tokens; t++)
          for (int j = 0; j < c.num_tables * c.code_bits; j++)
            EXPECT(same_bits(own.z[size_t(t) * l.z_stride + j], expected.z[size_t(t) * l.z_stride + j]),
                   "z[%d, %d] differs from scalar's", t, j);
        check_equal("the codes", own.codes, expected.codes);
        if (is_integer(c.tables)) check_equal("y", own.y, expected.y);
      }
      Parts same;  // of what scalar gives to hash and gather
      same.z = expected.z;
      {
        FloatMode mode(kFlushing);
        hash_part(*k, l, c.tokens, &same);
        check_equal("buckets for the same z", same.buckets, expected.buckets);
        check_equal("codes for the same z", same.codes, expected.codes);
        check_equal("scores for the same z", same.scores, expected.scores);
        check_equal("quantised scores for the same z", same.quantised, expected.quantised);
        check_equal("score_scales for the same z", same.score_scales, expected.score_scales);
        gather_part(*k, l, c.tokens, &same);
      }
      if (is_integer(c.tables)) check_equal("y for the same scores", same.y, expected.y);
      for (int t : tokens) check_gather(l, same, t, &same.y[size_t(t) * c.out_features]);
      check_forward(*k, l, in, 0, c.tokens, c.y_bf16, own.y, random);
      if (c.tokens == 0) continue;
      const int begin = random.below(c.tokens), end = random.between(begin + 1, c.tokens);
      check_forward(*k, l, in, begin, end, c.y_bf16, own.y, random);

      const int poisoned = random.below(c.tokens), feature = random.below(c.in_features);
      const float before = in.values[poisoned][feature];
      // NaN with a payload too: 0x7fffffff, and 0x7f80ffff, a signalling one
      in.set(poisoned, feature, random.pick({kNaN, kInfinity, -kInfinity, float_of(0x7fffffff), float_of(0xff81ffff)}));
      check_forward(*k, l, in, 0, c.tokens, c.y_bf16, own.y, random, poisoned);
      in.set(poisoned, feature, before);
    }
  }
  return text("%d layers; z of float32 weights at most %.1f times the expected error off, 4 allowed", cases, most);
}

// Batches longer than a chunk, and many callers at the same time.
std::string test_batches(const Options& options) {
  Random random = {options.seed ^ 0x6c6f6e67};
  constexpr int kPeriod = 97;
  for (int types = 0; types < 12; types++) {
    Case c = {};
    c.weights = WeightType(types % 3);
    c.tables = TableType(types / 3);
    c.in_features = 13;
    c.out_features = random.pick({3, 65, 130});
    c.slice = random.pick({64, 128}) * (c.tables == TableType::kInt4 ? 2 : 1);
    c.num_tables = 33;
    c.code_bits = 3;
    c.reads = 2;
    c.stages = types & 1 ? 4 : 1;
    c.repeats = 7;
    c.blocks = 1;
    c.block_in = c.block_out = 16;
    c.tokens = random.pick({2047, 2048, 2049, 4096, 4097});
    set_case(c.name());
    const Packed packed = pack(c, random);
    const Layer& l = packed.l;
    Input in = make_input(c.tokens, c.in_features, false, random);
    for (int t = kPeriod; t < c.tokens; t++)
      for (int i = 0; i < c.in_features; i++) in.set(t, i, in.values[t - kPeriod][i]);
    for (const Kernels* k : running_here()) {
      set_case(std::string(k->name) + ", " + c.name());
      const Parts parts = run_parts(*k, l, in, kPeriod);
      std::vector<float> y;
      for (int t = 0; t < c.tokens; t++) {
        const auto row = parts.y.begin() + t % kPeriod * c.out_features;
        y.insert(y.end(), row, row + c.out_features);
      }
      check_forward(*k, l, in, 0, c.tokens, false, y, random);

      std::atomic<int> wrong{0};
      std::vector<std::thread> callers;
      for (int caller = 0; caller < 4; caller++)
        callers.emplace_back([&, caller] {
          Random own = {options.seed + uint64_t(caller)};
          for (int i = 0; i < 4; i++) {
            try {
              const int begin = own.below(kPeriod);
              check_forward(*k, l, in, begin, own.between(begin + 1, kPeriod), false, y, own);
            } catch (const std::exception&) {
              wrong++;
            }
          }
        });
      for (std::thread& caller : callers) caller.join();
      EXPECT(wrong == 0, "%d of 16 calls at the same time are wrong", int(wrong));
    }
  }
  return "2047 to 4097 tokens; 4 callers at the same time";
}
