// Codes and scores from z: compute-bound, by one exp a bit. No fused multiply-add, so that every implementation agrees
// bit for bit.

LOOKUPFFN_INLINE int tables_of_group(int num_tables, int group) {
  const int left = num_tables - 16 * group;
  return left < 16 ? left : 16;
}

// Sixteen tables of one token: z (16, tau) to `reads` vectors of codes and scores, nearest bucket first.
template <int kBits, int kReads>
LOOKUPFFN_INLINE void hash_group(const float* z, int code_bits, int tables, uint16_t* codes, float* scores) {
  const int bits = kBits ? kBits : code_bits;
  f32x16 v[16];  // v[j]: bit j of sixteen tables
  if (kBits == 8) {
    load_transposed_8(z, v);
  } else {
    for (int t = 0; t < 16; t++) v[t] = load(z + t * bits);  // reads on behind the last table: z has the room
    transpose(v);
  }

  const f32x16 infinity = set1(__builtin_inff()), zero = zero_f32(), one = set1(1.0f);
  f32x16 total = zero, product = one;                // sum_j m_j, prod_j (1 + exp(-2 m_j))
  f32x16 least[3] = {infinity, infinity, infinity};  // the smallest m, in order; a tie goes to the bit that comes first
  i32x16 least_bit[3] = {zero_i32(), zero_i32(), zero_i32()};
  i32x16 code = zero_i32();
  const auto take_bit = [&](int j) __attribute__((always_inline)) {
    const i32x16 bit = set1((int32_t)(1 << (bits - 1 - j)));
    const f32x16 m = abs(v[j]);
    code = bit_or(code, select(less(zero, v[j]), bit, zero_i32()));
    total = add(total, m);
    product = mul(product, add(one, exp_minus_2(m)));
    if (kReads > 1) {  // insert m into the sorted smallest, behind those as small as it
      mask16 smaller[3];
      for (int k = 0; k < kReads - 1; k++) smaller[k] = less(m, least[k]);
      for (int k = kReads - 2; k >= 0; k--) {
        f32x16 value = m;
        i32x16 value_bit = bit;
        if (k > 0) {
          value = select(smaller[k - 1], least[k - 1], m);
          value_bit = select(smaller[k - 1], least_bit[k - 1], bit);
        }
        least[k] = select(smaller[k], value, least[k]);
        least_bit[k] = select(smaller[k], value_bit, least_bit[k]);
      }
    }
  };
  if (kBits) {
#pragma GCC unroll 8
    for (int j = 0; j < kBits; j++) take_bit(j);
  } else {
#pragma GCC unroll 1
    for (int j = 0; j < bits; j++) take_bit(j);
  }

  const i32x16 lane = load(kLaneIndex);
  const mask16 valid = less(lane, set1((int32_t)tables));
  store_16(codes, select(valid, code, zero_i32()));
  store(scores, select(valid, div(total, product), zero));
  if (kReads == 1) return;
  if (kReads == 4) {  // the fourth bucket flips the third bit, or the first two where those cost no more
    const f32x16 pair = add(least[0], least[1]);
    const mask16 third = less(least[2], pair);
    least_bit[2] = select(third, least_bit[2], bit_or(least_bit[0], least_bit[1]));
    least[2] = select(third, least[2], pair);
  }
  for (int n = 1; n < kReads; n++) {
    const f32x16 cost = least[n - 1];
    const f32x16 score = div(mul(sub(total, add(cost, cost)), exp_minus_2(cost)), product);
    store_16(codes + 16 * n, select(valid, bit_xor(code, least_bit[n - 1]), zero_i32()));
    store(scores + 16 * n, select(valid, score, zero));
  }
}

template <int kReads>
LOOKUPFFN_INLINE void hash_groups(const HashArgs& a) {
  const int bits = a.code_bits;
  for (int g = a.first; g < a.last; g++) {
    const int tables = tables_of_group(a.num_tables, g);
    const float* z = a.z + (size_t)g * 16 * bits;
    const size_t slot = (size_t)g * 16 * kReads;
    if (bits == 8)
      hash_group<8, kReads>(z, bits, tables, a.codes + slot, a.scores + slot);
    else
      hash_group<0, kReads>(z, bits, tables, a.codes + slot, a.scores + slot);
  }
}

static void hash(const HashArgs& a) {
  LOOKUPFFN_LOOP(codes_and_scores);
  switch (a.reads) {
    case 1: return hash_groups<1>(a);
    case 2: return hash_groups<2>(a);
    case 3: return hash_groups<3>(a);
    default: return hash_groups<4>(a);
  }
}

// Scores of a token as integers of 0 to 127, by a scale a token: its largest score times table scale is 127.
static float quantise_scores(const QuantiseScoresArgs& a) {
  LOOKUPFFN_LOOP(quantise_scores);
  const int groups = groups_of(a.num_tables), slots = groups * a.reads * 16;
  i32x16 largest = zero_i32();
  for (int g = 0, slot = 0; g < groups; g++)
    for (int n = 0; n < a.reads; n++, slot += 16) {
      const f32x16 s = mul(load(a.scores + slot), load(a.table_scales + 16 * g));
      store(a.scores + slot, s);
      largest = max(largest, abs_bits(s));
    }
  const Scale scale = quantisation_scale(reduce_max(largest), 127.0f);
  const f32x16 factor = set1(scale.inverse);
  for (int slot = 0; slot < slots; slot += 16)
    store_u8(a.quantised + slot, round_to_int(abs(mul(load(a.scores + slot), factor))));
  if (a.negated_rows) {  // a negative score reads the negated row
    const i32x16 negated = set1((int32_t)1 << a.code_bits);
    for (int slot = 0; slot < slots; slot += 16) {
      const i32x16 code = load_u16(a.codes + slot);
      store_16(a.codes + slot, select(less(load(a.scores + slot), zero_f32()), bit_or(code, negated), code));
    }
  }
  return scale.scale;
}
