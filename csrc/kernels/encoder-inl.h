// What an encoder has beside lookups and attention: linears, from their input's quantisation to their epilogue, norms,
// sums of embeddings. A row's result depends on that row alone: sums run in one order, whatever the batch.

// ---- Activations ----------------------------------------------------------------------------------------------------

LOOKUPFFN_INLINE f32x16 least(f32x16 a, f32x16 b) { return select(less(a, b), a, b); }

// 1 / (1 + exp(-2 u)), which is also (1 + tanh(u)) / 2.
LOOKUPFFN_INLINE f32x16 sigmoid_2(f32x16 u) {
  const f32x16 e = exp_minus_2(abs(u)), one = set1(1.0f);
  return div(select(less(u, zero_f32()), e, one), add(one, e));
}

// x (1 + erf(x / sqrt(2))) / 2 within 1e-6: erf(x / sqrt(2)) / x is a polynomial in x^2, fitted to the error of the
// product on [0, 5.5^2] and such that it gives 1 at 5.5, from where on it must: what lacks there would grow with x.
constexpr float kGelu[] = {-1.631801133e-03f, 5.043252837e-03f, -5.544649903e-03f, 5.307743791e-03f,
                           -1.207898837e-02f, 2.251724713e-02f, -3.098173440e-02f, 4.019990191e-02f,
                           -5.183271319e-02f, 6.420089304e-02f, -7.761389017e-02f, 9.547295421e-02f,
                           -1.283438504e-01f, 2.571038604e-01f};
LOOKUPFFN_INLINE f32x16 gelu(f32x16 x) {
  const f32x16 limit = set1(5.5f), one = set1(1.0f);
  const f32x16 c = max(sub(zero_f32(), limit), least(x, limit));
  const f32x16 s = fma(mul(c, c), set1(2.0f / 30.25f), set1(-1.0f));
  f32x16 p = set1(kGelu[0]);
#pragma GCC unroll 16
  for (int k = 1; k < 14; k++) p = fma(p, s, set1(kGelu[k]));
  const f32x16 e = max(set1(-1.0f), least(mul(c, p), one)), half = mul(x, set1(0.5f));
  return fma(half, e, half);
}

LOOKUPFFN_INLINE f32x16 activate(Activation kind, f32x16 x) {
  switch (kind) {
    case Activation::kGelu: return gelu(x);
    case Activation::kGeluTanh: {
      const f32x16 cube = mul(mul(x, x), mul(x, set1(0.044715f)));
      return mul(x, sigmoid_2(mul(set1(0.7978845608028654f), add(x, cube))));
    }
    case Activation::kSilu: return mul(x, sigmoid_2(mul(x, set1(0.5f))));
    case Activation::kRelu: return max(zero_f32(), x);
    case Activation::kTanh: return fma(set1(2.0f), sigmoid_2(x), set1(-1.0f));
    default: return x;
  }
}

// ---- Products -------------------------------------------------------------------------------------------------------

// A few inputs of a token, tens of times as large as the others, would take the integers of all: they are quantised as
// 0, and finish_row adds their products in float32.
constexpr int kOutliers = 4;
constexpr float kOutlierRatio = 1.25f;  // of the largest input to the largest of the others, from which on it pays
struct Outliers {
  int count;  // 0 or kOutliers
  int index[kOutliers];
  float value[kOutliers];
};

struct QuantisedRows {  // of a tile
  float scale[kMaxTile];
  Outliers outliers[kMaxTile];
  int32_t negatives[kMaxTile];
};

// Rows of x, which are as they were when all is done, to integers.
static void quantise_rows(const LinearArgs& a, size_t q_bytes, QuantisedRows* q) {
  for (int t = 0; t < a.tokens; t++) {
    float* row = a.x + t * a.x_stride;
    const int width = a.w.block_in;
    i32x16 largest = zero_i32(), where = zero_i32();  // of each lane
    for (int i = 0; i < width; i += 16) {
      const i32x16 bits = abs_bits(load(row + i));
      const mask16 more = less(largest, bits);
      largest = select(more, bits, largest);
      where = select(more, set1((int32_t)i), where);
    }
    int32_t place[kLanes];
    store(place, where);
    Outliers& o = q->outliers[t];
    const int32_t most = reduce_max(largest);
    // Their last bits give way to the lane, so that one maximum says both.
    const i32x16 low = set1((int32_t)15);
    i32x16 keys = bit_xor(bit_or(largest, low), bit_xor(low, load(kLaneIndex)));
    for (int k = 0; k < kOutliers; k++) {
      const int32_t key = reduce_max(keys);
      const int lane = key & 15;
      o.index[k] = place[lane] + lane;
      o.value[k] = row[o.index[k]];
      row[o.index[k]] = 0.0f;
      keys = select(less(keys, set1(key)), keys, zero_i32());
    }
    largest = zero_i32();
    for (int i = 0; i < width; i += 16) largest = max_abs_bits(largest, load(row + i));
    const Scale others = quantisation_scale(reduce_max(largest), 127.0f);
    const Scale all = quantisation_scale(most, 127.0f);
    o.count = all.scale > kOutlierRatio * others.scale || !(all.scale < __builtin_inff()) ? kOutliers : 0;
    if (o.count == 0)
      for (int k = 0; k < kOutliers; k++) row[o.index[k]] = o.value[k];
    const Scale& scale = o.count ? others : all;
    quantise(WeightType::kInt8, row, width, scale.inverse, a.quantised + t * q_bytes);
    q->scale[t] = scale.scale;
    for (int k = 0; k < o.count; k++) row[o.index[k]] = o.value[k];
  }
  sum_negatives(a.quantised, q_bytes, a.w.block_in, a.tokens, q->negatives);
}

constexpr int kSlice = 64;  // outputs whose sums and weights stay in L1 from the product to what is done with them

// y = activation(scale * sums + outliers' products + bias) * gate + residual, for a slice of the outputs of token t.
template <bool kScaled, bool kResidual>
LOOKUPFFN_INLINE void finish_row(const LinearArgs& a, const QuantisedRows* q, Activation kind, int first, int t) {
  const float* sums = a.sums + t * kSlice;
  const f32x16 scale = set1(kScaled ? q->scale[t] : 1.0f);
  const bool apart = kScaled && q->outliers[t].count;
  const uint8_t* column[kOutliers];  // of the slice's first panel
  f32x16 value[kOutliers];
  int byte[kOutliers];
#pragma GCC unroll 4
  for (int k = 0; k < kOutliers && apart; k++) {
    const int index = q->outliers[t].index[k];
    column[k] = a.w.words + (size_t)first * a.w.block_in + (size_t)(index / 4) * 4 * kSlice;
    value[k] = set1(q->outliers[t].value[k]);
    byte[k] = index % 4;
  }
  for (int i = 0; i < kSlice; i += 16) {
    f32x16 v = load(sums + i);
    if (kScaled) v = mul(v, scale);
    if (apart) {
      f32x16 sum = zero_f32();
#pragma GCC unroll 4
      for (int k = 0; k < kOutliers; k++)
        sum = fma(value[k], to_float(byte_of(load_bytes(column[k] + 4 * i), byte[k])), sum);
      v = fma(sum, load(a.w.scales + first + i), v);
    }
    v = activate(kind, add(v, load(a.bias + first + i)));
    if (a.gate) v = mul(v, load(a.gate + t * a.gate_stride + first + i));
    if (kResidual) v = add(v, load(a.residual + t * a.residual_stride + first + i));
    store(a.y + t * a.y_stride + first + i, v);
  }
}

template <bool kScaled>
static void finish_rows(const LinearArgs& a, const QuantisedRows* q, int first) {
  const auto run = [&](Activation kind) __attribute__((always_inline)) {
    for (int t = 0; t < a.tokens; t++)
      a.residual ? finish_row<kScaled, true>(a, q, kind, first, t) : finish_row<kScaled, false>(a, q, kind, first, t);
  };
  switch (a.activation) {
    case Activation::kGelu: return run(Activation::kGelu);
    case Activation::kGeluTanh: return run(Activation::kGeluTanh);
    case Activation::kSilu: return run(Activation::kSilu);
    case Activation::kRelu: return run(Activation::kRelu);
    case Activation::kTanh: return run(Activation::kTanh);
    default: return run(Activation::kNone);
  }
}

template <WeightType kType>
static void linear_float(const LinearArgs& a) {
  MultiplyArgs product = {.w = a.w,
                          .x = (const uint8_t*)a.x,
                          .x_bytes = 4 * a.x_stride,
                          .tokens = a.tokens,
                          .y = a.sums,
                          .y_stride = kSlice};
  product.w.block_out = kSlice;
  for (int first = 0; first < a.w.block_out; first += kSlice) {
    product.w.words = a.w.words + (size_t)first * a.w.block_in * element_size(kType);
    multiply<kType>(product);
    finish_rows<false>(a, nullptr, first);
  }
}

static void linear_i8(const LinearArgs& a) {
  QuantisedRows q;
  const size_t q_bytes = (size_t)a.w.block_in * kActivationPlanes;
  quantise_rows(a, q_bytes, &q);
  MultiplyArgs product = {
      .w = a.w, .x = a.quantised, .x_bytes = q_bytes, .tokens = a.tokens, .y = a.sums, .y_stride = kSlice};
  product.w.block_out = kSlice;
  for (int first = 0; first < a.w.block_out; first += kSlice) {
    product.w.words = a.w.words + (size_t)first * a.w.block_in;
    product.w.scales = a.w.scales + first, product.w.offsets = a.w.offsets + first;
#ifdef LOOKUPFFN_TILES
    multiply_on_tiles(product);
#else
    multiply_one_block<WeightType::kInt8>(product, 0, a.quantised, q.negatives, a.sums);
#endif
    finish_rows<true>(a, &q, first);
  }
}

static void linear(const LinearArgs& a) {
  switch (a.type) {
    case WeightType::kInt8: return linear_i8(a);
    case WeightType::kBFloat16: return linear_float<WeightType::kBFloat16>(a);
    default: return linear_float<WeightType::kFloat32>(a);
  }
}

// ---- Norms ----------------------------------------------------------------------------------------------------------

LOOKUPFFN_INLINE float sum_of(f32x16 v) {  // by halves
  float lane[16];
  store(lane, v);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}

static void norm_rows(const NormRowsArgs& a) {
  const int whole = a.width / 16 * 16;
  for (int t = 0; t < a.tokens; t++) {
    const float* x = a.x + t * a.x_stride;
    float* y = a.y + t * a.y_stride;
    float mean = 0, squares = 0;
    if (!a.rms) {
      f32x16 sum = zero_f32();
      for (int i = 0; i < whole; i += 16) sum = add(sum, load(x + i));
      mean = sum_of(sum);
      for (int i = whole; i < a.width; i++) mean += x[i];
      mean /= (float)a.width;
    }
    f32x16 sum = zero_f32();
    for (int i = 0; i < whole; i += 16) {
      const f32x16 d = sub(load(x + i), set1(mean));
      sum = add(sum, mul(d, d));
    }
    squares = sum_of(sum);
    for (int i = whole; i < a.width; i++) squares += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / __builtin_sqrtf(squares / (float)a.width + a.epsilon);
    const f32x16 m = set1(mean), s = set1(inverse);
    for (int i = 0; i < a.padded; i += 16)  // weight and bias are 0 behind the width
      store(y + i, add(mul(mul(sub(load(x + i), m), s), load(a.weight + i)), load(a.bias + i)));
  }
}

// ---- Embeddings and pooling -----------------------------------------------------------------------------------------

static void add_rows(const AddRowsArgs& a) {
  for (int i = 0; i < a.padded; i += 16) {
    f32x16 sum = load(a.rows[0] + i);
    for (int r = 1; r < a.count; r++) sum = add(sum, load(a.rows[r] + i));
    store(a.y + i, sum);
  }
}

static void add_table_row(const AddTableRowArgs& a) {
  const uint8_t* row = (const uint8_t*)a.row;
  if (a.type == TableType::kFloat32) {
    for (int i = 0; i < a.padded; i += 16) store(a.y + i, add(load(a.y + i), load((const float*)a.row + i)));
    return;
  }
  const bool halves = a.type == TableType::kInt4;
  const f32x16 scale = set1(halves ? a.scale / 16 : a.scale);  // a half is the upper one of a byte
  const auto add_line = [&](bytes64 line, float* y) __attribute__((always_inline)) {
    for (int k = 0; k < 4; k++) store(y + 16 * k, fma(to_float(byte_of(line, k)), scale, load(y + 16 * k)));
  };
  for (int i = 0; i < a.padded; row += 64) {
    const bytes64 line = load_bytes(row);
    add_line(halves ? low_halves(line) : line, a.y + i), i += 64;
    if (halves && i < a.padded) add_line(high_halves(line), a.y + i), i += 64;
  }
}

static void pool_rows(const PoolRowsArgs& a) {
  for (int i = 0; i < a.padded; i += 16) {
    f32x16 sum = load(a.x + i);
    for (int64_t t = 1; t < a.tokens; t++) sum = add(sum, load(a.x + t * a.stride + i));
    store(a.y + i, a.tokens > 1 ? div(sum, set1((float)a.tokens)) : sum);
  }
  if (!a.normalise) return;
  f32x16 sum = zero_f32();  // behind the width y is 0
  for (int i = 0; i < a.padded; i += 16) sum = add(sum, mul(load(a.y + i), load(a.y + i)));
  const float length = __builtin_sqrtf(sum_of(sum));
  const f32x16 inverse = set1(1.0f / (length > 1e-12f ? length : 1e-12f));
  for (int i = 0; i < a.padded; i += 16) store(a.y + i, mul(load(a.y + i), inverse));
}
