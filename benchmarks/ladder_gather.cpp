// The gather's rungs. Scores are quantised beforehand, as the shipped hash leaves them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <tuple>

#include "ladder.h"
#include "ladder_tools.h"

namespace lookupffn {
namespace {

// How rows lie: int8 in the order of outputs, or as the 8-bit dot product takes four of them apart
// (format._interleave).
enum class Format { kFloat32, kBFloat16, kInt8, kInterleaved };

struct Stored {
  Format format;
  TableSlices slices;
  Pages memory;
};

enum Stream : uint64_t { kEntries, kSizes, kCodes, kScores, kBiases };

class Gather {
 public:
  explicit Gather(const Shape& shape, const InferenceKernels& kernels)
      : s_(shape),
        kernels_(kernels),
        groups_(groups_of(shape.tables)),
        slots_(groups_ * shape.reads * kLanes),
        bias_(size_t(round_up(shape.width, kMaxSlice))),
        scales_(size_t(groups_) * kLanes),
        codes_(inputs(slots_)),
        scores_(inputs(slots_)),
        scaled_(inputs(slots_)),
        quantised_(inputs(slots_)),
        score_scales_(inputs(1)),
        sums_(size_t(shape.tokens) * kMaxSlice),
        y_(size_t(shape.tokens) * shape.width) {
    for (int i = 0; i < s_.width; i++) bias_[i] = random_uniform(kBiases, i);
    for (int t = 0; t < s_.tables; t++) scales_[t] = largest(t) / 127;
    for (int64_t token = 0; token < s_.inputs; token++) fill(token);
  }

  const Shape& shape() const { return s_; }

  // A body on tables of a format, cut into slices of so many outputs.
  Work work(Format format, int slice, bool huge, const std::function<void(const GatherWork&)>& body) {
    const Stored& t = stored(format, slice, huge);
    const double row_bytes = double((s_.width + slice - 1) / slice) * double(t.slices.row_bytes());
    return {[this, &t, body](int64_t first) { body(given(t, first)); },
            [this, &t, body] {
              std::fill(y_.get(), y_.get() + y_.size(), std::nanf(""));
              body(given(t, 0));
              return check(t);
            },
            row_bytes * s_.tables * s_.reads};
  }

 private:
  size_t inputs(int each) const { return size_t(s_.inputs) * each; }

  // The tables in float32, which every format rounds: entries within ± largest of the table.
  float largest(int table) const { return 0.02f * (1.5f + random_uniform(kSizes, table)); }
  float entry(int table, int row, int e) const {
    return largest(table) * random_uniform(kEntries, (uint64_t(table) << s_.bits | row) * s_.width + e);
  }

  // One token: codes and scores in groups of 16 tables, read by read, as the kernel hash leaves them.
  void fill(int64_t token) {
    for (int i = 0; i < slots_; i++) {
      const uint64_t place = uint64_t(token) * slots_ + i;
      if (i / (kLanes * s_.reads) * kLanes + i % kLanes >= s_.tables) continue;  // padding: code 0, score 0
      codes_[place] = uint16_t(random_bits(kCodes, place) >> (64 - s_.bits));
      scores_[place] = scaled_[place] = 1.5f + random_uniform(kScores, place);
    }
    const size_t slot = size_t(token) * slots_;
    score_scales_[token] = kernels_.quantise_scores({.num_tables = s_.tables,
                                                     .code_bits = s_.bits,
                                                     .reads = s_.reads,
                                                     .negated_rows = false,
                                                     .table_scales = scales_.get(),
                                                     .scores = &scaled_[slot],
                                                     .codes = &codes_[slot],
                                                     .quantised = &quantised_[slot]});
  }

  const Stored& stored(Format format, int slice, bool huge) {
    std::unique_ptr<Stored>& t = stored_[{format, slice, huge}];
    if (t) return *t;
    TableSlices slices = {.type = format == Format::kFloat32    ? TableType::kFloat32
                                  : format == Format::kBFloat16 ? TableType::kBFloat16
                                                                : TableType::kInt8,
                          .num_tables = s_.tables,
                          .table_rows = 1 << s_.bits,
                          .reads = s_.reads,
                          .slice = slice,
                          .rows = nullptr};
    const size_t bytes = (s_.width + slice - 1) / slice * s_.tables * slices.table_bytes();
    const size_t spare = 3 * slices.table_bytes() + 256;  // three tables more, and a row's last 64 outputs
    t.reset(new Stored{format, slices, Pages(bytes + spare, huge)});
    t->slices.rows = t->memory.data();
    for (int table = 0; table < s_.tables; table++)
      for (int row = 0; row < 1 << s_.bits; row++)
        for (int e = 0; e < s_.width; e++) put(*t, table, row, e);
    return *t;
  }

  static size_t place(const Stored& t, int table, int row, int e) {
    const TableSlices& s = t.slices;
    const int p = e % s.slice;
    int at = p;
    if (t.format == Format::kInterleaved) at = p / 64 * 64 + p % 16 / 4 * 16 + p % 64 / 16 * 4 + p % 4;
    if (t.format == Format::kBFloat16) at = p / 32 * 32 + p % 16 * 2 + p % 32 / 16;
    return ((size_t(e / s.slice) * s.num_tables + table) * s.table_rows + row) * s.slice + at;
  }

  void put(const Stored& t, int table, int row, int e) const {
    uint8_t* const data = t.memory.data();
    const size_t i = place(t, table, row, e);
    const float value = entry(table, row, e);
    if (t.format == Format::kFloat32) {
      reinterpret_cast<float*>(data)[i] = value;
    } else if (t.format == Format::kBFloat16) {  // to nearest, ties to even
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      reinterpret_cast<uint16_t*>(data)[i] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    } else {
      data[i] = uint8_t(int8_t(std::lrint(value / scales_[table])));
    }
  }

  double number(const Stored& t, int table, int row, int e) const {
    const size_t i = place(t, table, row, e);
    if (t.format == Format::kFloat32) return reinterpret_cast<const float*>(t.slices.rows)[i];
    if (t.format != Format::kBFloat16) return int8_t(t.slices.rows[i]);
    const uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(t.slices.rows)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  GatherWork given(const Stored& t, int64_t first) const {
    const size_t slot = size_t(first) * slots_;
    return {.tables = t.slices,
            .width = s_.width,
            .bias = bias_.get(),
            .tokens = s_.tokens,
            .codes = &codes_[slot],
            .scores = t.slices.type == TableType::kInt8 ? &scaled_[slot] : &scores_[slot],
            .quantised = &quantised_[slot],
            .score_scales = &score_scales_[first],
            .sums = sums_.get(),
            .y = y_.get()};
  }

  // Every row and score that is read, against float32 within half a step of its format; and y of the first inputs
  // against their sum in double, within rounding.
  std::string check(const Stored& t) const {
    std::vector<double> sum(s_.width), magnitude(s_.width);
    for (int64_t token : sampled(s_.tokens)) {
      for (int e = 0; e < s_.width; e++) sum[e] = bias_[e], magnitude[e] = std::abs(bias_[e]);
      for (int i = 0; i < slots_; i++) {
        const int table = i / (kLanes * s_.reads) * kLanes + i % kLanes;
        if (table >= s_.tables) continue;
        const size_t slot = size_t(token) * slots_ + i;
        const bool integers = t.slices.type == TableType::kInt8;
        const double unit = integers ? scales_[table] : 1, scale = score_scales_[token];
        double score = integers ? scaled_[slot] / unit : scores_[slot];
        if (t.format == Format::kInterleaved) score = quantised_[slot] * scale / unit;
        const double score_bound = t.format == Format::kInterleaved ? scale / unit / 2 : 1e-6;
        if (!(std::abs(score - scores_[slot]) <= 1.00001 * score_bound))
          return wrong("score", token, i, score, scores_[slot], score_bound);
        for (int e = 0; e < s_.width; e++) {
          const double row = unit * number(t, table, codes_[slot], e), exact = entry(table, codes_[slot], e);
          const double bound = integers ? unit / 2 : t.format == Format::kBFloat16 ? std::abs(exact) * 0x1p-8 : 0;
          if (!(std::abs(row - exact) <= 1.00001 * bound)) return wrong("row", token, e, row, exact, bound);
          sum[e] += score * row;
          magnitude[e] += std::abs(score * row);
        }
      }
      for (int e = 0; e < s_.width; e++) {
        const double y = y_[size_t(token) * s_.width + e], rounding = magnitude[e] * (slots_ + 3) * 0x1p-24;
        if (!(std::abs(y - sum[e]) <= rounding)) return wrong("y", token, e, y, sum[e], rounding);
      }
    }
    return "";
  }

  static std::string wrong(const char* what, int64_t token, int i, double is, double should, double bound) {
    char text[160];
    std::snprintf(text, sizeof text, "%s[%ld, %d] is %.9g, not %.9g within %.3g", what, long(token), i, is, should,
                  bound);
    return text;
  }

  const Shape s_;
  const InferenceKernels& kernels_;
  const int groups_, slots_;
  const Array<float> bias_, scales_;
  const Array<uint16_t> codes_;
  const Array<float> scores_, scaled_;
  const Array<uint8_t> quantised_;
  const Array<float> score_scales_;
  const Array<int32_t> sums_;
  const Array<float> y_;
  std::map<std::tuple<Format, int, bool>, std::unique_ptr<Stored>> stored_;
};

// ---- Loops ----------------------------------------------------------------------------------------------------------

// Plain C++, compiled for the baseline of the architecture.
void add_read(const GatherWork& w, int64_t token, int table, int slot) {
  const int width = w.width;
  const size_t i = size_t(token) * w.tables.slots() + slot;
  const float score = w.scores[i];
  const float* __restrict row =
      reinterpret_cast<const float*>(w.tables.rows) + (size_t(table) * w.tables.table_rows + w.codes[i]) * width;
  float* __restrict y = w.y + token * width;
  for (int e = 0; e < width; e++) y[e] += score * row[e];
}

template <typename Body>
void each_read(const TableSlices& tables, const Body& body) {  // body(table, slot)
  for (int slot = 0; slot < tables.slots(); slot++) {
    const int table = slot / (kLanes * tables.reads) * kLanes + slot % kLanes;
    if (table < tables.num_tables) body(table, slot);
  }
}

void start(const GatherWork& w, int64_t token) { std::memcpy(w.y + token * w.width, w.bias, sizeof(float) * w.width); }

void token_by_token(const GatherWork& w) {
  for (int64_t token = 0; token < w.tokens; token++) {
    start(w, token);
    each_read(w.tables, [&](int table, int slot) { add_read(w, token, table, slot); });
  }
}

void table_by_table(const GatherWork& w) {
  for (int64_t token = 0; token < w.tokens; token++) start(w, token);
  each_read(w.tables, [&](int table, int slot) {
    for (int64_t token = 0; token < w.tokens; token++) add_read(w, token, table, slot);
  });
}

// Tokens [begin, end), slices [first, last), all tables, as the engine calls the shipped kernel with default tiling.
void shipped(const InferenceKernels& k, const GatherWork& w, int first, int last, int64_t begin, int64_t end,
             int64_t prefetch_tokens) {
  for (int slice = first; slice < last; slice++)
    k.gather(w.args(slice, 0, w.groups(), begin, end, std::min(prefetch_tokens, w.tokens - 1)));
}

// The engine's prefetch distance, 128 rows, in tokens: model/lookup.cpp.
int64_t engine_tokens(const GatherWork& w) { return (128 + w.tables.slots() - 1) / w.tables.slots(); }

// Each thread its own tables: sums of all but the last are added to y afterwards.
void threads_over_tables(const InferenceKernels& k, const GatherWork& w, Workers& workers,
                         std::vector<Array<int32_t>>& partial) {
  const int parts = int(partial.size()), slice_width = w.tables.slice;
  const size_t slice_sums = size_t(w.tokens) * slice_width;
  const auto first_group = [&](int i) { return w.groups() * i / parts; };
  workers.run([&](int i) {
    const int first = first_group(i), last = first_group(i + 1);
    if (first == last) return;
    if (first) std::memset(partial[i].get(), 0, partial[i].size() * sizeof(int32_t));
    for (int slice = 0; slice < w.slices(); slice++) {
      GatherArgs args = w.args(slice, first, last, 0, w.tokens, std::min(engine_tokens(w), w.tokens - 1));
      args.sums = partial[i].get() + slice * slice_sums;
      k.gather(args);
    }
  });
  workers.run([&](int thread) {
    for (int64_t token = w.tokens * thread / parts; token < w.tokens * (thread + 1) / parts; token++)
      for (int i = 0; i + 1 < parts; i++)
        for (int slice = 0; slice < w.slices() && first_group(i) < first_group(i + 1); slice++) {
          const int width = std::min(slice_width, w.width - slice * slice_width);
          const int32_t* __restrict sums = partial[i].get() + slice * slice_sums + token * slice_width;
          float* __restrict y = w.y + token * w.width + slice * slice_width;
          for (int e = 0; e < width; e++) y[e] += float(sums[e]) * w.score_scales[token];
        }
  });
}

}  // namespace

std::vector<Rung> gather_rungs(const Shape& shape, const Kernels& kernels) {
  const auto data = std::make_shared<std::unique_ptr<Gather>>();  // made by the first rung that is prepared
  const int width = shape.width, fitting = round_up(width, 128) * 6 < width * 7 ? 128 : 64;  // format.slice_width
  const InferenceKernels& k = kernels.shipped;
  const LadderKernels& own = kernels.own;
  const char* const isa = kernels.name;
  std::vector<Rung> rungs;
  typedef std::function<void(const GatherWork&)> Body;
  const auto add = [&](const char* name, const char* from, const char* change, Format format, int slice,
                       const Body& body, bool huge = false, int threads = 1) {
    rungs.push_back({"gather", name, from, change, isa, threads, [=, &k] {
                       if (!*data) data->reset(new Gather(shape, k));
                       return (*data)->work(format, slice, huge, body);
                     }});
  };
  const auto dot = [&own](int groups_per_block, int64_t prefetch_tokens) {
    return [=, &own](const GatherWork& w) {
      const int block = std::min(groups_per_block, w.groups());
      for (int slice = 0; slice < w.slices(); slice++)
        for (int g = 0; g < w.groups(); g += block)
          own.dot(w, slice, g, std::min(g + block, w.groups()), std::min(prefetch_tokens, w.tokens - 1));
    };
  };
  constexpr int kAll = 1 << 20;
  const auto workers = std::make_shared<std::unique_ptr<Workers>>();
  const auto threaded = [=](const std::function<void(const GatherWork&, Workers&)>& body) {
    return [=](const GatherWork& w) {
      if (!*workers) workers->reset(new Workers(shape.threads));
      body(w, **workers);
    };
  };
  const int n = shape.threads;
  const auto partial = std::make_shared<std::vector<Array<int32_t>>>();

  add("plain", "", "float32 rows, token by token, plain C++", Format::kFloat32, width, token_by_token);
  add("table-order", "plain", "table by table over all tokens, the authors' order", Format::kFloat32, width,
      table_by_table);
  add("vectors", "plain", "vectors of the instruction set", Format::kFloat32, width, own.vectors);
  add("registers", "vectors", "64 outputs of a token at a time: sums stay in registers", Format::kFloat32, width,
      own.registers);
  add("slices", "registers", "tables cut into slices of 64 outputs: all tokens, then the next slice", Format::kFloat32,
      64, own.slices);
  add("bfloat16", "slices", "bfloat16 rows", Format::kBFloat16, 64, own.slices);
  add("converted", "bfloat16", "int8 rows, converted to float32", Format::kInt8, 64, own.slices);
  add("dot", "converted", "four rows and scores of seven bits through the 8-bit dot product", Format::kInterleaved, 64,
      dot(kAll, 0));
  add("two-lines", "dot", "slices of 128 outputs: two lines of a row", Format::kInterleaved, 128, dot(kAll, 0));
  add("pass-1", "two-lines", "16 tables per block", Format::kInterleaved, 128, dot(1, 0));
  add("pass-2", "two-lines", "32 tables per block", Format::kInterleaved, 128, dot(2, 0));
  add("ahead-1", "two-lines", "rows prefetched 1 token ahead", Format::kInterleaved, 128, dot(kAll, 1));
  add("ahead-2", "two-lines", "rows prefetched 2 tokens ahead", Format::kInterleaved, 128, dot(kAll, 2));
  add("ahead-8", "two-lines", "rows prefetched 8 tokens ahead", Format::kInterleaved, 128, dot(kAll, 8));
  add("huge-pages", "ahead-1", "tables on huge pages", Format::kInterleaved, 128, dot(kAll, 1), true);
  add(
      "shipped", "huge-pages", "the shipped kernel, prefetch distance 128 rows", Format::kInterleaved, fitting,
      [&k](const GatherWork& w) { shipped(k, w, 0, w.slices(), 0, w.tokens, engine_tokens(w)); }, true);
  add(
      "early", "shipped", "all rows of the batch prefetched at once, into L2, before the first is read",
      Format::kInterleaved, fitting,
      [&k](const GatherWork& w) {
        for (int64_t token = 0; token < w.tokens; token++)
          k.prefetch_rows({.tables = w.tables,
                           .first_slice = 0,
                           .last_slice = w.slices(),
                           .first = 0,
                           .last = w.groups(),
                           .codes = w.codes + token * w.tables.slots()});
        shipped(k, w, 0, w.slices(), 0, w.tokens, 0);
      },
      true);
  add("threads-tokens", "shipped", "threads share out tokens", Format::kInterleaved, fitting,
      threaded([&k, n](const GatherWork& w, Workers& t) {
        t.run([&](int i) { shipped(k, w, 0, w.slices(), w.tokens * i / n, w.tokens * (i + 1) / n, engine_tokens(w)); });
      }),
      true, n);
  add("threads-slices", "shipped", "threads share out slices of outputs", Format::kInterleaved, fitting,
      threaded([&k, n](const GatherWork& w, Workers& t) {
        t.run(
            [&](int i) { shipped(k, w, w.slices() * i / n, w.slices() * (i + 1) / n, 0, w.tokens, engine_tokens(w)); });
      }),
      true, n);
  add("threads-tables", "shipped", "threads share out tables, and add their sums", Format::kInterleaved, fitting,
      threaded([&k, n, partial](const GatherWork& w, Workers& t) {
        while (int(partial->size()) < n) partial->emplace_back(size_t(w.tokens) * w.slices() * w.tables.slice);
        threads_over_tables(k, w, t, *partial);
      }),
      true, n);
  return rungs;
}

}  // namespace lookupffn
