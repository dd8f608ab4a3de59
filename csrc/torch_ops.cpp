// The only file that sees torch: checks arguments, allocates the result, lends torch's threads to the engine.
// Built against libtorch's stable ABI, so one library serves every Python and every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "engine.h"

namespace lookupffn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool ok, const std::string& message) {
  if (!ok) throw std::runtime_error("lookupffn: " + message);
}

std::string shape(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); i++) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

void check_bytes(const Tensor& packed) {
  check(packed.is_cpu() && packed.dim() == 1 && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
        "packed must be a contiguous vector of bytes on the CPU, not " + shape(packed));
}

Threads torch_threads() {
  const int64_t count = torch::stable::get_num_threads();
  return {int(count), [count](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
            // at least n / count a thread, so that no more than `count` of them take part
            torch::stable::parallel_for(0, n, (n + count - 1) / count, body);
          }};
}

const Kernels& named_or_chosen(const std::string& isa) { return isa.empty() ? kernels() : kernels_named(isa); }

Tensor prepared(const Tensor& x, const Tensor& packed, int64_t out_features, int64_t tile_tokens, int64_t groups_a_pass,
                bool prefetch, int64_t serial_tokens, std::string isa) {
  check(x.is_cpu(), "a prepared layer runs on the CPU; move the input there");
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  check(x.dim() == 2 && (bfloat16 || x.scalar_type() == ScalarType::Float),
        "x must be (tokens, features) in float32 or bfloat16, not " + shape(x));
  check_bytes(packed);
  Layer layer;
  const std::string wrong = parse_layer(packed.const_data_ptr(), size_t(packed.numel()), &layer);
  check(wrong.empty(), "the packed layer cannot be used: " + wrong);
  check(x.size(1) == layer.h.in_features, "x " + shape(x) + " must have the layer's in_features, " +
                                              std::to_string(layer.h.in_features) + ", as its last dimension");
  check(out_features == layer.h.out_features, "out_features is " + std::to_string(out_features) + ", the packed layer's " +
                                                  std::to_string(layer.h.out_features));
  check(tile_tokens > 0 && groups_a_pass > 0 && serial_tokens >= 0, "tiling numbers must be positive");

  const Kernels& implementation = named_or_chosen(isa);
  const Tensor rows = x.stride(1) == 1 || x.size(1) == 1 ? x : torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, {x.size(0), out_features});
  forward(implementation, layer, {const_cast<void*>(rows.const_data_ptr()), rows.stride(0), bfloat16},
          {y.mutable_data_ptr(), out_features, bfloat16}, x.size(0),
          {int(std::min<int64_t>(tile_tokens, 1 << 20)), int(std::min<int64_t>(groups_a_pass, 1 << 20)), prefetch,
           int(std::min<int64_t>(serial_tokens, 1 << 30))},
          torch_threads());
  return y;
}

std::string check_packed(const Tensor& packed) {  // what is wrong with packed bytes, or nothing
  check_bytes(packed);
  Layer layer;
  return parse_layer(packed.const_data_ptr(), size_t(packed.numel()), &layer);
}

std::string implementation(std::string isa) { return named_or_chosen(isa).name; }

std::string all_implementations() {  // one a line: name, tab, runs here, tab, needs
  int count;
  const Implementation* all = implementations(&count);
  std::string lines;
  for (int i = 0; i < count; i++)
    lines += std::string(all[i].kernels->name) + (all[i].runs_here() ? "\t1\t" : "\t0\t") + all[i].needs + "\n";
  return lines;
}

}  // namespace
}  // namespace lookupffn

STABLE_TORCH_LIBRARY_FRAGMENT(lookupffn, m) {
  m.def(
      "prepared(Tensor x, Tensor packed, int out_features, int tile_tokens, int groups_a_pass, bool prefetch, "
      "int serial_tokens, str isa) -> Tensor");
  m.def("check_packed(Tensor packed) -> str");
  m.def("implementation(str isa) -> str");
  m.def("all_implementations() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lookupffn, CPU, m) {
  m.impl("prepared", TORCH_BOX(&lookupffn::prepared));
  m.impl("check_packed", TORCH_BOX(&lookupffn::check_packed));
}

STABLE_TORCH_LIBRARY_IMPL(lookupffn, CompositeExplicitAutograd, m) {
  m.impl("implementation", TORCH_BOX(&lookupffn::implementation));
  m.impl("all_implementations", TORCH_BOX(&lookupffn::all_implementations));
}
