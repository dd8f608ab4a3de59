// Hash and gather of a layer in training, and their backward passes: ops.py has the equations.
#pragma once

#include "kernels/kernels.h"
#include "ops/threads.h"

namespace lookupffn {

struct Tables {
  void* data;  // (T, K, E) without gaps, float32 or bfloat16
  int64_t tables, rows, width;
  bool bfloat16;
};

// Codes and scores are (B, T, N), codes in [0, K): see find_bad_code. y and grad are in the type of the tables.
struct Reads {
  const int32_t* codes;
  const float* scores;
  int64_t tokens;
  int reads;
};

// Index of the first code outside [0, rows), or -1.
int64_t find_bad_code(const int32_t* codes, int64_t count, int64_t rows);

// Shared out over the pool; `begin` and `end` of the arguments are set here.
void train_hash(const TrainingKernels&, HashRowsArgs, const ThreadPool&);
void train_hash_backward(const TrainingKernels&, HashRowsBackwardArgs, const ThreadPool&);

// y = reference.gather; the same bits for a token alone and in any batch, on any number of threads. `workspace` is as
// many bytes as are asked for here, from a cache line on.
size_t gather_workspace_bytes(const Tables&, const Reads&, int threads);
void train_gather(const TrainingKernels&, const Tables&, const Reads&, void* y, void* workspace, const ThreadPool&);

// Writes every element of grad_tables, in the type of the tables, and grad_scores; the same bits on any number of
// threads.
struct GatherGradients {
  void* tables;
  float* scores;
};
size_t gather_backward_workspace_bytes(const Tables&, const Reads&, int threads);
void train_gather_backward(const TrainingKernels&, const void* grad, const Tables&, const Reads&, GatherGradients,
                           void* workspace, const ThreadPool&);

}  // namespace lookupffn
