// Attention of one head: keys transposed, softmax and sums of values, for some of the queries.
#include "groups.h"
#include "encoder_reference.h"

namespace {

enum class Scores { kNormal, kFar, kExact, kEqual, kHuge };
enum class Bias { kNone, kDistance, kWindow, kMatrix };  // a window is a distance with a reach

struct HeadCase {
  int head_dim, keys;
  bool causal;
  Scores scores;
  int gap;        // between rows of queries, keys and values, as those of other heads
  int more_keys;  // by how many vectors keys_stride is longer than it need be
  Bias bias;
  int reach;

  int padded_keys() const { return int(round_up(size_t(keys), 16)); }
  size_t keys_stride() const { return size_t(padded_keys() + 16 * more_keys); }
  std::string name() const {
    const char* names[] = {"normal", "far apart", "exact and far apart", "equal", "huge"};
    const char* biases[] = {"no bias", "a bias by distance", "a window", "a bias for each score"};
    return text("head_dim %d, %d keys%s, scores %s, gap %d, %d vectors more, %s, reach %d", head_dim, keys,
                causal ? ", causal" : "", names[int(scores)], gap, more_keys, biases[int(bias)], reach);
  }
};

// A sequence of one head, and what is packed of it.
struct Head {
  HeadCase c;
  FloatRows q, k, v, y;
  FloatRows keys, values;
  Numbers<float> by_distance, matrix;  // from distance 1 - keys on, and what a vector reads behind the last

  Head(const HeadCase& c, Random& random)
      : c(c),
        q(c.keys, c.head_dim, c.gap),
        k(c.keys, c.head_dim, c.gap),
        v(c.keys, c.head_dim, c.gap),
        y(c.keys, c.head_dim, c.gap),
        keys(c.head_dim, c.padded_keys(), 16 * c.more_keys),
        values(c.keys, c.head_dim),
        by_distance(c.bias == Bias::kNone ? 0 : size_t(2 * c.keys + 14)),
        matrix(c.bias == Bias::kMatrix ? size_t(c.keys) * c.padded_keys() : 0) {
    for (size_t i = 0; i < by_distance.count; i++) {
      const bool outside = c.bias == Bias::kWindow && std::abs(int(i) - (c.keys - 1)) > c.reach;
      by_distance[i] = outside ? -kInfinity : c.bias == Bias::kWindow ? 0 : 3 * random.normal();
    }
    for (int t = 0; t < c.keys && matrix.count; t++)
      for (int j = 0; j < c.padded_keys(); j++) matrix[size_t(t) * c.padded_keys() + j] = bias_of(t, j);
    const float root = 1 / std::sqrt(float(c.head_dim));
    for (int t = 0; t < c.keys; t++)
      for (int d = 0; d < c.head_dim; d++) {
        v.at(t, d) = random.normal();
        switch (c.scores) {
          case Scores::kFar: q.at(t, d) = 30 * random.normal(), k.at(t, d) = 30 * random.normal(); break;
          case Scores::kExact:  // sums of whole multiples of 1/2, below 2^24 of them
            q.at(t, d) = float(random.between(-100, 100)), k.at(t, d) = float(random.between(-100, 100)) / 2;
            break;
          case Scores::kEqual: q.at(t, d) = random.normal(), k.at(t, d) = 0.25f; break;
          case Scores::kHuge: q.at(t, d) = 1e17f * random.normal(), k.at(t, d) = 1e17f * random.normal(); break;
          default: q.at(t, d) = root * random.normal(), k.at(t, d) = random.normal();
        }
      }
  }

  void pack(const Kernels& kernels) const {
    kernels.encoder->pack_head({.k = k.data(),
                                .v = v.data(),
                                .stride = int64_t(k.stride),
                                .keys = c.keys,
                                .head_dim = c.head_dim,
                                .keys_out = keys.data(),
                                .keys_stride = c.keys_stride(),
                                .values_out = values.data()});
  }

  void attend(const Kernels& kernels, int64_t begin, int64_t end) const {
    const Numbers<float> scores(kMaxQueryTile * c.keys_stride());
    memset(scores.data(), 0xff, scores.size());
    FloatMode mode(kFlushing);
    kernels.encoder->attend({.q = q.data(),
                             .stride = int64_t(q.stride),
                             .begin = begin,
                             .end = end,
                             .k = keys.data(),
                             .v = values.data(),
                             .keys_stride = c.keys_stride(),
                             .keys = c.keys,
                             .head_dim = c.head_dim,
                             .causal = c.causal,
                             .bias = c.bias == Bias::kNone     ? nullptr
                                     : c.bias == Bias::kMatrix ? matrix.at() + size_t(begin) * c.padded_keys()
                                                               : by_distance.at() + c.keys - 1 - begin,
                             .bias_step = c.bias == Bias::kMatrix ? c.padded_keys() : -1,
                             .reach = c.bias == Bias::kWindow ? c.reach : 0,
                             .scores = scores.at(),
                             .y = y.data(),
                             .y_stride = int64_t(y.stride)});
  }

  int seen(int query) const { return c.causal ? query + 1 : c.keys; }
  float bias_of(int query, int key) const {
    return c.bias == Bias::kNone ? 0 : key < c.keys ? by_distance[c.keys - 1 + key - query] : 0;
  }
  bool attended(int query, int key) const { return key < seen(query) && bias_of(query, key) > -kInfinity; }
  double score(int query, int key) const {
    double sum = bias_of(query, key);
    for (int d = 0; d < c.head_dim; d++) sum += double(q.at(query, d)) * k.at(key, d);
    return sum;
  }
  double score_error(int query, int key) const {  // head_dim products, summed in any order
    double magnitude = 0;
    for (int d = 0; d < c.head_dim && c.scores != Scores::kExact; d++)
      magnitude += std::abs(double(q.at(query, d)) * k.at(key, d));
    const double bias = std::abs(double(bias_of(query, key)));  // and one rounding of the sum with it
    return (c.head_dim + 1) * kUlp * magnitude +
           (c.bias == Bias::kDistance || c.bias == Bias::kMatrix) * kUlp * (bias + std::abs(score(query, key)));
  }
};

// y of one query. With scores s_j off by e at most, exp(s_j - max) is off relatively by exp(2 e) and by what
// exp_minus_2 is, 6 kUlp and (max - s_j) times three roundings of its argument, and it is 2^-126 at least; then sums of
// n products and of n weights, and three roundings more.
std::vector<Approx> attention_of(const Head& h, int query) {
  const int n = h.seen(query), dims = h.c.head_dim;
  std::vector<double> s, off;
  double most = -std::numeric_limits<double>::infinity(), e = 0, total = 0, lost = 0, widest = 0;
  for (int j = 0; j < n; j++) {
    s.push_back(h.score(query, j));
    if (!h.attended(query, j)) continue;
    most = std::max(most, s[j]);
    e = std::max(e, h.score_error(query, j));
  }
  for (int j = 0; j < n; j++) {
    const double below = std::min(most - s[j], 90.0);  // where it is no more than the least
    off.push_back(std::expm1(std::min(2 * e + (8 + 4 * below) * kUlp, 700.0)));
    widest = std::max(widest, off[j]);
    s[j] = h.attended(query, j) ? std::exp(s[j] - most) : 0;
    total += s[j];
  }
  for (int j = 0; j < n; j++) lost += off[j] * s[j] / total;
  std::vector<Approx> y;
  for (int d = 0; d < dims; d++) {
    double sum = 0, magnitude = 0, of_weights = 0, largest = 0;
    for (int j = 0; j < n; j++) {
      const double p = s[j] / total * h.v.at(j, d);
      sum += p, magnitude += std::abs(p), of_weights += off[j] * std::abs(p);
      largest = std::max(largest, std::abs(double(h.v.at(j, d))));
    }
    const double error = (of_weights + std::abs(sum) * lost) * (1 + widest) + (n + 4) * kUlp * magnitude +
                         (n / 16 + 12) * kUlp * std::abs(sum) + 2 * n * kTiny * largest;
    y.push_back({sum, error});
  }
  return y;
}

// Sums of values weighed by numbers of 0 to 1 that add up to 1 lie between the values.
void check_hull(const Head& h, int query) {
  for (int d = 0; d < h.c.head_dim; d++) {
    float low = kInfinity, high = -kInfinity;
    for (int j = 0; j < h.seen(query); j++)
      if (h.attended(query, j)) low = std::min(low, h.v.at(j, d)), high = std::max(high, h.v.at(j, d));
    const float slack = 1e-4f * std::max(std::fabs(low), std::fabs(high)), got = h.y.at(query, d);
    EXPECT(got >= low - slack && got <= high + slack, "y[%d, %d] is %.9g, the values are %.9g to %.9g", query, d,
           double(got), double(low), double(high));
  }
}

HeadCase draw(Random& random, Deck& dims, Deck& keys) {
  const Bias bias = Bias(random.pick({0, 0, 1, 2, 2, 3}));
  return {.head_dim = dims.deal(random),
          .keys = keys.deal(random),
          .causal = bias != Bias::kWindow && random.one_in(2),
          .scores = Scores(random.pick({0, 0, 0, 1, 2, 3, 4})),
          .gap = random.pick({0, 16, 48, 200}),
          .more_keys = random.pick({0, 0, 1, 3}),
          .bias = bias,
          .reach = random.pick({1, 2, 7, 15, 16, 17, 40})};
}

}  // namespace

std::string test_heads(const Options& options) {
  Random random = {options.seed ^ 0x68656164};
  Deck dims{16, 32, 48, 64, 80}, keys{1, 2, 15, 16, 17, 31, 32, 33, 47, 70, 130};
  const int cases = options.is_long ? 1000 : 66;
  for (int n = 0; n < cases; n++) {
    const HeadCase c = draw(random, dims, keys);
    for (const Kernels* k : running_here()) {
      set_case(std::string(k->name) + ", " + c.name());
      const Head h(c, random);
      h.pack(*k);
      for (int d = 0; d < c.head_dim; d++)
        for (int t = 0; t < c.padded_keys(); t++) {
          const float expected = t < c.keys ? h.k.at(t, d) : 0;
          EXPECT(same_bits(h.keys.at(d, t), expected), "key %d has %g at %d, not %g", t, double(h.keys.at(d, t)), d,
                 double(expected));
        }
      for (int t = 0; t < c.keys; t++) check_bits(h.values.row(t), h.v.row(t), c.head_dim, "the values of a key");
      h.keys.check_gaps("pack_head");
      h.values.check_gaps("pack_head");
    }
  }
  return text("%d heads packed", cases);
}

// Bit for bit what two multiplications and a sum give.
std::string test_rotations(const Options& options) {
  Random random = {options.seed ^ 0x726f7461};
  const int cases = options.is_long ? 1000 : 100;
  for (int n = 0; n < cases; n++) {
    const int heads = random.between(1, 5), head_dim = 32 * random.between(1, 3), half = head_dim / 2;
    set_case(text("%d heads of %d", heads, head_dim));
    const FloatRows x(1, heads * head_dim), angles(1, head_dim);
    for (int i = 0; i < heads * head_dim; i++) x.at(0, i) = random.normal();
    for (int i = 0; i < half; i++) {
      const double angle = 10 * random.normal();
      angles.at(0, i) = float(std::cos(angle)), angles.at(0, half + i) = float(std::sin(angle));
    }
    const std::vector<float> before = x.values(0);
    std::vector<float> expected(before.size());
    for (int h = 0; h < heads; h++)
      for (int i = 0; i < half; i++) {
        const float a = before[h * head_dim + i], b = before[h * head_dim + half + i];
        const float cosine = angles.at(0, i), sine = angles.at(0, half + i);
        const float ac = a * cosine, bs = b * sine, bc = b * cosine, as = a * sine;
        expected[h * head_dim + i] = ac - bs, expected[h * head_dim + half + i] = bc + as;
      }
    for (const Kernels* k : running_here()) {
      std::copy(before.begin(), before.end(), x.data());
      k->encoder->rotate({.x = x.data(), .heads = heads, .head_dim = head_dim, .angles = angles.data()});
      check_bits(x.data(), expected.data(), heads * head_dim, k->name);
      x.check_gaps(k->name);
    }
  }
  return text("%d tokens, bit for bit", cases);
}

std::string test_attention(const Options& options) {
  Random random = {options.seed ^ 0x61747465};
  Deck dims{16, 32, 48, 64, 80};
  Deck keys{1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 20, 24, 31, 32, 33, 40, 47, 48, 49, 63, 64, 65, 66, 70, 130};
  const int cases = options.is_long ? 1500 : 116;
  double most = 0;
  for (int n = 0; n < cases; n++) {
    const HeadCase c = draw(random, dims, keys);
    set_case(c.name());
    const Head h(c, random);
    std::vector<std::vector<Approx>> expected;
    for (int t = 0; t < c.keys; t++) expected.push_back(attention_of(h, t));
    for (const Kernels* k : running_here()) {
      set_case(std::string(k->name) + ", " + c.name());
      h.pack(*k);
      h.attend(*k, 0, c.keys);
      h.y.check_gaps("attention");
      std::vector<std::vector<float>> whole;
      for (int t = 0; t < c.keys; t++) {
        check_hull(h, t);
        for (int d = 0; d < c.head_dim; d++)
          if (std::isfinite(expected[t][d].error))
            most = std::max(most, check_within(h.y.at(t, d), expected[t][d], "y", t, d));
        whole.push_back(h.y.values(t));
      }
      // The same bits whichever other queries are asked for, and no row of theirs is written.
      const std::vector<float> before = h.y.all();
      for (int part = 0; part < 6; part++) {
        const int begin = random.below(c.keys), end = part < 2 ? begin + 1 : random.between(begin, c.keys);
        const FloatRows untouched(c.keys, c.head_dim, c.gap);
        h.y.set_all(untouched.all());
        h.attend(*k, begin, end);
        for (int t = 0; t < c.keys; t++)
          if (t >= begin && t < end)
            check_bits(h.y.row(t), whole[t].data(), c.head_dim, "a query of fewer");
          else
            h.y.check_row_untouched(t, "attention");
      }
      // A query that is not finite makes its own row so, and no other.
      const int poisoned = random.below(c.keys), where = random.below(c.head_dim);
      const float sound = h.q.at(poisoned, where);
      h.q.at(poisoned, where) = kNaN;
      h.attend(*k, 0, c.keys);
      h.q.at(poisoned, where) = sound;
      for (int t = 0; t < c.keys; t++)
        if (t != poisoned) check_bits(h.y.row(t), whole[t].data(), c.head_dim, "a query beside one that is NaN");
      for (int d = 0; d < c.head_dim; d++)
        EXPECT(!std::isfinite(h.y.at(poisoned, d)), "y of a query that is NaN is %g", double(h.y.at(poisoned, d)));
      // A token that is not finite is so in all of its key and value: no query that sees it is finite.
      const std::vector<float> sound_k = h.k.all(), sound_v = h.v.all();
      for (int d = 0; d < c.head_dim; d++) h.k.at(poisoned, d) = h.v.at(poisoned, d) = kNaN;
      h.pack(*k);
      h.attend(*k, 0, c.keys);
      h.k.set_all(sound_k), h.v.set_all(sound_v);
      for (int t = 0; t < c.keys; t++) {
        if (c.causal && t + kMaxQueryTile <= poisoned)  // queries of one tile may see 0 times its value
          check_bits(h.y.row(t), whole[t].data(), c.head_dim, "a query before a key that is NaN");
        // Of a window: a key within reach of one of its tile is read, and counts 0.
        for (int d = 0; h.attended(t, poisoned) && d < c.head_dim; d++)
          EXPECT(!std::isfinite(h.y.at(t, d)), "y of query %d is %g, and key %d is NaN", t, double(h.y.at(t, d)),
                 poisoned);
      }
      h.y.set_all(before);
    }
  }
  return text("%d heads, at most %.2f of the bound", cases, most);
}
