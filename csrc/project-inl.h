// The projection of a tile of tokens: bound by multiply-adds. kTileTokens x kTilePanels sums stay in registers, a weight is
// loaded once a tile; between the stages butterflies, and in the integer paths the way back to int8 or int16.

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
