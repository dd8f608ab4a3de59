// The projection of a tile of tokens: compute-bound, by multiply-adds. kTileTokens x kTilePanels sums stay in
// registers, a weight is loaded once a tile; between the stages butterflies, and in the integer paths the way back to
// int8 or int16.

template <WeightType kType>
struct Product;  // sums of 16 outputs over words of the packed weights

template <>
struct Product<WeightType::kFloat32> {
  typedef f32x16 Sum;
  typedef bytes64 Word;
  static constexpr int kInputBytes = 4;  // that meet a word of weights
  static LOOKUPFFN_INLINE Sum start(const int32_t*) { return zero_f32(); }
  static LOOKUPFFN_INLINE Sum of_token(Sum start, const int32_t*) { return start; }
  static LOOKUPFFN_INLINE Word broadcast(const uint8_t* x, size_t) { return broadcast_word(x); }
  static LOOKUPFFN_INLINE Sum step(Sum sum, Word x, bytes64 w) { return dot_f32(sum, x, w); }
  static LOOKUPFFN_INLINE f32x16 finish(Sum sum, const float*) { return sum; }
};

// Activations stay in float32, two for a word of weights.
template <>
struct Product<WeightType::kBFloat16> {
  typedef f32x16 Sum;
  struct Word { f32x16 first, second; };
  static constexpr int kInputBytes = 8;
  static LOOKUPFFN_INLINE Sum start(const int32_t*) { return zero_f32(); }
  static LOOKUPFFN_INLINE Sum of_token(Sum start, const int32_t*) { return start; }
  static LOOKUPFFN_INLINE Word broadcast(const uint8_t* x, size_t) {
    float pair[2];
    __builtin_memcpy(pair, x, sizeof pair);
    return {set1(pair[0]), set1(pair[1])};
  }
  static LOOKUPFFN_INLINE Sum step(Sum sum, Word x, bytes64 w) {
    return fma(x.second, high_bf16(w), fma(x.first, low_bf16(w), sum));
  }
  static LOOKUPFFN_INLINE f32x16 finish(Sum sum, const float*) { return sum; }
};

template <>
struct Product<WeightType::kInt16> {
  typedef i32x16 Sum;
  typedef bytes64 Word;
  static constexpr int kInputBytes = 4;
  static LOOKUPFFN_INLINE Sum start(const int32_t*) { return zero_i32(); }
  static LOOKUPFFN_INLINE Sum of_token(Sum start, const int32_t*) { return start; }
  static LOOKUPFFN_INLINE Word broadcast(const uint8_t* x, size_t) { return broadcast_word(x); }
  static LOOKUPFFN_INLINE Sum step(Sum sum, Word x, bytes64 w) { return dot2_i16(sum, x, w); }
  static LOOKUPFFN_INLINE f32x16 finish(Sum sum, const float* scales) { return mul(to_float(sum), load(scales)); }
};

template <>
struct Product<WeightType::kInt8> {
  typedef i32x16 Sum;
  typedef activation4 Word;
  static constexpr int kInputBytes = 4;
  static LOOKUPFFN_INLINE Sum start(const int32_t* offsets) { return kActivationOffset ? load(offsets) : zero_i32(); }
  static LOOKUPFFN_INLINE Sum of_token(Sum start, const int32_t* negatives) {
    return kActivationPlanes == 2 ? set1(*negatives) : start;
  }
  static LOOKUPFFN_INLINE Word broadcast(const uint8_t* x, size_t plane) { return broadcast_activations(x, plane); }
  static LOOKUPFFN_INLINE Sum step(Sum sum, Word x, bytes64 w) { return dot4_i8(sum, x, w); }
  static LOOKUPFFN_INLINE f32x16 finish(Sum sum, const float* scales) { return mul(to_float(sum), load(scales)); }
};

// Panels of one block: `words` steps of w, each `group` panels of 64 bytes of which these are the first.
struct Panels {
  const uint8_t* x;
  size_t x_bytes;
  const int32_t* negatives;  // [tokens], of int8 on two planes
  const uint8_t* w;
  int words, group;
  const float* scales;
  const int32_t* offsets;
  float* y;
  size_t y_stride;
};

// kTokens x kPanels sums, from row t of x on. kAhead: prefetches the panels that follow, for the call that comes next.
template <WeightType kType, int kTokens, int kPanels, bool kAhead>
LOOKUPFFN_INLINE void multiply_tile(const Panels& a, int t) {
  typedef Product<kType> P;
  const size_t x_bytes = a.x_bytes, step = (size_t)a.group * 64, ahead = step * a.words;
  const uint8_t *x = a.x + t * x_bytes, *w = a.w;
  typename P::Sum sum[kTokens][kPanels];
#pragma GCC unroll 8
  for (int p = 0; p < kPanels; p++) {
    const typename P::Sum start = P::start(a.offsets + 16 * p);
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; i++) sum[i][p] = P::of_token(start, a.negatives + t + i);
  }
  for (int k = 0; k < a.words; k++, x += P::kInputBytes, w += step) {
    bytes64 weight[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; p++) weight[p] = load_bytes(w + 64 * p);
    if (kAhead)
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; p++) prefetch(w + ahead + 64 * p);
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; i++) {
      const typename P::Word activation = P::broadcast(x + i * x_bytes, x_bytes / 2);
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; p++) sum[i][p] = P::step(sum[i][p], activation, weight[p]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTokens; i++)
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; p++)
      store(a.y + (t + i) * a.y_stride + 16 * p, P::finish(sum[i][p], a.scales + 16 * p));
}

template <WeightType kType, int kPanels>
static void multiply_panels(const Panels& a, int tokens) {
  constexpr bool kAhead = kType == WeightType::kInt8;
  int t = 0;
  const auto tiles = [&](auto count) __attribute__((always_inline)) {
    constexpr int kTokens = decltype(count)::value;
    if (t == 0 && tokens >= kTokens) multiply_tile<kType, kTokens, kPanels, kAhead>(a, 0), t = kTokens;
    for (; t + kTokens <= tokens; t += kTokens) multiply_tile<kType, kTokens, kPanels, false>(a, t);
  };
  tiles(Count<kTileTokens>());
  if (kTileTokens > 2) tiles(Count<2>());
  tiles(Count<1>());
}

// y = W_block x_block for a tile of tokens, on the vector registers; x and y are those of the block.
template <WeightType kType>
static void multiply_one_block(const MultiplyArgs& a, int block, const uint8_t* x, const int32_t* negatives, float* y) {
  const BlockWeights& w = a.w;
  const int words = w.block_in * (int)element_size(kType) / 4, panels = w.block_out / 16;
  const int group = panels_of_group(w.block_out), wide = group % kTilePanels ? 1 : kTilePanels;
  const auto run = wide > 1 ? multiply_panels<kType, kTilePanels> : multiply_panels<kType, 1>;
  for (int p = 0; p < panels; p += wide) {
    const size_t output = (size_t)block * w.block_out + 16 * p, panel = output / 16;
    run({.x = x,
         .x_bytes = a.x_bytes,
         .negatives = negatives,
         .w = w.words + ((panel - p % group) * words + p % group) * 64,
         .words = words,
         .group = group,
         .scales = w.scales + output,
         .offsets = w.offsets + output,
         .y = y + 16 * p,
         .y_stride = a.y_stride},
        a.tokens);
  }
}

// Of each of a tile's tokens, what the sums of dot4_i8 lack; nothing with one plane.
static void sum_negatives(const uint8_t* x, size_t x_bytes, int count, int tokens, int32_t* sums) {
  for (int t = 0; t < tokens && kActivationPlanes == 2; t++)
    sums[t] = sum_of_negatives(x + t * x_bytes, x_bytes / 2, count);
}

template <WeightType kType>
static void multiply(const MultiplyArgs& a) {
  int32_t negatives[kMaxTile];
  for (int n = 0; n < a.w.blocks; n++) {
    const uint8_t* const x = a.x + (size_t)n * a.w.block_in * element_size(kType);
    if (kType == WeightType::kInt8) sum_negatives(x, a.x_bytes, a.w.block_in, a.tokens, negatives);
    multiply_one_block<kType>(a, n, x, negatives, a.y + (size_t)n * a.w.block_out);
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

// The same of int8 weights on tiles of 16 tokens, for blocks of up to 64 inputs or a multiple of 64.
static void multiply_on_tiles(const MultiplyArgs& a) {
  const BlockWeights& w = a.w;
  const int group = panels_of_group(w.block_out), bytes = w.block_in < 64 ? w.block_in : 64;
  const int outputs = w.blocks * w.block_out;
  constexpr decltype(&multiply_block<1>) all[] = {multiply_block<1>, multiply_block<2>, multiply_block<3>,
                                                  multiply_block<4>};
  const auto run = all[group - 1];
  for (int t = 0, rows; t < a.tokens; t += rows) {
    rows = a.tokens - t < 16 ? a.tokens - t : 16;
    const Tiles tiles(rows, bytes);
    for (int output = 0; output < outputs; output += 16 * group)
      run(a.x + t * a.x_bytes + (size_t)(output / w.block_out) * w.block_in, a.x_bytes,
          w.words + (size_t)output * w.block_in, bytes, w.block_in / bytes, a.y + t * a.y_stride + output, a.y_stride);
  }
  for (int t = 0; t < a.tokens; t++)
    for (int i = 0; i < outputs; i += 16) {
      float* sums = a.y + t * a.y_stride + i;
      const i32x16 sum = add(load((const int32_t*)sums), load(w.offsets + i));
      store(sums, mul(to_float(sum), load(w.scales + i)));
    }
}
#endif

static void multiply_i8(const MultiplyArgs& a) {
#ifdef LOOKUPFFN_TILES
  if (a.w.block_in < 64 || a.w.block_in % 64 == 0) return multiply_on_tiles(a);
#endif
  multiply<WeightType::kInt8>(a);
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

struct Scale {
  float inverse;  // quantised = round(value * inverse)
  float scale;    // value ~ quantised * scale; NaN where a value is not finite
};

LOOKUPFFN_INLINE Scale quantisation_scale(int32_t largest_bits, float levels) {
  float largest;
  __builtin_memcpy(&largest, &largest_bits, 4);
  if (largest_bits >= 0x7f800000) return {0.0f, __builtin_nanf("")};
  if (largest < 1e-30f) return {0.0f, 0.0f};  // the reciprocal would overflow
  return {levels / largest, largest / levels};
}

LOOKUPFFN_INLINE int planes_of(WeightType type) { return type == WeightType::kInt8 ? kActivationPlanes : 1; }

// `width` integers as the products take them, in width * element_size(type) * planes_of(type) bytes.
static void quantise(WeightType type, const float* values, int width, float inverse, uint8_t* out) {
  const f32x16 factor = set1(inverse);
  const auto integers = [&](int i)
                            __attribute__((always_inline)) { return round_to_int(mul(load(values + i), factor)); };
  int i = 0;
  if (type == WeightType::kInt16) {
    for (; i < width; i += 16) store_16(out + 2 * i, integers(i));
    return;
  }
  for (; i + 64 <= width; i += 64) {
    const i32x16 four[4] = {integers(i), integers(i + 16), integers(i + 32), integers(i + 48)};
    store_activations(out + i, width, four);
  }
  for (; i < width; i += 16) store_activations(out + i, width, integers(i));
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

// Quantises a tile by each token's largest magnitude; scale[t] becomes that of its integers, times before[t].
static void quantise_tile(const Projection& p, const float* values, size_t stride, int tokens, const int32_t* largest,
                          float levels, const float* before, float* scale, uint8_t* out) {
  const size_t bytes = (size_t)p.width_in() * element_size(p.type) * planes_of(p.type);
  for (int t = 0; t < tokens; t++) {
    const Scale of_token = quantisation_scale(largest[t], levels);
    quantise(p.type, values + t * stride, p.width_in(), of_token.inverse, out + t * bytes);
    scale[t] = before ? before[t] * of_token.scale : of_token.scale;
  }
}

static void project(const Projection& p, const ProjectArgs& a) {
  const int stages = p.stages, width = p.width_in(), out = p.width_out(), tokens = a.tokens;
  const ProjectScratch& s = a.scratch;
  const bool direct = !a.x.bfloat16 && width == p.in_features;  // x as it lies there will do
  LOOKUPFFN_LOOP(copy_x);
  if (!direct) load_rows(a.x, a.token, tokens, p.in_features, width, s.rows);
  const float* rows = direct ? (const float*)a.x.data + a.token * a.x.stride : s.rows;
  const size_t stride = direct ? a.x.stride : width;
  if (stages == 0) {
    for (int t = 0; t < tokens; t++) __builtin_memcpy(a.z + t * a.z_stride, rows + t * stride, sizeof(float) * width);
    return;
  }
  const bool integer = p.type != WeightType::kFloat32;
  const size_t item = element_size(p.type), q_bytes = (size_t)width * item * planes_of(p.type);
  int32_t largest_x[kMaxTile], largest[kMaxTile];
  LOOKUPFFN_LOOP(largest_of_x);
  for (int t = 0; t < tokens && integer; t++) {
    i32x16 m = zero_i32();
    for (int i = 0; i < width; i += 16) m = max(m, abs_bits(load(rows + t * stride + i)));
    largest_x[t] = reduce_max(m);
  }
  float levels_of_x = 0;  // to which s.first is quantised
  for (int r = a.first; r < a.last; r++) {
    float* sums = s.sums[0];
    for (int stage = 0; stage < stages; stage++) {
      const size_t index = (size_t)r * stages + stage, output = index * out;
      MultiplyArgs product = {
          .w = {.words = p.weights + output * p.block_in * item,
                .scales = p.scales + output,
                .offsets = p.offsets + output,
                .blocks = p.blocks,
                .block_in = p.block_in,
                .block_out = p.block_out},
          .x = stage ? s.activations : s.first,
          .x_bytes = q_bytes,
          .tokens = tokens,
          .y = sums,
          .y_stride = (size_t)out,
      };
      if (!integer) {
        product.x = (const uint8_t*)(stage ? sums : rows);
        product.x_bytes = 4 * (stage ? (size_t)out : stride);
        product.y = sums = s.sums[stage & 1];
        LOOKUPFFN_LOOP(products);
        multiply<WeightType::kFloat32>(product);
      } else {
        const float levels = p.levels[index];
        if (stage) {
          LOOKUPFFN_LOOP(quantise_between);
          quantise_tile(p, sums, out, tokens, largest, levels, s.scale[stage > 1], s.scale[1], s.activations);
        } else if (levels != levels_of_x) {
          LOOKUPFFN_LOOP(quantise_x);
          quantise_tile(p, rows, stride, tokens, largest_x, levels, nullptr, s.scale[0], s.first);
          levels_of_x = levels;
        }
        LOOKUPFFN_LOOP(products);
        p.type == WeightType::kInt8 ? multiply_i8(product) : multiply<WeightType::kInt16>(product);
      }
      LOOKUPFFN_LOOP(butterflies);
      if (stage + 1 < stages)
        for (int t = 0; t < tokens; t++) largest[t] = butterflies(sums + (size_t)t * out, p.blocks, p.block_out);
    }
    const float* scale = s.scale[stages > 1];
    LOOKUPFFN_LOOP(butterflies_to_z);
    for (int t = 0; t < tokens; t++)
      butterflies_to_z(sums + (size_t)t * out, p.blocks, p.block_out, integer ? p.scale * scale[t] : p.scale,
                       p.residual, rows + t * stride, p.bias + (size_t)r * out, a.z + t * a.z_stride + (size_t)r * out);
  }
}
