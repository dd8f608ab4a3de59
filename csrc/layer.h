// A prepared layer: what the kernels read, and the header of the packed bytes that it is read from (docs/format.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lookupffn {

constexpr int kLanes = 16;             // outputs of a panel of packed weights; tables of a group
constexpr int kMaxSlice = 128;         // outputs of a slice of packed tables: 64 or 128
constexpr int kMaxReads = 4;
constexpr uint32_t kFormatVersion = 1;

enum class WeightType : int32_t { kFloat32 = 0, kInt16 = 1, kInt8 = 2 };
enum class TableType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

enum Section { kWeights, kWeightScales, kWeightOffsets, kLevels, kCodeBias, kTables, kTableScales, kBias, kSections };

struct PackedHeader {
  char magic[8];  // "LOOKUPFF"
  uint32_t version;
  int32_t in_features, out_features, num_tables, code_bits, reads;
  int32_t stages;                // block-diagonal factors: 4 for BH4, 1 for a dense projection, 0 for none
  int32_t repeats, blocks;       // R, n
  int32_t block_in, block_out;   // b and b for BH4; padded D and T tau for a dense projection
  int32_t table_rows;            // K, or 2 K where scores may be negative: rows K to 2 K are those of 0 to K, negated
  WeightType weight_type;
  TableType table_type;
  int32_t slice;                 // outputs of a slice of the tables, 64 or 128
  int32_t reserved;              // 0
  float scale, residual;         // z = scale * product + residual * x + code_bias
  uint64_t total_bytes;
  uint64_t offset[kSections];    // from the first byte of the header
};
static_assert(sizeof(PackedHeader) == 152, "the header is a file format");

struct Layer {
  PackedHeader h;
  const uint8_t* weights;       // [R][stages][n][panels / G][block_in / g][G] words of 16 outputs x g inputs, 64 bytes;
                                // G = panels_a_group(block_out), g inputs are four bytes
  const float* weight_scales;   // [R][stages][n * block_out], integer weights only
  const int32_t* weight_offsets;  // the same shape: -128 times the sum of an output's weights, int8 only
  const float* levels;          // [R][stages]: the largest activation that cannot overflow the sums, integers only
  const float* code_bias;       // [R * n * block_out], zeros behind T tau
  const uint8_t* tables;        // [slices][T][table_rows][slice]
  const float* table_scales;    // [T padded to 16], int8 only
  const float* bias;            // [slices * slice]

  int width_in, width_out;      // n * block_in, n * block_out
  int z_stride;                 // floats of z a token, with room for whole vectors behind the last table
  int groups;                   // ceil(T / 16)
  int slots;                    // groups * reads * 16: codes and scores a token, in groups of 16 tables, read by read
  int slices;                   // ceil(E / slice)
  size_t slice_bytes;           // of one row's slice
};

// Reads a layer from packed bytes, which may come from a file: every size is checked before it is used.
// Returns an empty string, or what is wrong.
std::string parse_layer(const void* packed, size_t bytes, Layer* layer);

inline int panels_a_group(int block_out) { return block_out >= 64 ? 4 : block_out / kLanes; }
inline size_t element_size(WeightType t) { return t == WeightType::kFloat32 ? 4 : t == WeightType::kInt16 ? 2 : 1; }
inline size_t element_size(TableType t) { return t == TableType::kFloat32 ? 4 : t == TableType::kBFloat16 ? 2 : 1; }

}  // namespace lookupffn
