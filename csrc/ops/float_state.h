// The processor's rounding and denormals while kernels run.
#pragma once

#include <cstdint>

#include "ops/threads.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lookupffn {

// Round to nearest and flush denormals inside; the caller's control and status flags are put back as they were found.
class FloatState {
 public:
#if defined(__SSE2__)
  FloatState() : saved_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }
  ~FloatState() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FloatState() {
    __asm__ volatile("mrs %0, fpcr\n mrs %1, fpsr" : "=r"(control_), "=r"(status_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t(1) << 24));
  }
  ~FloatState() { __asm__ volatile("msr fpcr, %0\n msr fpsr, %1" : : "r"(control_), "r"(status_)); }

 private:
  uint64_t control_, status_;
#endif
};

// share_out, with FloatState in every thread that takes part.
template <typename Body>
void share_out_flushing(const ThreadPool& pool, int threads, int64_t units, const Body& body) {
  share_out(pool, threads, units, [&body](int thread, int64_t first, int64_t last) {
    FloatState state;
    body(thread, first, last);
  });
}

}  // namespace lookupffn
