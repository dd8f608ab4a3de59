// Codes and scores from z: bound by the arithmetic of one exp a bit. No fused multiply-add, so that every implementation
// agrees bit for bit.

LOOKUPFFN_INLINE int tables_of_group(const Layer& l, int g) {
  const int left = l.h.num_tables - 16 * g;
  return left < 16 ? left : 16;
}

// exp(-2 m) for m >= 0, within 3 ulp and the rounding of 2 m / ln 2, and at least 2^-126; multiply and add apart, so that
// it is the same bits everywhere.
LOOKUPFFN_INLINE f32x16 exp_minus_2(f32x16 m) {
  const f32x16 t = max(set1(-126.0f), mul(m, set1(-2.885390081777927f)));  // -2 / ln 2; a NaN stays one
  const f32x16 n = round(t), f = sub(t, n), f2 = mul(f, f);                // f in [-1/2, 1/2]
  // 2^f, Chebyshev's fit of degree 5, as a tree: the chain of operations is what takes the time here, not their number
  const f32x16 low = add(mul(f, set1(0.6931471880f)), set1(1.0f));
  const f32x16 middle = add(mul(f, set1(5.5503571142e-2f)), set1(0.2402210749f));
  const f32x16 high = add(mul(f, set1(1.3390863365e-3f)), set1(9.6760319183e-3f));
  return scale(add(mul(add(mul(high, f2), middle), f2), low), n);
}

// Sixteen tables of one token: z (16, tau) to `reads` vectors of codes and scores, nearest cell first.
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
  f32x16 total = zero, product = one;      // sum_j m_j, prod_j (1 + exp(-2 m_j))
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
  if (kReads == 4) {  // the fourth cell flips the third bit, or the first two where those cost no more
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
LOOKUPFFN_INLINE void hash_groups(const Layer& l, int first, int last, const float* z, uint16_t* codes, float* scores) {
  const int bits = l.h.code_bits;
  for (int g = first; g < last; g++) {
    const int tables = tables_of_group(l, g);
    const float* z_group = z + (size_t)g * 16 * bits;
    const size_t slot = (size_t)g * 16 * kReads;
    if (bits == 8)
      hash_group<8, kReads>(z_group, bits, tables, codes + slot, scores + slot);
    else
      hash_group<0, kReads>(z_group, bits, tables, codes + slot, scores + slot);
  }
}

static void hash(const Layer& l, int first, int last, const float* z, uint16_t* codes, float* scores) {
  switch (l.h.reads) {
    case 1: return hash_groups<1>(l, first, last, z, codes, scores);
    case 2: return hash_groups<2>(l, first, last, z, codes, scores);
    case 3: return hash_groups<3>(l, first, last, z, codes, scores);
    default: return hash_groups<4>(l, first, last, z, codes, scores);
  }
}

static void prefetch_rows(const Layer& l, int first_slice, int last_slice, int first, int last, const uint16_t* codes) {
  const size_t table_bytes = (size_t)l.h.table_rows * l.slice_bytes, slice_bytes = l.h.num_tables * table_bytes;
  for (int slice = first_slice; slice < last_slice; slice++) {
    const uint16_t* code = codes + (size_t)first * l.h.reads * 16;
    for (int g = first; g < last; g++) {
      const uint8_t* tables = l.tables + slice * slice_bytes + (size_t)g * 16 * table_bytes;
      for (int n = 0; n < l.h.reads; n++, code += 16)
        for (int t = 0; t < tables_of_group(l, g); t++)
          for (size_t line = 0; line < l.slice_bytes; line += 64)
            prefetch_l2(tables + t * table_bytes + code[t] * l.slice_bytes + line);
    }
  }
}

// Scores of a token as integers of 0 to 127, in steps of its largest score times table scale: returns the step.
static float quantise_scores(const Layer& l, float* scores, uint16_t* codes, uint8_t* quantised) {
  const int reads = l.h.reads;
  i32x16 largest = zero_i32();
  for (int g = 0, slot = 0; g < l.groups; g++)
    for (int n = 0; n < reads; n++, slot += 16) {
      const f32x16 s = mul(load(scores + slot), load(l.table_scales + 16 * g));
      store(scores + slot, s);
      largest = max(largest, abs_bits(s));
    }
  const Step step = quantisation_step(reduce_max(largest), 127.0f);
  const f32x16 factor = set1(step.per_unit);
  for (int slot = 0; slot < l.slots; slot += 16) store_u8(quantised + slot, round_to_int(abs(mul(load(scores + slot), factor))));
  if (l.h.table_rows >> l.h.code_bits == 2) {  // a negative score reads the negated row
    const i32x16 negated = set1((int32_t)1 << l.h.code_bits);
    for (int slot = 0; slot < l.slots; slot += 16) {
      const i32x16 code = load_u16(codes + slot);
      store_16(codes + slot, select(less(load(scores + slot), zero_f32()), bit_or(code, negated), code));
    }
  }
  return step.unit;
}
