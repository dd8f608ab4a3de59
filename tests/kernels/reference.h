// What the parts of a layer must give: double precision with a bound on float32, exact integers, the buckets of a hash.
#pragma once

#include "layers.h"

// z of one token with float32 weights. Roundings add up like the score_scales of a random walk: a bound that let all of
// them add up in one direction would be thousands of times wider after four stages, and hide faults.
inline std::vector<Approx> reference_z(const Layer& l, const std::vector<float>& x) {
  const PackedHeader& h = l.h;
  const int codes = h.num_tables * h.code_bits;
  std::vector<Approx> z;
  if (h.stages == 0)
    for (float value : x) z.push_back({value, 0});
  for (int r = 0; r < h.repeats && h.stages > 0; r++) {
    std::vector<Approx> y(l.projection.width_in(), Approx{0, 0});
    for (size_t i = 0; i < x.size(); i++) y[i].value = x[i];
    for (int stage = r * h.stages; stage < (r + 1) * h.stages; stage++) {
      std::vector<Approx> out(l.projection.width_out());
      for (int n = 0; n < h.blocks; n++)
        for (int o = 0; o < h.block_out; o++) {
          double sum = 0, variance = 0, squares = 0;
          for (int i = 0; i < h.block_in; i++) {
            const double w = weight(l, stage, n, o, i);
            const Approx& a = y[n * h.block_in + i];
            sum += w * a.value;
            variance += w * w * a.error * a.error;
            squares += w * w * a.value * a.value;
          }
          out[n * h.block_out + o] = {sum, std::sqrt(variance + kUlp * kUlp * (0.5 * h.block_in + 1) * squares)};
        }
      y = out;
      for (int half = 1; half < h.blocks; half *= 2)
        for (int n = 0; n < h.blocks; n++)
          for (int i = 0; i < h.block_out && !(n & half); i++) {
            Approx &a = y[n * h.block_out + i], &b = y[(n + half) * h.block_out + i];
            const double sum = a.value + b.value, difference = a.value - b.value, error = std::hypot(a.error, b.error);
            a = {sum, std::hypot(error, kUlp * sum)};
            b = {difference, std::hypot(error, kUlp * difference)};
          }
    }
    for (int i = 0; i < l.projection.width_out() && int(z.size()) < codes; i++) {
      const double product = h.scale * y[i].value, bias = l.projection.bias[z.size()];
      const double straight = h.residual != 0 && i < int(x.size()) ? h.residual * double(x[i]) : 0;
      z.push_back({product + straight + bias,
                   h.scale * y[i].error + kUlp * (2 * std::abs(product) + 2 * std::abs(straight) + std::abs(bias))});
    }
  }
  return z;
}

// z of one token with integer weights: here every rounding is part of the definition, so there is one right answer.
__attribute__((noinline)) inline std::vector<float> exact_z(const Layer& l, const std::vector<float>& x) {
  const PackedHeader& h = l.h;
  std::vector<float> z;
  for (int r = 0; r < h.repeats; r++) {
    std::vector<float> y(l.projection.width_in(), 0.0f);
    std::copy(x.begin(), x.end(), y.begin());
    float scale = 0;  // of the integers in y
    for (int stage = r * h.stages; stage < (r + 1) * h.stages; stage++) {
      float largest = 0;
      for (float value : y) largest = std::max(largest, std::fabs(value));
      const bool zero = largest < 1e-30f;
      const float inverse = zero ? 0 : l.projection.levels[stage] / largest,
                  of_stage = zero ? 0 : largest / l.projection.levels[stage];
      scale = stage == r * h.stages ? of_stage : scale * of_stage;
      std::vector<int> q;
      for (float value : y) q.push_back(int(std::nearbyint(value * inverse)));
      y.assign(l.projection.width_out(), 0);
      for (int n = 0; n < h.blocks; n++)
        for (int o = 0; o < h.block_out; o++) {
          int64_t sum = 0;
          for (int i = 0; i < h.block_in; i++) sum += int(weight(l, stage, n, o, i)) * int64_t(q[n * h.block_in + i]);
          const size_t at = n * h.block_out + o;
          y[at] = float(sum) * l.projection.scales[size_t(stage) * l.projection.width_out() + at];
        }
      for (int half = 1; half < h.blocks; half *= 2)
        for (int n = 0; n < h.blocks; n++)
          for (int i = 0; i < h.block_out && !(n & half); i++) {
            const float a = y[n * h.block_out + i], b = y[(n + half) * h.block_out + i];
            y[n * h.block_out + i] = a + b;
            y[(n + half) * h.block_out + i] = a - b;
          }
    }
    const float factor = h.scale * scale;
    for (int i = 0; i < l.projection.width_out(); i++) {
      float value = y[i] * factor;
      if (h.residual != 0) value = value + (i < int(x.size()) ? x[i] : 0) * h.residual;
      z.push_back(value + l.projection.bias[z.size()]);
    }
  }
  z.resize(h.num_tables * h.code_bits);
  return z;
}

// The buckets that hash() must choose for one table: the sign pattern, then the flips of the bits of least |z|. Of
// equal bits the first goes first; two flips go before a third that costs as much. A NaN or infinite |z| is never
// flipped.
__attribute__((noinline)) inline void nearest_buckets(const float* z, int bits, int reads, uint16_t* buckets) {
  struct Flip {
    float cost;
    int buckets;
  };
  std::vector<Flip> flips;
  int code = 0;
  for (int j = 0; j < bits; j++) {
    const int bit = 1 << (bits - 1 - j);
    if (z[j] > 0) code |= bit;
    if (std::fabs(z[j]) < kInfinity) flips.push_back({std::fabs(z[j]), bit});
  }
  std::stable_sort(flips.begin(), flips.end(), [](const Flip& a, const Flip& b) { return a.cost < b.cost; });
  while (flips.size() < 3) flips.push_back({kInfinity, 0});
  const float pair = flips[0].cost + flips[1].cost;
  if (reads == 4 && !(flips[2].cost < pair)) flips[2] = {pair, flips[0].buckets | flips[1].buckets};
  buckets[0] = uint16_t(code);
  for (int n = 1; n < reads; n++) buckets[n] = uint16_t(code ^ flips[n - 1].buckets);
}

// One table's buckets and scores by looking at every bucket: reference.nearest_buckets, for finite z.
inline void check_buckets(const float* z, int bits, int reads, const uint16_t* buckets, const float* scores) {
  std::vector<double> inner = {0};  // <z, S_i> of every bucket
  double total = 0;
  for (int j = 0; j < bits; j++) {
    total += std::abs(double(z[j]));
    std::vector<double> longer;
    for (double sum : inner) longer.insert(longer.end(), {sum - double(z[j]), sum + double(z[j])});
    inner = longer;
  }
  double partition = 0;
  for (double sum : inner) partition += std::exp(sum - total);
  std::vector<double> best = inner;
  std::partial_sort(best.begin(), best.begin() + reads, best.end(), [](double a, double b) { return a > b; });
  for (int n = 0; n < reads; n++) {
    for (int m = 0; m < n; m++) EXPECT(buckets[m] != buckets[n], "bucket %d is read twice", buckets[n]);
    EXPECT(buckets[n] < inner.size(), "there is no bucket %d", buckets[n]);
    const double sum = inner[buckets[n]], cost = (total - sum) / 2;
    EXPECT(std::abs(sum - best[n]) <= 4 * bits * kUlp * total, "bucket %d is not the %d. nearest: %.9g, not %.9g",
           buckets[n], n + 1, sum, best[n]);
    const double probability = std::exp(sum - total) / partition;
    const double bound = (8 * bits + 16 + 8 * cost) * kUlp * total * probability + 0x1p-120 * (1 + total);
    EXPECT(std::abs(scores[n] - sum * probability) <= bound, "the score of bucket %d is %.9g, not %.9g +- %.2g",
           buckets[n], double(scores[n]), sum * probability, bound);
  }
}

// ---- The parts of a layer, run one token at a time ------------------------------------------------------------------

struct Parts {
  std::vector<float> z;           // [tokens][z_stride]
  std::vector<uint16_t> buckets;  // [tokens][slots] as hash gave them
  std::vector<uint16_t> codes;    // with the sign that quantise_scores adds
  std::vector<float> scores;      // [tokens][slots] as hash gave them
  std::vector<uint8_t> quantised;
  std::vector<float> score_scales;  // [tokens]
  std::vector<float> y;             // [tokens][E]
};

inline void project_part(const Kernels& k, const Layer& l, const Input& in, int tokens, Parts* p) {
  p->z.assign(size_t(tokens) * l.z_stride, kNaN);
  const size_t width_in = l.projection.width_in(), width_out = l.projection.width_out();
  std::vector<float> rows(width_in), sums[2], scales(2);
  std::vector<uint8_t> first(width_in * 2), activations(width_in * 2);
  for (auto& s : sums) s.resize(width_out);
  const ProjectScratch scratch = {
      rows.data(), {sums[0].data(), sums[1].data()}, first.data(), activations.data(), {&scales[0], &scales[1]}};
  for (int t = 0; t < tokens; t++)
    k.project(l.projection, {.x = in.rows,
                             .token = t,
                             .tokens = 1,
                             .first = 0,
                             .last = l.h.repeats,
                             .z = &p->z[size_t(t) * l.z_stride],
                             .z_stride = size_t(l.z_stride),
                             .scratch = scratch});
}

inline void hash_part(const Kernels& k, const Layer& l, int tokens, Parts* p) {  // and quantise_scores
  const size_t slots = size_t(tokens) * l.slots();
  p->buckets.assign(slots, 0xffff);
  p->scores.assign(slots, kNaN);
  p->quantised.assign(slots, 0xff);
  p->score_scales.assign(tokens, kNaN);
  for (int t = 0; t < tokens; t++)
    k.hash({.num_tables = l.h.num_tables,
            .code_bits = l.h.code_bits,
            .reads = l.h.reads,
            .first = 0,
            .last = l.groups,
            .z = &p->z[size_t(t) * l.z_stride],
            .codes = &p->buckets[size_t(t) * l.slots()],
            .scores = &p->scores[size_t(t) * l.slots()]});
  p->codes = p->buckets;
  std::vector<float> scores = p->scores;
  for (int t = 0; t < tokens && is_integer(l.h.table_type); t++) {
    const size_t at = size_t(t) * l.slots();
    p->score_scales[t] = k.quantise_scores({.num_tables = l.h.num_tables,
                                            .code_bits = l.h.code_bits,
                                            .reads = l.h.reads,
                                            .negated_rows = l.negated_rows(),
                                            .table_scales = l.table_scales,
                                            .scores = &scores[at],
                                            .codes = &p->codes[at],
                                            .quantised = &p->quantised[at]});
  }
}

inline void gather_part(const Kernels& k, const Layer& l, int tokens, Parts* p) {
  p->y.assign(size_t(tokens) * l.h.out_features, 0);
  const void* scores = p->scores.data();
  if (is_integer(l.h.table_type)) scores = p->quantised.data();
  for (int t = 0; t < tokens; t++)
    for (int slice = 0; slice < l.slices; slice++)
      k.gather({.tables = l.tables,
                .slice = slice,
                .first = 0,
                .last = l.groups,
                .begin = t,
                .end = t + 1,
                .codes = p->codes.data(),
                .scores = scores,
                .score_scales = p->score_scales.data(),
                .sums = nullptr,
                .y = {p->y.data(), l.h.out_features, false},
                .y_token = 0,
                .out_features = l.h.out_features,
                .bias = l.bias,
                .prefetch_tokens = t % 3});
}

inline Parts run_parts(const Kernels& k, const Layer& l, const Input& in, int tokens) {
  FloatMode mode(kFlushing);
  Parts p;
  project_part(k, l, in, tokens, &p);
  hash_part(k, l, tokens, &p);
  gather_part(k, l, tokens, &p);
  return p;
}

template <typename T>
inline void check_equal(const char* what, const std::vector<T>& a, const std::vector<T>& b) {
  EXPECT(a.size() == b.size(), "%s: %zu numbers, not %zu", what, a.size(), b.size());
  for (size_t i = 0; i < a.size(); i++)
    EXPECT(same_bits(float(a[i]), float(b[i])), "%s differs from scalar's at %zu: %.9g, not %.9g", what, i,
           double(a[i]), double(b[i]));
}

// z of float32 weights against the reference; returns the largest distance in units of what is expected of float32.
inline double check_z(const std::vector<Approx>& reference, const float* z) {
  double most = 0;
  for (size_t i = 0; i < reference.size(); i++) {
    const double off = std::abs(z[i] - reference[i].value), error = reference[i].error + 1e-37;
    EXPECT(off <= 4 * error, "z[%zu] is %.9g, not %.9g +- %.2g", i, double(z[i]), reference[i].value, 4 * error);
    most = std::max(most, off / error);
  }
  return most;
}

inline void check_hash(const Layer& l, const Parts& p, int t) {
  const int bits = l.h.code_bits, reads = l.h.reads;
  for (int table = 0; table < l.groups * 16; table++) {
    const float* z = &p.z[size_t(t) * l.z_stride + size_t(table) * bits];
    uint16_t buckets[kMaxReads], expected[kMaxReads];
    float scores[kMaxReads];
    for (int n = 0; n < reads; n++) {
      const size_t slot = size_t(t) * l.slots() + (table / 16 * reads + n) * 16 + table % 16;
      buckets[n] = p.buckets[slot];
      scores[n] = p.scores[slot];
      EXPECT(table < l.h.num_tables || (buckets[n] == 0 && scores[n] == 0), "padding has bucket %d and score %g",
             buckets[n], double(scores[n]));
    }
    if (table >= l.h.num_tables) continue;
    nearest_buckets(z, bits, reads, expected);
    for (int n = 0; n < reads; n++)
      EXPECT(buckets[n] == expected[n], "table %d reads bucket %d, not %d", table, buckets[n], expected[n]);
    if (bits <= 10 || table % 4 == 0) check_buckets(z, bits, reads, buckets, scores);
  }
}

inline void check_quantised(const Layer& l, const Parts& p, int t) {
  const size_t at = size_t(t) * l.slots();
  std::vector<float> s(l.slots());
  float largest = 0;
  for (int i = 0; i < l.slots(); i++) {
    s[i] = p.scores[at + i] * l.table_scales[i / (16 * l.h.reads) * 16 + i % 16];
    largest = std::max(largest, std::fabs(s[i]));
  }
  const float scale = largest < 1e-30f ? 0.0f : largest / 127;
  EXPECT(same_bits(p.score_scales[t], scale), "the scale is %.9g, not %.9g", double(p.score_scales[t]), double(scale));
  for (int i = 0; i < l.slots(); i++) {
    const double exact = scale ? std::abs(double(s[i])) / largest * 127 : 0;
    EXPECT(std::abs(p.quantised[at + i] - exact) <= 0.5 + 1e-4, "score %d is %d, not %.9g", i, p.quantised[at + i],
           exact);
    const int sign = s[i] < 0 && l.negated_rows() ? 1 << l.h.code_bits : 0;
    EXPECT(p.codes[at + i] == (p.buckets[at + i] | sign), "code %d is %d, not %d", i, p.codes[at + i],
           p.buckets[at + i] | sign);
    EXPECT(sign || s[i] >= 0, "score %d is %g, and there are no negated rows", i, double(s[i]));
  }
}

inline void check_gather(const Layer& l, const Parts& p, int t, const float* y) {
  const bool integers = is_integer(l.h.table_type);
  const int reads = l.h.reads;
  for (int e = 0; e < l.h.out_features; e++) {
    double sum = 0, magnitude = 0;
    for (int table = 0; table < l.h.num_tables; table++)
      for (int n = 0; n < reads; n++) {
        const size_t slot = size_t(t) * l.slots() + (table / 16 * reads + n) * 16 + table % 16;
        const double product =
            (integers ? p.quantised[slot] : p.scores[slot]) * table_entry(l, table, p.codes[slot], e);
        sum += product;
        magnitude += std::abs(product);
      }
    if (integers) sum *= p.score_scales[t];
    const double exact = sum + l.bias[e];
    const double off = integers ? 2 * std::abs(sum) : (l.h.num_tables * reads + 1) * magnitude;
    const double bound = kUlp * (off + std::abs(exact)) * (1 + 1e-6) + 1e-37;
    EXPECT(std::abs(y[e] - exact) <= bound, "y[%d, %d] is %.9g, not %.9g +- %.2g", t, e, double(y[e]), exact, bound);
  }
}
