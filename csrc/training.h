// Hash and gather of an unprepared layer and their backward passes, for training: ops.py has the equations.
#pragma once

#include "engine.h"

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

void train_hash(const Kernels&, const float* z, int64_t rows, int bits, int reads, int32_t* codes, float* scores,
                const Threads&);
void train_hash_backward(const Kernels&, const float* grad, const float* z, const int32_t* codes, int64_t rows, int bits,
                         int reads, float* grad_z, const Threads&);

// y = reference.gather; the same bits for a token alone and in any batch, on any number of threads.
void train_gather(const Kernels&, const Tables&, const Reads&, void* y, const Threads&);

// Writes every element of grad_tables, in the type of the tables, and grad_scores; the same bits on any number of threads.
void train_gather_backward(const Kernels&, const void* grad, const Tables&, const Reads&, void* grad_tables,
                           float* grad_scores, const Threads&);

}  // namespace lookupffn
