// What torch sees of the models of hardware: checks arguments, allocates the result.
#include "lab/cache_simulator.h"
#include "bindings/torch_checks.h"

namespace lookupffn {
namespace {

const int64_t* numbers(const Tensor& t, const char* name) {
  check(t.is_cpu() && t.dim() == 1 && t.scalar_type() == ScalarType::Long && t.is_contiguous(),
        std::string(name) + " must be a contiguous vector of int64 on the CPU, not " + shape(t));
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// Misses of each level, L1 first (cache_simulator.h). `contents` is what lies in the caches, level by level, before and
// after: a long stream may come in parts.
Tensor cache_misses(const Tensor& lines, const Tensor& sets, const Tensor& ways, Tensor contents) {
  const int64_t *line = numbers(lines, "lines"), *set = numbers(sets, "sets"), *way = numbers(ways, "ways");
  numbers(contents, "contents");
  check(sets.numel() == ways.numel(),
        "sets and ways must be one number a level, not " + shape(sets) + " and " + shape(ways));
  std::vector<CacheLevel> levels;
  int64_t* free = static_cast<int64_t*>(contents.mutable_data_ptr());
  int64_t left = contents.numel();
  for (int64_t i = 0; i < sets.numel(); i++) {
    check(set[i] > 0 && way[i] > 0 && set[i] <= left / way[i], "contents must hold sets * ways lines of every level");
    levels.push_back({set[i], way[i], free, 0});
    free += set[i] * way[i];
    left -= set[i] * way[i];
  }
  check(left == 0, "contents must hold sets * ways lines of every level and no more");
  bool valid = true;
  for (int64_t i = 0; i < lines.numel(); i++) valid = valid && line[i] >= 0;
  check(valid, "a line is negative");
  simulate_caches(line, lines.numel(), levels.data(), int(levels.size()));
  Tensor misses = empty({int64_t(levels.size())}, ScalarType::Long);
  for (size_t i = 0; i < levels.size(); i++) static_cast<int64_t*>(misses.mutable_data_ptr())[i] = levels[i].misses;
  return misses;
}

}  // namespace
}  // namespace lookupffn

STABLE_TORCH_LIBRARY_FRAGMENT(lookupffn_lab, m) {
  m.def("simulate_caches(Tensor lines, Tensor sets, Tensor ways, Tensor(a!) contents) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lookupffn_lab, CPU, m) { m.impl("simulate_caches", TORCH_BOX(&lookupffn::cache_misses)); }
