// What torch sees of the loops for measuring (probe-inl.h): each checks its memory and runs on the calling thread.
#include <algorithm>
#include <atomic>

#include "bindings/torch_checks.h"
#include "kernels/isas.h"
#include "lab/probe.h"

namespace lookupffn {

namespace {

const ProbeKernels& kernels() { return probe_kernels(isa_index()); }

void check_memory(const Tensor& memory, int64_t least) {
  check(memory.is_cpu() && memory.dim() == 1 && memory.scalar_type() == ScalarType::Byte && memory.is_contiguous() &&
            memory.numel() >= least,
        "memory must be a contiguous vector of at least " + std::to_string(least) + " bytes on the CPU, not " +
            shape(memory));
}

const uint32_t* check_places(const Tensor& places, int64_t limit, const char* what) {
  check(places.is_cpu() && places.dim() == 1 && places.scalar_type() == ScalarType::Int && places.is_contiguous(),
        std::string(what) + " must be a contiguous vector of int32");
  const int32_t* p = static_cast<const int32_t*>(places.const_data_ptr());
  const int64_t count = places.numel();
  int32_t least = 0, most = 0;
  for (int64_t i = 0; i < count; i++) least = std::min(least, p[i]), most = std::max(most, p[i]);
  check(count == 0 || (least == 0 && most < limit), std::string("one of ") + what + " lies outside memory");
  return reinterpret_cast<const uint32_t*>(p);
}

const uint8_t* bytes_of(const Tensor& memory) { return static_cast<const uint8_t*>(memory.const_data_ptr()); }

// body(byte at which a part of memory begins) on as many threads as there are parts, each its own; the sum of what it
// returns.
template <typename Body>
int64_t on_parts(int64_t bytes, int64_t parts, const Body& body) {
  check(parts >= 1 && parts <= 4096, "parts must be 1 to 4096, not " + std::to_string(parts));
  std::atomic<int64_t> all{0};
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) all += body(i * (bytes / parts));
  };
  if (parts == 1)
    run(0, 1);
  else
    torch::stable::parallel_for(0, parts, 1, run);
  return all;
}

// Reads lines (int32) of 64 bytes, `rounds` times, in each of `parts` equal parts of `memory`, each on its own thread,
// and prefetches each `distance` lines before.
int64_t read_lines(const Tensor& memory, const Tensor& lines, int64_t rounds, int64_t parts, int64_t distance) {
  check_memory(memory, 0);
  const uint32_t* places = check_places(lines, memory.numel() / std::max<int64_t>(parts, 1) / 64, "lines");
  return on_parts(memory.numel(), parts, [&](int64_t part) {
    int64_t all = 0;
    for (int64_t i = 0; i < rounds; i++)
      all ^= kernels().read_lines(bytes_of(memory) + part, places, lines.numel(), distance);
    return all;
  });
}

// Reads all of `memory` as it lies, `rounds` times, as read_lines does.
int64_t read_stream(const Tensor& memory, int64_t rounds, int64_t parts) {
  check_memory(memory, 256 * parts);
  return on_parts(memory.numel(), parts, [&](int64_t part) {
    int64_t all = 0;
    const int64_t lines = memory.numel() / parts / 256 * 4;
    for (int64_t i = 0; i < rounds; i++) all ^= kernels().read_stream(bytes_of(memory) + part, lines);
    return all;
  });
}

// Follows `steps` links, each the byte at which the next stands (int32), from byte `start`, and returns where it ends:
// a load waits for the one before it. Memory has a power of two of bytes, so that a mask, which takes a cycle, keeps
// any link inside.
int64_t chase(const Tensor& memory, int64_t start, int64_t steps) {
  const uint64_t bytes = uint64_t(memory.numel());
  check_memory(memory, 4);
  check((bytes & (bytes - 1)) == 0, "memory must have a power of two of bytes, not " + std::to_string(bytes));
  const uint8_t* links = bytes_of(memory);
  const uint64_t mask = bytes - 4;
  uint64_t place = uint64_t(start) & mask;
  for (int64_t i = 0; i < steps; i++) {
    uint32_t next;
    __builtin_memcpy(&next, links + place, 4);
    place = next & mask;
  }
  return int64_t(place);
}

// Runs an instruction `rounds` times or so on each of `parts` threads, each with its part of `memory`: how many in all.
int64_t repeat(int64_t instruction, int64_t rounds, const Tensor& memory, int64_t parts) {
  check(instruction >= 0 && instruction < kInstructions,
        "no instruction has the number " + std::to_string(instruction));
  check_memory(memory, 4096 * parts);
  uint8_t* const bytes = static_cast<uint8_t*>(memory.mutable_data_ptr());
  return on_parts(memory.numel(), parts,
                  [&](int64_t part) { return kernels().repeat(Instruction(instruction), rounds, bytes + part); });
}

}  // namespace
}  // namespace lookupffn

STABLE_TORCH_LIBRARY_FRAGMENT(lookupffn_lab, m) {
  m.def("read_lines(Tensor memory, Tensor lines, int rounds, int parts=1, int distance=0) -> int");
  m.def("read_stream(Tensor memory, int rounds, int parts=1) -> int");
  m.def("chase(Tensor memory, int start, int steps) -> int");
  m.def("repeat(int instruction, int rounds, Tensor(a!) memory, int parts=1) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(lookupffn_lab, CPU, m) {
  m.impl("read_lines", TORCH_BOX(&lookupffn::read_lines));
  m.impl("read_stream", TORCH_BOX(&lookupffn::read_stream));
  m.impl("chase", TORCH_BOX(&lookupffn::chase));
  m.impl("repeat", TORCH_BOX(&lookupffn::repeat));
}
