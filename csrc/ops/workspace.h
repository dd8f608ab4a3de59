// Memory of the caller's for one call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lookupffn {

// Gives out a workspace part by part, each from a cache line on. From nullptr on it counts what the parts take.
class Carver {
 public:
  explicit Carver(void* workspace) : next_(reinterpret_cast<uintptr_t>(workspace)) {}

  template <typename T>
  T* take(size_t count) {
    T* const part = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 63) / 64 * 64 + 64;  // +64: not all on the same cache sets
    return part;
  }

  size_t bytes() const { return next_; }  // that were counted

 private:
  uintptr_t next_;
};

// What parts made by Part(Carver&, sizes...) take.
template <typename Part, typename... Sizes>
size_t bytes_of(const Sizes&... sizes) {
  Carver counting(nullptr);
  Part(counting, sizes...);
  return counting.bytes();
}

}  // namespace lookupffn
