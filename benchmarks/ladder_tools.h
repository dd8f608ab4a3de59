// Memory, threads and random numbers for the ladder.
#pragma once

#include <sys/mman.h>

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace lookupffn {

// Zeros, on a cache line of their own.
template <typename T>
class Array {
 public:
  explicit Array(size_t count) : size_(count), data_(static_cast<T*>(std::aligned_alloc(64, bytes()))) {
    if (!data_) throw std::bad_alloc();
    std::memset(data_.get(), 0, bytes());
  }
  T* get() const { return data_.get(); }
  T& operator[](size_t i) const { return data_.get()[i]; }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  size_t bytes() const { return (size_ * sizeof(T) + 127) / 64 * 64; }
  size_t size_;
  std::unique_ptr<T, Free> data_;
};

// Zeros that start on a huge page and lie on huge pages or on ordinary ones, as far as the system does as it is asked.
class Pages {
 public:
  Pages(size_t bytes, bool huge) : mapped_(bytes + kHuge) {
    memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(memory_, mapped_, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
  }
  Pages(const Pages&) = delete;
  ~Pages() { munmap(memory_, mapped_); }
  uint8_t* data() const { return static_cast<uint8_t*>(memory_) + -reinterpret_cast<uintptr_t>(memory_) % kHuge; }

 private:
  static constexpr size_t kHuge = 2 << 20;
  size_t mapped_;
  void* memory_;
};

// Threads that sleep between calls: a time has their waking in it.
class Workers {
 public:
  explicit Workers(int count) {
    for (int i = 1; i < count; i++) threads_.emplace_back([this, i] { serve(i); });
  }
  ~Workers() {
    call(nullptr);
    for (std::thread& thread : threads_) thread.join();
  }

  // body(i) for every i < count, the first on the calling thread.
  void run(const std::function<void(int)>& body) {
    call(&body);
    body(0);
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void call(const std::function<void(int)>* body) {
    const std::lock_guard<std::mutex> lock(mutex_);
    body_ = body, busy_ = int(threads_.size()), calls_++;
    changed_.notify_all();
  }

  void serve(int i) {
    for (int64_t served = 0;; served++) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return calls_ > served; });
      const std::function<void(int)>* const body = body_;
      if (!body) return;
      lock.unlock();
      (*body)(i);
      lock.lock();
      if (--busy_ == 0) changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void(int)>* body_ = nullptr;
  int busy_ = 0;
  int64_t calls_ = 0;
  std::vector<std::thread> threads_;
};

// Random numbers by their place, so that what one rung prepares does not depend on the others.
inline uint64_t random_bits(uint64_t stream, uint64_t i) {  // splitmix64
  uint64_t z = (stream << 48) + (i + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}
inline float random_uniform(uint64_t stream, uint64_t i) {  // [-1, 1)
  return float(int64_t(random_bits(stream, i)) >> 40) * 0x1p-23f;
}
inline float random_normal(uint64_t stream, uint64_t i) {  // nearly
  return random_uniform(stream, 3 * i) + random_uniform(stream, 3 * i + 1) + random_uniform(stream, 3 * i + 2);
}

// About 100 of the tokens, with the first and the last.
inline std::vector<int64_t> sampled(int64_t tokens) {
  std::vector<int64_t> some;
  for (int64_t token = 0; token + 1 < tokens; token += 1 + tokens / 100) some.push_back(token);
  some.push_back(tokens - 1);
  return some;
}

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace lookupffn
