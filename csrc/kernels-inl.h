// The loops of the engine, written once over the 16-lane shim that was included before this file.
//
// project  bound by multiply-adds: kTileTokens x kTilePanels sums stay in registers, a weight is loaded once a tile
// hash     bound by the arithmetic of one exp a bit; no fused multiply-add, so that every implementation agrees bit for bit
// gather   bound by the rows' way from L2: one slice of a row is one to four cache lines, a slice of some tables stays in L2
//
// In the integer paths (int8 and int16 weights, int8 tables) every rounding is written out and sums are exact, so codes
// and outputs are the same bits on every instruction set.

// ---- Projection ------------------------------------------------------------------------------------------------------

template <WeightType kType>
struct Product;  // sums of 16 outputs over words of the packed weights

template <>
struct Product<WeightType::kFloat32> {
  typedef f32x16 Sum;
  static LOOKUPFFN_INLINE Sum start(const int32_t*) { return zero_f32(); }
  static LOOKUPFFN_INLINE Sum step(Sum sum, bytes64 x, bytes64 w) { return dot_f32(sum, x, w); }
  static LOOKUPFFN_INLINE f32x16 finish(Sum sum, const float*) { return sum; }
};

template <>
struct Product<WeightType::kInt16> {
  typedef i32x16 Sum;
  static LOOKUPFFN_INLINE Sum start(const int32_t*) { return zero_i32(); }
  static LOOKUPFFN_INLINE Sum step(Sum sum, bytes64 x, bytes64 w) { return dot2_i16(sum, x, w); }
  static LOOKUPFFN_INLINE f32x16 finish(Sum sum, const float* scales) { return mul(to_float(sum), load(scales)); }
};

template <>
struct Product<WeightType::kInt8> {
  typedef i32x16 Sum;
  static LOOKUPFFN_INLINE Sum start(const int32_t* offsets) {  // activations come as q + 128, and may be taken as such
    return kActivationOffset ? load(offsets) : zero_i32();
  }
  static LOOKUPFFN_INLINE Sum step(Sum sum, bytes64 x, bytes64 w) { return dot4_u8i8(sum, x, w); }
  static LOOKUPFFN_INLINE f32x16 finish(Sum sum, const float* scales) { return mul(to_float(sum), load(scales)); }
};

// kTokens x kPanels sums of `words` steps. x rows are x_bytes apart; a step of w is `group` panels of 64 bytes.
template <WeightType kType, int kTokens, int kPanels>
LOOKUPFFN_INLINE void multiply_tile(const uint8_t* x, size_t x_bytes, const uint8_t* w, size_t group, const float* scales,
                                    const int32_t* offsets, int words, float* y, size_t y_stride) {
  typedef Product<kType> P;
  typename P::Sum sum[kTokens][kPanels];
#pragma GCC unroll 8
  for (int p = 0; p < kPanels; p++) {
    typename P::Sum start = P::start(offsets + 16 * p);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; t++) sum[t][p] = start;
  }
  for (int k = 0; k < words; k++, w += group * 64) {
    bytes64 weight[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; p++) weight[p] = load_bytes(w + 64 * p);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; t++) {
      bytes64 activation = broadcast_word(x + t * x_bytes + 4 * (size_t)k);
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; p++) sum[t][p] = P::step(sum[t][p], activation, weight[p]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; t++)
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; p++) store(y + t * y_stride + 16 * p, P::finish(sum[t][p], scales + 16 * p));
}

template <WeightType kType, int kPanels>
static void multiply_panels(const uint8_t* x, size_t x_bytes, const uint8_t* w, size_t group, const float* scales,
                            const int32_t* offsets, int words, float* y, size_t y_stride, int tokens) {
  int t = 0;
  for (; t + kTileTokens <= tokens; t += kTileTokens)
    multiply_tile<kType, kTileTokens, kPanels>(x + t * x_bytes, x_bytes, w, group, scales, offsets, words,
                                               y + t * y_stride, y_stride);
  if (kTileTokens > 2)
    for (; t + 2 <= tokens; t += 2)
      multiply_tile<kType, 2, kPanels>(x + t * x_bytes, x_bytes, w, group, scales, offsets, words, y + t * y_stride, y_stride);
  for (; t < tokens; t++)
    multiply_tile<kType, 1, kPanels>(x + t * x_bytes, x_bytes, w, group, scales, offsets, words, y + t * y_stride, y_stride);
}

// One stage, one repeat: y = blockdiag(W) x for a tile of tokens. `stage` counts stages over all repeats.
template <WeightType kType>
static void multiply(const Layer& l, int stage, const uint8_t* x, size_t x_bytes, int tokens, float* y) {
  const int words = l.h.block_in * (int)element_size(kType) / 4, panels = l.h.block_out / 16;
  const int group = panels_a_group(l.h.block_out);
  for (int n = 0; n < l.h.blocks; n++)
    for (int p = 0, wide; p < panels; p += wide) {
      wide = group % kTilePanels ? 1 : kTilePanels;
      const size_t output = (size_t)stage * l.width_out + (size_t)n * l.h.block_out + 16 * p;  // of all stages
      const size_t panel = output / 16;
      const uint8_t* w = l.weights + ((panel - p % group) * words + p % group) * 64;
      const auto run = wide > 1 ? multiply_panels<kType, kTilePanels> : multiply_panels<kType, 1>;
      run(x + (size_t)n * words * 4, x_bytes, w, group, l.weight_scales + output, l.weight_offsets + output, words,
          y + (size_t)n * l.h.block_out + 16 * p, l.width_out, tokens);
    }
}

#ifdef LOOKUPFFN_TILES
// kGroup panels of one block for up to 16 tokens: int32 sums to y. A step takes `bytes` inputs.
template <int kGroup>
static void multiply_block(const uint8_t* x, size_t x_bytes, const uint8_t* w, int bytes, int steps, float* y,
                           size_t y_stride) {
  constexpr size_t kWord = kGroup * 64;  // bytes from a word of the weights to the next
  const size_t y_bytes = y_stride * sizeof(float);
  Tiles::zero<2>();
  if (kGroup > 1) Tiles::zero<3>();
  if (kGroup > 2) Tiles::zero<4>();
  if (kGroup > 3) Tiles::zero<5>();
  for (int k = 0; k < steps; k++, x += bytes, w += bytes / 4 * kWord) {
    Tiles::load<0>(x, x_bytes);
    Tiles::load<1>(w, kWord), Tiles::dot<2>();
    if (kGroup > 1) Tiles::load<1>(w + 64, kWord), Tiles::dot<3>();
    if (kGroup > 2) Tiles::load<1>(w + 128, kWord), Tiles::dot<4>();
    if (kGroup > 3) Tiles::load<1>(w + 192, kWord), Tiles::dot<5>();
  }
  Tiles::store<2>(y, y_bytes);
  if (kGroup > 1) Tiles::store<3>(y + 16, y_bytes);
  if (kGroup > 2) Tiles::store<4>(y + 32, y_bytes);
  if (kGroup > 3) Tiles::store<5>(y + 48, y_bytes);
}

// multiply() of int8 weights on tiles of 16 tokens, for blocks of up to 64 inputs or a multiple of 64.
static void multiply_on_tiles(const Layer& l, int stage, const uint8_t* x, size_t x_bytes, int tokens, float* y) {
  const int group = panels_a_group(l.h.block_out), bytes = l.h.block_in < 64 ? l.h.block_in : 64;
  constexpr decltype(&multiply_block<1>) all[] = {multiply_block<1>, multiply_block<2>, multiply_block<3>, multiply_block<4>};
  const auto run = all[group - 1];
  const size_t first = (size_t)stage * l.width_out;
  for (int t = 0, rows; t < tokens; t += rows) {
    rows = tokens - t < 16 ? tokens - t : 16;
    const Tiles tiles(rows, bytes);
    for (int output = 0; output < l.width_out; output += 16 * group)
      run(x + t * x_bytes + (size_t)(output / l.h.block_out) * l.h.block_in, x_bytes,
          l.weights + (first + output) * l.h.block_in, bytes, l.h.block_in / bytes, y + (size_t)t * l.width_out + output,
          l.width_out);
  }
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < l.width_out; i += 16) {
      float* sums = y + (size_t)t * l.width_out + i;
      const i32x16 sum = add(load((const int32_t*)sums), load(l.weight_offsets + first + i));
      store(sums, mul(to_float(sum), load(l.weight_scales + first + i)));
    }
}
#endif

// One stage, one repeat, int8 weights.
static void multiply_int8(const Layer& l, int stage, const uint8_t* x, size_t x_bytes, int tokens, float* y) {
#ifdef LOOKUPFFN_TILES
  if (l.h.block_in < 64 || l.h.block_in % 64 == 0) return multiply_on_tiles(l, stage, x, x_bytes, tokens, y);
#endif
  multiply<WeightType::kInt8>(l, stage, x, x_bytes, tokens, y);
}

// One radix-2^kLevels pass of the unnormalised Walsh-Hadamard transform over blocks of `block` floats, `step` blocks
// apart; emit(i, v) takes 16 results, those of position i.
template <int kLevels, typename Emit>
LOOKUPFFN_INLINE void butterfly_pass(const float* y, int blocks, size_t block, int step, const Emit& emit) {
  constexpr int kRadix = 1 << kLevels;
  for (int high = 0; high < blocks; high += kRadix * step)
    for (int low = 0; low < step; low++) {
      const size_t first = (size_t)(high + low) * block;
      for (size_t i = first; i < first + block; i += 16) {
        f32x16 v[kRadix];
#pragma GCC unroll 8
        for (int j = 0; j < kRadix; j++) v[j] = load(y + (size_t)j * step * block + i);
#pragma GCC unroll 3
        for (int h = 1; h < kRadix; h *= 2)
#pragma GCC unroll 8
          for (int j = 0; j < kRadix; j++)
            if (!(j & h)) {
              f32x16 a = v[j], b = v[j + h];
              v[j] = add(a, b);
              v[j + h] = sub(a, b);
            }
#pragma GCC unroll 8
        for (int j = 0; j < kRadix; j++) emit((size_t)j * step * block + i, v[j]);
      }
    }
}

// H_n across the blocks of one token: y is overwritten, and emit takes the results.
template <typename Emit>
LOOKUPFFN_INLINE void butterflies(float* y, int blocks, size_t block, const Emit& emit) {
  const auto in_place = [&](size_t i, f32x16 v) { store(y + i, v); };
  int step = 1;
  for (; blocks / step > 8; step *= 8) butterfly_pass<3>(y, blocks, block, step, in_place);
  switch (blocks / step) {
    case 8: return butterfly_pass<3>(y, blocks, block, step, emit);
    case 4: return butterfly_pass<2>(y, blocks, block, step, emit);
    case 2: return butterfly_pass<1>(y, blocks, block, step, emit);
    default: return butterfly_pass<0>(y, blocks, block, step, emit);
  }
}

// The same in place; returns the bits of the largest |y|.
static int32_t butterflies(float* y, int blocks, size_t block) {
  i32x16 largest = zero_i32();
  butterflies(y, blocks, block, [&](size_t i, f32x16 v) __attribute__((always_inline)) {
    largest = max_abs_bits(largest, v);
    store(y + i, v);
  });
  return reduce_max(largest);
}

// z = factor * H_n y + residual * x + bias.
static void butterflies_to_z(float* y, int blocks, size_t block, float factor, float residual, const float* x,
                             const float* bias, float* z) {
  const f32x16 scale_y = set1(factor), scale_x = set1(residual);
  if (residual != 0)
    butterflies(y, blocks, block, [&](size_t i, f32x16 v) __attribute__((always_inline)) {
      store(z + i, add(add(mul(v, scale_y), mul(load(x + i), scale_x)), load(bias + i)));
    });
  else
    butterflies(y, blocks, block, [&](size_t i, f32x16 v) __attribute__((always_inline)) {
      store(z + i, add(mul(v, scale_y), load(bias + i)));
    });
}

struct Step {
  float per_unit;  // quantised = round(value * per_unit)
  float unit;      // value ~ quantised * unit; NaN where a value is not finite
};

LOOKUPFFN_INLINE Step quantisation_step(int32_t largest_bits, float levels) {
  float largest;
  __builtin_memcpy(&largest, &largest_bits, 4);
  if (largest_bits >= 0x7f800000) return {0.0f, __builtin_nanf("")};
  if (largest < 1e-30f) return {0.0f, 0.0f};  // the reciprocal would overflow
  return {levels / largest, largest / levels};
}

static void quantise(WeightType type, const float* values, int width, float per_unit, uint8_t* out) {
  const f32x16 factor = set1(per_unit);
  const auto integers = [&](int i) __attribute__((always_inline)) { return round_to_int(mul(load(values + i), factor)); };
  int i = 0;
  if (type == WeightType::kInt16) {
    for (; i < width; i += 16) store_16(out + 2 * i, integers(i));
    return;
  }
  for (; i + 64 <= width; i += 64) {
    const i32x16 four[4] = {integers(i), integers(i + 16), integers(i + 32), integers(i + 48)};
    store_offset_u8(out + i, four);
  }
  const i32x16 offset = set1((int32_t)128);
  for (; i < width; i += 16) store_u8(out + i, add(integers(i), offset));
}

// x in float32, padded with zeros to `width`.
static void load_rows(const Rows& x, int64_t token, int tokens, int features, int width, float* out) {
  for (int t = 0; t < tokens; t++, out += width) {
    const int64_t start = (token + t) * x.stride;
    int i = 0;
    if (x.bfloat16) {
      const uint16_t* row = (const uint16_t*)x.data + start;
      for (; i + 16 <= features; i += 16) store(out + i, load_bf16(row + i));
      for (; i < features; i++) {
        uint32_t bits = (uint32_t)row[i] << 16;
        __builtin_memcpy(out + i, &bits, 4);
      }
    } else {
      const float* row = (const float*)x.data + start;
      for (; i + 16 <= features; i += 16) store(out + i, load(row + i));
      for (; i < features; i++) out[i] = row[i];
    }
    for (; i < width; i++) out[i] = 0.0f;
  }
}

// Quantises a tile by each token's largest magnitude; unit[t] becomes what one step is worth, times before[t].
static void quantise_tile(const Layer& l, const float* values, size_t stride, int tokens, const int32_t* largest,
                          float levels, const float* before, float* unit, uint8_t* out) {
  const size_t bytes = (size_t)l.width_in * element_size(l.h.weight_type);
  for (int t = 0; t < tokens; t++) {
    Step step = quantisation_step(largest[t], levels);
    quantise(l.h.weight_type, values + t * stride, l.width_in, step.per_unit, out + t * bytes);
    unit[t] = before ? before[t] * step.unit : step.unit;
  }
}

static void project(const Layer& l, Rows x, int64_t token, int tokens, int first, int last, float* z,
                    const ProjectScratch& s) {
  const int stages = l.h.stages, width = l.width_in, out = l.width_out;
  const bool direct = !x.bfloat16 && width == l.h.in_features;  // x as it lies there will do
  if (!direct) load_rows(x, token, tokens, l.h.in_features, width, s.rows);
  const float* rows = direct ? (const float*)x.data + token * x.stride : s.rows;
  const size_t stride = direct ? x.stride : width;
  if (stages == 0) {
    for (int t = 0; t < tokens; t++) __builtin_memcpy(z + (size_t)t * l.z_stride, rows + t * stride, sizeof(float) * width);
    return;
  }
  const bool integer = l.h.weight_type != WeightType::kFloat32;
  const size_t q_bytes = (size_t)width * element_size(l.h.weight_type);
  int32_t largest_x[kMaxTile], largest[kMaxTile];
  for (int t = 0; t < tokens && integer; t++) {
    i32x16 m = zero_i32();
    for (int i = 0; i < width; i += 16) m = max(m, abs_bits(load(rows + t * stride + i)));
    largest_x[t] = reduce_max(m);
  }
  float levels_of_x = 0;  // to which s.first is quantised
  for (int r = first; r < last; r++) {
    float* sums = s.sums[0];
    for (int stage = 0; stage < stages; stage++) {
      const int index = r * stages + stage;
      if (!integer) {
        const float* input = stage ? sums : rows;
        sums = s.sums[stage & 1];
        multiply<WeightType::kFloat32>(l, index, (const uint8_t*)input, 4 * (stage ? (size_t)out : stride), tokens, sums);
      } else {
        const uint8_t* input = stage ? s.activations : s.first;
        const float levels = l.levels[index];
        if (stage) {
          quantise_tile(l, sums, out, tokens, largest, levels, s.unit[stage > 1], s.unit[1], s.activations);
        } else if (levels != levels_of_x) {
          quantise_tile(l, rows, stride, tokens, largest_x, levels, nullptr, s.unit[0], s.first);
          levels_of_x = levels;
        }
        if (l.h.weight_type == WeightType::kInt8)
          multiply_int8(l, index, input, q_bytes, tokens, sums);
        else
          multiply<WeightType::kInt16>(l, index, input, q_bytes, tokens, sums);
      }
      if (stage + 1 < stages)
        for (int t = 0; t < tokens; t++) largest[t] = butterflies(sums + (size_t)t * out, l.h.blocks, l.h.block_out);
    }
    const float* unit = s.unit[stages > 1];
    for (int t = 0; t < tokens; t++)
      butterflies_to_z(sums + (size_t)t * out, l.h.blocks, l.h.block_out, integer ? l.h.scale * unit[t] : l.h.scale,
                       l.h.residual, rows + t * stride, l.code_bias + (size_t)r * out,
                       z + (size_t)t * l.z_stride + (size_t)r * out);
  }
}

LOOKUPFFN_INLINE int tables_of_group(const Layer& l, int g) {
  const int left = l.h.num_tables - 16 * g;
  return left < 16 ? left : 16;
}

// ---- Hash ------------------------------------------------------------------------------------------------------------

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

static void prefetch_rows(const Layer& l, int first, int last, const uint16_t* codes) {
  const size_t table_bytes = (size_t)l.h.table_rows * l.slice_bytes, slice_bytes = l.h.num_tables * table_bytes;
  for (int slice = 0; slice < l.slices; slice++) {
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

// ---- Gather ----------------------------------------------------------------------------------------------------------

// kSums vectors of sums, a slice, and the bias to one row of y.
template <int kSums>
LOOKUPFFN_INLINE void write_slice(const Layer& l, int slice, const Rows& y, int64_t token, const f32x16* sum) {
  const int first = slice * kSums * 16, left = l.h.out_features - first;
  const bool whole = left >= kSums * 16;
  const int64_t start = token * y.stride + first;
  if (y.bfloat16) {
    uint16_t narrow[kSums * 16], *row = (uint16_t*)y.data + start;
    for (int i = 0; i < kSums; i++) store_bf16((whole ? row : narrow) + 16 * i, add(sum[i], load(l.bias + first + 16 * i)));
    if (!whole) __builtin_memcpy(row, narrow, sizeof(uint16_t) * left);
  } else {
    float out[kSums * 16], *row = (float*)y.data + start;
    for (int i = 0; i < kSums; i++) store((whole ? row : out) + 16 * i, add(sum[i], load(l.bias + first + 16 * i)));
    if (!whole) __builtin_memcpy(row, out, sizeof(float) * left);
  }
}

struct GatherCall {
  const uint8_t* tables;  // of this slice
  int first, last;        // groups
  int64_t begin, end;
  const uint16_t* codes;
  const void* scores;
  const float* steps;
  void* sums;
  int64_t ahead;          // tokens whose rows are asked for early; 0 for none
};

// kLines cache lines a row; kSums = 4 kLines.
template <int kLines, bool kPrefetch>
static void gather_i8(const Layer& l, int slice, const GatherCall& c, const Rows& y, int64_t y_token) {
  constexpr size_t kRow = kLines * 64;
  constexpr int kSums = kLines * 4;
  const size_t table_bytes = (size_t)l.h.table_rows * kRow;
  const int reads = l.h.reads;
  const bool starts = c.first == 0, ends = c.last == l.groups;
  for (int64_t token = c.begin; token < c.end; token++) {
    const size_t slot0 = (size_t)token * l.slots + (size_t)c.first * reads * 16;
    const uint16_t* code = c.codes + slot0;
    const uint8_t* score = (const uint8_t*)c.scores + slot0;
    const uint16_t* next = code + (token + c.ahead < c.end ? c.ahead : 0) * (int64_t)l.slots;
    int32_t* saved = (int32_t*)c.sums + (token - c.begin) * kSums * 16;
    i32x16 sum[kSums];
    for (int i = 0; i < kSums; i++) sum[i] = starts ? zero_i32() : load(saved + 16 * i);
    const uint8_t* table = c.tables + (size_t)c.first * 16 * table_bytes;
    for (int g = c.first; g < c.last; g++, table += 16 * table_bytes) {
      const int tables = tables_of_group(l, g);
      for (int n = 0; n < reads; n++, code += 16, score += 16, next += 16) {
        const uint8_t* base = table;
        int t = 0;
        for (; t + 4 <= tables; t += 4, base += 4 * table_bytes) {
          const uint8_t* row0 = base + (size_t)code[t] * kRow;
          const uint8_t* row1 = base + table_bytes + (size_t)code[t + 1] * kRow;
          const uint8_t* row2 = base + 2 * table_bytes + (size_t)code[t + 2] * kRow;
          const uint8_t* row3 = base + 3 * table_bytes + (size_t)code[t + 3] * kRow;
          if (kPrefetch)
            for (int k = 0; k < 4; k++)
              for (int line = 0; line < kLines; line++)
                prefetch(base + k * table_bytes + (size_t)next[t + k] * kRow + line * 64);
          for (int line = 0; line < kLines; line++)
            dot4_rows(sum + 4 * line, load_bytes(row0 + line * 64), load_bytes(row1 + line * 64),
                      load_bytes(row2 + line * 64), load_bytes(row3 + line * 64), score + t);
        }
        if (t < tables) {  // one to three tables are left; the padded scores are 0, their row any row
          const uint8_t* row[4];
          for (int k = 0; k < 4; k++) row[k] = t + k < tables ? base + k * table_bytes + (size_t)code[t + k] * kRow : base;
          for (int line = 0; line < kLines; line++)
            dot4_rows(sum + 4 * line, load_bytes(row[0] + line * 64), load_bytes(row[1] + line * 64),
                      load_bytes(row[2] + line * 64), load_bytes(row[3] + line * 64), score + t);
        }
      }
    }
    if (!ends) {
      for (int i = 0; i < kSums; i++) store(saved + 16 * i, sum[i]);
    } else {
      f32x16 out[kSums];
      for (int i = 0; i < kSums; i++) out[i] = mul(to_float(sum[i]), set1(c.steps[token]));
      write_slice<kSums>(l, slice, y, y_token + token, out);
    }
  }
}

template <TableType kType, int kSums, bool kPrefetch>
static void gather_float(const Layer& l, int slice, const GatherCall& c, const Rows& y, int64_t y_token) {
  constexpr size_t kRow = kSums * 16 * (kType == TableType::kFloat32 ? 4 : 2);
  const size_t table_bytes = (size_t)l.h.table_rows * kRow;
  const int reads = l.h.reads;
  const bool starts = c.first == 0, ends = c.last == l.groups;
  for (int64_t token = c.begin; token < c.end; token++) {
    const size_t slot0 = (size_t)token * l.slots + (size_t)c.first * reads * 16;
    const uint16_t* code = c.codes + slot0;
    const float* score = (const float*)c.scores + slot0;
    const uint16_t* next = code + (token + c.ahead < c.end ? c.ahead : 0) * (int64_t)l.slots;
    float* saved = (float*)c.sums + (token - c.begin) * kSums * 16;
    f32x16 sum[kSums];
    for (int i = 0; i < kSums; i++) sum[i] = starts ? zero_f32() : load(saved + 16 * i);
    const uint8_t* table = c.tables + (size_t)c.first * 16 * table_bytes;
    for (int g = c.first; g < c.last; g++, table += 16 * table_bytes) {
      const int tables = tables_of_group(l, g);
      for (int n = 0; n < reads; n++, code += 16, score += 16, next += 16) {
        const uint8_t* base = table;
        for (int t = 0; t < tables; t++, base += table_bytes) {
          const uint8_t* row = base + code[t] * kRow;
          const f32x16 s = set1(score[t]);
          if (kPrefetch)
            for (size_t line = 0; line < kRow; line += 64) prefetch(base + next[t] * kRow + line);
          if (kType == TableType::kFloat32) {
            for (int i = 0; i < kSums; i++) sum[i] = fma(s, load((const float*)row + 16 * i), sum[i]);
          } else {
            for (int i = 0; i < kSums; i += 2) {
              const bytes64 pair = load_bytes(row + 32 * i);
              sum[i] = fma(s, low_bf16(pair), sum[i]);
              sum[i + 1] = fma(s, high_bf16(pair), sum[i + 1]);
            }
          }
        }
      }
    }
    if (ends)
      write_slice<kSums>(l, slice, y, y_token + token, sum);
    else
      for (int i = 0; i < kSums; i++) store(saved + 16 * i, sum[i]);
  }
}

template <int kSums, bool kPrefetch>
static void gather_any(const Layer& l, int slice, const GatherCall& call, const Rows& y, int64_t y_token) {
  switch (l.h.table_type) {
    case TableType::kInt8: return gather_i8<kSums / 4, kPrefetch>(l, slice, call, y, y_token);
    case TableType::kBFloat16: return gather_float<TableType::kBFloat16, kSums, kPrefetch>(l, slice, call, y, y_token);
    default: return gather_float<TableType::kFloat32, kSums, kPrefetch>(l, slice, call, y, y_token);
  }
}

static void gather(const Layer& l, int slice, int first, int last, int64_t begin, int64_t end, const uint16_t* codes,
                   const void* scores, const float* steps, void* sums, Rows y, int64_t y_token, int ahead) {
  const size_t slice_bytes = (size_t)l.h.num_tables * l.h.table_rows * l.slice_bytes;
  const GatherCall call = {l.tables + slice * slice_bytes, first, last, begin, end, codes, scores, steps, sums, ahead};
  if (l.h.slice == 64)
    return ahead ? gather_any<4, true>(l, slice, call, y, y_token) : gather_any<4, false>(l, slice, call, y, y_token);
  return ahead ? gather_any<8, true>(l, slice, call, y, y_token) : gather_any<8, false>(l, slice, call, y, y_token);
}

static int32_t read_lines(const uint8_t* memory, const uint32_t* lines, int64_t count) {
  i32x16 a = zero_i32(), b = zero_i32();
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    a = bit_xor(a, load((const int32_t*)(memory + (size_t)lines[i] * 64)));
    b = bit_xor(b, load((const int32_t*)(memory + (size_t)lines[i + 1] * 64)));
  }
  return reduce_max(bit_xor(a, b));
}
