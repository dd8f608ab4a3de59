// The records of a packed model (docs/format.md, version 2): each a header of 64 bytes and sections, whose sizes follow
// from the header alone. Checked once when opened; what is opened points into the bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/kernels.h"

namespace lookupffn {

enum class RecordKind : uint32_t {
  kLookup = 1,
  kLinear = 2,
  kNorm = 3,
  kEmbedding = 4,
  kModel = 5,
  kBranches = 6,
  kTokenRows = 7
};
constexpr uint32_t kRecordVersion = 2;
constexpr int kRecordSizes = 10;

struct RecordHeader {
  char magic[8];  // "LOOKUPFF"
  uint32_t version;
  RecordKind kind;
  uint64_t total_bytes;
  int32_t size[kRecordSizes];  // by kind
};
static_assert(sizeof(RecordHeader) == 64, "the header is a file format");

struct Bytes {
  const uint8_t* data;
  size_t size;
};

// y = activation(x W^T + bias). Inputs and outputs are padded to multiples of 64 with zeros.
struct Linear {
  int in_features, out_features, block_in, block_out;
  WeightType type;  // float32, bfloat16 or int8
  Activation activation;
  BlockWeights weights;
  const float* bias;  // [block_out]
};

// Outputs [begin, end) of a linear, multiples of 64.
Linear outputs_of(const Linear&, int begin, int end);

struct Norm {
  int width, padded;
  bool rms;
  float epsilon;
  const float *weight, *bias;  // [padded]
};

struct Embedding {
  int rows, width, padded;
  const float* values;  // [rows][padded]
};

// Rows of a table that is addressed by a token's id and its neighbours'.
struct TokenRows {
  int rows, width, padded;  // a multiple of 64, of int4 of 128
  TableType type;           // float32, int8 or int4
  int before, after;        // neighbours whose ids take part; none, and as many rows as ids: the id is the row
  const uint8_t* data;      // [rows][padded]
  const float* scales;      // [rows], integers only

  size_t row_bytes() const { return size_t(padded) * bits_of(type) / 8; }
};

// What a lookup layer's output has beside its tables' sum.
struct Branches {
  bool low_rank;   // two linears more
  int token_rows;  // so many tables of rows more
};

// Each returns an empty string, or what is wrong with the bytes.
std::string open_token_rows(Bytes, TokenRows*);
std::string open_branches(Bytes, Branches*);
std::string open_linear(Bytes, Linear*);
std::string open_norm(Bytes, Norm*);
std::string open_embedding(Bytes, Embedding*);

// The header of a record of this kind, which has so many sizes; its bytes are checked against those that are there.
std::string open_record(Bytes, RecordKind, int sizes, RecordHeader*);

// The kind of a record; kLookup is that of version 1. Empty, or why the bytes begin with none.
std::string record_kind(Bytes, RecordKind*);

constexpr int kPadding = 64;  // every width is padded to a multiple of it
constexpr int kMostFeatures = 1 << 20;
constexpr int kMostNeighbours = 8;
constexpr int kMostBranches = 16;

}  // namespace lookupffn
