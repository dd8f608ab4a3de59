// What torch sees of packed layers: checks arguments, allocates result and workspace, lends torch's threads.
// Built against libtorch's stable ABI, so one library serves every Python and every torch from 2.10 on.
#include <algorithm>
#include <cstring>

#include "bindings/torch_checks.h"
#include "model/lookup.h"

namespace lookupffn {
namespace {

void check_bytes(const Tensor& packed) {
  check(packed.is_cpu() && packed.dim() == 1 && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
        "packed must be a contiguous vector of bytes on the CPU, not " + shape(packed));
}

// The layer in these bytes. It is opened, that is parsed and checked, when its bytes are first seen, and anew where
// others lie at the same place: the header decides all sizes, so an equal one means an equal layer. Each thread
// remembers the layers that it met last.
const Layer& opened(const Tensor& packed) {
  struct Entry {
    const void* data;
    size_t bytes;
    Layer layer;
  };
  constexpr size_t kEntries = 64;
  thread_local Entry entries[kEntries] = {};
  check_bytes(packed);
  const void* const data = packed.const_data_ptr();
  const size_t bytes = size_t(packed.numel());
  const uint64_t mixed = reinterpret_cast<uintptr_t>(data) / 64 * 0x9e3779b97f4a7c15u;
  Entry& e = entries[mixed >> 58];
  const bool known = e.data == data && e.bytes == bytes && std::memcmp(data, &e.layer.h, sizeof(PackedHeader)) == 0;
  const std::string wrong = known ? check_levels(e.layer) : open_layer(data, bytes, &e.layer);
  e.data = wrong.empty() ? data : nullptr;
  e.bytes = bytes;
  check(wrong.empty(), "the packed layer cannot be used: " + wrong);
  return e.layer;
}

Tiling tiling(int64_t tile_tokens, int64_t groups_per_block, int64_t prefetch_distance, int64_t serial_tokens) {
  check(tile_tokens > 0 && groups_per_block > 0 && prefetch_distance >= 0 && serial_tokens >= 0,
        "tile_tokens and groups_per_block must be positive, prefetch_distance and serial_tokens not negative");
  const auto narrow = [](int64_t n) { return int(std::min<int64_t>(n, 1 << 24)); };
  return {narrow(tile_tokens), narrow(groups_per_block), narrow(prefetch_distance), narrow(serial_tokens)};
}

Tensor forward(const Tensor& x, const Tensor& packed, int64_t out_features, const Tiling& tiling,
               const InferenceKernels& kernels) {
  check(x.is_cpu(), "a packed layer runs on the CPU; move the input there");
  const ScalarType type = x.scalar_type();
  check(x.dim() >= 1 && (type == ScalarType::BFloat16 || type == ScalarType::Float),
        "x must be (..., features) in float32 or bfloat16, not " + shape(x));
  const Layer& layer = opened(packed);
  const int64_t last = x.dim() - 1, features = layer.h.in_features;
  check(x.size(last) == features, "x " + shape(x) + " must have the layer's in_features, " + std::to_string(features) +
                                      ", as its last dimension");
  check(out_features == layer.h.out_features, "out_features is " + std::to_string(out_features) +
                                                  ", the packed layer's " + std::to_string(layer.h.out_features));

  // Rows may lie apart in a matrix; other layouts are copied first.
  const bool in_place = x.is_contiguous() || (last == 1 && (x.stride(1) == 1 || features == 1));
  const Tensor rows = in_place ? x : torch::stable::contiguous(x);
  std::vector<int64_t> sizes(rows.sizes().begin(), rows.sizes().end());
  sizes.back() = out_features;
  Tensor y = empty(sizes, type);
  const bool bfloat16 = type == ScalarType::BFloat16;
  const ThreadPool threads = torch_threads();
  const Plan plan = make_plan(layer, x.numel() / features, tiling, threads.threads);
  const Workspace workspace(plan.workspace_bytes());
  run(kernels, layer, plan, {const_cast<void*>(rows.const_data_ptr()), last == 1 ? rows.stride(0) : features, bfloat16},
      {y.mutable_data_ptr(), out_features, bfloat16}, workspace.get(), threads);
  return y;
}

Tensor packed_forward(const Tensor& x, const Tensor& packed, int64_t out_features, int64_t tile_tokens,
                      int64_t groups_per_block, int64_t prefetch_distance, int64_t serial_tokens) {
  return forward(x, packed, out_features, tiling(tile_tokens, groups_per_block, prefetch_distance, serial_tokens),
                 *implementation(isa_index()).inference);
}

// The same by the implementation of this name. Apart, because a string costs a call more than a token's hash.
Tensor packed_forward_isa(const Tensor& x, const Tensor& packed, int64_t out_features, int64_t tile_tokens,
                          int64_t groups_per_block, int64_t prefetch_distance, int64_t serial_tokens, std::string isa) {
  return forward(x, packed, out_features, tiling(tile_tokens, groups_per_block, prefetch_distance, serial_tokens),
                 *implementation(isa_index(isa)).inference);
}

// Seconds that one thread spends in projection, hash and gather of a call, (3); for `lookupffn bench`.
Tensor stage_seconds(const Tensor& x, const Tensor& packed, int64_t tile_tokens, int64_t groups_per_block,
                     int64_t prefetch_distance) {
  const Layer& layer = opened(packed);
  check(x.is_cpu() && x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.is_contiguous() &&
            x.size(1) == layer.h.in_features,
        "x must be contiguous float32 rows of the layer's width");
  Tensor y = empty({x.size(0), layer.h.out_features}, ScalarType::Float);
  const Plan plan = make_plan(layer, x.size(0), tiling(tile_tokens, groups_per_block, prefetch_distance, 0), 1);
  const Workspace workspace(plan.workspace_bytes());
  const StageSeconds seconds = run_timed(*implementation(isa_index()).inference, layer, plan,
                                         {const_cast<void*>(x.const_data_ptr()), x.size(1), false},
                                         {y.mutable_data_ptr(), layer.h.out_features, false}, workspace.get());
  Tensor out = empty({3}, ScalarType::Double);
  double* values = static_cast<double*>(out.mutable_data_ptr());
  values[0] = seconds.project, values[1] = seconds.hash, values[2] = seconds.gather;
  return out;
}

std::string check_packed(const Tensor& packed) {  // what is wrong with packed bytes, or nothing
  check_bytes(packed);
  Layer layer;
  return open_layer(packed.const_data_ptr(), size_t(packed.numel()), &layer);
}

std::string implementation_name(std::string isa) {
  int count;
  return isas(&count)[isa_index(isa)].name;
}

std::string all_implementations() {  // one a line: name, tab, runs here, tab, needs
  int count;
  const Isa* all = isas(&count);
  std::string lines;
  for (int i = 0; i < count; i++)
    lines += std::string(all[i].name) + (all[i].runs_here() ? "\t1\t" : "\t0\t") + all[i].needs + "\n";
  return lines;
}

}  // namespace
}  // namespace lookupffn

STABLE_TORCH_LIBRARY_FRAGMENT(lookupffn, m) {
  m.def(
      "packed_forward(Tensor x, Tensor packed, int out_features, int tile_tokens, int groups_per_block, "
      "int prefetch_distance, int serial_tokens) -> Tensor");
  m.def(
      "packed_forward_isa(Tensor x, Tensor packed, int out_features, int tile_tokens, int groups_per_block, "
      "int prefetch_distance, int serial_tokens, str isa) -> Tensor");
  m.def(
      "stage_seconds(Tensor x, Tensor packed, int tile_tokens, int groups_per_block, int prefetch_distance) -> Tensor");
  m.def("check_packed(Tensor packed) -> str");
  m.def("implementation(str isa) -> str");
  m.def("all_implementations() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lookupffn, CPU, m) {
  m.impl("packed_forward", TORCH_BOX(&lookupffn::packed_forward));
  m.impl("packed_forward_isa", TORCH_BOX(&lookupffn::packed_forward_isa));
  m.impl("stage_seconds", TORCH_BOX(&lookupffn::stage_seconds));
  m.impl("check_packed", TORCH_BOX(&lookupffn::check_packed));
}

STABLE_TORCH_LIBRARY_IMPL(lookupffn, CompositeExplicitAutograd, m) {
  m.impl("implementation", TORCH_BOX(&lookupffn::implementation_name));
  m.impl("all_implementations", TORCH_BOX(&lookupffn::all_implementations));
}
