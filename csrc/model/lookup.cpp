#include "model/lookup.h"

#include <algorithm>
#include <chrono>
#include <numeric>

#include "ops/float_state.h"
#include "ops/workspace.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace lookupffn {
namespace {

constexpr int64_t kChunk = 2048;  // tokens
// Of several tokens' rows, up to which they are prefetched outside of the gather.
constexpr size_t kEarlyBytes = 1 << 19;
// Of rows that are prefetched at once: more came later than in turns.
constexpr size_t kInFlightBytes = 1 << 16;

// ---- Workspace ------------------------------------------------------------------------------------------------------

// What waits between the two phases of a chunk, and the z of a tile whose repeats are shared out.
struct Shared {
  uint16_t* codes;      // [chunk][slots]
  void* scores;         // [chunk][slots] uint8 for integer tables, else float
  float* score_scales;  // [chunk], integer tables only
  float* z;             // [tile][z_stride]

  Shared(Carver& memory, const Layer& l, const Plan& p)
      : codes(memory.take<uint16_t>(p.chunk * l.slots())),
        scores(memory.take<uint8_t>(p.chunk * l.slots() * (is_integer(l.h.table_type) ? 1 : 4))),
        score_scales(memory.take<float>(p.chunk)),
        z(p.threads > 1 ? memory.take<float>(size_t(p.tile) * l.z_stride) : nullptr) {}
};

// Of one thread, in the first phase.
struct Tile {
  ProjectScratch project;
  float *z, *scores;

  Tile(Carver& memory, const Layer& l, const Plan& p) {
    const size_t tile = p.tile, in = l.projection.width_in(), out = l.projection.width_out();
    project.rows = memory.take<float>(tile * in);
    for (float*& sums : project.sums) sums = memory.take<float>(tile * out);
    project.first = memory.take<uint8_t>(tile * in * 2);
    project.activations = memory.take<uint8_t>(tile * in * 2);
    for (float*& scale : project.scale) scale = memory.take<float>(tile);
    z = memory.take<float>(tile * l.z_stride);
    scores = memory.take<float>(tile * l.slots());
  }
};

// Of one thread, in the second: where a slice is not summed in one go.
struct Sums {
  float* sums;
  Sums(Carver& memory, const Layer& l, const Plan& p)
      : sums(p.groups_per_block < l.groups ? memory.take<float>(ceil_div(p.chunk, p.token_parts) * l.h.slice)
                                           : nullptr) {}
};

// ---- Measuring ------------------------------------------------------------------------------------------------------

enum Stage { kProject, kHash, kGather, kStages };

struct NoClock {
  void enter(Stage) {}
};

// Seconds from one enter() to the next belong to the stage entered.
class StageClock {
 public:
  void enter(Stage next) {
    const double time = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    seconds[stage_] += time - since_;
    since_ = time;
    stage_ = next;
  }
  double seconds[kStages + 1] = {};

 private:
  Stage stage_ = kStages;  // of nothing yet
  double since_ = 0;
};

// ---- The two phases -------------------------------------------------------------------------------------------------

template <typename Clock>
struct Call {
  const InferenceKernels& k;
  const Layer& l;
  const Plan& p;
  Rows x, y;
  const ThreadPool& pool;
  Clock& clock;
  Shared shared;
  uint8_t* thread_memory;

  Carver memory_of(int thread) const { return Carver(thread_memory + thread * p.thread_bytes); }
  uint16_t* codes_of(int64_t token) const { return shared.codes + token * l.slots(); }

  // Repeats [first, last) of the projection of `tokens` tokens, from row `token` of x on.
  void project(int64_t token, int tokens, int first, int last, float* z, const ProjectScratch& scratch) const {
    k.project(l.projection, {.x = x,
                             .token = token,
                             .tokens = tokens,
                             .first = first,
                             .last = last,
                             .z = z,
                             .z_stride = size_t(l.z_stride),
                             .scratch = scratch});
  }

  // Codes and scores of groups [first, last) of `tokens` tokens, the first of which is `token` of its chunk; with the
  // last group all scores quantised.
  void hash(int first, int last, const float* z, int64_t token, int tokens, float* float_scores) const {
    const bool quantised = is_integer(l.h.table_type);
    for (int t = 0; t < tokens; t++) {
      const size_t slot = size_t(token + t) * l.slots();
      uint16_t* const codes = codes_of(token + t);
      float* const scores =
          quantised ? float_scores + size_t(t) * l.slots() : static_cast<float*>(shared.scores) + slot;
      k.hash({.num_tables = l.h.num_tables,
              .code_bits = l.h.code_bits,
              .reads = l.h.reads,
              .first = first,
              .last = last,
              .z = z + size_t(t) * l.z_stride,
              .codes = codes,
              .scores = scores});
      if (p.prefetch.early_slices) prefetch(0, p.prefetch.early_slices, first, last, codes);
      if (quantised && last == l.groups)
        shared.score_scales[token + t] = k.quantise_scores({.num_tables = l.h.num_tables,
                                                            .code_bits = l.h.code_bits,
                                                            .reads = l.h.reads,
                                                            .negated_rows = l.negated_rows(),
                                                            .table_scales = l.table_scales,
                                                            .scores = scores,
                                                            .codes = codes,
                                                            .quantised = static_cast<uint8_t*>(shared.scores) + slot});
    }
  }

  void prefetch(int first_slice, int last_slice, int first, int last, const uint16_t* codes) const {
    k.prefetch_rows({.tables = l.tables,
                     .first_slice = first_slice,
                     .last_slice = last_slice,
                     .first = first,
                     .last = last,
                     .codes = codes});
  }
};

// z, codes and scores of the chunk's tokens [0, count), which are rows from `start` on of x. Threads share tokens, or
// where these are one tile the repeats of its projection, whose z is then hashed by the calling thread.
template <typename Clock>
void project_and_hash(const Call<Clock>& c, int64_t start, int64_t count) {
  const Plan& p = c.p;
  const int repeats = c.l.h.repeats, groups = c.l.groups;
  if (p.threads > 1 && count <= p.tile && repeats > 1) {
    share_out_flushing(c.pool, p.threads, repeats, [&](int thread, int64_t first, int64_t last) {
      Carver memory = c.memory_of(thread);
      c.project(start, int(count), int(first), int(last), c.shared.z, Tile(memory, c.l, p).project);
    });
    return share_out_flushing(c.pool, 1, 1, [&](int thread, int64_t, int64_t) {
      Carver memory = c.memory_of(thread);
      c.hash(0, groups, c.shared.z, 0, int(count), Tile(memory, c.l, p).scores);
    });
  }
  // With early prefetches each repeat's codes are made as soon as its z is there.
  const int parts = p.prefetch.early_slices ? repeats : 1;
  const int64_t z_of_part = int64_t(repeats / parts) * c.l.projection.width_out(),
                z_of_group = kLanes * c.l.h.code_bits;
  share_out_flushing(c.pool, p.threads, count, [&](int thread, int64_t begin, int64_t end) {
    Carver memory = c.memory_of(thread);
    const Tile tile(memory, c.l, p);
    for (int64_t token = begin; token < end; token += p.tile) {
      const int tokens = int(std::min<int64_t>(p.tile, end - token));
      for (int part = 0, hashed = 0; part < parts; part++) {
        const int ready =
            part + 1 == parts ? groups : int(std::min<int64_t>((part + 1) * z_of_part / z_of_group, groups));
        c.clock.enter(kProject);
        c.project(start + token, tokens, part * repeats / parts, (part + 1) * repeats / parts, tile.z, tile.project);
        c.clock.enter(kHash);
        if (ready > hashed) c.hash(hashed, ready, tile.z, token, tokens, tile.scores);
        hashed = ready;
      }
    }
  });
}

// y of the same tokens. A thread keeps to few slices, so that their rows are fetched into one L2 only; where slices do
// not come out even, tokens are split too.
template <typename Clock>
void gather(const Call<Clock>& c, int64_t start, int64_t count) {
  const Plan& p = c.p;
  const int64_t parts = std::min<int64_t>(count, p.token_parts), part = ceil_div(count, parts);
  c.clock.enter(kGather);
  share_out_flushing(c.pool, p.threads, c.l.slices * parts, [&](int thread, int64_t first, int64_t last) {
    Carver memory = c.memory_of(thread);
    GatherArgs args = {
        .tables = c.l.tables,
        .slice = 0,
        .first = 0,
        .last = 0,
        .begin = 0,
        .end = 0,
        .codes = c.shared.codes,
        .scores = c.shared.scores,
        .score_scales = c.shared.score_scales,
        .sums = Sums(memory, c.l, p).sums,
        .y = c.y,
        .y_token = start,
        .out_features = c.l.h.out_features,
        .bias = c.l.bias,
        .prefetch_tokens = p.prefetch.tokens_ahead,
    };
    for (int64_t unit = first; unit < last; unit++) {
      args.slice = int(unit / parts);
      args.begin = unit % parts * part;
      args.end = std::min(count, args.begin + part);
      if (const int next = args.slice + p.prefetch.early_slices; next > args.slice && next < c.l.slices)
        for (int64_t token = args.begin; token < args.end; token++)
          c.prefetch(next, next + 1, 0, c.l.groups, c.codes_of(token));
      for (args.first = 0; args.first < c.l.groups && args.begin < args.end; args.first = args.last) {
        args.last = std::min(args.first + p.groups_per_block, c.l.groups);
        c.k.gather(args);
      }
    }
  });
}

template <typename Clock>
void run_all(const InferenceKernels& k, const Layer& l, const Plan& p, Rows x, Rows y, void* workspace,
             const ThreadPool& pool, Clock& clock) {
  Carver memory(workspace);
  const Call<Clock> call = {
      k, l, p, x, y, pool, clock, Shared(memory, l, p), static_cast<uint8_t*>(workspace) + p.shared_bytes};
  for (int64_t start = 0; start < p.tokens; start += p.chunk) {
    const int64_t count = std::min(p.chunk, p.tokens - start);
    project_and_hash(call, start, count);
    gather(call, start, count);
  }
  clock.enter(kStages);
}

// Few tokens read rows that lie in L3 or memory: they are prefetched while the projection goes on, as many bytes of
// each row as may be in flight, then slice by slice. Many read slices that lie in L2: some tokens ahead into L1.
Prefetch choose_prefetch(const Layer& l, int64_t tokens, int prefetch_distance, int groups_per_block, bool serial) {
  const size_t slice_bytes = size_t(tokens) * l.slots() * l.tables.row_bytes();  // of all rows that the call reads
  const bool few = serial && (tokens == 1 || slice_bytes * l.slices <= kEarlyBytes);
  const size_t early = few ? std::clamp<size_t>(kInFlightBytes / slice_bytes, 1, l.slices) : 0;
  const int64_t rows_of_token = int64_t(groups_per_block) * l.h.reads * kLanes;
  const int64_t ahead = ceil_div(std::max(prefetch_distance, 0), rows_of_token);
  return {.early_slices = int(early), .tokens_ahead = int(std::min(ahead, tokens - 1))};
}

}  // namespace

Plan make_plan(const Layer& l, int64_t tokens, const Tiling& tiling, int threads) {
  Plan p = {};
  p.tokens = tokens;
  if (tokens == 0) return p;
  const bool serial = threads <= 1 || tokens <= tiling.serial_tokens;
  p.chunk = std::min(tokens, kChunk);
  p.threads = serial ? 1 : threads;
  p.tile = int(std::clamp<int64_t>(std::min<int64_t>(tiling.tile_tokens, tokens), 1, kMaxTile));
  // A block pays where its rows are read from L2 once more; a chunk that reads few of them gathers all tables in one
  // go.
  const bool rows_come_again = p.chunk * l.h.reads > l.h.table_rows;
  p.groups_per_block = rows_come_again ? std::clamp(tiling.groups_per_block, 1, l.groups) : l.groups;
  p.token_parts = p.threads / std::gcd(p.threads, l.slices);  // as few as give every thread as much
  p.prefetch = choose_prefetch(l, tokens, tiling.prefetch_distance, p.groups_per_block, serial);
  p.shared_bytes = bytes_of<Shared>(l, p);
  p.thread_bytes = std::max(bytes_of<Tile>(l, p), bytes_of<Sums>(l, p));
  return p;
}

void run(const InferenceKernels& k, const Layer& l, const Plan& plan, Rows x, Rows y, void* workspace,
         const ThreadPool& pool) {
  NoClock clock;
  run_all(k, l, plan, x, y, workspace, pool, clock);
}

StageSeconds run_timed(const InferenceKernels& k, const Layer& l, const Plan& plan, Rows x, Rows y, void* workspace) {
  StageClock clock;
  run_all(k, l, plan, x, y, workspace, {1, nullptr, nullptr}, clock);
  return {clock.seconds[kProject], clock.seconds[kHash], clock.seconds[kGather]};
}

// ---- Loop sizes -------------------------------------------------------------------------------------------------------

namespace {

size_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return size_t(found);
#endif
  return size_t(1) << 20;
}

}  // namespace

Tiling default_tiling(const Layer& l) {
  const size_t group_bytes = kLanes * l.tables.table_bytes();
  int groups = l.groups;
  if (groups * group_bytes > 2 * l2_bytes()) {
    groups = 1;
    for (int halved = l.groups / 2; halved >= 1; halved /= 2)
      if (halved * group_bytes <= l2_bytes() * 3 / 4) {
        groups = halved;
        break;
      }
  }
  return {.tile_tokens = 16, .groups_per_block = groups, .prefetch_distance = 128, .serial_tokens = 4};
}

}  // namespace lookupffn
