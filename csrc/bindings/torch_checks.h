// What the files that see torch share: checks, torch's threads, memory for a call, results.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/dispatch.h"
#include "ops/threads.h"

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

inline void run_on_torch(void*, int tasks, void (*task)(void*, int), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [task, context](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) task(context, int(i));
  });
}

inline ThreadPool torch_threads() {
  return {forked ? 1 : int(torch::stable::get_num_threads()), run_on_torch, nullptr};
}

// Memory for one call. A thread keeps a small one for its next call: the system would map its pages anew each time,
// which costs a call of a few tokens more than its products. A large one is given back at once.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    Kept& kept = of_thread();
    if (bytes > kept.bytes) {
      std::free(kept.memory);
      kept = {};
      kept.memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      if (!kept.memory) throw std::bad_alloc();
      kept.bytes = bytes;
    }
  }
  ~Workspace() {
    Kept& kept = of_thread();
    if (kept.bytes <= kMostKept) return;
    std::free(kept.memory);
    kept = {};
  }
  Workspace(const Workspace&) = delete;
  void* get() const { return of_thread().memory; }

 private:
  static constexpr size_t kMostKept = 4 << 20;
  struct Kept {
    void* memory = nullptr;
    size_t bytes = 0;
  };
  struct Freed : Kept {
    ~Freed() { std::free(memory); }
  };
  static Kept& of_thread() {
    static thread_local Freed kept;
    return kept;
  }
};

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
