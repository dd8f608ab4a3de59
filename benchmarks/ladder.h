// The ladder of strategies: every rung is a complete way to do the gather or the projection, one change from the rung
// that it names; the last ones call the shipped kernels. benchmarks/ladder.py builds, runs and explains the program.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/dispatch.h"

namespace lookupffn {

struct Shape {
  int64_t tokens;  // of a call
  int64_t inputs;  // tokens that are prepared, a multiple of `tokens`; calls take them in turn
  int width;       // outputs of the gather, inputs of the projection: a multiple of 16
  int tables, bits, reads;
  int threads;  // of the rungs that have threads
};

// A rung that is ready to run.
struct Work {
  std::function<void(int64_t first)> run;  // the inputs [first, first + tokens)
  std::function<std::string()> check;      // what is wrong with the result for the first inputs; empty if nothing
  double bytes_per_token;  // table rows, or weights, that it loads; weights are shared by a tile's tokens
};

struct NotRun : std::runtime_error {  // this processor cannot
  using std::runtime_error::runtime_error;
};

struct Rung {
  const char *stage, *name, *from, *change, *isa;  // from: the rung that it changes, "" for none
  int threads;
  std::function<Work()> prepare;  // allocates and fills what this rung alone needs; throws NotRun
};

// What a gather is given, and where the outputs go.
struct GatherWork {
  TableSlices tables;  // float32 rows that are not sliced are one slice
  int width;           // outputs
  const float* bias;
  int64_t tokens;
  const uint16_t* codes;      // [token][slots]
  const float* scores;        // [token][slots], for int8 rows times the table's scale
  const uint8_t* quantised;   // [token][slots], as the kernel quantise_scores leaves them, and
  const float* score_scales;  // [token]
  int32_t* sums;              // [token][slice], from one block of tables to the next
  float* y;                   // [token][width]

  int groups() const { return groups_of(tables.num_tables); }
  int slices() const { return (width + tables.slice - 1) / tables.slice; }
  Rows rows_of_y() const { return {y, width, false}; }

  // Tokens [begin, end), groups [first, last) of a slice, for the shipped kernel.
  GatherArgs args(int slice, int first, int last, int64_t begin, int64_t end, int64_t prefetch_tokens) const {
    return {.tables = tables,
            .slice = slice,
            .first = first,
            .last = last,
            .begin = begin,
            .end = end,
            .codes = codes,
            .scores = quantised,
            .score_scales = score_scales,
            .sums = sums + begin * tables.slice,
            .y = rows_of_y(),
            .y_token = 0,
            .out_features = width,
            .bias = bias,
            .prefetch_tokens = int(prefetch_tokens)};
  }
};

// The small kernels of the lower rungs, for one instruction set (ladder-inl.h).
struct LadderKernels {
  const char* name;
  void (*vectors)(const GatherWork&);
  void (*registers)(const GatherWork&);
  void (*slices)(const GatherWork&);
  void (*dot)(const GatherWork&, int slice, int first, int last, int64_t prefetch_tokens);
  void (*unfolded)(const Projection&, const float* x, float* z, const ProjectScratch&);  // one token
  void (*folded)(const Projection&, const float* x, float* z, const ProjectScratch&);
};

struct Kernels {  // of one instruction set
  const char* name;
  const InferenceKernels& shipped;
  const LadderKernels& own;
};

const LadderKernels* ladder_kernels(const std::string& name);  // null where the ladder has none

std::vector<Rung> gather_rungs(const Shape&, const Kernels&);
std::vector<Rung> projection_rungs(const Shape&, const Kernels&);

}  // namespace lookupffn
