// The kernels: what one implementation (an instruction set) provides, as two tables of functions, for inference and for
// training. They take raw pointers and small argument structs, start no thread, allocate nothing and know no layer:
// model/lookup.cpp and ops/training.cpp call them on ranges of tokens, with the caller's buffers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lookupffn {

constexpr int kLanes = 16;       // outputs of a panel of packed weights; tables of a group
constexpr int kMaxTile = 96;     // tokens that are projected at once
constexpr int kMaxSlice = 256;   // outputs of a slice of packed tables: 64 or 128, of int4 128 or 256
constexpr int kMaxPlanes = 2;    // bytes of an int8 activation as products take it
constexpr int kMaxReads = 4;     // buckets of a table that a token reads
constexpr int kTrainSlice = 64;  // outputs of a table that training reads at once
constexpr int32_t kLaneIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

enum class WeightType : int32_t { kFloat32 = 0, kInt16 = 1, kInt8 = 2, kBFloat16 = 3 };
enum class TableType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3 };

inline size_t element_size(WeightType t) { return t == WeightType::kFloat32 ? 4 : t == WeightType::kInt8 ? 1 : 2; }
inline int bits_of(TableType t) {
  return t == TableType::kFloat32 ? 32 : t == TableType::kBFloat16 ? 16 : t == TableType::kInt8 ? 8 : 4;
}
inline bool is_integer(TableType t) { return t >= TableType::kInt8; }  // weighed by quantised scores
inline int groups_of(int num_tables) { return (num_tables + kLanes - 1) / kLanes; }
// Panels of packed weights whose words come in turn.
inline int panels_of_group(int block_out) { return block_out >= 64 ? 4 : block_out / kLanes; }

// Rows of x or y, float32 or bfloat16, `stride` elements apart.
struct Rows {
  void* data;
  int64_t stride;
  bool bfloat16;
};

// ---- Inference ------------------------------------------------------------------------------------------------------

// Packed weights of a block-diagonal product, y_block = W_block x_block; a dense linear is one block. With
// G = panels_of_group(block_out) and g inputs in four bytes, a word is 16 outputs x g inputs, 64 bytes.
struct BlockWeights {
  const uint8_t* words;    // [blocks][block_out / 16 / G][block_in / g][G]
  const float* scales;     // [blocks * block_out], integer weights only
  const int32_t* offsets;  // [blocks * block_out], int8 only: -128 times the sum of an output's weights
  int blocks, block_in, block_out;
};

struct MultiplyArgs {
  BlockWeights w;
  const uint8_t* x;  // [tokens][blocks * block_in] activations, -127 to 127, in the implementation's form
  size_t x_bytes;    // of a row: blocks * block_in * activation_planes
  int tokens;        // at most kMaxTile
  float* y;          // [tokens][blocks * block_out] scale * sum of w q, rows y_stride apart
  size_t y_stride;
};

// The projection of a lookup layer: z = scale * product + residual * x + bias, a product of `stages` block-diagonal
// factors with butterflies between the blocks (reference.bh4), or of one dense factor; without stages z is x.
struct Projection {
  WeightType type;
  int in_features, stages, repeats;
  int blocks, block_in, block_out;
  float scale, residual;
  const uint8_t* weights;  // [repeats][stages] of BlockWeights' words, and so are scales and offsets
  const float* scales;
  const int32_t* offsets;
  const float* levels;  // [repeats][stages]: the largest activation that cannot overflow the sums, integers only
  const float* bias;    // [repeats * blocks * block_out]

  int width_in() const { return stages ? blocks * block_in : in_features; }
  int width_out() const { return stages ? blocks * block_out : in_features; }
};

struct ProjectScratch {  // for a tile of tokens
  float* rows;           // [tile][width_in] x in float32, padded with zeros
  float* sums[2];        // [tile][width_out]
  uint8_t* first;        // [tile][width_in * 2] the quantised x
  uint8_t* activations;  // [tile][width_in * 2] the quantised input of a stage
  float* scale[2];       // [tile] of the quantised x, of a stage's input
};

struct ProjectArgs {
  Rows x;
  int64_t token;    // the first row
  int tokens;       // at most kMaxTile
  int first, last;  // repeats
  float* z;         // [tokens], rows z_stride apart
  size_t z_stride;
  ProjectScratch scratch;
};

struct HashArgs {
  int num_tables, code_bits, reads;
  int first, last;  // groups of 16 tables
  const float* z;   // [num_tables * code_bits], and room to read whole vectors behind the last table
  uint16_t* codes;  // [groups][reads][16], as are all codes and scores of inference
  float* scores;    // 0 behind the last table
};

// Packed tables. In bytes, as docs/format.md orders them within a slice.
struct TableSlices {
  TableType type;
  int num_tables, table_rows, reads;
  int slice;            // outputs of a slice, 64 or 128
  const uint8_t* rows;  // [slices][num_tables][table_rows][slice]

  int slots() const { return groups_of(num_tables) * reads * kLanes; }    // codes and scores of a token
  size_t row_bytes() const { return size_t(slice) * bits_of(type) / 8; }  // of one slice
  size_t table_bytes() const { return size_t(table_rows) * row_bytes(); }
  const uint8_t* of_slice(int index) const { return rows + size_t(index) * num_tables * table_bytes(); }
};

struct PrefetchArgs {
  TableSlices tables;
  int first_slice, last_slice;
  int first, last;        // groups
  const uint16_t* codes;  // of one token
};

struct QuantiseScoresArgs {
  int num_tables, code_bits, reads;
  bool negated_rows;          // scores may be negative: then bit `code_bits` of a code is set, for the negated row
  const float* table_scales;  // [groups * 16]
  float* scores;              // overwritten: times the table's scale
  uint16_t* codes;
  uint8_t* quantised;  // integers of 0 to 127
};

struct GatherArgs {
  TableSlices tables;
  int slice;
  int first, last;            // groups; sums go through `sums` from call to call, that with the last group writes y
  int64_t begin, end;         // tokens
  const uint16_t* codes;      // [tokens][slots]
  const void* scores;         // [tokens][slots] uint8 for integer tables, else float
  const float* score_scales;  // [tokens], integer tables only
  void* sums;                 // [end - begin][slice], of four bytes each
  Rows y;
  int64_t y_token;  // row of y that is token 0
  int out_features;
  const float* bias;    // [slices * slice]
  int prefetch_tokens;  // whose rows are prefetched while a token's are read: so many tokens later, 0 for none
};

struct InferenceKernels {
  // One product of int8 weights. Activations q come as q + 128; with two planes as |q|, and behind a row of these the
  // masks, 255 where q < 0.
  void (*multiply_i8)(const MultiplyArgs&);
  int activation_planes;

  // z of some tokens for the repeats [first, last).
  void (*project)(const Projection&, const ProjectArgs&);

  // Codes and scores of one token: reference.sign_codes, sign_score, nearest_buckets.
  void (*hash)(const HashArgs&);

  // Prefetches the rows of one token's codes into L2.
  void (*prefetch_rows)(const PrefetchArgs&);

  // One token, integer tables: scores times the tables' scales as integers of 0 to 127. Returns what one of them is
  // worth.
  float (*quantise_scores)(const QuantiseScoresArgs&);

  // y of some tokens, outputs of one slice: reference.gather.
  void (*gather)(const GatherArgs&);
};

// ---- Encoders -------------------------------------------------------------------------------------------------------
// Rows are float32, padded to whole vectors with zeros. What a call takes of them is said in tokens and floats.

enum class Activation : int32_t { kNone = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3, kRelu = 4, kTanh = 5 };

// y = activation(x W^T + bias) * gate + residual for a tile of tokens. Int8 weights: x is quantised by token.
struct LinearArgs {
  WeightType type;  // float32, bfloat16 or int8
  BlockWeights w;   // one block, inputs and outputs padded to multiples of 64
  const float* bias;
  Activation activation;
  float* x;  // rows of w.block_in; as it was, when all is done
  size_t x_stride;
  int tokens;             // at most kMaxTile
  const float* residual;  // or null, as the gate
  size_t residual_stride;
  const float* gate = nullptr;
  size_t gate_stride = 0;
  float* y;  // rows of w.block_out; may be the residual or the gate
  size_t y_stride;
  uint8_t* quantised;  // scratch: [tokens][block_in][activation_planes]
  float* sums;         // scratch: [tokens][64]
};

struct NormRowsArgs {  // y = (x - mean) / sqrt(variance + epsilon) * weight + bias, or without the mean; y may be x
  const float* x;
  size_t x_stride;
  int tokens, width, padded;
  bool rms;
  float epsilon;
  const float *weight, *bias;
  float* y;
  size_t y_stride;
};

struct PackHeadArgs {  // of a sequence: keys as (head_dim, keys), values as (keys, head_dim)
  const float *k, *v;
  int64_t stride;
  int keys, head_dim;
  float* keys_out;
  size_t keys_stride;  // a multiple of 16
  float* values_out;
};

struct RotateArgs {     // pairs of a token's heads by angles of its position: (a, b) to (a cos - b sin, b cos + a sin)
  float* x;             // [heads][head_dim], whose halves are the pairs' sides
  int heads, head_dim;  // a multiple of 32
  const float* angles;  // [head_dim]: cosines, then sines
};

struct AttendArgs {
  const float* q;  // of the sequence's first token, rows `stride` apart
  int64_t stride;
  int64_t begin, end;  // queries
  const float *k, *v;  // of pack_head
  size_t keys_stride;
  int keys, head_dim;
  bool causal;
  const float* bias =
      nullptr;  // or null: added to the scores of query i, from key 0 on, at bias + (i - begin) * bias_step
  int64_t bias_step = 0;
  int reach = 0;  // keys further away have a bias of minus infinity and may be passed over; 0: all count
  float* scores;  // [kMaxQueryTile][keys_stride]
  float* y;       // of the sequence's first token
  int64_t y_stride;
};
constexpr int kMaxQueryTile = 8;

struct AddRowsArgs {
  const float* rows[4];
  int count, padded;
  float* y;
};

// y += scale * row. A line of 64 bytes holds 64 integers, byte k of word l for output 16 k + l, or 128 of four bits:
// the low halves of its bytes as the first 64, the high ones as the others.
struct AddTableRowArgs {
  TableType type;  // float32, int8 or int4
  const void* row;
  float scale;
  int padded;  // a multiple of 64: outputs that are added to, of int4 it may be less than the row has
  float* y;
};

struct PoolRowsArgs {  // the mean of some rows, divided by its length with `normalise`
  const float* x;
  int64_t stride, tokens;
  int padded;
  bool normalise;
  float* y;
};

struct EncoderKernels {
  void (*linear)(const LinearArgs&);
  void (*norm_rows)(const NormRowsArgs&);
  void (*pack_head)(const PackHeadArgs&);
  void (*rotate)(const RotateArgs&);
  void (*attend)(const AttendArgs&);
  void (*add_rows)(const AddRowsArgs&);
  void (*add_table_row)(const AddTableRowArgs&);
  void (*pool_rows)(const PoolRowsArgs&);
};

// ---- Training -------------------------------------------------------------------------------------------------------
// Codes and scores are int32 and float32, [token][table][read].

struct HashRowsArgs {  // rows [begin, end) of z (rows, bits)
  const float* z;
  int64_t rows, begin, end;
  int bits, reads;
  int32_t* codes;
  float* scores;
};

struct HashRowsBackwardArgs {
  const float* grad;  // to the scores
  const float* z;
  const int32_t* codes;
  int64_t rows, begin, end;
  int bits, reads;
  float* grad_z;
};

// Outputs [first, first + kTrainSlice) of rows of `width`, in float32 rows without gaps, zeros behind the last output.
struct PackSliceArgs {
  Rows from;
  int64_t begin, end;
  int first, width;
  float* to;
};
struct PackRowsArgs {
  Rows from;
  const int32_t* rows;  // which; each goes to its own place
  int64_t count;
  int first, width;
  float* to;
};
struct UnpackSliceArgs {
  const float* from;
  Rows to;
  int64_t begin, end;
  int first, width;
};

struct TransposeArgs {  // to[column][row] = from[row][column], words of 32 bits
  const void* from;
  int64_t from_stride, rows, columns;
  void* to;
  int64_t to_stride;
};

struct GatherSliceArgs {
  const float* packed;  // [tables][table_rows][kTrainSlice]
  int tables;
  int64_t table_rows;
  int reads;
  const int32_t* codes;  // rows `stride` apart from token to token, as are the scores
  const float* scores;
  int64_t stride, tokens;
  float* sums;  // [tokens][kTrainSlice]
  bool starts;  // with sums of 0
};

struct GatherTokenArgs {
  Rows rows;  // of the tables
  int64_t tables, table_rows;
  int reads;
  const int32_t* codes;
  const float* scores;
  int first, last, width;  // outputs, of how many
  Rows y;
  int64_t token;
};

struct ScatterSliceArgs {
  const float* packed;   // [table_rows][kTrainSlice]
  float* sums;           // the same shape
  const float* grad;     // [tokens][kTrainSlice]
  const int32_t* codes;  // [tokens], as are scores and dots
  const float* scores;
  float* dots;
  int64_t tokens;  // a multiple of 16
};

struct TrainingKernels {
  // ops.hash_codes and its backward.
  void (*hash_rows)(const HashRowsArgs&);
  void (*hash_rows_backward)(const HashRowsBackwardArgs&);

  void (*pack_slice)(const PackSliceArgs&);
  void (*pack_rows)(const PackRowsArgs&);
  void (*unpack_slice)(const UnpackSliceArgs&);
  void (*transpose_words)(const TransposeArgs&);

  // sums[token] (+)= the reads of packed tables.
  void (*gather_slice)(const GatherSliceArgs&);

  // The same sums for some outputs of one token, straight from the tables to y.
  void (*gather_token)(const GatherTokenArgs&);

  // One read of one packed table: sums[code] += score * grad, dots += <grad, row>.
  void (*scatter_slice)(const ScatterSliceArgs&);
};

}  // namespace lookupffn
