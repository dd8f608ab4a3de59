// The loops of training: hash and gather of tables as PyTorch keeps them, (T, K, E), and their backward passes.
//
// hash      compute-bound, forward and backward
// gather    bound by L2: a row's slice is one or two cache lines at a stride that fits few cache sets, so slices of
// some
//           tables are packed first and read from there by every token
// scatter   bound by L1: the slice of one table and that of its gradient lie there while the tokens' slices stream past
//
// A float32 sum has one order of summands whatever the batch, the threads and the path: that is all that keeps results
// the same bits.

// ---- Hash -----------------------------------------------------------------------------------------------------------

// Rows of z of one table and token each, `bits` floats apart. A group of sixteen reads a little behind its last row.
LOOKUPFFN_INLINE const float* whole_rows(const float* z, int64_t rows, int64_t first, int bits, float* copy) {
  const float* group = z + first * bits;
  if (15 * bits + 16 <= (rows - first) * bits) return group;
  const int count = rows - first < 16 ? (int)(rows - first) : 16;
  for (int i = 0; i < 256; i++) copy[i] = 0.0f;
  __builtin_memcpy(copy, group, sizeof(float) * count * bits);
  return copy;
}

static void hash_rows(const HashRowsArgs& a) {
  float copy[256], score[16 * kMaxReads];
  uint16_t code[16 * kMaxReads];
  for (int64_t row = a.begin; row < a.end; row += 16) {
    const int count = a.end - row < 16 ? (int)(a.end - row) : 16;  // sixteen rows as a token of sixteen tables
    hash({.num_tables = count,
          .code_bits = a.bits,
          .reads = a.reads,
          .first = 0,
          .last = 1,
          .z = whole_rows(a.z, a.rows, row, a.bits, copy),
          .codes = code,
          .scores = score});
    int32_t* codes = a.codes + row * a.reads;
    float* scores = a.scores + row * a.reads;
    if (a.reads == 1 && count == 16) {
      store(codes, load_u16(code));
      store(scores, load(score));
    } else {
      for (int i = 0; i < count; i++)
        for (int n = 0; n < a.reads; n++) {
          codes[i * a.reads + n] = code[16 * n + i];
          scores[i * a.reads + n] = score[16 * n + i];
        }
    }
  }
}

// The formula and its letters are in ops.py, _hash_codes_backward; lanes are sixteen rows.
template <int kReads>
LOOKUPFFN_INLINE void hash_group_backward(const float* z, int bits, const float* grad, const int32_t* codes,
                                          float* grad_z) {
  const f32x16 zero = zero_f32(), one = set1(1.0f);
  f32x16 v[16], q[16];
  for (int i = 0; i < 16; i++) v[i] = load(z + i * bits);
  transpose(v);
  f32x16 total = zero, product = one, cost[kReads];
  i32x16 flips[kReads];
  for (int n = 1; n < kReads; n++) {
    cost[n] = zero;
    flips[n] = bit_xor(load(codes), load(codes + 16 * n));
  }
  for (int j = 0; j < bits; j++) {
    const i32x16 bit = set1((int32_t)(1 << (bits - 1 - j)));
    const f32x16 m = abs(v[j]), e = exp_minus_2(m), rest = add(one, e);
    q[j] = div(e, rest);
    total = add(total, m);
    product = mul(product, rest);
    for (int n = 1; n < kReads; n++)  // a set bit leaves the number as it is when it is set again
      cost[n] = add(cost[n], select(less(flips[n], bit_or(flips[n], bit)), zero, m));
  }
  f32x16 p = div(load(grad), product), score = mul(p, total);  // these carry the gradient that comes in
  f32x16 constant = p, slope = add(score, score), lower[kReads];
  for (int n = 1; n < kReads; n++) {
    p = mul(div(load(grad + 16 * n), product), exp_minus_2(cost[n]));
    score = mul(p, sub(total, add(cost[n], cost[n])));
    constant = add(constant, p);
    slope = add(slope, add(score, score));
    lower[n] = add(add(p, score), add(p, score));
  }
  for (int j = 0; j < bits; j++) {
    const i32x16 bit = set1((int32_t)(1 << (bits - 1 - j)));
    f32x16 g = add(mul(q[j], slope), constant);
    for (int n = 1; n < kReads; n++) g = sub(g, select(less(flips[n], bit_or(flips[n], bit)), zero, lower[n]));
    const f32x16 sign = select(less(zero, v[j]), one, select(less(v[j], zero), set1(-1.0f), zero));
    v[j] = mul(g, sign);
  }
  transpose(v);
  for (int i = 0; i < 16; i++) store(grad_z + i * bits, v[i]);  // in order: each overwrites what is left of the last
}

template <int kReads>
LOOKUPFFN_INLINE void hash_rows_backward_of(const HashRowsBackwardArgs& a) {
  float copy[256], out[256], grads[16 * kReads];
  int32_t code[16 * kReads];
  for (int64_t row = a.begin; row < a.end; row += 16) {
    const int count = a.end - row < 16 ? (int)(a.end - row) : 16;
    const float* group = whole_rows(a.z, a.rows, row, a.bits, copy);
    for (int n = 0; n < kReads; n++)
      for (int i = 0; i < 16; i++) {
        grads[16 * n + i] = i < count ? a.grad[(row + i) * kReads + n] : 0.0f;
        code[16 * n + i] = i < count ? a.codes[(row + i) * kReads + n] : 0;
      }
    hash_group_backward<kReads>(group, a.bits, grads, code, out);
    __builtin_memcpy(a.grad_z + row * a.bits, out, sizeof(float) * count * a.bits);
  }
}

static void hash_rows_backward(const HashRowsBackwardArgs& a) {
  LOOKUPFFN_LOOP(gradient_of_z);
  switch (a.reads) {
    case 1: return hash_rows_backward_of<1>(a);
    case 2: return hash_rows_backward_of<2>(a);
    case 3: return hash_rows_backward_of<3>(a);
    default: return hash_rows_backward_of<4>(a);
  }
}

// ---- Slices ---------------------------------------------------------------------------------------------------------

constexpr int kVectors = kTrainSlice / 16;

// Outputs [first, first + kTrainSlice) of one row in float32, zeros behind the last one.
LOOKUPFFN_INLINE void pack_row(const Rows& from, int64_t row, int first, int width, float* to) {
  const int64_t start = row * from.stride + first;
  const int left = width - first;
  if (left >= kTrainSlice) {
    for (int i = 0; i < kTrainSlice; i += 16)
      store(to + i, from.bfloat16 ? load_bf16((const uint16_t*)from.data + start + i)
                                  : load((const float*)from.data + start + i));
  } else if (from.bfloat16) {
    uint16_t narrow[kTrainSlice] = {0};
    __builtin_memcpy(narrow, (const uint16_t*)from.data + start, sizeof(uint16_t) * left);
    for (int i = 0; i < kTrainSlice; i += 16) store(to + i, load_bf16(narrow + i));
  } else {
    for (int i = left; i < kTrainSlice; i++) to[i] = 0.0f;
    __builtin_memcpy(to, (const float*)from.data + start, sizeof(float) * left);
  }
}

static void pack_slice(const PackSliceArgs& a) {
  LOOKUPFFN_LOOP(pack);
  float* to = a.to;
  for (int64_t row = a.begin; row < a.end; row++, to += kTrainSlice) pack_row(a.from, row, a.first, a.width, to);
}

static void pack_rows(const PackRowsArgs& a) {
  LOOKUPFFN_LOOP(pack);
  for (int64_t i = 0; i < a.count; i++)
    pack_row(a.from, a.rows[i], a.first, a.width, a.to + (size_t)a.rows[i] * kTrainSlice);
}

static void unpack_slice(const UnpackSliceArgs& a) {
  LOOKUPFFN_LOOP(unpack);
  const int left = a.width - a.first;
  const float* from = a.from;
  for (int64_t row = a.begin; row < a.end; row++, from += kTrainSlice) {
    const int64_t start = row * a.to.stride + a.first;
    if (a.to.bfloat16) {
      uint16_t narrow[kTrainSlice], *out = (uint16_t*)a.to.data + start;
      const bool whole = left >= kTrainSlice;
      for (int i = 0; i < kTrainSlice; i += 16) store_bf16((whole ? out : narrow) + i, load(from + i));
      if (!whole) __builtin_memcpy(out, narrow, sizeof(uint16_t) * left);
    } else if (left >= kTrainSlice) {
      for (int i = 0; i < kTrainSlice; i += 16) store((float*)a.to.data + start + i, load(from + i));
    } else {
      __builtin_memcpy((float*)a.to.data + start, from, sizeof(float) * left);
    }
  }
}

// to[column][row] = from[row][column] for words of 32 bits, rows and columns up to 16.
LOOKUPFFN_INLINE void transpose_block(const float* from, int64_t from_stride, int rows, int columns, float* to,
                                      int64_t to_stride) {
  if (rows == 16 && columns == 16) {
    f32x16 v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = load(from + i * from_stride);
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) store(to + i * to_stride, v[i]);
  } else {
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < columns; j++) __builtin_memcpy(to + j * to_stride + i, from + i * from_stride + j, 4);
  }
}

static void transpose_words(const TransposeArgs& a) {
  LOOKUPFFN_LOOP(transpose);
  for (int64_t i = 0; i < a.rows; i += 16)
    for (int64_t j = 0; j < a.columns; j += 16)
      transpose_block((const float*)a.from + i * a.from_stride + j, a.from_stride,
                      a.rows - i < 16 ? (int)(a.rows - i) : 16, a.columns - j < 16 ? (int)(a.columns - j) : 16,
                      (float*)a.to + j * a.to_stride + i, a.to_stride);
}

// ---- Gather ---------------------------------------------------------------------------------------------------------

constexpr int kPrefetchTokens = 16;  // of codes and scores

template <bool kOneRead>
LOOKUPFFN_INLINE void gather_slice_of(const GatherSliceArgs& a) {
  const size_t table_floats = (size_t)a.table_rows * kTrainSlice;
  const int tables = a.tables, reads = a.reads;
  const int32_t* codes = a.codes;
  const float* scores = a.scores;
  float* sums = a.sums;
  for (int64_t token = 0; token < a.tokens; token++, codes += a.stride, scores += a.stride, sums += kTrainSlice) {
    for (int c = 0; c < tables * reads; c += 16) {  // the processor's own prefetchers follow no stride that long
      prefetch(codes + kPrefetchTokens * a.stride + c);
      prefetch(scores + kPrefetchTokens * a.stride + c);
    }
    f32x16 sum[kVectors];
    for (int i = 0; i < kVectors; i++) sum[i] = a.starts ? zero_f32() : load(sums + 16 * i);
    const float* table = a.packed;
    if (kOneRead) {
      for (int t = 0; t < tables; t++, table += table_floats) {
        const float* row = table + (size_t)codes[t] * kTrainSlice;
        const f32x16 s = set1(scores[t]);
        for (int i = 0; i < kVectors; i++) sum[i] = fma(s, load(row + 16 * i), sum[i]);
      }
    } else {
      for (int t = 0, c = 0; t < tables; t++, table += table_floats)
        for (int n = 0; n < reads; n++, c++) {
          const float* row = table + (size_t)codes[c] * kTrainSlice;
          const f32x16 s = set1(scores[c]);
          for (int i = 0; i < kVectors; i++) sum[i] = fma(s, load(row + 16 * i), sum[i]);
        }
    }
    for (int i = 0; i < kVectors; i++) store(sums + 16 * i, sum[i]);
  }
}

static void gather_slice(const GatherSliceArgs& a) {
  LOOKUPFFN_LOOP(rows);
  a.reads == 1 ? gather_slice_of<true>(a) : gather_slice_of<false>(a);
}

template <bool kBFloat16>
LOOKUPFFN_INLINE f32x16 load_number(const void* data, int64_t at) {
  return kBFloat16 ? load_bf16((const uint16_t*)data + at) : load((const float*)data + at);
}

// Outputs [first, first + 16 kSums) of one token, straight from the tables.
template <int kSums, bool kBFloat16>
LOOKUPFFN_INLINE void gather_outputs(const GatherTokenArgs& a, int first) {
  f32x16 sum[kSums];
  for (int i = 0; i < kSums; i++) sum[i] = zero_f32();
  for (int64_t t = 0, c = 0; t < a.tables; t++)
    for (int n = 0; n < a.reads; n++, c++) {
      const int64_t start = (t * a.table_rows + a.codes[c]) * a.rows.stride + first;
      const f32x16 s = set1(a.scores[c]);
      for (int i = 0; i < kSums; i++) sum[i] = fma(s, load_number<kBFloat16>(a.rows.data, start + 16 * i), sum[i]);
    }
  for (int i = 0; i < kSums; i++) {
    const int64_t at = a.token * a.y.stride + first + 16 * i;
    if (kBFloat16)
      store_bf16((uint16_t*)a.y.data + at, sum[i]);
    else
      store((float*)a.y.data + at, sum[i]);
  }
}

template <bool kBFloat16>
LOOKUPFFN_INLINE void gather_token_of(const GatherTokenArgs& a) {
  int e = a.first;
  for (; e + 128 <= a.last; e += 128) gather_outputs<8, kBFloat16>(a, e);
  for (; e + 32 <= a.last; e += 32) gather_outputs<2, kBFloat16>(a, e);
  for (; e + 16 <= a.last; e += 16) gather_outputs<1, kBFloat16>(a, e);
  if (e == a.last) return;
  if (a.width >= 16)
    return gather_outputs<1, kBFloat16>(a, a.width - 16);  // some of them once more, to the same result
  f32x16 sum = zero_f32();
  uint16_t narrow[16] = {0};
  float row[16] = {0};
  for (int64_t t = 0, c = 0; t < a.tables; t++)
    for (int n = 0; n < a.reads; n++, c++) {
      const int64_t start = (t * a.table_rows + a.codes[c]) * a.rows.stride;
      if (kBFloat16)
        __builtin_memcpy(narrow, (const uint16_t*)a.rows.data + start, sizeof(uint16_t) * a.width);
      else
        __builtin_memcpy(row, (const float*)a.rows.data + start, sizeof(float) * a.width);
      sum = fma(set1(a.scores[c]), kBFloat16 ? load_bf16(narrow) : load(row), sum);
    }
  store(row, sum);
  store_bf16(narrow, sum);
  if (kBFloat16)
    __builtin_memcpy((uint16_t*)a.y.data + a.token * a.y.stride, narrow, sizeof(uint16_t) * a.width);
  else
    __builtin_memcpy((float*)a.y.data + a.token * a.y.stride, row, sizeof(float) * a.width);
}

static void gather_token(const GatherTokenArgs& a) {
  LOOKUPFFN_LOOP(rows);
  a.rows.bfloat16 ? gather_token_of<true>(a) : gather_token_of<false>(a);
}

// ---- Scatter --------------------------------------------------------------------------------------------------------

static void scatter_slice(const ScatterSliceArgs& a) {
  LOOKUPFFN_LOOP(scatter);
  for (int64_t token = 0; token < a.tokens; token += 16) {
    f32x16 dot[16];
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++) {
      const size_t start = (size_t)a.codes[token + k] * kTrainSlice;
      const float *row = a.packed + start, *g = a.grad + (token + k) * kTrainSlice;
      float* sum = a.sums + start;
      const f32x16 s = set1(a.scores[token + k]);
      for (int i = 0; i < kVectors; i++) {
        const f32x16 gi = load(g + 16 * i);
        dot[k] = i ? fma(gi, load(row + 16 * i), dot[k]) : mul(gi, load(row));
        store(sum + 16 * i, fma(s, gi, load(sum + 16 * i)));
      }
    }
    transpose(dot);
#pragma GCC unroll 4
    for (int step = 1; step < 16; step *= 2)
#pragma GCC unroll 8
      for (int k = 0; k < 16; k += 2 * step) dot[k] = add(dot[k], dot[k + step]);
    store(a.dots + token, add(load(a.dots + token), dot[0]));
  }
}
