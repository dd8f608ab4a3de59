#include "groups.h"
#include "reference.h"

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
