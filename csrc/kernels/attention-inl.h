// Attention: softmax(q k^T + bias) v of one head for the queries [begin, end) of a sequence; q is scaled already. Keys
// come transposed, (head_dim, keys), and values as rows; keys are padded to whole vectors with zeros. A query's sums
// run over the keys in one order, whichever others are asked for: keys that are passed over would add 0.
template <int kQueries, int kDims>
LOOKUPFFN_INLINE void attend_tile(const AttendArgs& a, int64_t query) {
  const int keys = a.causal ? (int)(query + kQueries) : a.keys;  // of the last query; earlier ones see fewer
  int last = keys, from = 0;  // keys within reach of any of the queries, from a whole vector on
  if (a.reach) {
    const int64_t nearest = query - a.reach, furthest = query + kQueries + a.reach;
    from = nearest > 0 ? (int)(nearest / 16 * 16) : 0;
    last = furthest < keys ? (int)furthest : keys;
  }
  const int padded = (last + 15) / 16 * 16;
  const float *q[kQueries], *bias[kQueries];
  float* p[kQueries];
#pragma GCC unroll 8
  for (int t = 0; t < kQueries; t++) {
    q[t] = a.q + (query + t) * a.stride;
    p[t] = a.scores + (size_t)t * a.keys_stride;
    bias[t] = a.bias + (a.bias ? (query + t - a.begin) * a.bias_step : 0);
  }
  f32x16 top[kQueries];
#pragma GCC unroll 8
  for (int t = 0; t < kQueries; t++) top[t] = set1(-__builtin_inff());
  int i = from;
  const auto block = [&](auto vectors) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    f32x16 sum[kQueries][kVectors];
#pragma GCC unroll 8
    for (int t = 0; t < kQueries; t++)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) sum[t][v] = zero_f32();
    for (int d = 0; d < a.head_dim; d++) {
      f32x16 k[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) k[v] = load(a.k + (size_t)d * a.keys_stride + i + 16 * v);
#pragma GCC unroll 8
      for (int t = 0; t < kQueries; t++) {
        const f32x16 x = set1(q[t][d]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++) sum[t][v] = fma(x, k[v], sum[t][v]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kQueries; t++) {
      const int seen = a.causal ? (int)(query + t + 1) : keys;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) {
        const int left = seen - (i + 16 * v);
        f32x16 s = sum[t][v];
        if (a.bias) s = add(s, load(bias[t] + i + 16 * v));
        if (left < 16) s = select(less(load(kLaneIndex), set1((int32_t)left)), s, set1(-__builtin_inff()));
        top[t] = max(top[t], s);
        store(p[t] + i + 16 * v, s);
      }
    }
    i += 16 * kVectors;
  };
  for (; i + 16 * kKeyVectors <= padded;) block(Count<kKeyVectors>());
  for (; i < padded;) block(Count<1>());

  float inverse[kQueries];
#pragma GCC unroll 8
  for (int t = 0; t < kQueries; t++) {
    float lane[16];
    store(lane, top[t]);
    float most = lane[0];
    for (int j = 1; j < 16; j++) most = lane[j] > most ? lane[j] : most;
    const f32x16 m = set1(most), half = set1(0.5f);
    f32x16 sum = zero_f32();
    for (int j = from; j < padded; j += 16) {
      const f32x16 s = load(p[t] + j), e = exp_minus_2(mul(half, sub(m, s)));
      const f32x16 kept = select(less(set1(-__builtin_inff()), s), e, zero_f32());
      sum = add(sum, kept);
      store(p[t] + j, kept);
    }
    inverse[t] = 1.0f / sum_of(sum);
  }
  for (int first = 0; first < a.head_dim; first += 16 * kDims) {
    f32x16 sum[kQueries][kDims];
#pragma GCC unroll 8
    for (int t = 0; t < kQueries; t++)
#pragma GCC unroll 8
      for (int v = 0; v < kDims; v++) sum[t][v] = zero_f32();
    for (int j = from; j < last; j++) {
      f32x16 row[kDims];
#pragma GCC unroll 8
      for (int v = 0; v < kDims; v++) row[v] = load(a.v + (size_t)j * a.head_dim + first + 16 * v);
#pragma GCC unroll 8
      for (int t = 0; t < kQueries; t++) {
        const f32x16 w = set1(p[t][j]);
#pragma GCC unroll 8
        for (int v = 0; v < kDims; v++) sum[t][v] = fma(w, row[v], sum[t][v]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kQueries; t++)
#pragma GCC unroll 8
      for (int v = 0; v < kDims; v++)
        store(a.y + (query + t) * a.y_stride + first + 16 * v, mul(sum[t][v], set1(inverse[t])));
  }
}

static void rotate(const RotateArgs& a) {
  const int half = a.head_dim / 2;
  for (int h = 0; h < a.heads; h++) {
    float* const x = a.x + (size_t)h * a.head_dim;
    for (int i = 0; i < half; i += 16) {
      const f32x16 first = load(x + i), second = load(x + half + i);
      const f32x16 cosine = load(a.angles + i), sine = load(a.angles + half + i);
      store(x + i, sub(mul(first, cosine), mul(second, sine)));
      store(x + half + i, add(mul(second, cosine), mul(first, sine)));
    }
  }
}

// Keys of one head as (head_dim, keys) and its values as rows.
static void pack_head(const PackHeadArgs& a) {
  for (int i = 0; i < a.keys; i += 16) {
    const int rows = a.keys - i < 16 ? a.keys - i : 16;
    for (int d = 0; d < a.head_dim; d += 16) {
      f32x16 r[16];
      for (int t = 0; t < 16; t++) r[t] = t < rows ? load(a.k + (int64_t)(i + t) * a.stride + d) : zero_f32();
      transpose(r);
      for (int j = 0; j < 16; j++) store(a.keys_out + (size_t)(d + j) * a.keys_stride + i, r[j]);
    }
    for (int t = 0; t < rows; t++)
      for (int d = 0; d < a.head_dim; d += 16)
        store(a.values_out + (size_t)(i + t) * a.head_dim + d, load(a.v + (int64_t)(i + t) * a.stride + d));
  }
}

template <int kDims>
static void attend_queries(const AttendArgs& a) {
  int64_t query = a.begin;
  for (; query + kQueryTile <= a.end; query += kQueryTile) attend_tile<kQueryTile, kDims>(a, query);
  for (; query < a.end; query++) attend_tile<1, kDims>(a, query);
}

static void attend(const AttendArgs& a) { a.head_dim % 32 ? attend_queries<1>(a) : attend_queries<2>(a); }
