// count_training TABLES CODE_BITS READS WIDTH TOKENS
//
// Runs hash and gather of an unprepared layer and their backward passes, on one thread, and prints what the kernels
// executed: operations of the vector shim by stage and kind (simd_counting.h). tests/test_hardware_work.py compares them
// with the formulas of lookupffn/hardware/training_work.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "training.h"

namespace lookupffn { namespace counting {
#include "simd_counting.h"
#include "kernels-inl.h"
#include "probe-inl.h"
#define LOOKUPFFN_NAME "counting"
#include "training-inl.h"
#undef __builtin_memcpy
} }

using namespace lookupffn;
using namespace lookupffn::counting;

namespace {

constexpr const char* kKindNames[] = {"load",    "store", "add",  "multiply", "fma",       "divide", "convert", "vector",
                                      "shuffle", "rows",  "dot_int8", "dot_int16", "exp", "prefetch", "set1"};

// Runs `stage` with what it does counted, and prints it. A set1 of a float is a load, of a score or of its gradient, but for
// those of constants.
template <typename Stage>
void print(const char* name, int64_t constants, bool last, const Stage& stage) {
  int64_t of_stage[kKinds] = {};
  counting::counts = of_stage;
  stage();
  counting::counts = no_counts;
  of_stage[kLoad] += of_stage[kSet1] - constants;
  printf("\"%s\": {", name);
  for (int kind = 0; kind < kSet1; kind++)
    printf("%s\"%s\": %lld", kind ? ", " : "", kKindNames[kind], (long long)of_stage[kind]);
  printf("}%s", last ? "}\n" : ", ");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 6) return fprintf(stderr, "usage: count_training TABLES CODE_BITS READS WIDTH TOKENS\n"), 1;
  const int64_t tables = atoll(arguments[1]), rows = int64_t(1) << atoi(arguments[2]), width = atoll(arguments[4]);
  const int64_t tokens = atoll(arguments[5]);
  const int bits = atoi(arguments[2]), reads = atoi(arguments[3]);
  uint32_t state = 1;
  const auto numbers = [&](int64_t size) {
    std::vector<float> made(size);
    for (float& value : made) state = state * 1664525u + 1013904223u, value = float(state >> 8) * 0x1p-23f - 1.0f;
    return made;
  };
  std::vector<float> z = numbers(tokens * tables * bits), weights = numbers(tables * rows * width), grad = numbers(tokens * width);
  std::vector<float> scores(tokens * tables * reads), grad_scores(scores.size()), grad_z(z.size()), y(grad.size());
  std::vector<float> grad_tables(weights.size());
  std::vector<int32_t> codes(scores.size());
  const Threads one = {1, {}};
  const Kernels& k = kKernels;
  const Tables of = {weights.data(), tables, rows, width, false};
  const Reads read = {codes.data(), scores.data(), tokens, reads};

  const auto forward = [&] { train_hash(k, z.data(), tokens * tables, bits, reads, codes.data(), scores.data(), one); };
  int64_t constants[kKinds] = {};  // of the hashes, whose set1 are all constants
  counting::counts = constants;
  forward();
  counting::counts = no_counts;
  printf("{");
  print("hash", constants[kSet1], false, forward);
  print("gather", 0, false, [&] { train_gather(k, of, read, y.data(), one); });
  print("gather backward", 0, false, [&] {
    train_gather_backward(k, grad.data(), of, read, grad_tables.data(), grad_scores.data(), one);
  });
  const auto backward = [&] {
    train_hash_backward(k, grad_scores.data(), z.data(), codes.data(), tokens * tables, bits, reads, grad_z.data(), one);
  };
  for (int64_t& kind : constants) kind = 0;
  counting::counts = constants;
  backward();
  counting::counts = no_counts;
  print("hash backward", constants[kSet1], true, backward);
  for (const auto* made : {&y, &grad_z, &grad_tables})
    for (float value : *made)
      if (!std::isfinite(value)) return fprintf(stderr, "a result is not finite\n"), 1;
}
