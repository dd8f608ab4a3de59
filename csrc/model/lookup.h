// The forward pass of a packed lookup layer: tiles of tokens through project and hash, then slices of the tables
// through the gather.
#pragma once

#include "model/layer.h"
#include "ops/threads.h"

namespace lookupffn {

// Loop sizes, a choice of speed alone.
struct Tiling {
  int tile_tokens;        // tokens that are projected at once
  int groups_per_block;   // groups of 16 tables whose slice is to stay in L2
  int prefetch_distance;  // how many rows ahead of their use rows are prefetched in the gather; 0 for not at all
  int serial_tokens;      // batches up to this size run on the calling thread alone
};

// By the caches, as runtime/tuning.py has it.
Tiling default_tiling(const Layer&);

// The policy of prefetching rows, all of it.
struct Prefetch {
  // Slices of a row that are prefetched as soon as its code is known, after each repeat of the projection while the
  // next is computed, and so many slices ahead in the gather; 0 for none. For few tokens, whose rows lie far away.
  int early_slices;
  // In the gather, the rows of the token so many later; 0 for none.
  int tokens_ahead;
};

// What a call does, from sizes, tiling and threads.
struct Plan {
  int64_t tokens;
  int64_t chunk;         // tokens whose codes and scores wait in memory at once
  int threads;           // that take part, 1 for the calling one alone
  int tile;              // tokens that are projected at once
  int groups_per_block;  // groups that are gathered at once
  int token_parts;       // of a chunk in the gather, where slices do not come out even on the threads
  Prefetch prefetch;
  size_t shared_bytes, thread_bytes;  // of the workspace

  size_t workspace_bytes() const { return shared_bytes + threads * thread_bytes; }
};

Plan make_plan(const Layer&, int64_t tokens, const Tiling&, int threads);

// y = LookupFFN(x) for plan.tokens rows. The result does not depend on the plan or the batch, bit for bit. `workspace`
// is plan.workspace_bytes() bytes from a cache line on, whose content is of no matter.
void run(const InferenceKernels&, const Layer&, const Plan&, Rows x, Rows y, void* workspace, const ThreadPool&);

// The same on one thread (plan.threads), and where its time went.
struct StageSeconds { double project, hash, gather; };
StageSeconds run_timed(const InferenceKernels&, const Layer&, const Plan&, Rows x, Rows y, void* workspace);

}  // namespace lookupffn
