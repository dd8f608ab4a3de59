// The weighted sum of rows: bound by the rows' way from L2. One slice of a row is one to four cache lines, and a slice of some
// tables stays in L2.

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
