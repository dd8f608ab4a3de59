// Random layers in packed bytes, where layer.h says that their numbers lie, and their input and output.
#pragma once

#include "tools.h"

struct Case {
  WeightType weights;
  TableType tables;
  int in_features, out_features, num_tables, code_bits, reads, stages, repeats, blocks, block_in, block_out, slice,
      tokens;
  bool x_bf16, y_bf16;

  std::string name() const {
    const char* types[][4] = {{"float32", "int16", "int8"}, {"float32", "bfloat16", "int8", "int4"}};
    return text(
        "%s weights, %s tables, D %d, E %d, T %d, tau %d, reads %d, stages %d, R %d, n %d, blocks %d to %d, "
        "slices of %d, %d tokens, x %s, y %s",
        types[0][int(weights)], types[1][int(tables)], in_features, out_features, num_tables, code_bits, reads, stages,
        repeats, blocks, block_in, block_out, slice, tokens, x_bf16 ? "bfloat16" : "float32",
        y_bf16 ? "bfloat16" : "float32");
  }
};

inline size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Where layer.h says that a number lies.
inline size_t weight_index(const PackedHeader& h, int stage, int n, int o, int i) {  // `stage` counts over all repeats
  const int word = 4 / int(element_size(h.weight_type)), words = h.block_in / word;
  const int panel = o / 16, together = h.block_out >= 64 ? 4 : h.block_out / 16;  // panels whose words come in turn
  const size_t block = (size_t(stage) * h.blocks + n) * (h.block_out / 16);
  const size_t at = (block + panel / together * together) * words + i / word * together + panel % together;
  return (at * 16 + o % 16) * word + i % word;
}
inline size_t table_index(const PackedHeader& h, int table, int row, int e) {  // of bytes, with int4
  const int p = e % h.slice;
  int at = p;
  if (h.table_type == TableType::kInt4)
    return (((size_t(e / h.slice) * h.num_tables + table) * h.table_rows + row) * h.slice + p / 128 * 128) / 2 +
           p % 16 / 4 * 16 + p % 64 / 16 * 4 + p % 4;
  if (h.table_type == TableType::kInt8) at = p / 64 * 64 + p % 16 / 4 * 16 + p % 64 / 16 * 4 + p % 4;
  if (h.table_type == TableType::kBFloat16) at = p / 32 * 32 + p % 16 * 2 + p % 32 / 16;
  return ((size_t(e / h.slice) * h.num_tables + table) * h.table_rows + row) * h.slice + at;
}

inline double weight(const Layer& l, int stage, int n, int o, int i) {
  const size_t at = weight_index(l.h, stage, n, o, i);
  if (l.h.weight_type == WeightType::kInt8) return reinterpret_cast<const int8_t*>(l.projection.weights)[at];
  if (l.h.weight_type == WeightType::kInt16) return reinterpret_cast<const int16_t*>(l.projection.weights)[at];
  return reinterpret_cast<const float*>(l.projection.weights)[at];
}
inline double table_entry(const Layer& l, int table, int row, int e) {
  const size_t at = table_index(l.h, table, row, e);
  if (l.h.table_type == TableType::kInt8) return reinterpret_cast<const int8_t*>(l.tables.rows)[at];
  if (l.h.table_type == TableType::kInt4) {
    const int half = l.tables.rows[at] >> (e % 128 < 64 ? 0 : 4) & 15;
    return half < 8 ? half : half - 16;
  }
  if (l.h.table_type == TableType::kBFloat16) return from_bf16(reinterpret_cast<const uint16_t*>(l.tables.rows)[at]);
  return reinterpret_cast<const float*>(l.tables.rows)[at];
}

// A random layer in packed bytes. What lies behind the last table or output is NaN where the format leaves it open.
struct Packed {
  std::unique_ptr<Guarded> bytes;
  Layer l;
};

inline Packed pack(const Case& c, Random& random) {
  const bool projects = c.stages > 0, integer = projects && c.weights != WeightType::kFloat32;
  const bool integers = is_integer(c.tables);
  const bool negated = integers && c.reads > 1 && c.code_bits < 3;
  const int rows = 1 << c.code_bits, codes = c.num_tables * c.code_bits,
            slices = (c.out_features + c.slice - 1) / c.slice;
  PackedHeader h = {{},
                    kFormatVersion,
                    c.in_features,
                    c.out_features,
                    c.num_tables,
                    c.code_bits,
                    c.reads,
                    c.stages,
                    c.repeats,
                    c.blocks,
                    c.block_in,
                    c.block_out,
                    negated ? 2 * rows : rows,
                    c.weights,
                    c.tables,
                    c.slice,
                    0,
                    c.stages == 4 ? 0.7f : 1.0f,
                    0,
                    0,
                    {}};
  memcpy(h.magic, "LOOKUPFF", 8);
  if (projects && c.block_in == c.block_out && random.one_in(2)) h.residual = 0.3f;

  const size_t stages = size_t(c.repeats) * c.stages, outputs = stages * c.blocks * c.block_out;
  const size_t table_rows = size_t(slices) * c.num_tables * h.table_rows;
  const size_t size[kSections] = {outputs * c.block_in * element_size(c.weights),
                                  integer ? outputs * 4 : 0,
                                  integer && c.weights == WeightType::kInt8 ? outputs * 4 : 0,
                                  integer ? stages * 4 : 0,
                                  projects ? size_t(c.repeats) * c.blocks * c.block_out * 4 : 0,
                                  table_rows * c.slice * bits_of(c.tables) / 8,
                                  integers ? round_up(c.num_tables, 16) * 4 : 0,
                                  size_t(slices) * c.slice * 4};
  h.total_bytes = round_up(sizeof h, 64);
  for (int s = 0; s < kSections; s++) {
    h.offset[s] = h.total_bytes;
    h.total_bytes += round_up(size[s], 64);
  }
  Packed p = {std::make_unique<Guarded>(h.total_bytes), {}};
  uint8_t* const data = p.bytes->data();
  memcpy(data, &h, sizeof h);
  const auto floats = [&](Section s) { return reinterpret_cast<float*>(data + h.offset[s]); };

  const float deviation = projects ? 1 / std::sqrt(float(c.block_in) * c.blocks) : 0;  // a stage keeps the size of x
  const int most = c.weights == WeightType::kInt8 ? 128 : random.pick({32767, 3000, 127});
  const size_t weights = outputs * c.block_in;
  for (size_t i = 0; i < weights; i++) {
    const bool extreme = random.one_in(16);
    const int whole = extreme ? (random.one_in(2) ? -most : most - 1) : random.between(-most, most - 1);
    if (c.weights == WeightType::kFloat32) floats(kWeights)[i] = deviation * random.normal();
    if (c.weights == WeightType::kInt16) reinterpret_cast<int16_t*>(data + h.offset[kWeights])[i] = int16_t(whole);
    if (c.weights == WeightType::kInt8) reinterpret_cast<int8_t*>(data + h.offset[kWeights])[i] = int8_t(whole);
  }
  for (size_t i = 0; integer && i < outputs; i++)
    floats(kWeightScales)[i] = deviation * 1.7f / float(most) * (0.5f + random.uniform());
  for (size_t i = 0; i < stages * integer; i++) floats(kLevels)[i] = 1;  // for now
  for (int i = 0; projects && i < c.repeats * c.blocks * c.block_out; i++)
    floats(kCodeBias)[i] = i < codes ? 0.1f * random.normal() : kNaN;

  for (size_t i = 0; i < table_rows * c.slice; i++) {
    if (c.tables == TableType::kFloat32) floats(kTables)[i] = random.uniform() - 0.5f;
    if (c.tables == TableType::kBFloat16)
      reinterpret_cast<uint16_t*>(data + h.offset[kTables])[i] = to_bf16(random.uniform() - 0.5f);
    if (c.tables == TableType::kInt8) {
      const uint64_t r = random.next();
      data[h.offset[kTables] + i] = r & 0xf00 ? uint8_t(r) : r & 0x1000 ? 127 : 128;  // every 16th is an extreme
    }
    if (c.tables == TableType::kInt4 && i % 2 == 0) data[h.offset[kTables] + i / 2] = uint8_t(random.next());
  }
  const int row_bytes = c.slice * bits_of(c.tables) / 8;
  for (int s = 0; negated && s < slices; s++)
    for (int t = 0; t < c.num_tables; t++)
      for (int i = 0; i < rows * row_bytes; i++) {
        uint8_t* first = data + h.offset[kTables] + table_index(h, t, 0, c.slice * s) + i;
        if (c.tables == TableType::kInt8) {
          if (*first == 128) *first = 129;  // -128 has no negative
          first[rows * row_bytes] = uint8_t(-*first);
        } else {
          if (*first % 16 == 8) *first += 1;  // nor has -8
          if (*first / 16 == 8) *first += 16;
          first[rows * row_bytes] = uint8_t((-*first & 15) | (-(*first & 0xf0) & 0xf0));
        }
      }
  for (int i = 0; integers && i < c.num_tables; i++)
    floats(kTableScales)[i] = random.one_in(20) ? 0.0f : (0.5f + random.uniform()) / 128;
  for (int i = 0; i < slices * c.slice; i++) floats(kBias)[i] = i < c.out_features ? random.normal() : kNaN;

  std::string wrong = open_layer(data, h.total_bytes, &p.l);
  EXPECT(wrong.empty(), "open_layer refuses a layer: %s", wrong.c_str());
  for (int stage = 0; integer && stage < int(stages); stage++) {
    double largest = 1;  // sum of an output's magnitudes
    for (int n = 0; n < c.blocks; n++)
      for (int o = 0; o < c.block_out; o++) {
        double sum = 0, magnitude = 0;
        for (int i = 0; i < c.block_in; i++) {
          sum += weight(p.l, stage, n, o, i);
          magnitude += std::abs(weight(p.l, stage, n, o, i));
        }
        largest = std::max(largest, magnitude);
        if (c.weights == WeightType::kInt8)
          reinterpret_cast<int32_t*>(data + h.offset[kWeightOffsets])[(stage * c.blocks + n) * c.block_out + o] =
              -128 * int(sum);
      }
    const double levels = c.weights == WeightType::kInt8 ? 127 : std::min(32767.0, std::floor((0x1p31 - 1) / largest));
    floats(kLevels)[stage] =
        random.one_in(4) ? std::floor(float(levels) * (0.5f + 0.5f * random.uniform())) : float(levels);
  }
  wrong = open_layer(data, h.total_bytes, &p.l);
  EXPECT(wrong.empty(), "open_layer refuses a layer: %s", wrong.c_str());
  return p;
}

// Rows of x that end at a guard page, as the engine gets them and as floats.
struct Input {
  std::unique_ptr<Guarded> memory;
  Rows rows;
  std::vector<std::vector<float>> values;  // [token][feature]

  void set(int token, int i, float value) {
    const size_t at = size_t(token) * size_t(rows.stride) + size_t(i);
    if (rows.bfloat16) {
      const uint16_t narrow = uint16_t(bits_of(value) >> 16);
      static_cast<uint16_t*>(rows.data)[at] = narrow;
      value = from_bf16(narrow);  // not with ?: below, which GCC 12 gets wrong at -O1
    } else {
      static_cast<float*>(rows.data)[at] = value;
    }
    values[token][i] = value;
  }
};

inline Input make_input(int tokens, int features, bool bfloat16, Random& random) {
  const int stride = features + random.pick({0, 0, 1, 3, 16});
  const size_t elements = tokens ? size_t(tokens - 1) * stride + features : 0;
  Input in = {std::make_unique<Guarded>(elements * (bfloat16 ? 2 : 4)), {}, {}};
  in.rows = {in.memory->data(), stride, bfloat16};
  in.values.assign(tokens, std::vector<float>(features));
  for (int t = 0; t < tokens; t++) {
    const float scale = random.pick({1.0f, 1.0f, 1.0f, 30.0f, 1e-3f});
    const bool zero = random.one_in(12);
    for (int i = 0; i < features; i++) in.set(t, i, zero ? 0.0f : scale * random.normal());
  }
  return in;
}

// Rows of y among bytes that must stay as they are.
class Output {
 public:
  Output(int64_t tokens, int features, bool bfloat16, Random& random)
      : tokens_(tokens),
        features_(features),
        size_(bfloat16 ? 2 : 4),
        before_(random.below(70)),
        memory_((before_ + size_t(tokens) * (features + kMargin)) * size_) {
    rows = {memory_.data() + before_ * size_, features, bfloat16};
    rows.stride += random.pick({0, 0, 1, 5, kMargin});
    memset(memory_.data(), kUntouched, memory_.size());
  }

  float at(int64_t token, int e) const {
    const int64_t i = token * rows.stride + e;
    return rows.bfloat16 ? from_bf16(static_cast<uint16_t*>(rows.data)[i]) : static_cast<float*>(rows.data)[i];
  }
  // The row holds the float32 numbers `expected`, rounded once more for bfloat16.
  void check(int64_t token, const float* expected, const std::string& what) const {
    for (int e = 0; e < features_; e++) {
      const float value = rows.bfloat16 ? from_bf16(to_bf16(expected[e])) : expected[e];
      EXPECT(same_bits(at(token, e), value), "%s: y[%ld, %d] is %.9g, not %.9g", what.c_str(), long(token), e,
             double(at(token, e)), double(value));
    }
  }
  void check_margins(const std::string& what) const {
    const uint8_t* const data = memory_.data();
    const size_t row = size_t(features_) * size_, stride = size_t(rows.stride) * size_, start = before_ * size_;
    for (size_t i = 0; i < memory_.size(); i++) {
      const bool inside = i >= start && (i - start) / stride < size_t(tokens_) && (i - start) % stride < row;
      EXPECT(inside || data[i] == kUntouched, "%s: writes outside y, at byte %ld", what.c_str(), long(i) - long(start));
    }
  }

  Rows rows;

 private:
  static constexpr int kMargin = 16, kUntouched = 0xa5;
  int64_t tokens_;
  int features_;
  size_t size_, before_;
  Guarded memory_;
};

inline Tiling random_tiling(Random& random) {
  return {random.pick({1, 2, 3, 5, 7, 8, 24, 48, 96, 1000}), random.pick({1, 1, 2, 1000}),
          random.pick({0, 1, 100, 5000}), random.pick({0, 0, 0, 4, 1000})};
}

// A call in a workspace of just the size that its plan asks for, whose content is of no matter.
inline void forward(const Kernels& k, const Layer& l, Rows x, Rows y, int64_t tokens, const Tiling& tiling,
                    int threads) {
  const Plan plan = make_plan(l, tokens, tiling, threads);
  const Guarded workspace(plan.workspace_bytes());
  if (workspace.size()) memset(workspace.data(), 0xa5, workspace.size());
  run(k, l, plan, x, y, workspace.data(), threads_of(threads));
}
