#include "training.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace lookupffn {
namespace {

constexpr int64_t kPackedBytes = 512 << 10;  // of tables at once: half of an L2 cache
constexpr int64_t kGroup = 16;               // tables of a unit of the backward pass
constexpr int64_t kOutputs = 128;            // of a token that are gathered at once without packing
constexpr int64_t kSerialRows = 4096;        // less work than this is not shared out

// Memory for one call, on cache lines.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {
    if (!memory_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;

  template <typename T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(memory_ + used_);
    used_ += bytes<T>(count);
    return p;
  }
  template <typename T>
  static size_t bytes(size_t count) { return (count * sizeof(T) + 63) / 64 * 64; }

 private:
  uint8_t* memory_;
  size_t used_ = 0;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void share_out(const Threads& threads, int64_t rows, int64_t units, const std::function<void(int64_t, int64_t)>& body) {
  if (threads.count <= 1 || units <= 1 || rows <= kSerialRows)
    body(0, units);
  else
    threads.run(units, body);
}

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

void train_hash(const Kernels& k, const float* z, int64_t rows, int bits, int reads, int32_t* codes, float* scores,
                const Threads& threads) {
  share_out(threads, rows, ceil_div(rows, 16), [&](int64_t first, int64_t last) {
    k.hash_rows(z, rows, first * 16, std::min(rows, last * 16), bits, reads, codes, scores);
  });
}

void train_hash_backward(const Kernels& k, const float* grad, const float* z, const int32_t* codes, int64_t rows, int bits,
                         int reads, float* grad_z, const Threads& threads) {
  share_out(threads, rows, ceil_div(rows, 16), [&](int64_t first, int64_t last) {
    k.hash_rows_backward(grad, z, codes, rows, first * 16, std::min(rows, last * 16), bits, reads, grad_z);
  });
}

void train_gather(const Kernels& k, const Tables& tables, const Reads& r, void* y_data, const Threads& threads) {
  const Rows rows = {tables.data, tables.width, tables.bfloat16}, y = {y_data, tables.width, tables.bfloat16};
  const int64_t columns = tables.tables * r.reads;
  const int width = int(tables.width);
  if (r.tokens == 0) return;
  if (r.tokens * r.reads < 2 * tables.rows) {  // packing would read more rows than there are reads
    const int64_t chunks = std::max<int64_t>(1, width / kOutputs);  // the last one is longer
    share_out(threads, r.tokens * columns, r.tokens * chunks, [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; unit++) {
        const int64_t token = unit / chunks, chunk = unit % chunks;
        k.gather_token(rows, tables.tables, tables.rows, r.reads, r.codes + token * columns, r.scores + token * columns,
                       int(chunk * kOutputs), chunk + 1 == chunks ? width : int((chunk + 1) * kOutputs), width, y, token);
      }
    });
    return;
  }
  const int64_t table_floats = tables.rows * kTrainSlice, slices = ceil_div(width, kTrainSlice);
  const int64_t pass = std::clamp<int64_t>(kPackedBytes / (table_floats * 4), 1, tables.tables);
  // Where there are fewer slices than threads, tokens are split too.
  const int64_t parts = std::clamp<int64_t>(ceil_div(threads.count, slices), 1, r.tokens), part = ceil_div(r.tokens, parts);
  share_out(threads, r.tokens * columns, slices * parts, [&](int64_t first, int64_t last) {
    Scratch scratch(Scratch::bytes<float>(pass * table_floats) + Scratch::bytes<float>(part * kTrainSlice));
    float *packed = scratch.take<float>(pass * table_floats), *sums = scratch.take<float>(part * kTrainSlice);
    for (int64_t unit = first; unit < last; unit++) {
      const int slice = int(unit / parts) * kTrainSlice;
      const int64_t begin = unit % parts * part, end = std::min(r.tokens, begin + part);
      if (begin >= end) continue;
      for (int64_t t = 0; t < tables.tables; t += pass) {
        const int64_t count = std::min(pass, tables.tables - t);
        k.pack_slice(rows, t * tables.rows, (t + count) * tables.rows, slice, width, packed);
        const int64_t read = begin * columns + t * r.reads;
        k.gather_slice(packed, int(count), tables.rows, r.reads, r.codes + read, r.scores + read, columns, end - begin, sums,
                       t == 0);
      }
      k.unpack_slice(sums, y, begin, end, slice, width);
    }
  });
}

void train_gather_backward(const Kernels& k, const void* grad_data, const Tables& tables, const Reads& r,
                           void* grad_tables_data, float* grad_scores, const Threads& threads) {
  const Rows rows = {tables.data, tables.width, tables.bfloat16}, grad_rows = {grad_tables_data, tables.width, tables.bfloat16};
  const Rows grad = {const_cast<void*>(grad_data), tables.width, tables.bfloat16};
  const int64_t columns = tables.tables * r.reads, table_floats = tables.rows * kTrainSlice;
  const int64_t tokens = ceil_div(r.tokens, 16) * 16;  // the added ones read row 0 with score and gradient 0
  const int width = int(tables.width);
  const bool few = r.tokens * r.reads < tables.rows;
  const int64_t group = std::clamp<int64_t>(ceil_div(tables.tables, threads.count), 1, kGroup);
  share_out(threads, tables.tables * tables.rows, ceil_div(tables.tables, group), [&](int64_t first, int64_t last) {
    const size_t words = size_t(group) * r.reads * tokens;
    Scratch scratch(2 * Scratch::bytes<float>(table_floats) + Scratch::bytes<float>(tokens * kTrainSlice) +
                    3 * Scratch::bytes<float>(words));
    float *packed = scratch.take<float>(table_floats), *sums = scratch.take<float>(table_floats);
    float* slice_grad = scratch.take<float>(tokens * kTrainSlice);
    int32_t* codes = scratch.take<int32_t>(words);  // [column][token], as are scores and dots
    float *scores = scratch.take<float>(words), *dots = scratch.take<float>(words);
    std::memset(slice_grad + r.tokens * kTrainSlice, 0, (tokens - r.tokens) * kTrainSlice * sizeof(float));
    for (int64_t unit = first; unit < last; unit++) {
      const int64_t begin = unit * group, end = std::min(tables.tables, begin + group);
      const int64_t column = begin * r.reads, count = (end - begin) * r.reads;
      k.transpose_words(r.codes + column, columns, r.tokens, count, codes, tokens);
      k.transpose_words(r.scores + column, columns, r.tokens, count, scores, tokens);
      for (int64_t c = 0; c < count; c++)
        for (int64_t i = r.tokens; i < tokens; i++) codes[c * tokens + i] = 0, scores[c * tokens + i] = 0;
      std::memset(dots, 0, words * sizeof(float));
      for (int slice = 0; slice < width; slice += kTrainSlice) {
        k.pack_slice(grad, 0, r.tokens, slice, width, slice_grad);
        for (int64_t t = begin; t < end; t++) {
          const int64_t at = (t - begin) * r.reads * tokens;
          const Rows table = {static_cast<uint8_t*>(rows.data) + t * tables.rows * tables.width * (tables.bfloat16 ? 2 : 4),
                              tables.width, tables.bfloat16};
          if (few)
            k.pack_rows(table, codes + at, r.reads * tokens, slice, width, packed);
          else
            k.pack_slice(table, 0, tables.rows, slice, width, packed);
          std::memset(sums, 0, table_floats * sizeof(float));
          for (int n = 0; n < r.reads; n++)
            k.scatter_slice(packed, sums, slice_grad, codes + at + n * tokens, scores + at + n * tokens, dots + at + n * tokens,
                            tokens);
          k.unpack_slice(sums, grad_rows, t * tables.rows, (t + 1) * tables.rows, slice, width);
        }
      }
      k.transpose_words(dots, tokens, count, r.tokens, grad_scores + column, columns);
    }
  });
}

}  // namespace lookupffn
