// What the kernel tests stand on: expectations, random numbers, guarded memory, the floating-point state, threads.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels/dispatch.h"
#include "model/lookup.h"

namespace lookupffn {
namespace exported {
extern const InferenceKernels* const inference_emulated_tiles;  // emulated_tiles.cpp
extern const EncoderKernels* const encoder_emulated_tiles;
}  // namespace exported
}  // namespace lookupffn

using namespace lookupffn;

constexpr double kUlp = 0x1p-24;  // half a unit in the last place: what one float32 operation may be off, relatively
constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

inline char current_case[400] = "";  // named in every failure, and where the program crashes

__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  char buffer[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

inline void set_case(const std::string& name) { snprintf(current_case, sizeof current_case, "%s", name.c_str()); }

// expect(condition, format, ...): arguments are only looked at where the condition is false.
#define EXPECT(condition, ...)                                     \
  do {                                                             \
    if (!(condition)) throw std::runtime_error(text(__VA_ARGS__)); \
  } while (0)

inline struct sigaction previous_action[NSIG];

inline void on_crash(int signal) {
  const char* words[] = {"FAILED  crash in ", current_case, "\n"};
  for (const char* word : words)
    if (write(1, word, strlen(word)) < 0) break;
  sigaction(signal, &previous_action[signal], nullptr);  // then again, so that a sanitizer or a core tells where
}

struct Random {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int below(int n) { return int(next() % uint64_t(n)); }
  int between(int low, int high) { return low + below(high - low + 1); }
  bool one_in(int n) { return below(n) == 0; }
  float uniform() { return float(next() >> 40) * 0x1p-24f; }                                      // [0, 1)
  float normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0f) * 1.7320508f; }  // nearly
  template <typename T>
  T pick(std::initializer_list<T> list) {
    return list.begin()[below(int(list.size()))];
  }
};

// Deals every entry of a list once before any comes again, so that few cases meet all awkward sizes.
class Deck {
 public:
  Deck(std::initializer_list<int> list) : cards_(list) {}
  int deal(Random& random) {
    if (next_ == 0)
      for (size_t i = cards_.size() - 1; i > 0; i--) std::swap(cards_[i], cards_[random.below(int(i) + 1)]);
    const int card = cards_[next_];
    next_ = (next_ + 1) % cards_.size();
    return card;
  }

 private:
  std::vector<int> cards_;
  size_t next_ = 0;
};

// Memory whose last byte lies before a page that may not be touched.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + mapped_ - page, page, PROT_NONE)) throw std::bad_alloc();
    data_ = base_ + mapped_ - page - bytes;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }
  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_, mapped_;
  uint8_t *base_, *data_;
};

inline uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline bool same_bits(float a, float b) {
  return bits_of(a) == bits_of(b) || (a != a && b != b);
}  // any two NaN are the same
inline float from_bf16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
inline uint16_t to_bf16(float f) {  // to nearest, ties to even
  return f != f ? 0x7fc0 : uint16_t((bits_of(f) + 0x7fff + (bits_of(f) >> 16 & 1)) >> 16);
}

struct Approx {
  double value, error;  // float32 arithmetic, in any order and with or without fma, is about this far from it
};

// The thread's floating-point control and status registers.
#if defined(__SSE2__)
inline uint64_t float_state() { return _mm_getcsr(); }
inline void set_float_state(uint64_t state) { _mm_setcsr(unsigned(state)); }
constexpr uint64_t kFlushing = 0x9fc0, kOddState = 0x5f91;  // odd: rounds up, two flags are up
#elif defined(__aarch64__)
inline uint64_t float_state() {
  uint64_t control, status;
  __asm__ volatile("mrs %0, fpcr\n mrs %1, fpsr" : "=r"(control), "=r"(status));
  return control | status << 32;
}
inline void set_float_state(uint64_t state) {
  __asm__ volatile("msr fpcr, %0\n msr fpsr, %1" : : "r"(state & 0xffffffff), "r"(state >> 32));
}
constexpr uint64_t kFlushing = uint64_t(1) << 24, kOddState = uint64_t(1) << 22 | uint64_t(0x11) << 32;
#else
inline uint64_t float_state() { return 0; }
inline void set_float_state(uint64_t) {}
constexpr uint64_t kFlushing = 0, kOddState = 0;
#endif

class FloatMode {  // the engine's is kFlushing
 public:
  explicit FloatMode(uint64_t state) : before_(float_state()) { set_float_state(state); }
  ~FloatMode() { set_float_state(before_); }

 private:
  uint64_t before_;
};

// Threads of an odd state of their own, which the engine must leave as it was; chunks as unequal as torch's may be.
inline std::atomic<bool> state_changed{false};

// As many threads as there are tasks, with a floating-point state of their own.
inline void run_on_threads(void*, int tasks, void (*task)(void*, int), void* context) {
  std::vector<std::thread> threads;
  for (int i = 0; i < tasks; i++)
    threads.emplace_back([=] {
      set_float_state(kOddState);
      task(context, i);
      if (float_state() != kOddState) state_changed = true;
    });
  for (std::thread& thread : threads) thread.join();
}

inline ThreadPool threads_of(int count) { return {count, run_on_threads, nullptr}; }

struct Kernels : InferenceKernels {
  const char* name;
  const EncoderKernels* encoder;
};

inline std::vector<const Kernels*>
running_here() {  // scalar first, and last the loops of AMX on tiles that are emulated
  static const std::vector<Kernels> all = [] {
    int count;
    const Isa* isa = isas(&count);
    std::vector<Kernels> found;
    for (int i = count - 1; i >= 0; i--)
      if (isa[i].runs_here()) found.push_back({*implementation(i).inference, isa[i].name, implementation(i).encoder});
    found.push_back({*exported::inference_emulated_tiles, "emulated_tiles", exported::encoder_emulated_tiles});
    return found;
  }();
  std::vector<const Kernels*> pointers;
  for (const Kernels& k : all) pointers.push_back(&k);
  return pointers;
}
