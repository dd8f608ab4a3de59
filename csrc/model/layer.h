// A packed lookup layer: the header of its bytes (docs/format.md), checked once when they are opened, and what the
// kernels read of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/kernels.h"

namespace lookupffn {

constexpr uint32_t kFormatVersion = 1;

enum Section { kWeights, kWeightScales, kWeightOffsets, kLevels, kCodeBias, kTables, kTableScales, kBias, kSections };

struct PackedHeader {
  char magic[8];  // "LOOKUPFF"
  uint32_t version;
  int32_t in_features, out_features, num_tables, code_bits, reads;
  int32_t stages;               // block-diagonal factors: 4 for BH4, 1 for a dense projection, 0 for none
  int32_t repeats, blocks;      // R, n
  int32_t block_in, block_out;  // b and b for BH4; padded D and T tau for a dense projection
  int32_t table_rows;           // K, or 2 K where scores may be negative: rows K to 2 K are those of 0 to K, negated
  WeightType weight_type;
  TableType table_type;
  int32_t slice;          // outputs of a slice of the tables, 64 or 128, of int4 128 or 256
  int32_t reserved;       // 0
  float scale, residual;  // z = scale * product + residual * x + code_bias
  uint64_t total_bytes;
  uint64_t offset[kSections];  // from the first byte of the header
};
static_assert(sizeof(PackedHeader) == 152, "the header is a file format");

struct Layer {
  PackedHeader h;
  Projection projection;
  TableSlices tables;
  const float* table_scales;  // [T padded to 16], integer tables only
  const float* bias;          // [slices * slice]

  int z_stride;  // floats of z a token, with room for whole vectors behind the last table
  int groups;    // ceil(T / 16)
  int slices;    // ceil(E / slice)

  int slots() const { return tables.slots(); }
  bool negated_rows() const { return h.table_rows >> h.code_bits == 2; }
};

// Opens packed bytes, which may come from a file: every size is checked before it is used. The layer points into them.
// Returns an empty string, or what is wrong.
std::string open_layer(const void* packed, size_t bytes, Layer* layer);

// Whether the activation levels, numbers that the bytes hold, are in range; empty, or what is wrong.
std::string check_levels(const Layer& layer);

}  // namespace lookupffn
