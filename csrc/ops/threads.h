// The host's threads, handed in: nothing here starts one.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lookupffn {

// run(host, ...) calls task(context, i) for every i < tasks, in any order, on as many threads as it likes.
struct ThreadPool {
  int threads;
  void (*run)(void* host, int tasks, void (*task)(void* context, int index), void* context);
  void* host;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(i) for every i < tasks, on the pool; a single task on the calling thread.
template <typename Body>
void run_tasks(const ThreadPool& pool, int tasks, const Body& body) {
  if (tasks == 1) return body(0);
  const auto task = [](void* context, int i) { (*static_cast<const Body*>(context))(i); };
  pool.run(pool.host, tasks, task, const_cast<Body*>(&body));
}

// body(i, begin, end) for parts of [0, units), the i-th of which is thread i's; at most `threads` of them.
template <typename Body>
void share_out(const ThreadPool& pool, int threads, int64_t units, const Body& body) {
  if (units == 0) return;
  const int64_t share = ceil_div(units, threads);
  run_tasks(pool, int(ceil_div(units, share)), [&](int i) { body(i, i * share, std::min(units, (i + 1) * share)); });
}

}  // namespace lookupffn
