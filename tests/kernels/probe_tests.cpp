// Tests of what the probe reads with, for every implementation that runs here. Exit code 1 and a line FAILED where it
// is wrong.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "kernels/isas.h"
#include "lab/probe.h"

using namespace lookupffn;

int main() {
  constexpr int kLines = 50;
  alignas(64) uint8_t memory[64 * kLines];
  uint32_t state = 1, lines[40];
  const auto random = [&state] { return state = state * 1664525u + 1013904223u, state >> 8; };
  for (uint8_t& byte : memory) byte = uint8_t(random());
  for (uint32_t& line : lines) line = random() % kLines;
  int count, failed = 0;
  const Isa* all = isas(&count);
  for (int i = 0; i < count; i++) {
    if (!all[i].runs_here()) continue;
    const ProbeKernels& k = probe_kernels(i);
    for (int n : {0, 2, 40}) {
      int32_t read[16] = {}, streamed[16] = {}, part[16];
      for (int j = 0; j < n; j++) {
        memcpy(part, memory + 64 * lines[j], 64);
        for (int lane = 0; lane < 16; lane++) read[lane] ^= part[lane];
        memcpy(part, memory + 64 * j, 64);
        for (int lane = 0; lane < 16; lane++) streamed[lane] ^= n % 4 ? 0 : part[lane];
      }
      bool right = k.read_stream(memory, n) == *std::max_element(streamed, streamed + 16);
      for (int64_t distance : {0, 1, 3, 100})
        right = right && k.read_lines(memory, lines, n, distance) == *std::max_element(read, read + 16);
      if (!right) failed = printf("FAILED  %s reads other lines\n", all[i].name);
    }
    for (int instruction = 0; instruction < kInstructions; instruction++)
      if (k.repeat(Instruction(instruction), 3, memory) < 3)
        failed = printf("FAILED  %s does not repeat instruction %d\n", all[i].name, instruction);
  }
  if (!failed) printf("ok      probe\n");
  return failed != 0;
}
