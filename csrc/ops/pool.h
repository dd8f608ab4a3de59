// Threads of our own, for hosts that lend none: they sleep between calls, and look out for the next part of a call for
// kSpins steps before, since waking a thread takes as long as a part of a short one.
#pragma once

#include <atomic>
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace lookupffn {

class WorkerPool {
 public:
  explicit WorkerPool(int threads) : process_(process()) {
    try {
      for (int i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
    } catch (...) {  // the system has no more threads: those that there are must not outlive what they wait for
      end();
      throw;
    }
  }

  ~WorkerPool() {
    if (process() != process_) {  // the child of a fork has none of the threads, and cannot join them
      for (std::thread& worker : workers_) worker.detach();
      return;
    }
    end();
  }

  // As ThreadPool::run. Where the threads are busy with another call, or are those of a parent process, on this one.
  void run(int tasks, void (*task)(void*, int), void* context) {
    if (process() != process_ || !busy_.try_lock()) {
      for (int i = 0; i < tasks; i++) task(context, i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task, context_ = context, tasks_ = tasks;
      next_ = 0, left_ = tasks;
      call_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_part();
    spin([this] { return left_.load(std::memory_order_acquire) == 0; });
    while (left_.load(std::memory_order_acquire) > 0) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [this] { return left_.load(std::memory_order_acquire) == 0; });
    }
    busy_.unlock();
  }

 private:
  void end() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  static constexpr int kSpins = 2000;  // some 30 microseconds

  template <typename Done>
  static void spin(const Done& done) {
    for (int i = 0; i < kSpins && !done(); i++) {
#if defined(__SSE2__)
      _mm_pause();
#elif defined(__aarch64__)
      __asm__ volatile("yield");
#endif
    }
  }

  static long process() {
#if defined(__unix__) || defined(__APPLE__)
    return long(getpid());
#else
    return 0;
#endif
  }

  void take_part() {
    for (;;) {
      void (*task)(void*, int);
      void* context;
      int index;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (next_ >= tasks_) return;
        index = next_++, task = task_, context = context_;
      }
      task(context, index);
      if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_all();
      }
    }
  }

  void work() {
    long seen = 0;
    for (;;) {
      if (seen) spin([&] { return call_.load(std::memory_order_acquire) != seen; });
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return ended_ || call_.load(std::memory_order_relaxed) != seen; });
        if (ended_) return;
        seen = call_.load(std::memory_order_relaxed);
      }
      take_part();
    }
  }

  const long process_;
  std::vector<std::thread> workers_;
  std::mutex busy_;   // held during a call
  std::mutex mutex_;  // of all below
  std::condition_variable wake_, done_;
  void (*task_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int tasks_ = 0, next_ = 0;
  std::atomic<int> left_{0};
  std::atomic<long> call_{0};
  bool ended_ = false;
};

}  // namespace lookupffn
