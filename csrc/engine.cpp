#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lookupffn {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

constexpr int64_t kChunk = 2048;         // tokens whose codes and scores wait in memory at once
constexpr size_t kEarlyBytes = 1 << 19;  // of several tokens' rows, up to which they are asked for outside of the gather
constexpr size_t kAskedBytes = 1 << 16;  // of rows that are asked for at once: more came later than in turns

// Round to nearest and flush denormals inside; the caller's control and status flags are put back as they were found.
class FloatState {
 public:
#if defined(__SSE2__)
  FloatState() : saved_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }
  ~FloatState() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FloatState() {
    __asm__ volatile("mrs %0, fpcr\n mrs %1, fpsr" : "=r"(control_), "=r"(status_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t(1) << 24));
  }
  ~FloatState() { __asm__ volatile("msr fpcr, %0\n msr fpsr, %1" : : "r"(control_), "r"(status_)); }

 private:
  uint64_t control_, status_;
#endif
};

// Memory of one thread that grows to what its largest call needs and serves the next calls: a call must not fault pages.
class Arena {
 public:
  ~Arena() { std::free(memory_); }

  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(memory_);
    size_ = 0;
    memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!memory_) throw std::bad_alloc();
    std::memset(memory_, 0, bytes);
    size_ = bytes;
  }

  template <typename T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(memory_ + used_);
    used_ += padded(count * sizeof(T));
    return p;
  }

  static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64 + 64; }  // +64: not all on the same cache sets

 private:
  uint8_t* memory_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

thread_local Arena shared_arena, tile_arena, sums_arena;

struct TileScratch : ProjectScratch {
  float *z, *scores;

  TileScratch(Arena& arena, const Layer& l, int tile) {
    const size_t t = tile;
    const size_t widths = t * (l.width_in * (sizeof(float) + 4) + 2 * l.width_out * sizeof(float) + 8);
    arena.reserve(widths + t * (l.z_stride + l.slots) * sizeof(float) + 16 * 128);
    rows = arena.take<float>(t * l.width_in);
    sums[0] = arena.take<float>(t * l.width_out);
    sums[1] = arena.take<float>(t * l.width_out);
    first = arena.take<uint8_t>(t * l.width_in * 2);
    activations = arena.take<uint8_t>(t * l.width_in * 2);
    unit[0] = arena.take<float>(t);
    unit[1] = arena.take<float>(t);
    z = arena.take<float>(t * l.z_stride);
    scores = arena.take<float>(t * l.slots);
  }
};

// What waits between the two phases of a chunk.
struct Reads {
  uint16_t* codes;  // [chunk][slots]
  void* scores;     // [chunk][slots] uint8 for int8 tables, else float
  float* steps;     // [chunk], int8 only
};

// Groups [first, last) of a tile's tokens, the first of which is `token` of its chunk: codes and scores from z, and with
// the last group all scores quantised. Of their rows, `early` slices are asked for at once.
void hash_tile(const Kernels& k, const Layer& l, int first, int last, const float* z, int64_t token, int tokens,
               int early, float* scratch, const Reads& reads) {
  const bool quantised = l.h.table_type == TableType::kInt8;
  for (int t = 0; t < tokens; t++) {
    const size_t slot = size_t(token + t) * l.slots;
    uint16_t* const codes = reads.codes + slot;
    float* const scores = quantised ? scratch + size_t(t) * l.slots : static_cast<float*>(reads.scores) + slot;
    k.hash(l, first, last, z + size_t(t) * l.z_stride, codes, scores);
    if (early) k.prefetch_rows(l, 0, early, first, last, codes);
    if (quantised && last == l.groups)
      reads.steps[token + t] = k.quantise_scores(l, scores, codes, static_cast<uint8_t*>(reads.scores) + slot);
  }
}

}  // namespace

void forward(const Kernels& k, const Layer& l, Rows x, Rows y, int64_t tokens, const Tiling& tiling, const Threads& threads,
             StageSeconds* stages) {
  if (stages) *stages = {0, 0, 0};
  if (tokens == 0) return;
  const int tile = std::max(1, std::min({tiling.tile_tokens, kMaxTile, int(std::min<int64_t>(tokens, kMaxTile))}));
  const int pass = std::max(1, std::min(tiling.groups_per_block, l.groups));
  const int rows_a_pass = pass * l.h.reads * kLanes;
  const bool serial = stages || threads.count <= 1 || tokens <= tiling.serial_tokens;
  // Few tokens read rows that lie in memory. So many slices of a row are asked for as soon as its code is known, after one
  // repeat of the projection while the next is computed; the others so many slices before they are read.
  const size_t slice_rows = size_t(tokens) * l.slots * l.slice_bytes;
  const bool few = serial && (tokens == 1 || slice_rows * l.slices <= kEarlyBytes);
  const int early = few ? int(std::min<size_t>(l.slices, std::max<size_t>(1, kAskedBytes / slice_rows))) : 0;
  const int64_t wanted = (std::max(tiling.prefetch_distance, 0) + rows_a_pass - 1) / rows_a_pass;  // tokens
  const int ahead = int(std::min(wanted, tokens - 1));
  const auto run = [&](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
    const auto guarded = [&](int64_t begin, int64_t end) {
      FloatState state;
      body(begin, end);
    };
    if (serial || n == 1)
      guarded(0, n);
    else
      threads.run(n, guarded);
  };

  const int64_t chunk = std::min(tokens, kChunk);
  const size_t slots = size_t(chunk) * l.slots;
  const size_t score_bytes = l.h.table_type == TableType::kInt8 ? 1 : 4;
  shared_arena.reserve(slots * (2 + score_bytes) + chunk * 4 + size_t(tile) * l.z_stride * 4 + 8 * 128);
  const Reads reads = {shared_arena.take<uint16_t>(slots), shared_arena.take<uint8_t>(slots * score_bytes),
                       shared_arena.take<float>(chunk)};
  float* const shared_z = shared_arena.take<float>(size_t(tile) * l.z_stride);

  const int parts = early ? l.h.repeats : 1;
  const auto groups_of = [&l](int repeats) {
    return int(std::min<int64_t>(int64_t(repeats) * l.width_out / (kLanes * l.h.code_bits), l.groups));
  };

  for (int64_t start = 0; start < tokens; start += chunk) {
    const int64_t count = std::min(chunk, tokens - start);

    // Phase 1: codes and scores. Threads share tokens, or of one tile alone its repeats, whose z is then hashed here.
    if (!serial && count <= tile && l.h.repeats > 1) {
      run(l.h.repeats, [&](int64_t first, int64_t last) {
        TileScratch s(tile_arena, l, tile);
        k.project(l, x, start, int(count), int(first), int(last), shared_z, s);
      });
      run(1, [&](int64_t, int64_t) {
        TileScratch s(tile_arena, l, tile);
        hash_tile(k, l, 0, l.groups, shared_z, 0, int(count), 0, s.scores, reads);
      });
    } else {
      run(count, [&](int64_t first, int64_t last) {
        TileScratch s(tile_arena, l, tile);
        for (int64_t token = first; token < last; token += tile) {
          const int in_tile = int(std::min<int64_t>(tile, last - token));
          for (int part = 0, hashed = 0; part < parts; part++) {
            const int repeats = l.h.repeats / parts, ready = part + 1 == parts ? l.groups : groups_of(part + 1);
            const double before = stages ? now() : 0;
            k.project(l, x, start + token, in_tile, part * repeats, (part + 1) * repeats, s.z, s);
            const double between = stages ? now() : 0;
            if (ready > hashed) hash_tile(k, l, hashed, ready, s.z, token, in_tile, early, s.scores, reads);
            hashed = ready;
            if (stages) {
              stages->project += between - before;
              stages->hash += now() - between;
            }
          }
        }
      });
    }

    // Phase 2: the gather. A thread keeps to few slices, so that their rows are fetched into one L2 only; where slices
    // do not come out even, tokens are split too, into as few parts as give every thread as much.
    const int64_t parts = serial ? 1 : std::min<int64_t>(count, threads.count / std::gcd(threads.count, l.slices));
    const int64_t part = (count + parts - 1) / parts;
    const double before = stages ? now() : 0;
    run(l.slices * parts, [&](int64_t first, int64_t last) {
      const bool one_pass = pass >= l.groups;
      if (!one_pass) sums_arena.reserve(size_t(part) * l.h.slice * 4 + 128);
      float* const sums = one_pass ? nullptr : sums_arena.take<float>(part * l.h.slice);
      for (int64_t unit = first; unit < last; unit++) {
        const int64_t begin = unit % parts * part, end = std::min(count, begin + part);
        if (const int next = int(unit) + early; early && next < l.slices)  // few tokens are one part
          for (int64_t token = begin; token < end; token++)
            k.prefetch_rows(l, next, next + 1, 0, l.groups, reads.codes + token * l.slots);
        for (int g = 0; g < l.groups && begin < end; g += pass)
          k.gather(l, int(unit / parts), g, std::min(g + pass, l.groups), begin, end, reads.codes, reads.scores,
                   reads.steps, sums, y, start, ahead);
      }
    });
    if (stages) stages->gather += now() - before;
  }
}

}  // namespace lookupffn
