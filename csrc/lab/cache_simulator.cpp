#include "lab/cache_simulator.h"

#include <cstring>

namespace lookupffn {
namespace {

// Whether the line was there; it is the set's first afterwards.
bool access(CacheLevel& level, int64_t line) {
  int64_t* const set = level.contents + line % level.sets * level.ways;
  if (set[0] == line) return true;
  int64_t way = 1;
  while (way < level.ways && set[way] != line) way++;
  const bool hit = way < level.ways;
  std::memmove(set + 1, set, sizeof(int64_t) * (hit ? way : level.ways - 1));
  set[0] = line;
  return hit;
}

}  // namespace

void simulate_caches(const int64_t* lines, int64_t count, CacheLevel* levels, int num_levels) {
  for (int64_t i = 0; i < count; i++)
    for (int level = 0; level < num_levels && !access(levels[level], lines[i]); level++) levels[level].misses++;
}

}  // namespace lookupffn
