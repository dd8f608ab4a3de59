// One implementation of the kernels is one struct of function pointers. They take raw pointers and the caller's
// buffers, start no thread and allocate nothing; engine.cpp calls them on ranges of tokens.
#pragma once

#include "layer.h"

namespace lookupffn {

constexpr int kMaxTile = 96;  // tokens
constexpr int kTrainSlice = 64;  // outputs of a table that training reads at once
constexpr int32_t kLaneIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Rows of x or y, float32 or bfloat16, `stride` elements apart.
struct Rows {
  void* data;
  int64_t stride;
  bool bfloat16;
};

struct ProjectScratch {  // for a tile of tokens
  float* rows;           // [tile][width_in] x in float32, padded with zeros
  float* sums[2];        // [tile][width_out]
  uint8_t* first;        // [tile][width_in * 2] the quantised x
  uint8_t* activations;  // [tile][width_in * 2] the quantised input of a stage
  float* unit[2];        // [tile] what one step of the quantised x, of a stage's input is worth
};

// What a core is asked to repeat; each on sixteen lanes where it is a vector instruction.
enum class Instruction : int {
  kAdd, kMultiply, kFma, kDivide, kConvert, kVector, kDotInt8, kDotInt16, kRows, kTranspose, kExp,
  kLoad, kStore, kPrefetch, kWord, kScalar, kIssue, kCycle, kWideCycle,
};
constexpr int kInstructions = 19;

struct Kernels {
  const char* name;

  // z of `tokens` tokens for the repeats [first, last): reference.bh4 or a dense product, plus the bias.
  void (*project)(const Layer&, Rows x, int64_t token, int tokens, int first, int last, float* z, const ProjectScratch&);

  // One token, groups [first, last): codes and scores [slots] from z, reference.sign_codes, sign_score, nearest_cells.
  // Padding scores 0.
  void (*hash)(const Layer&, int first, int last, const float* z, uint16_t* codes, float* scores);

  // Asks for slices [first_slice, last_slice) of the rows of one token's codes, groups [first, last).
  void (*prefetch_rows)(const Layer&, int first_slice, int last_slice, int first, int last, const uint16_t* codes);

  // One token, int8 tables: scores times the tables' scales to integers of 0 to 127, a sign to the code; the step.
  float (*quantise_scores)(const Layer&, float* scores, uint16_t* codes, uint8_t* quantised);

  // Tokens [begin, end), outputs of one slice, tables of groups [first, last): reference.gather. Sums of a slice go
  // through `sums` from one call to the next; the call with the last group writes y.
  void (*gather)(const Layer&, int slice, int first, int last, int64_t begin, int64_t end, const uint16_t* codes,
                 const void* scores, const float* steps, void* sums, Rows y, int64_t y_token, int ahead);

  // Measuring (probe-inl.h). The two readers return something that depends on every line of 64 bytes that they load: line
  // lines[i] of `memory` for every i < count; `lines` of them, a multiple of 4, as they lie.
  int32_t (*read_lines)(const uint8_t* memory, const uint32_t* lines, int64_t count, int64_t ahead);
  int32_t (*read_stream)(const uint8_t* memory, int64_t lines);

  // Runs an instruction again and again, on 4 KiB of `memory` where it needs any; returns how many times.
  int64_t (*repeat)(Instruction instruction, int64_t rounds, uint8_t* memory);

  // Training (training-inl.h). Codes and scores here are int32 and float32, [token][table][read].

  // Rows [begin, end) of z, `bits` floats each: ops.hash_codes and its backward.
  void (*hash_rows)(const float* z, int64_t rows, int64_t begin, int64_t end, int bits, int reads, int32_t* codes,
                    float* scores);
  void (*hash_rows_backward)(const float* grad, const float* z, const int32_t* codes, int64_t rows, int64_t begin,
                             int64_t end, int bits, int reads, float* grad_z);

  // Outputs [first, first + kTrainSlice) of rows of `width`, to float32 rows without gaps and back: rows [begin, end),
  // or those named, each to its own place.
  void (*pack_slice)(Rows from, int64_t begin, int64_t end, int first, int width, float* to);
  void (*pack_rows)(Rows from, const int32_t* rows, int64_t count, int first, int width, float* to);
  void (*unpack_slice)(const float* from, Rows to, int64_t begin, int64_t end, int first, int width);

  // to[column][row] = from[row][column], words of 32 bits.
  void (*transpose_words)(const void* from, int64_t from_stride, int64_t rows, int64_t columns, void* to, int64_t to_stride);

  // sums[token] (+)= the reads of packed tables; codes and scores are `stride` apart from token to token.
  void (*gather_slice)(const float* packed, int tables, int64_t table_rows, int reads, const int32_t* codes,
                       const float* scores, int64_t stride, int64_t tokens, float* sums, bool starts);

  // The same sums for outputs [first, last) of one token, straight from the tables to y.
  void (*gather_token)(Rows rows, int64_t tables, int64_t table_rows, int reads, const int32_t* codes, const float* scores,
                       int first, int last, int width, Rows y, int64_t token);

  // One read of one packed table, tokens in sixteens: sums[code] += score * grad, dots += <grad, row>.
  void (*scatter_slice)(const float* packed, float* sums, const float* grad, const int32_t* codes, const float* scores,
                        float* dots, int64_t tokens);
};

}  // namespace lookupffn
