// The weighted sum of rows: memory-bound, by the rows' way from L2 where a slice of a block of tables stays there. One
// slice of a row is one to eight cache lines.
//
// Rows are prefetched in two ways, both chosen by the plan (model/lookup.cpp, choose_prefetch): by prefetch_rows,
// outside of the gather, and some tokens ahead of their use, within it.

static void prefetch_rows(const PrefetchArgs& a) {
  LOOKUPFFN_LOOP(prefetch_rows);
  const size_t row_bytes = a.tables.row_bytes(), table_bytes = a.tables.table_bytes();
  for (int slice = a.first_slice; slice < a.last_slice; slice++) {
    const uint16_t* code = a.codes + (size_t)a.first * a.tables.reads * 16;
    for (int g = a.first; g < a.last; g++) {
      const uint8_t* tables = a.tables.of_slice(slice) + (size_t)g * 16 * table_bytes;
      for (int n = 0; n < a.tables.reads; n++, code += 16)
        for (int t = 0; t < tables_of_group(a.tables.num_tables, g); t++)
          for (size_t line = 0; line < row_bytes; line += 64)
            prefetch_l2(tables + t * table_bytes + code[t] * row_bytes + line);
    }
  }
}

// kSums vectors of sums, the outputs from `first` on, and their bias to one row of y.
template <int kSums>
LOOKUPFFN_INLINE void write_outputs(const GatherArgs& a, int64_t token, int first, const f32x16* sum) {
  const int left = a.out_features - first;
  const bool whole = left >= kSums * 16;
  if (left <= 0) return;
  const int64_t start = (a.y_token + token) * a.y.stride + first;
  if (a.y.bfloat16) {
    uint16_t narrow[kSums * 16], *row = (uint16_t*)a.y.data + start;
    for (int i = 0; i < kSums; i++)
      store_bf16((whole ? row : narrow) + 16 * i, add(sum[i], load(a.bias + first + 16 * i)));
    if (!whole) __builtin_memcpy(row, narrow, sizeof(uint16_t) * left);
  } else {
    float out[kSums * 16], *row = (float*)a.y.data + start;
    for (int i = 0; i < kSums; i++) store((whole ? row : out) + 16 * i, add(sum[i], load(a.bias + first + 16 * i)));
    if (!whole) __builtin_memcpy(row, out, sizeof(float) * left);
  }
}

// A type of rows: its scores and sums, and how the rows that some tables of a group give to one read are added.
// `next`: the codes of the token whose rows are prefetched.

// kLines cache lines of a slice. Four tables at a time through the 8-bit dot product, sums exact. Of int4 a line is two
// of int8, times 16: the low and the high halves of its bytes; its outputs are so many that lines are summed in turn.
template <TableType kType, int kLines>
struct IntegerRows {
  typedef uint8_t Score;
  typedef i32x16 Sum;
  typedef int32_t Saved;
  static constexpr bool kHalves = kType == TableType::kInt4;
  static constexpr int kParts = kHalves ? kLines : 1;
  static constexpr int kSums = kHalves ? 8 : kLines * 4;  // of a part
  static constexpr size_t kBytes = kLines * 64, kPartBytes = kBytes / kParts;
  static LOOKUPFFN_INLINE Sum zero() { return zero_i32(); }

  static LOOKUPFFN_INLINE void add_four(Sum* sum, const uint8_t* const* row, const Score* score) {
    for (size_t line = 0; line < kPartBytes; line += 64) {
      const bytes64 a = load_bytes(row[0] + line), b = load_bytes(row[1] + line), c = load_bytes(row[2] + line),
                    d = load_bytes(row[3] + line);
      if (kHalves) {
        dot4_rows(sum, low_halves(a), low_halves(b), low_halves(c), low_halves(d), score);
        dot4_rows(sum + 4, high_halves(a), high_halves(b), high_halves(c), high_halves(d), score);
      } else {
        dot4_rows(sum + line / 16, a, b, c, d, score);
      }
    }
  }

  template <bool kPrefetch>
  static LOOKUPFFN_INLINE void add_rows(Sum* sum, const uint8_t* table, size_t table_bytes, int tables,
                                        const uint16_t* code, const Score* score, const uint16_t* next) {
    const uint8_t* row[4];
    int t = 0;
    for (; t + 4 <= tables; t += 4, table += 4 * table_bytes) {
      for (int k = 0; k < 4; k++) row[k] = table + k * table_bytes + (size_t)code[t + k] * kBytes;
      if (kPrefetch)
        for (int k = 0; k < 4; k++)
          for (size_t line = 0; line < kPartBytes; line += 64)
            prefetch(table + k * table_bytes + (size_t)next[t + k] * kBytes + line);
      add_four(sum, row, score + t);
    }
    if (t < tables) {  // one to three tables are left; the padded scores are 0, their row any row
      for (int k = 0; k < 4; k++)
        row[k] = t + k < tables ? table + k * table_bytes + (size_t)code[t + k] * kBytes : table;
      add_four(sum, row, score + t);
    }
  }

  static LOOKUPFFN_INLINE void finish(const GatherArgs& a, int64_t token, int first, const Sum* sum) {
    const f32x16 scale = set1(a.score_scales[token] * (kHalves ? 0.0625f : 1.0f));
    f32x16 out[kSums];
    for (int i = 0; i < kSums; i++) out[i] = mul(to_float(sum[i]), scale);
    write_outputs<kSums>(a, token, first, out);
  }
};

template <TableType kType, int kVectors>
struct FloatRows {
  typedef float Score;
  typedef f32x16 Sum;
  typedef float Saved;
  static constexpr int kParts = 1, kSums = kVectors;
  static constexpr size_t kPartBytes = 0;
  static constexpr size_t kBytes = kSums * 16 * (kType == TableType::kFloat32 ? 4 : 2);
  static LOOKUPFFN_INLINE Sum zero() { return zero_f32(); }

  template <bool kPrefetch>
  static LOOKUPFFN_INLINE void add_rows(Sum* sum, const uint8_t* table, size_t table_bytes, int tables,
                                        const uint16_t* code, const Score* score, const uint16_t* next) {
    for (int t = 0; t < tables; t++, table += table_bytes) {
      const uint8_t* row = table + code[t] * kBytes;
      const f32x16 s = set1(score[t]);
      if (kPrefetch)
        for (size_t line = 0; line < kBytes; line += 64) prefetch(table + next[t] * kBytes + line);
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

  static LOOKUPFFN_INLINE void finish(const GatherArgs& a, int64_t token, int first, const Sum* sum) {
    write_outputs<kSums>(a, token, first, sum);
  }
};

template <typename RowType, bool kPrefetch>
static void gather_tokens(const GatherArgs& args) {
  const GatherArgs a = args;  // a copy that no store below can change, so that it stays in registers
  constexpr int kSums = RowType::kSums, kParts = RowType::kParts, kOutputs = kSums * 16;
  const int num_tables = a.tables.num_tables, reads = a.tables.reads, slots = a.tables.slots();
  const size_t table_bytes = (size_t)a.tables.table_rows * RowType::kBytes;
  const uint8_t* const first_table = a.tables.of_slice(a.slice) + (size_t)a.first * 16 * table_bytes;
  const bool starts = a.first == 0, ends = a.last == groups_of(num_tables);
  for (int64_t token = a.begin; token < a.end; token++) {
    const size_t slot = (size_t)token * slots + (size_t)a.first * reads * 16;
    for (int part = 0; part < kParts; part++) {
      const uint16_t* code = a.codes + slot;
      const auto* score = (const typename RowType::Score*)a.scores + slot;
      const uint16_t* next = code + (token + a.prefetch_tokens < a.end ? a.prefetch_tokens : 0) * (int64_t)slots;
      auto* saved = (typename RowType::Saved*)a.sums + ((token - a.begin) * kParts + part) * kOutputs;
      typename RowType::Sum sum[kSums];
      for (int i = 0; i < kSums; i++) sum[i] = starts ? RowType::zero() : load(saved + 16 * i);
      const uint8_t* table = first_table + part * RowType::kPartBytes;
      for (int g = a.first; g < a.last; g++, table += 16 * table_bytes) {
        const int tables = tables_of_group(num_tables, g);
        for (int n = 0; n < reads; n++, code += 16, score += 16, next += 16)
          if (tables == 16)  // for all but the last group: a number that the compiler knows
            RowType::template add_rows<kPrefetch>(sum, table, table_bytes, 16, code, score, next);
          else
            RowType::template add_rows<kPrefetch>(sum, table, table_bytes, tables, code, score, next);
      }
      if (ends)
        RowType::finish(a, token, (a.slice * kParts + part) * kOutputs, sum);
      else
        for (int i = 0; i < kSums; i++) store(saved + 16 * i, sum[i]);
    }
  }
}

template <int kLines, bool kPrefetch>  // lines of int8 or int4
static void gather_any(const GatherArgs& a) {
  switch (a.tables.type) {
    case TableType::kInt8: return gather_tokens<IntegerRows<TableType::kInt8, kLines>, kPrefetch>(a);
    case TableType::kInt4: return gather_tokens<IntegerRows<TableType::kInt4, kLines>, kPrefetch>(a);
    case TableType::kBFloat16: return gather_tokens<FloatRows<TableType::kBFloat16, 4 * kLines>, kPrefetch>(a);
    default: return gather_tokens<FloatRows<TableType::kFloat32, 4 * kLines>, kPrefetch>(a);
  }
}

static void gather(const GatherArgs& a) {
  LOOKUPFFN_LOOP(rows);
  const bool narrow = a.tables.slice == (a.tables.type == TableType::kInt4 ? 128 : 64);
  if (narrow) return a.prefetch_tokens ? gather_any<1, true>(a) : gather_any<1, false>(a);
  return a.prefetch_tokens ? gather_any<2, true>(a) : gather_any<2, false>(a);
}
