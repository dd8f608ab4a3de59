#include "ops/training.h"

#include <algorithm>
#include <cstring>

#include "ops/workspace.h"

namespace lookupffn {
namespace {

constexpr int64_t kPackedBytes = 512 << 10;  // of tables at once: half of an L2 cache
constexpr int64_t kGroup = 16;               // tables of a unit of the backward pass
constexpr int64_t kOutputs = 128;            // of a token that are gathered at once without packing
constexpr int64_t kSerialRows = 4096;        // less work than this is not shared out

int threads_for(int64_t rows, int threads) { return rows <= kSerialRows ? 1 : threads; }

int64_t table_floats(const Tables& t) { return t.rows * kTrainSlice; }  // of one packed slice

// Whether tokens read the tables as they lie: packing would read more rows than there are reads.
bool unpacked(const Tables& t, const Reads& r) { return r.tokens * r.reads < 2 * t.rows; }

// How the gather of packed slices is shared out.
struct GatherPlan {
  int threads;
  int64_t slices;
  int64_t tables_of_pass;
  int64_t parts, part;  // where there are fewer slices than threads, tokens are split too

  GatherPlan(const Tables& t, const Reads& r, int all_threads)
      : threads(threads_for(r.tokens * t.tables * r.reads, all_threads)),
        slices(ceil_div(t.width, kTrainSlice)),
        tables_of_pass(std::clamp<int64_t>(kPackedBytes / (table_floats(t) * 4), 1, t.tables)),
        parts(std::clamp<int64_t>(ceil_div(threads, slices), 1, r.tokens)),
        part(ceil_div(r.tokens, parts)) {}
};

struct GatherScratch {  // of one thread
  float *packed, *sums;
  GatherScratch(Carver& memory, const Tables& t, const GatherPlan& p)
      : packed(memory.take<float>(p.tables_of_pass * table_floats(t))),
        sums(memory.take<float>(p.part * kTrainSlice)) {}
};

struct BackwardPlan {
  int threads;
  int64_t tables_of_unit;
  int64_t tokens;  // to a multiple of 16: the added ones read row 0 with score and gradient 0

  BackwardPlan(const Tables& t, const Reads& r, int all_threads)
      : threads(threads_for(t.tables * t.rows, all_threads)),
        tables_of_unit(std::clamp<int64_t>(ceil_div(t.tables, all_threads), 1, kGroup)),
        tokens(ceil_div(r.tokens, 16) * 16) {}
  size_t words(const Reads& r) const { return size_t(tables_of_unit) * r.reads * tokens; }
};

struct BackwardScratch {  // of one thread
  float *packed, *sums, *grad;
  int32_t* codes;  // [column][token], as are scores and dots
  float *scores, *dots;
  BackwardScratch(Carver& memory, const Tables& t, const Reads& r, const BackwardPlan& p)
      : packed(memory.take<float>(table_floats(t))),
        sums(memory.take<float>(table_floats(t))),
        grad(memory.take<float>(p.tokens * kTrainSlice)),
        codes(memory.take<int32_t>(p.words(r))),
        scores(memory.take<float>(p.words(r))),
        dots(memory.take<float>(p.words(r))) {}
};

}  // namespace

int64_t find_bad_code(const int32_t* codes, int64_t count, int64_t rows) {
  const uint32_t most = uint32_t(std::min<int64_t>(rows, int64_t(1) << 31));
  for (int64_t begin = 0; begin < count; begin += 4096) {
    const int64_t end = std::min(count, begin + 4096);
    uint32_t bad = 0;
    for (int64_t i = begin; i < end; i++) bad |= uint32_t(codes[i]) >= most;
    if (!bad) continue;
    for (int64_t i = begin; i < end; i++)
      if (uint32_t(codes[i]) >= most) return i;
  }
  return -1;
}

void train_hash(const TrainingKernels& k, HashRowsArgs args, const ThreadPool& pool) {
  share_out(pool, threads_for(args.rows, pool.threads), ceil_div(args.rows, 16), [&](int, int64_t first, int64_t last) {
    HashRowsArgs own = args;
    own.begin = first * 16, own.end = std::min(args.rows, last * 16);
    k.hash_rows(own);
  });
}

void train_hash_backward(const TrainingKernels& k, HashRowsBackwardArgs args, const ThreadPool& pool) {
  share_out(pool, threads_for(args.rows, pool.threads), ceil_div(args.rows, 16), [&](int, int64_t first, int64_t last) {
    HashRowsBackwardArgs own = args;
    own.begin = first * 16, own.end = std::min(args.rows, last * 16);
    k.hash_rows_backward(own);
  });
}

size_t gather_workspace_bytes(const Tables& t, const Reads& r, int threads) {
  if (r.tokens == 0 || unpacked(t, r)) return 0;
  const GatherPlan plan(t, r, threads);
  return plan.threads * bytes_of<GatherScratch>(t, plan);
}

void train_gather(const TrainingKernels& k, const Tables& t, const Reads& r, void* y_data, void* workspace,
                  const ThreadPool& pool) {
  if (r.tokens == 0) return;
  const Rows rows = {t.data, t.width, t.bfloat16}, y = {y_data, t.width, t.bfloat16};
  const int64_t columns = t.tables * r.reads;
  const int width = int(t.width);
  if (unpacked(t, r)) {
    const int64_t chunks = std::max<int64_t>(1, width / kOutputs);  // the last one is longer
    const int threads = threads_for(r.tokens * columns, pool.threads);
    share_out(pool, threads, r.tokens * chunks, [&](int, int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; unit++) {
        const int64_t token = unit / chunks, chunk = unit % chunks;
        k.gather_token({.rows = rows,
                        .tables = t.tables,
                        .table_rows = t.rows,
                        .reads = r.reads,
                        .codes = r.codes + token * columns,
                        .scores = r.scores + token * columns,
                        .first = int(chunk * kOutputs),
                        .last = chunk + 1 == chunks ? width : int((chunk + 1) * kOutputs),
                        .width = width,
                        .y = y,
                        .token = token});
      }
    });
    return;
  }
  const GatherPlan p(t, r, pool.threads);
  const size_t thread_bytes = bytes_of<GatherScratch>(t, p);
  share_out(pool, p.threads, p.slices * p.parts, [&](int thread, int64_t first, int64_t last) {
    Carver memory(static_cast<uint8_t*>(workspace) + thread * thread_bytes);
    const GatherScratch s(memory, t, p);
    for (int64_t unit = first; unit < last; unit++) {
      const int slice = int(unit / p.parts) * kTrainSlice;
      const int64_t begin = unit % p.parts * p.part, end = std::min(r.tokens, begin + p.part);
      if (begin >= end) continue;
      for (int64_t table = 0; table < t.tables; table += p.tables_of_pass) {
        const int64_t count = std::min(p.tables_of_pass, t.tables - table), read = begin * columns + table * r.reads;
        k.pack_slice({.from = rows,
                      .begin = table * t.rows,
                      .end = (table + count) * t.rows,
                      .first = slice,
                      .width = width,
                      .to = s.packed});
        k.gather_slice({.packed = s.packed,
                        .tables = int(count),
                        .table_rows = t.rows,
                        .reads = r.reads,
                        .codes = r.codes + read,
                        .scores = r.scores + read,
                        .stride = columns,
                        .tokens = end - begin,
                        .sums = s.sums,
                        .starts = table == 0});
      }
      k.unpack_slice({.from = s.sums, .to = y, .begin = begin, .end = end, .first = slice, .width = width});
    }
  });
}

size_t gather_backward_workspace_bytes(const Tables& t, const Reads& r, int threads) {
  const BackwardPlan plan(t, r, threads);
  return plan.threads * bytes_of<BackwardScratch>(t, r, plan);
}

void train_gather_backward(const TrainingKernels& k, const void* grad_data, const Tables& t, const Reads& r,
                           GatherGradients gradients, void* workspace, const ThreadPool& pool) {
  const BackwardPlan p(t, r, pool.threads);
  const Rows grad_tables = {gradients.tables, t.width, t.bfloat16};
  const Rows grad = {const_cast<void*>(grad_data), t.width, t.bfloat16};
  const int64_t columns = t.tables * r.reads, tokens = p.tokens;
  const size_t table_bytes = size_t(t.rows) * t.width * (t.bfloat16 ? 2 : 4);
  const size_t thread_bytes = bytes_of<BackwardScratch>(t, r, p);
  const int width = int(t.width);
  const bool few = r.tokens * r.reads < t.rows;
  share_out(pool, p.threads, ceil_div(t.tables, p.tables_of_unit), [&](int thread, int64_t first, int64_t last) {
    Carver memory(static_cast<uint8_t*>(workspace) + thread * thread_bytes);
    const BackwardScratch s(memory, t, r, p);
    std::memset(s.grad + r.tokens * kTrainSlice, 0, (tokens - r.tokens) * kTrainSlice * sizeof(float));
    for (int64_t unit = first; unit < last; unit++) {
      const int64_t begin = unit * p.tables_of_unit, end = std::min(t.tables, begin + p.tables_of_unit);
      const int64_t column = begin * r.reads, count = (end - begin) * r.reads;
      const auto by_column = [&](const void* from, void* to) {
        k.transpose_words(
            {.from = from, .from_stride = columns, .rows = r.tokens, .columns = count, .to = to, .to_stride = tokens});
      };
      by_column(r.codes + column, s.codes);
      by_column(r.scores + column, s.scores);
      for (int64_t c = 0; c < count; c++)
        for (int64_t i = r.tokens; i < tokens; i++) s.codes[c * tokens + i] = 0, s.scores[c * tokens + i] = 0;
      std::memset(s.dots, 0, p.words(r) * sizeof(float));
      for (int slice = 0; slice < width; slice += kTrainSlice) {
        k.pack_slice({.from = grad, .begin = 0, .end = r.tokens, .first = slice, .width = width, .to = s.grad});
        for (int64_t table = begin; table < end; table++) {
          const int64_t at = (table - begin) * r.reads * tokens;
          const Rows rows = {static_cast<uint8_t*>(t.data) + table * table_bytes, t.width, t.bfloat16};
          if (few)
            k.pack_rows({.from = rows,
                         .rows = s.codes + at,
                         .count = r.reads * tokens,
                         .first = slice,
                         .width = width,
                         .to = s.packed});
          else
            k.pack_slice({.from = rows, .begin = 0, .end = t.rows, .first = slice, .width = width, .to = s.packed});
          std::memset(s.sums, 0, table_floats(t) * sizeof(float));
          for (int n = 0; n < r.reads; n++)
            k.scatter_slice({.packed = s.packed,
                             .sums = s.sums,
                             .grad = s.grad,
                             .codes = s.codes + at + n * tokens,
                             .scores = s.scores + at + n * tokens,
                             .dots = s.dots + at + n * tokens,
                             .tokens = tokens});
          k.unpack_slice({.from = s.sums,
                          .to = grad_tables,
                          .begin = table * t.rows,
                          .end = (table + 1) * t.rows,
                          .first = slice,
                          .width = width});
        }
      }
      k.transpose_words({.from = s.dots,
                         .from_stride = tokens,
                         .rows = count,
                         .columns = r.tokens,
                         .to = gradients.scores + column,
                         .to_stride = columns});
    }
  });
}

}  // namespace lookupffn
