// What the probe measures a core with, as one table an instruction set; built for the lab only (probe-inl.h).
#pragma once

#include "kernels/kernels.h"

namespace lookupffn {

// What a core repeats; each on sixteen lanes where it is a vector instruction.
enum class Instruction : int {
  kAdd,
  kMultiply,
  kFma,
  kDivide,
  kConvert,
  kVector,
  kDotInt8,
  kDotInt16,
  kRows,
  kTranspose,
  kExp,
  kLoad,
  kStore,
  kPrefetch,
  kWord,
  kScalar,
  kIssue,
  kCycle,
  kWideCycle,
};
constexpr int kInstructions = 19;

struct ProbeKernels {
  // The two readers return something that depends on every line of 64 bytes that they load: line lines[i] of `memory`
  // for every i < count, prefetched `distance` lines before; `lines` of them, a multiple of 4, as they lie.
  int32_t (*read_lines)(const uint8_t* memory, const uint32_t* lines, int64_t count, int64_t distance);
  int32_t (*read_stream)(const uint8_t* memory, int64_t lines);

  // Runs an instruction again and again, on 4 KiB of `memory` where it needs any; returns how many times.
  int64_t (*repeat)(Instruction instruction, int64_t rounds, uint8_t* memory);
};

// Of the instruction set at this place of isas().
const ProbeKernels& probe_kernels(int isa);

}  // namespace lookupffn
