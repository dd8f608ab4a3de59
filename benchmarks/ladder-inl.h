// The kernels of the ladder's lower rungs, over the vector shim and the loops of loops-inl.h, which were included
// before; int8_to_float, sixteen of them, is ladder_isas.cpp's.

// body(table, slot) for every row that a token reads, in the order of the codes.
template <typename Body>
LOOKUPFFN_INLINE void for_each_read(const TableSlices& tables, const Body& body) {
  int slot = 0;
  for (int g = 0; g < groups_of(tables.num_tables); g++)
    for (int n = 0; n < tables.reads; n++, slot += 16)
      for (int t = 0; t < tables_of_group(tables.num_tables, g); t++) body(16 * g + t, slot + t);
}

// ---- Gather ---------------------------------------------------------------------------------------------------------

// Whole rows, token by token: the sums lie in y, which every row reads and writes.
static void gather_vectors(const GatherWork& w) {
  const int width = w.width, slots = w.tables.slots();
  const float* const tables = (const float*)w.tables.rows;
  for (int64_t token = 0; token < w.tokens; token++) {
    const uint16_t* code = w.codes + token * slots;
    const float* score = w.scores + token * slots;
    float* y = w.y + token * width;
    __builtin_memcpy(y, w.bias, sizeof(float) * width);
    for_each_read(w.tables, [&](int table, int slot) __attribute__((always_inline)) {
      const float* row = tables + ((size_t)table * w.tables.table_rows + code[slot]) * width;
      const f32x16 s = set1(score[slot]);
      for (int i = 0; i < width; i += 16) store(y + i, fma(s, load(row + i), load(y + i)));
    });
  }
}

// sum[0..3] += score * 64 numbers of a row.
template <TableType kType>
LOOKUPFFN_INLINE void add_row(f32x16 score, const uint8_t* row, f32x16 sum[4]) {
  if (kType == TableType::kBFloat16) {  // pairs of even and odd numbers, as format.py interleaves them
    for (int i = 0; i < 4; i += 2) {
      const bytes64 pair = load_bytes(row + 32 * i);
      sum[i] = fma(score, low_bf16(pair), sum[i]);
      sum[i + 1] = fma(score, high_bf16(pair), sum[i + 1]);
    }
    return;
  }
  for (int i = 0; i < 4; i++)
    sum[i] =
        fma(score, kType == TableType::kInt8 ? int8_to_float(row + 16 * i) : load((const float*)row + 16 * i), sum[i]);
}

// Outputs [64 part, 64 part + 64) of a token: their sums stay in registers over all rows, `row_bytes` apart.
template <TableType kType>
LOOKUPFFN_INLINE void gather_part(const GatherWork& w, int64_t token, const uint8_t* tables, size_t row_bytes,
                                  int part) {
  const uint16_t* code = w.codes + token * w.tables.slots();
  const float* score = w.scores + token * w.tables.slots();
  f32x16 sum[4] = {zero_f32(), zero_f32(), zero_f32(), zero_f32()};
  for_each_read(w.tables, [&](int table, int slot) __attribute__((always_inline)) {
    const size_t row = (size_t)table * w.tables.table_rows + code[slot];
    add_row<kType>(set1(score[slot]), tables + row * row_bytes, sum);
  });
  write_slice<4>(w.args(part, 0, 0, 0, 0, 0), token, sum);
}

// Whole rows again, token by token, but of all its rows 64 outputs at a time.
static void gather_registers(const GatherWork& w) {
  for (int64_t token = 0; token < w.tokens; token++)
    for (int part = 0; 64 * part < w.width; part++)
      gather_part<TableType::kFloat32>(w, token, w.tables.rows + part * 256, sizeof(float) * w.width, part);
}

template <TableType kType>
static void gather_slices_of(const GatherWork& w) {
  for (int slice = 0; slice < w.slices(); slice++)
    for (int64_t token = 0; token < w.tokens; token++)
      gather_part<kType>(w, token, w.tables.of_slice(slice), w.tables.row_bytes(), slice);
}

// Slices of 64 outputs, of all tokens one after the other; int8 rows are converted to float32.
static void gather_slices(const GatherWork& w) {
  switch (w.tables.type) {
    case TableType::kInt8: return gather_slices_of<TableType::kInt8>(w);
    case TableType::kBFloat16: return gather_slices_of<TableType::kBFloat16>(w);
    default: return gather_slices_of<TableType::kFloat32>(w);
  }
}

// A slice of kLines cache lines, groups [first, last): the shipped gather of int8 without its case of tables left over,
// for which the codes and scores behind the last table must be 0 and its memory readable.
template <int kLines, bool kPrefetch>
static void gather_dot_of(const GatherWork& w, int slice, int first, int last, int64_t prefetch_tokens) {
  const int reads = w.tables.reads, slots = w.tables.slots();
  constexpr size_t kRow = 64 * kLines;
  const size_t table_bytes = w.tables.table_rows * kRow;
  const uint8_t* const tables = w.tables.of_slice(slice) + 16 * first * table_bytes;
  for (int64_t token = 0; token < w.tokens; token++) {
    const size_t slot = (size_t)token * slots + (size_t)first * reads * 16;
    const uint16_t *code = w.codes + slot,
                   *next = code + (token + prefetch_tokens < w.tokens ? prefetch_tokens : 0) * slots;
    const uint8_t *score = w.quantised + slot, *group = tables;
    int32_t* const saved = w.sums + token * w.tables.slice;
    i32x16 sum[4 * kLines];
    for (int i = 0; i < 4 * kLines; i++) sum[i] = first ? load(saved + 16 * i) : zero_i32();
    for (int g = first; g < last; g++, group += 16 * table_bytes)
      for (int n = 0; n < reads; n++, code += 16, next += 16, score += 16)
        for (int t = 0; t < tables_of_group(w.tables.num_tables, g); t += 4) {
          const uint8_t *base = group + t * table_bytes, *row[4];
          for (int k = 0; k < 4; k++) row[k] = base + k * table_bytes + code[t + k] * kRow;
          if (kPrefetch)
            for (int k = 0; k < 4; k++)
              for (int line = 0; line < kLines; line++)
                prefetch(base + k * table_bytes + next[t + k] * kRow + 64 * line);
          for (int line = 0; line < kLines; line++)
            dot4_rows(sum + 4 * line, load_bytes(row[0] + 64 * line), load_bytes(row[1] + 64 * line),
                      load_bytes(row[2] + 64 * line), load_bytes(row[3] + 64 * line), score + t);
        }
    if (last < w.groups()) {
      for (int i = 0; i < 4 * kLines; i++) store(saved + 16 * i, sum[i]);
      continue;
    }
    f32x16 out[4 * kLines];
    for (int i = 0; i < 4 * kLines; i++) out[i] = mul(to_float(sum[i]), set1(w.score_scales[token]));
    write_slice<4 * kLines>(w.args(slice, 0, 0, 0, 0, 0), token, out);
  }
}

static void gather_dot(const GatherWork& w, int slice, int first, int last, int64_t prefetch_tokens) {
  if (w.tables.slice == 64)
    return prefetch_tokens ? gather_dot_of<1, true>(w, slice, first, last, prefetch_tokens)
                           : gather_dot_of<1, false>(w, slice, first, last, 0);
  return prefetch_tokens ? gather_dot_of<2, true>(w, slice, first, last, prefetch_tokens)
                         : gather_dot_of<2, false>(w, slice, first, last, 0);
}

// ---- Projection -----------------------------------------------------------------------------------------------------

// The unnormalised Walsh-Hadamard transform of a whole token: log2 `width` levels, the first four of them inside of
// vectors, which are transposed for it.
static void hadamard(float* y, int width) {
  for (int first = 0; first < width; first += 256) {
    const int vectors = width - first < 256 ? (width - first) / 16 : 16;
    f32x16 v[16];
    for (int i = 0; i < 16; i++) v[i] = i < vectors ? load(y + first + 16 * i) : zero_f32();
    transpose(v);
#pragma GCC unroll 4
    for (int h = 1; h < 16; h *= 2)
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        if (!(i & h)) {
          const f32x16 a = v[i], b = v[i + h];
          v[i] = add(a, b);
          v[i + h] = sub(a, b);
        }
    transpose(v);
    for (int i = 0; i < vectors; i++) store(y + first + 16 * i, v[i]);
  }
  if (width > 16)
    butterflies(y, width / 16, 16, [&](size_t i, f32x16 v) __attribute__((always_inline)) { store(y + i, v); });
}

// BH4 of one token. As it is written (reference.bh4) each block product is followed by the whole transform; with the
// part inside of blocks folded into the weights only the levels across blocks are left.
template <bool kFolded>
static void project_token(const Projection& p, const float* x, float* z, const ProjectScratch& s) {
  const Rows rows = {(void*)x, p.in_features, false};
  const int width = p.width_out();
  const size_t stage_bytes = sizeof(float) * width * p.block_in;
  load_rows(rows, 0, 1, p.in_features, p.width_in(), s.rows);
  const f32x16 scale_y = set1(p.scale), scale_x = set1(p.residual);
  for (int r = 0; r < p.repeats; r++) {
    const float* y = s.rows;
    for (int stage = 0; stage < p.stages; stage++) {
      float* const sums = s.sums[stage & 1];
      multiply<WeightType::kFloat32>({.w = {.words = p.weights + (r * p.stages + stage) * stage_bytes,
                                            .scales = nullptr,
                                            .offsets = nullptr,
                                            .blocks = p.blocks,
                                            .block_in = p.block_in,
                                            .block_out = p.block_out},
                                      .x = (const uint8_t*)y,
                                      .x_bytes = sizeof(float) * p.width_in(),
                                      .tokens = 1,
                                      .y = sums,
                                      .y_stride = (size_t)width});
      const auto in_place = [&](size_t i, f32x16 v) __attribute__((always_inline)) { store(sums + i, v); };
      if (kFolded)
        butterflies(sums, p.blocks, p.block_out, in_place);
      else
        hadamard(sums, width);
      y = sums;
    }
    const float* bias = p.bias + (size_t)r * width;
    for (int i = 0; i < width; i += 16) {
      const f32x16 mixed = add(mul(load(y + i), scale_y), mul(load(s.rows + i), scale_x));
      store(z + (size_t)r * width + i, add(mixed, load(bias + i)));
    }
  }
}

static const LadderKernels kLadder = {LOOKUPFFN_NAME, gather_vectors,       gather_registers,   gather_slices,
                                      gather_dot,     project_token<false>, project_token<true>};
