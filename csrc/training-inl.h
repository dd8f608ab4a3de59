// The loops of training, over the same shim as kernels-inl.h, which is included before this file: hash and gather of
// tables as PyTorch keeps them, (T, K, E), and their backward passes.
//
// hash      bound by arithmetic, forward and backward
// gather    bound by L2: a row's slice is one or two cache lines at a stride that fits few cache sets, so slices of some
//           tables are packed first and read from there by every token
// scatter   bound by L1: the slice of one table and that of its gradient lie there while the tokens' slices stream past
//
// A float32 sum has one order of summands whatever the batch, the threads and the path: that is all that keeps results
// the same bits.

// ---- Hash ------------------------------------------------------------------------------------------------------------

// Rows of z of one table and token each, `bits` floats apart. A group of sixteen reads a little behind its last row.
LOOKUPFFN_INLINE const float* whole_rows(const float* z, int64_t rows, int64_t first, int bits, float* copy) {
  const float* group = z + first * bits;
  if (15 * bits + 16 <= (rows - first) * bits) return group;
  const int count = rows - first < 16 ? (int)(rows - first) : 16;
  for (int i = 0; i < 256; i++) copy[i] = 0.0f;
  __builtin_memcpy(copy, group, sizeof(float) * count * bits);
  return copy;
}

static void hash_rows(const float* z, int64_t rows, int64_t begin, int64_t end, int bits, int reads, int32_t* codes,
                      float* scores) {
  Layer layer = {};  // a token of sixteen tables, as the engine hashes them
  layer.h.code_bits = bits;
  layer.h.reads = reads;
  layer.groups = 1;
  float copy[256], score[16 * kMaxReads];
  uint16_t code[16 * kMaxReads];
  for (int64_t row = begin; row < end; row += 16) {
    const int count = layer.h.num_tables = end - row < 16 ? (int)(end - row) : 16;
    hash(layer, 0, layer.groups, whole_rows(z, rows, row, bits, copy), code, score);
    int32_t* code_row = codes + row * reads;
    float* score_row = scores + row * reads;
    if (reads == 1 && count == 16) {
      store(code_row, load_u16(code));
      store(score_row, load(score));
    } else {
      for (int i = 0; i < count; i++)
        for (int n = 0; n < reads; n++) {
          code_row[i * reads + n] = code[16 * n + i];
          score_row[i * reads + n] = score[16 * n + i];
        }
    }
  }
}

// The formula and its letters are in ops.py, _hash_codes_backward; lanes are sixteen rows.
template <int kReads>
LOOKUPFFN_INLINE void hash_group_backward(const float* z, int bits, const float* grad, const int32_t* codes, float* grad_z) {
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
LOOKUPFFN_INLINE void hash_rows_backward_of(const float* grad, const float* z, const int32_t* codes, int64_t rows,
                                            int64_t begin, int64_t end, int bits, float* grad_z) {
  float copy[256], out[256], grads[16 * kReads];
  int32_t code[16 * kReads];
  for (int64_t row = begin; row < end; row += 16) {
    const int count = end - row < 16 ? (int)(end - row) : 16;
    const float* group = whole_rows(z, rows, row, bits, copy);
    for (int n = 0; n < kReads; n++)
      for (int i = 0; i < 16; i++) {
        grads[16 * n + i] = i < count ? grad[(row + i) * kReads + n] : 0.0f;
        code[16 * n + i] = i < count ? codes[(row + i) * kReads + n] : 0;
      }
    hash_group_backward<kReads>(group, bits, grads, code, out);
    __builtin_memcpy(grad_z + row * bits, out, sizeof(float) * count * bits);
  }
}

static void hash_rows_backward(const float* grad, const float* z, const int32_t* codes, int64_t rows, int64_t begin,
                               int64_t end, int bits, int reads, float* grad_z) {
  switch (reads) {
    case 1: return hash_rows_backward_of<1>(grad, z, codes, rows, begin, end, bits, grad_z);
    case 2: return hash_rows_backward_of<2>(grad, z, codes, rows, begin, end, bits, grad_z);
    case 3: return hash_rows_backward_of<3>(grad, z, codes, rows, begin, end, bits, grad_z);
    default: return hash_rows_backward_of<4>(grad, z, codes, rows, begin, end, bits, grad_z);
  }
}

// ---- Slices ----------------------------------------------------------------------------------------------------------

constexpr int kVectors = kTrainSlice / 16;

// Outputs [first, first + kTrainSlice) of one row in float32, zeros behind the last one.
LOOKUPFFN_INLINE void pack_row(const Rows& from, int64_t row, int first, int width, float* to) {
  const int64_t start = row * from.stride + first;
  const int left = width - first;
  if (left >= kTrainSlice) {
    for (int i = 0; i < kTrainSlice; i += 16)
      store(to + i, from.bfloat16 ? load_bf16((const uint16_t*)from.data + start + i) : load((const float*)from.data + start + i));
  } else if (from.bfloat16) {
    uint16_t narrow[kTrainSlice] = {0};
    __builtin_memcpy(narrow, (const uint16_t*)from.data + start, sizeof(uint16_t) * left);
    for (int i = 0; i < kTrainSlice; i += 16) store(to + i, load_bf16(narrow + i));
  } else {
    for (int i = left; i < kTrainSlice; i++) to[i] = 0.0f;
    __builtin_memcpy(to, (const float*)from.data + start, sizeof(float) * left);
  }
}

static void pack_slice(Rows from, int64_t begin, int64_t end, int first, int width, float* to) {
  for (int64_t row = begin; row < end; row++, to += kTrainSlice) pack_row(from, row, first, width, to);
}

static void pack_rows(Rows from, const int32_t* rows, int64_t count, int first, int width, float* to) {
  for (int64_t i = 0; i < count; i++) pack_row(from, rows[i], first, width, to + (size_t)rows[i] * kTrainSlice);
}

static void unpack_slice(const float* from, Rows to, int64_t begin, int64_t end, int first, int width) {
  const int left = width - first;
  for (int64_t row = begin; row < end; row++, from += kTrainSlice) {
    const int64_t start = row * to.stride + first;
    if (to.bfloat16) {
      uint16_t narrow[kTrainSlice], *out = (uint16_t*)to.data + start;
      const bool whole = left >= kTrainSlice;
      for (int i = 0; i < kTrainSlice; i += 16) store_bf16((whole ? out : narrow) + i, load(from + i));
      if (!whole) __builtin_memcpy(out, narrow, sizeof(uint16_t) * left);
    } else if (left >= kTrainSlice) {
      for (int i = 0; i < kTrainSlice; i += 16) store((float*)to.data + start + i, load(from + i));
    } else {
      __builtin_memcpy((float*)to.data + start, from, sizeof(float) * left);
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

static void transpose_words(const void* from, int64_t from_stride, int64_t rows, int64_t columns, void* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; j += 16)
      transpose_block((const float*)from + i * from_stride + j, from_stride, rows - i < 16 ? (int)(rows - i) : 16,
                      columns - j < 16 ? (int)(columns - j) : 16, (float*)to + j * to_stride + i, to_stride);
}

// ---- Gather ----------------------------------------------------------------------------------------------------------

constexpr int kAhead = 16;  // tokens

// sums[token] += the reads of `tables` tables of which a slice lies packed, [tables][K][kTrainSlice].
template <bool kOneRead>
LOOKUPFFN_INLINE void gather_slice_of(const float* packed, int tables, int64_t table_rows, int reads, const int32_t* codes,
                                      const float* scores, int64_t stride, int64_t tokens, float* sums, bool starts) {
  const size_t table_floats = (size_t)table_rows * kTrainSlice;
  for (int64_t token = 0; token < tokens; token++, codes += stride, scores += stride, sums += kTrainSlice) {
    for (int c = 0; c < tables * reads; c += 16) {  // the processor's own prefetchers follow no stride that long
      prefetch(codes + kAhead * stride + c);
      prefetch(scores + kAhead * stride + c);
    }
    f32x16 sum[kVectors];
    for (int i = 0; i < kVectors; i++) sum[i] = starts ? zero_f32() : load(sums + 16 * i);
    const float* table = packed;
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

static void gather_slice(const float* packed, int tables, int64_t table_rows, int reads, const int32_t* codes,
                         const float* scores, int64_t stride, int64_t tokens, float* sums, bool starts) {
  if (reads == 1)
    gather_slice_of<true>(packed, tables, table_rows, reads, codes, scores, stride, tokens, sums, starts);
  else
    gather_slice_of<false>(packed, tables, table_rows, reads, codes, scores, stride, tokens, sums, starts);
}

// Outputs [first, first + 16 kSums) of one token, straight from the tables.
template <int kSums, bool kBFloat16>
LOOKUPFFN_INLINE void gather_outputs(const Rows& rows, int64_t tables, int64_t table_rows, int reads, const int32_t* codes,
                                     const float* scores, int first, const Rows& y, int64_t token) {
  f32x16 sum[kSums];
  for (int i = 0; i < kSums; i++) sum[i] = zero_f32();
  for (int64_t t = 0, c = 0; t < tables; t++)
    for (int n = 0; n < reads; n++, c++) {
      const int64_t start = (t * table_rows + codes[c]) * rows.stride + first;
      const f32x16 s = set1(scores[c]);
      for (int i = 0; i < kSums; i++)
        sum[i] = fma(s, kBFloat16 ? load_bf16((const uint16_t*)rows.data + start + 16 * i) : load((const float*)rows.data + start + 16 * i), sum[i]);
    }
  for (int i = 0; i < kSums; i++) {
    if (kBFloat16)
      store_bf16((uint16_t*)y.data + token * y.stride + first + 16 * i, sum[i]);
    else
      store((float*)y.data + token * y.stride + first + 16 * i, sum[i]);
  }
}

template <bool kBFloat16>
LOOKUPFFN_INLINE void gather_token_of(const Rows& rows, int64_t tables, int64_t table_rows, int reads, const int32_t* codes,
                                      const float* scores, int first, int last, int width, const Rows& y, int64_t token) {
  int e = first;
  for (; e + 128 <= last; e += 128) gather_outputs<8, kBFloat16>(rows, tables, table_rows, reads, codes, scores, e, y, token);
  for (; e + 32 <= last; e += 32) gather_outputs<2, kBFloat16>(rows, tables, table_rows, reads, codes, scores, e, y, token);
  for (; e + 16 <= last; e += 16) gather_outputs<1, kBFloat16>(rows, tables, table_rows, reads, codes, scores, e, y, token);
  if (e == last) return;
  if (width >= 16) {  // the last sixteen outputs: some of them once more, with the same result
    gather_outputs<1, kBFloat16>(rows, tables, table_rows, reads, codes, scores, width - 16, y, token);
    return;
  }
  f32x16 sum = zero_f32();
  uint16_t narrow[16] = {0};
  float row[16] = {0};
  for (int64_t t = 0, c = 0; t < tables; t++)
    for (int n = 0; n < reads; n++, c++) {
      const int64_t start = (t * table_rows + codes[c]) * rows.stride;
      if (kBFloat16)
        __builtin_memcpy(narrow, (const uint16_t*)rows.data + start, sizeof(uint16_t) * width);
      else
        __builtin_memcpy(row, (const float*)rows.data + start, sizeof(float) * width);
      sum = fma(set1(scores[c]), kBFloat16 ? load_bf16(narrow) : load(row), sum);
    }
  store(row, sum);
  store_bf16(narrow, sum);
  if (kBFloat16)
    __builtin_memcpy((uint16_t*)y.data + token * y.stride, narrow, sizeof(uint16_t) * width);
  else
    __builtin_memcpy((float*)y.data + token * y.stride, row, sizeof(float) * width);
}

static void gather_token(Rows rows, int64_t tables, int64_t table_rows, int reads, const int32_t* codes, const float* scores,
                         int first, int last, int width, Rows y, int64_t token) {
  if (rows.bfloat16)
    gather_token_of<true>(rows, tables, table_rows, reads, codes, scores, first, last, width, y, token);
  else
    gather_token_of<false>(rows, tables, table_rows, reads, codes, scores, first, last, width, y, token);
}

// ---- Scatter ---------------------------------------------------------------------------------------------------------

// One read of one table, a slice of it and of grad packed: sums[code] += score * grad and dots += <grad, row>, for
// tokens in sixteens.
static void scatter_slice(const float* packed, float* sums, const float* grad, const int32_t* codes, const float* scores,
                          float* dots, int64_t tokens) {
  for (int64_t token = 0; token < tokens; token += 16) {
    f32x16 dot[16];
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++) {
      const size_t start = (size_t)codes[token + k] * kTrainSlice;
      const float *row = packed + start, *g = grad + (token + k) * kTrainSlice;
      float* sum = sums + start;
      const f32x16 s = set1(scores[token + k]);
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
    store(dots + token, add(load(dots + token), dot[0]));
  }
}

static const Kernels kKernels = {LOOKUPFFN_NAME,  project,      hash,         prefetch_rows, quantise_scores, gather,
                                 read_lines,      read_stream,  repeat,       hash_rows,    hash_rows_backward, pack_slice,
                                 pack_rows,       unpack_slice, transpose_words, gather_slice, gather_token, scatter_slice};
