// Counts the misses of a stream of memory accesses in a hierarchy of set-associative caches.
#pragma once

#include <cstdint>

namespace lookupffn {

struct CacheLevel {
  int64_t sets, ways;  // line n lies in set n % sets, whether or not `sets` is a power of two
  int64_t* contents;   // [sets][ways] line numbers, the latest used first; -1 where nothing lies
  int64_t misses;      // counted up
};

// Accesses lines[0] to lines[count - 1], none negative, in this order; `levels` from L1 outwards. As in cachegrind
// every level replaces its least recently used line, a miss at one level is an access of the next, a hit ends the walk,
// and what a line replaces in one level stays where it is in the others.
void simulate_caches(const int64_t* lines, int64_t count, CacheLevel* levels, int num_levels);

}  // namespace lookupffn
