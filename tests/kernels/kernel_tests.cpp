// Tests of the kernels and the engine, without torch: kernel_tests [--long] [--seed N]. Exit code 1 and a line FAILED
// with the case where something is wrong.
//
// The reference (reference.h) is double precision, written from the layer's definition (reference.py) and its packed
// form (layer.h), with a bound on how far float32 may be from it. The hash is discontinuous, so the parts of the layer
// are tested one by one, each on what the part before it gave; then forward() must give the very bits of the parts, run
// one token at a time, for every batch, tiling and number of threads. The scalar implementation is tested against the
// reference, the others that run here against both: the same bits wherever a part computes with integers, and in hash.
// Buffers end where a page begins that cannot be touched: reading or writing past one is caught in every build.
#include "reference.h"

namespace {

struct Options {
  bool is_long = false;
  uint64_t seed = 1;
};

Tiling random_tiling(Random& random) {
  return {random.pick({1, 2, 3, 5, 7, 8, 24, 48, 96, 1000}), random.pick({1, 1, 2, 1000}),
          random.pick({0, 1, 100, 5000}), random.pick({0, 0, 0, 4, 1000})};
}

// A call in a workspace of just the size that its plan asks for, whose content is of no matter.
void forward(const Kernels& k, const Layer& l, Rows x, Rows y, int64_t tokens, const Tiling& tiling, int threads) {
  const Plan plan = make_plan(l, tokens, tiling, threads);
  const Guarded workspace(plan.workspace_bytes());
  if (workspace.size()) memset(workspace.data(), 0xa5, workspace.size());
  run(k, l, plan, x, y, workspace.data(), threads_of(threads));
}

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

// hash for z that no projection gives: codes and scores of every implementation, with and without denormals.
std::string test_hash(const Options& options) {
  Random random = {options.seed ^ 0x68617368};
  const float special[] = {0.0f,     -0.0f,   1e-40f,    -1e-40f,    1.2e-38f, 0.5f,  -0.5f,
                           1.0f,     -1.0f,   1.5f,      20.0f,      -44.0f,   1e5f,  1e30f,
                           -3.4e38f, 3.4e38f, kInfinity, -kInfinity, kNaN,     -kNaN, float_of(0x7fc12345)};
  const std::vector<const Kernels*> implementations = running_here();
  const int rounds = options.is_long ? 200 : 6;
  int count = 0;
  for (int round = 0; round < rounds; round++)
    for (int bits = 1; bits <= 16; bits++)
      for (int reads = 1; reads <= std::min(4, 1 << bits); reads++) {
        Case c = {};
        c.tables = TableType(random.below(4));
        c.num_tables = bits > 10 ? random.between(1, 2) : random.pick({1, 5, 16, 17, 40});
        c.code_bits = bits;
        c.reads = reads;
        c.in_features = c.num_tables * bits;
        c.out_features = c.repeats = c.blocks = 1;
        c.slice = 128;
        const Packed packed = pack(c, random);
        const Layer& l = packed.l;
        constexpr int kTokens = 4;
        Parts p;
        p.z.assign(size_t(kTokens) * l.z_stride, kNaN);
        for (int t = 0; t < kTokens; t++)
          for (int table = 0; table < c.num_tables; table++) {
            const int kind = random.below(4);
            for (int j = 0; j < bits; j++) {
              float& z = p.z[size_t(t) * l.z_stride + table * bits + j];
              if (kind == 0) z = special[random.below(int(std::size(special)))];
              if (kind == 1) z = special[random.below(11)];  // finite and not huge: zeros, denormals, ties
              if (kind == 2) z = random.pick({-1.5f, -1.0f, -0.5f, 0.5f, 1.0f, 1.5f});  // pairs that equal a third
              if (kind == 3) z = random.normal();
            }
          }
        for (const uint64_t mode : {kFlushing, float_state()}) {
          set_case(text("%s z of %d tables, tau %d, reads %d, %s", "special", c.num_tables, bits, reads,
                        mode == kFlushing ? "denormals flushed" : "denormals kept"));
          FloatMode state(mode);
          hash_part(*implementations[0], l, kTokens, &p);
          for (int t = 0; t < kTokens; t++)
            for (int table = 0; table < c.num_tables; table++) {
              uint16_t expected[kMaxReads];
              const float* z = &p.z[size_t(t) * l.z_stride + table * bits];
              nearest_buckets(z, bits, reads, expected);
              double total = 0;
              for (int j = 0; j < bits; j++) total += std::abs(z[j]);
              uint16_t buckets[kMaxReads];
              float scores[kMaxReads];
              for (int n = 0; n < reads; n++) {
                const size_t slot = size_t(t) * l.slots() + (table / 16 * reads + n) * 16 + table % 16;
                buckets[n] = p.buckets[slot];
                scores[n] = p.scores[slot];
                EXPECT(buckets[n] == expected[n], "bucket %d of table %d is %d, not %d", n, table, buckets[n],
                       expected[n]);
                EXPECT(std::isfinite(total) || n > 0 || !std::isfinite(scores[n]), "z is not finite, its score is");
              }
              if (total < 1e4 && (bits <= 8 || round == 0)) check_buckets(z, bits, reads, buckets, scores);
              count++;
            }
          for (const Kernels* k : implementations) {
            Parts same;
            same.z = p.z;
            hash_part(*k, l, kTokens, &same);
            check_equal((std::string(k->name) + "'s buckets").c_str(), same.buckets, p.buckets);
            check_equal((std::string(k->name) + "'s codes").c_str(), same.codes, p.codes);
            check_equal((std::string(k->name) + "'s scores").c_str(), same.scores, p.scores);
            check_equal((std::string(k->name) + "'s score_scales").c_str(), same.score_scales, p.score_scales);
            for (int t = 0; t < kTokens; t++)  // where the step is NaN they may be anything
              for (int i = 0; i < l.slots() && p.score_scales[t] == p.score_scales[t]; i++)
                EXPECT(same.quantised[t * l.slots() + i] == p.quantised[t * l.slots() + i],
                       "%s's quantised score %d differs", k->name, i);
          }
        }
      }
  return text("%d tables of zeros, denormals, ties, huge numbers, infinities and NaN", count);
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

std::vector<Case> small_cases() {
  std::vector<Case> cases;
  for (int i = 0; i < 36; i++) {
    Case c = {};
    c.weights = WeightType(i % 3);
    c.tables = TableType(i / 3 % 4);
    c.stages = i / 12 == 2 ? 4 : i / 12;
    c.code_bits = 1 + i % 4;
    c.num_tables = i % 2 ? 3 : 17;
    c.reads = std::min(1 + i % 4, 1 << c.code_bits);
    c.out_features = i % 5 ? 3 : 65;
    c.slice = (i % 3 ? 64 : 128) * (c.tables == TableType::kInt4 ? 2 : 1);
    const int codes = c.num_tables * c.code_bits;
    c.repeats = c.blocks = 1;
    c.in_features = codes;
    if (c.stages) {
      c.blocks = 2;
      c.block_in = c.block_out = 16;
      c.repeats = (codes + 31) / 32;
      c.in_features = 30;
    }
    cases.push_back(c);
  }
  return cases;
}

// One field of the header changed: each of these must be refused, whatever the layer.
std::string test_refusals(const Options& options) {
  Random random = {options.seed ^ 0x72656675};
  constexpr int kMost = std::numeric_limits<int>::max();
  int refused = 0;
  for (const Case& c : small_cases()) {
    set_case(c.name());
    const Packed good = pack(c, random);
    const PackedHeader& h = good.l.h;
    const auto must_refuse = [&](const char* what, size_t at, const void* value, size_t size) {
      Guarded bytes(good.bytes->size());
      memcpy(bytes.data(), good.bytes->data(), bytes.size());
      memcpy(bytes.data() + at, value, size);
      Layer l;
      EXPECT(!open_layer(bytes.data(), bytes.size(), &l).empty(), "a layer with another %s is taken", what);
      refused++;
    };
#define REFUSE(type, field, ...)                                    \
  for (const type value : std::initializer_list<type>{__VA_ARGS__}) \
    must_refuse(#field, offsetof(PackedHeader, field), &value, sizeof value);
    REFUSE(uint32_t, version, 0, 2, 0xffffffff)
    REFUSE(int, in_features, 0, -1, kMost, 1 << 25)
    REFUSE(int, out_features, 0, -1, 1000, kMost, kMost - 62)
    REFUSE(int, num_tables, 0, -1, h.num_tables + 16, kMost)
    REFUSE(int, code_bits, 0, -1, 17, kMost)
    REFUSE(int, reads, 0, -1, 5, kMost)
    REFUSE(int, stages, -1, 2, 3, 5, kMost)
    REFUSE(int, table_rows, 0, -1, 3 * (1 << h.code_bits), kMost)
    REFUSE(int, weight_type, -1, 3)
    REFUSE(int, table_type, -1, 4)
    REFUSE(int, slice, 0, -64, 32, 96, 512, kMost, c.tables == TableType::kInt4 ? 64 : 256)
    REFUSE(int, reserved, 1, -1)
    REFUSE(float, scale, kNaN, kInfinity)
    REFUSE(float, residual, kNaN, -kInfinity)
    REFUSE(uint64_t, total_bytes, 0, h.total_bytes - 1, h.total_bytes + 64, ~uint64_t(0))
    REFUSE(uint64_t, offset[kBias], 32, h.total_bytes, h.total_bytes - 64 * 3, ~uint64_t(0), ~uint64_t(63))
    REFUSE(uint64_t, offset[kTables], h.total_bytes, ~uint64_t(63))
    if (!c.stages) REFUSE(int, repeats, 0, 2, kMost)  // repeats would be shared out among threads
    if (c.stages) {
      REFUSE(int, repeats, 0, -1, kMost, 1 << 20)
      REFUSE(int, blocks, 0, 3, -2, 1 << 30)
      REFUSE(int, block_in, 0, 8, 24, -16, kMost - 15)
      REFUSE(int, block_out, 0, 8, 24, -16, kMost - 15)
      if (c.weights != WeightType::kFloat32)
        for (const float level : {0.0f, -1.0f, kNaN, kInfinity, c.weights == WeightType::kInt8 ? 128.0f : 32768.0f})
          must_refuse("level", h.offset[kLevels], &level, 4);
    }
#undef REFUSE
    for (size_t i = 0; i < 8; i++) must_refuse("magic", i, "?", 1);
    std::vector<size_t> sizes = {h.total_bytes - 1, h.total_bytes - 64};
    for (size_t n = 0; n <= sizeof h; n++) sizes.push_back(n);
    for (size_t n : sizes) {  // truncated, and truncated with a header that agrees
      Guarded bytes(n);
      memcpy(bytes.data(), good.bytes->data(), n);
      Layer l;
      EXPECT(!open_layer(bytes.data(), n, &l).empty(), "%zu of %zu bytes are taken", n, good.bytes->size());
      const uint64_t total = n;
      if (n >= sizeof h) memcpy(bytes.data() + offsetof(PackedHeader, total_bytes), &total, 8);
      EXPECT(!open_layer(bytes.data(), n, &l).empty(), "%zu of %zu bytes are taken", n, good.bytes->size());
      refused += 2;
    }
    Guarded longer(good.bytes->size() + 64);  // and a header that agrees
    memset(longer.data(), 0, longer.size());
    memcpy(longer.data(), good.bytes->data(), good.bytes->size());
    const uint64_t total = longer.size();
    memcpy(longer.data() + offsetof(PackedHeader, total_bytes), &total, 8);
    Layer l;
    EXPECT(!open_layer(longer.data(), longer.size(), &l).empty(), "64 bytes too many are taken");
    refused++;
  }
  return text("%d damaged layers refused", refused);
}

// Random damage to the header, to the numbers behind it, or both: refused, or a layer that runs within its own bytes.
std::string test_damage(const Options& options) {
  Random random = {options.seed ^ 0x64616d61};
  std::vector<Packed> layers;
  for (const Case& c : small_cases()) layers.push_back(pack(c, random));
  const std::vector<const Kernels*> implementations = running_here();
  const int count = options.is_long ? 400000 : 20000;
  int taken = 0;
  for (int i = 0; i < count; i++) {
    const Guarded& good = *layers[random.below(int(layers.size()))].bytes;
    size_t size = good.size();
    uint8_t header[sizeof(PackedHeader)];
    memcpy(header, good.data(), sizeof header);
    for (int changes = random.between(1, 3); changes > 0; changes--) {
      const int field = 12 + 4 * random.below(int(sizeof header - 12) / 4);
      const int interesting = random.pick({-1,
                                           0,
                                           1,
                                           2,
                                           3,
                                           4,
                                           8,
                                           15,
                                           16,
                                           17,
                                           32,
                                           48,
                                           64,
                                           128,
                                           1 << 16,
                                           1 << 24,
                                           1 << 30,
                                           (1 << 30) + (1 << 29),
                                           std::numeric_limits<int>::max(),
                                           std::numeric_limits<int>::min()});
      const uint64_t offset = 64 * uint64_t(random.below(int(size / 64) + 2));
      switch (random.below(5)) {
        case 0: header[random.below(sizeof header)] ^= uint8_t(1 << random.below(8)); break;
        case 1: header[12 + random.below(sizeof header - 12)] = uint8_t(random.next()); break;
        case 2: memcpy(header + field, &interesting, 4); break;
        case 3: memcpy(header + offsetof(PackedHeader, offset) + 8 * random.below(kSections), &offset, 8); break;
        default:  // shorter, and the header agrees
          size = random.one_in(4) ? size - random.below(int(size) - int(sizeof header)) : size;
          const uint64_t total = size;
          memcpy(header + offsetof(PackedHeader, total_bytes), &total, 8);
      }
    }
    Guarded bytes(round_up(size, 64));  // rounded, so that it begins at a cache line
    memset(bytes.data(), 0, bytes.size());
    memcpy(bytes.data(), good.data(), size);
    if (random.one_in(2)) memcpy(bytes.data(), header, sizeof header);
    for (int changes = random.pick({0, 0, 1, 100}); changes > 0; changes--) {
      const size_t at = sizeof header + random.below(int(bytes.size() - sizeof header));
      bytes.data()[at] = random.pick({uint8_t(random.next()), uint8_t(0x7f), uint8_t(0x80), uint8_t(0xff)});
    }
    std::string name = text("seed %llu, damaged layer %d:", static_cast<unsigned long long>(options.seed), i);
    for (size_t at = 0; at < sizeof header; at += 4)
      name += text(" %d", reinterpret_cast<const int*>(bytes.data() + at)[0]);
    set_case(name);
    Layer l;
    if (!open_layer(bytes.data(), size, &l).empty()) continue;
    taken++;
    const int tokens = random.between(1, 3);
    const Input in = make_input(tokens, l.h.in_features, random.one_in(2), random);
    for (const Kernels* k : {implementations[0], implementations[random.below(int(implementations.size()))]}) {
      Output out(tokens, l.h.out_features, random.one_in(2), random);
      forward(*k, l, in.rows, out.rows, tokens, random_tiling(random), random.one_in(8) ? 2 : 1);
      out.check_margins(k->name);
    }
  }
  EXPECT(taken > count / 100 && taken < count * 3 / 4, "%d of %d damaged layers are taken", taken, count);
  return text("%d damaged layers, %d of them still taken for one", count, taken);
}

// A dense linear is one block: exact sums of int8 products for every implementation, times the scales.
std::string test_linear(const Options& options) {
  Random random = {options.seed ^ 0x6c696e65};
  const int cases = options.is_long ? 400 : 40;
  for (int i = 0; i < cases; i++) {
    const int in = 16 * random.pick({1, 2, 3, 4, 5, 8, 12, 24}),
              tokens = random.pick({1, 2, 3, 5, 6, 7, 15, 16, 17, 33, kMaxTile});
    const int out = random.pick({16, 32, 48, 64, 128, 192, 384}), blocks = random.pick({1, 1, 2, 4});
    const int all_in = blocks * in, all_out = blocks * out, gap = random.pick({0, 4, 64});
    set_case(text("%d blocks of %d to %d, %d tokens", blocks, in, out, tokens));
    Guarded words(size_t(all_out) * in), scales(size_t(all_out) * 4), offsets(size_t(all_out) * 4);
    std::vector<int> q(size_t(tokens) * all_in);
    Guarded y((size_t(tokens - 1) * (all_out + gap) + all_out) * 4);
    PackedHeader layout = {};
    layout.weight_type = WeightType::kInt8;
    layout.blocks = blocks, layout.block_in = in, layout.block_out = out;
    std::vector<int> w(size_t(all_out) * in), sum(all_out);
    for (int n = 0; n < blocks; n++)
      for (int o = 0; o < out; o++)
        for (int j = 0; j < in; j++) {
          const int value = random.one_in(16) ? (random.one_in(2) ? -127 : 127) : random.between(-127, 127);
          w[(size_t(n) * out + o) * in + j] = value;
          sum[n * out + o] += value;
          words.data()[weight_index(layout, 0, n, o, j)] = uint8_t(int8_t(value));
        }
    for (int o = 0; o < all_out; o++) {
      reinterpret_cast<float*>(scales.data())[o] = 0.5f + random.uniform();
      reinterpret_cast<int32_t*>(offsets.data())[o] = -128 * sum[o];
    }
    for (int& value : q) value = random.one_in(16) ? (random.one_in(2) ? -127 : 127) : random.between(-127, 127);
    for (const Kernels* k : running_here()) {
      const int planes = k->activation_planes;
      const size_t plane = size_t(all_in + gap);
      Guarded x(size_t(tokens - 1) * plane * planes + plane * (planes - 1) + all_in);
      for (int t = 0; t < tokens; t++)
        for (int j = 0; j < all_in; j++) {
          const int value = q[size_t(t) * all_in + j];
          uint8_t* const at = x.data() + size_t(t) * plane * planes + j;
          at[0] = uint8_t(planes == 1 ? value + 128 : std::abs(value));
          if (planes == 2) at[plane] = value < 0 ? 255 : 0;
        }
      memset(y.data(), 0xff, y.size());
      k->multiply_i8({.w = {.words = words.data(),
                            .scales = reinterpret_cast<float*>(scales.data()),
                            .offsets = reinterpret_cast<int32_t*>(offsets.data()),
                            .blocks = blocks,
                            .block_in = in,
                            .block_out = out},
                      .x = x.data(),
                      .x_bytes = plane * planes,
                      .tokens = tokens,
                      .y = reinterpret_cast<float*>(y.data()),
                      .y_stride = size_t(all_out + gap)});
      for (int t = 0; t < tokens; t++)
        for (int o = 0; o < all_out; o++) {
          int64_t exact = 0;
          for (int j = 0; j < in; j++) exact += w[size_t(o) * in + j] * q[size_t(t) * all_in + o / out * in + j];
          const float expected = float(exact) * reinterpret_cast<float*>(scales.data())[o];
          const float got = reinterpret_cast<float*>(y.data())[size_t(t) * (all_out + gap) + o];
          EXPECT(same_bits(got, expected), "%s: y[%d, %d] is %.9g, not %.9g", k->name, t, o, double(got),
                 double(expected));
        }
      for (int t = 0; t + 1 < tokens; t++)
        for (int j = 0; j < gap * 4; j++)
          EXPECT(y.data()[(size_t(t) * (all_out + gap) + all_out) * 4 + j] == 0xff, "%s writes between rows of y",
                 k->name);
    }
  }
  return text("%d int8 products, of one block and of several", cases);
}

std::string test_dispatch(const Options&) {
  int count;
  const Isa* all = isas(&count);
  std::string names;
  bool first = true;
  const char* forced = std::getenv("LOOKUPFFN_ISA");
  for (int i = 0; i < count; i++) {
    set_case(all[i].name);
    if (all[i].runs_here()) {
      EXPECT(isa_index(all[i].name) == i, "its name gives another");
      EXPECT(!first || (forced && *forced) || isa_index() == i, "the first that runs is not the one in use");
      EXPECT(implementation(i).inference && implementation(i).training, "it has no kernels");
      first = false;
      names += std::string(names.empty() ? "" : ", ") + all[i].name;
    } else {
      try {
        isa_index(all[i].name);
        throw std::logic_error("");
      } catch (const std::runtime_error& error) {
        EXPECT(strstr(error.what(), all[i].needs), "the error does not say what it needs: %s", error.what());
      } catch (const std::logic_error&) {
        EXPECT(false, "it does not run here, but is given");
      }
    }
  }
  EXPECT(all[count - 1].name == std::string("scalar") && all[count - 1].runs_here(), "the last must be scalar");
  bool refused = false;
  try {
    isa_index("pentium");
  } catch (const std::runtime_error&) {
    refused = true;
  }
  EXPECT(refused, "an unknown name is taken");
  return names + "; in use: " + all[isa_index()].name;
}

}  // namespace

int main(int arguments, char** argument) {
  Options options;
  for (int i = 1; i < arguments; i++) {
    if (!strcmp(argument[i], "--long")) {
      options.is_long = true;
    } else if (!strcmp(argument[i], "--seed") && i + 1 < arguments) {
      options.seed = strtoull(argument[++i], nullptr, 10);
    } else {
      fprintf(stderr, "usage: kernel_tests [--long] [--seed N]\n");
      return 2;
    }
  }
  struct sigaction action = {};
  action.sa_handler = on_crash;
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(signal, &action, &previous_action[signal]);

  const struct {
    const char* name;
    std::string (*run)(const Options&);
  } groups[] = {{"dispatch", test_dispatch}, {"linear", test_linear},   {"hash", test_hash},
                {"layers", test_layers},     {"batches", test_batches}, {"refusals", test_refusals},
                {"damage", test_damage}};
  bool failed = false;
  for (const auto& group : groups) {
    const auto start = std::chrono::steady_clock::now();
    std::string result, verdict = "ok    ";
    try {
      result = group.run(options);
    } catch (const std::exception& error) {
      verdict = "FAILED";
      result = std::string(error.what()) + "\n        in: " + current_case +
               text("\n        seed %llu", static_cast<unsigned long long>(options.seed));
      failed = true;
    }
    state_changed = false;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    printf("%s  %-9s %6.2f s  %s\n", verdict.c_str(), group.name, seconds, result.c_str());
    fflush(stdout);
  }
  return failed;
}
