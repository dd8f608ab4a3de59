#include "model/layer.h"

#include <cmath>
#include <cstring>

namespace lookupffn {
namespace {

bool power_of_two(int64_t n) { return n >= 1 && (n & (n - 1)) == 0; }

// The product of sizes, or false where it does not fit 62 bits.
template <size_t N>
bool product(const int64_t (&factors)[N], uint64_t* out) {
  uint64_t total = 1;
  for (int64_t factor : factors)
    if (factor < 0 || __builtin_mul_overflow(total, (uint64_t)factor, &total) || total >> 62) return false;
  *out = total;
  return true;
}

std::string field(const char* name, int64_t value) { return std::string(name) + " is " + std::to_string(value); }

}  // namespace

std::string open_layer(const void* packed, size_t bytes, Layer* layer) {
  if (bytes < sizeof(PackedHeader)) return "it has " + std::to_string(bytes) + " bytes, fewer than its header";
  std::memcpy(&layer->h, packed, sizeof(PackedHeader));
  const PackedHeader& h = layer->h;
  if (std::memcmp(h.magic, "LOOKUPFF", 8) != 0) return "it does not begin with LOOKUPFF";
  if (h.version != kFormatVersion)
    return "its format version is " + std::to_string(h.version) + ", this build reads " +
           std::to_string(kFormatVersion);
  if (h.total_bytes != bytes)
    return "its header says " + std::to_string(h.total_bytes) + " bytes, but it has " + std::to_string(bytes);

  if (h.in_features < 1) return field("in_features", h.in_features);
  if (h.out_features < 1) return field("out_features", h.out_features);
  if (h.num_tables < 1) return field("num_tables", h.num_tables);
  if (h.code_bits < 1 || h.code_bits > 16) return field("code_bits", h.code_bits);
  const int64_t rows = int64_t(1) << h.code_bits;
  if (h.reads < 1 || h.reads > kMaxReads || h.reads > rows) return field("reads", h.reads);
  const bool is_signed = h.table_rows == 2 * rows;
  // Rows of integers are weighed by scores without a sign. Only codes of one or two bits can have negative ones.
  const bool needs_sign = is_integer(h.table_type) && h.reads > 1 && h.code_bits < 3;
  if ((h.table_rows != rows && !is_signed) || is_signed != needs_sign) return field("table_rows", h.table_rows);
  if (h.weight_type < WeightType::kFloat32 || h.weight_type > WeightType::kInt8)
    return field("weight_type", int64_t(h.weight_type));
  if (h.table_type < TableType::kFloat32 || h.table_type > TableType::kInt4)
    return field("table_type", int64_t(h.table_type));
  const int narrow = h.table_type == TableType::kInt4 ? 128 : 64;  // a cache line of int8 or int4
  if ((h.slice != narrow && h.slice != 2 * narrow) || h.reserved != 0) return field("slice", h.slice);
  if (is_integer(h.table_type) && int64_t(h.num_tables) * h.reads > 66000)
    return field("num_tables", h.num_tables) + ", too many for 32-bit sums of rows";

  const int64_t codes = int64_t(h.num_tables) * h.code_bits;
  if (h.stages == 0) {
    if (h.in_features != codes) return field("in_features", h.in_features) + " without a projection";
    if (h.repeats != 1 || h.blocks != 1) return field("repeats", h.repeats) + " without a projection";
  } else {
    if (h.stages != 1 && h.stages != 4) return field("stages", h.stages);
    if (h.repeats < 1) return field("repeats", h.repeats);
    if (!power_of_two(h.blocks)) return field("blocks", h.blocks);
    if (h.block_in < kLanes || h.block_in % kLanes) return field("block_in", h.block_in);
    if (h.block_out < kLanes || h.block_out % (kLanes * panels_of_group(h.block_out)))
      return field("block_out", h.block_out);
    if ((h.stages == 4 || h.blocks > 1 || h.residual != 0) && h.block_in != h.block_out)
      return field("block_in", h.block_in) + " and " + field("block_out", h.block_out);
    const int64_t in = int64_t(h.blocks) * h.block_in, out = int64_t(h.blocks) * h.block_out;
    if (in < h.in_features || in > (1 << 24) || out > (1 << 24)) return field("blocks", h.blocks);
    if (out > (1 << 28) / h.repeats || out * h.repeats < codes) return field("repeats", h.repeats);
    // An int8 sum: 255 * 127 a product
    if (h.weight_type == WeightType::kInt8 && h.block_in > 66000) return field("block_in", h.block_in);
  }
  if (!std::isfinite(h.scale) || !std::isfinite(h.residual)) return "scale or residual is not finite";
  if (codes > (1 << 28)) return field("num_tables", h.num_tables);

  Layer& l = *layer;
  const bool projects = h.stages > 0;
  const int64_t width_out = projects ? int64_t(h.blocks) * h.block_out : codes;
  l.groups = groups_of(h.num_tables);
  const int64_t z_needed = int64_t(l.groups) * kLanes * h.code_bits + kLanes;
  const int64_t z_written = projects ? int64_t(h.repeats) * width_out : codes;
  l.z_stride = int(z_needed > z_written ? z_needed : z_written);
  l.slices = int((int64_t(h.out_features) + h.slice - 1) / h.slice);
  l.tables = {.type = h.table_type,
              .num_tables = h.num_tables,
              .table_rows = h.table_rows,
              .reads = h.reads,
              .slice = h.slice,
              .rows = nullptr};

  const int64_t per_output = projects ? int64_t(h.repeats) * h.stages * width_out : 0;
  const bool integer = projects && h.weight_type != WeightType::kFloat32;
  uint64_t size[kSections];
  bool fits = product({per_output, int64_t(h.block_in), int64_t(element_size(h.weight_type))}, &size[kWeights]);
  fits = fits && product({int64_t(integer), per_output, 4}, &size[kWeightScales]);
  fits =
      fits && product({int64_t(integer && h.weight_type == WeightType::kInt8), per_output, 4}, &size[kWeightOffsets]);
  fits = fits && product({int64_t(integer), int64_t(h.repeats), int64_t(h.stages), 4}, &size[kLevels]);
  fits = fits && product({int64_t(projects), int64_t(h.repeats), width_out, 4}, &size[kCodeBias]);
  fits = fits && product({l.slices, h.num_tables, h.table_rows, int64_t(l.tables.row_bytes())}, &size[kTables]);
  fits = fits && product({int64_t(is_integer(h.table_type)), int64_t(l.groups) * kLanes, 4}, &size[kTableScales]);
  fits = fits && product({l.slices, h.slice, 4}, &size[kBias]);
  if (!fits) return "its sizes overflow";

  // One layout for given sizes: sections in order, each from the next multiple of 64 bytes on.
  const uint8_t* section[kSections];
  uint64_t position = (sizeof(PackedHeader) + 63) / 64 * 64;
  for (int s = 0; s < kSections; s++) {
    if (h.offset[s] != position || position > bytes || size[s] > bytes - position)
      return "section " + std::to_string(s) + " of " + std::to_string(size[s]) + " bytes at " +
             std::to_string(h.offset[s]) + " should begin at " + std::to_string(position) + " and end within " +
             std::to_string(bytes) + " bytes";
    section[s] = static_cast<const uint8_t*>(packed) + position;
    position += (size[s] + 63) / 64 * 64;
  }
  if (position != bytes)
    return "its sections end at byte " + std::to_string(position) + ", but it has " + std::to_string(bytes);
  const auto floats = [&section](Section s) { return reinterpret_cast<const float*>(section[s]); };
  l.projection = {.type = h.weight_type,
                  .in_features = h.in_features,
                  .stages = h.stages,
                  .repeats = h.repeats,
                  .blocks = h.blocks,
                  .block_in = h.block_in,
                  .block_out = h.block_out,
                  .scale = h.scale,
                  .residual = h.residual,
                  .weights = section[kWeights],
                  .scales = floats(kWeightScales),
                  .offsets = reinterpret_cast<const int32_t*>(section[kWeightOffsets]),
                  .levels = floats(kLevels),
                  .bias = floats(kCodeBias)};
  l.tables.rows = section[kTables];
  l.table_scales = floats(kTableScales);
  l.bias = floats(kBias);
  return check_levels(l);
}

std::string check_levels(const Layer& layer) {
  const Projection& p = layer.projection;
  if (p.stages == 0 || p.type == WeightType::kFloat32) return "";
  const float most = p.type == WeightType::kInt8 ? 127.0f : 32767.0f;
  for (int i = 0; i < p.repeats * p.stages; i++)
    if (!(p.levels[i] >= 1 && p.levels[i] <= most)) return "activation level " + std::to_string(p.levels[i]);
  return "";
}

}  // namespace lookupffn
