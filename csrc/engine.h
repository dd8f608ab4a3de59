// The forward pass of a prepared layer: tiles of tokens through project and hash, then slices of the tables.
#pragma once

#include <functional>

#include "kernels.h"

namespace lookupffn {

// Runs body(begin, end) over [0, n), in parallel where it likes.
struct Threads {
  int count;
  std::function<void(int64_t n, const std::function<void(int64_t, int64_t)>& body)> run;
};

struct Tiling {
  int tile_tokens;        // tokens that are projected at once
  int groups_per_block;      // groups of 16 tables whose slice is to stay in L2
  int prefetch_distance;      // how many rows ahead of their use rows are asked for; 0 for not at all
  int serial_tokens;      // batches up to this size run on the calling thread alone
};

// Where the time of a call went, in seconds; filled on request, by calls on one thread.
struct StageSeconds {
  double project, hash, gather;
};

// y = LookupFFN(x) for `tokens` rows. The result does not depend on the tiling, the threads or the batch, bit for bit.
void forward(const Kernels&, const Layer&, Rows x, Rows y, int64_t tokens, const Tiling&, const Threads&,
             StageSeconds* stages = nullptr);

}  // namespace lookupffn
