// What the files that see torch share: checks, torch's threads, results.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "engine.h"

namespace lookupffn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Macro, so that the message is put together only where it is needed.
#define check(ok, message) \
  if (!(ok)) throw std::runtime_error(std::string("lookupffn: ") + (message))

inline std::string shape(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); i++) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

// The child of a fork has none of its parent's threads, and OpenMP would wait for them for ever: it works alone.
inline std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
inline const int fork_is_watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

inline Threads torch_threads() {
  const int64_t count = forked ? 1 : torch::stable::get_num_threads();
  return {int(count), [count](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
            // at least n / count a thread, so that no more than `count` of them take part
            torch::stable::parallel_for(0, n, (n + count - 1) / count, body);
          }};
}

inline const Kernels& named_or_chosen(const std::string& isa) { return isa.empty() ? kernels() : kernels_named(isa); }

// An uninitialised tensor on the CPU. The stable ABI's own functions go through the dispatcher, which takes longer than
// a token's whole projection.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
  AtenTensorHandle handle;
  const int32_t dtype = type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                        : type == ScalarType::Double ? aoti_torch_dtype_float64()
                        : type == ScalarType::Int    ? aoti_torch_dtype_int32()
                        : type == ScalarType::Long   ? aoti_torch_dtype_int64()
                                                     : aoti_torch_dtype_float32();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace lookupffn
