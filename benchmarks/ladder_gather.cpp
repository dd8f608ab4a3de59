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

// How rows lie: int8 in the order of outputs, or as the 8-bit dot product takes four of them apart (packed._interleave).
enum class Format { kFloat32, kBFloat16, kInt8, kInterleaved };

struct Tables {
  Format format;
  Layer layer;
  Pages memory;
};

enum Stream : uint64_t { kEntries, kSizes, kCodes, kScores, kBiases };

class Gather {
 public:
  explicit Gather(const Shape& shape, const Kernels& kernels)
      : s_(shape), kernels_(kernels), groups_((shape.tables + kLanes - 1) / kLanes), slots_(groups_ * shape.reads * kLanes),
        bias_(size_t(round_up(shape.width, kMaxSlice))), scales_(size_t(groups_) * kLanes), codes_(inputs(slots_)),
        scores_(inputs(slots_)), scaled_(inputs(slots_)), quantised_(inputs(slots_)), steps_(inputs(1)),
        sums_(size_t(shape.tokens) * kMaxSlice), y_(size_t(shape.tokens) * shape.width) {
    for (int i = 0; i < s_.width; i++) bias_[i] = random_uniform(kBiases, i);
    for (int t = 0; t < s_.tables; t++) scales_[t] = largest(t) / 127;
    for (int64_t token = 0; token < s_.inputs; token++) fill(token);
  }

  const Shape& shape() const { return s_; }

  // A body on tables of a format, cut into slices of so many outputs.
  Work work(Format format, int slice, bool huge, const std::function<void(const GatherWork&)>& body) {
    const Tables& t = tables(format, slice, huge);
    const double row_bytes = double(t.layer.slices) * double(t.layer.slice_bytes);
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

  // One token: codes and scores in groups of 16 tables, read by read, as Kernels::hash has them.
  void fill(int64_t token) {
    for (int i = 0; i < slots_; i++) {
      const uint64_t place = uint64_t(token) * slots_ + i;
      if (i / (kLanes * s_.reads) * kLanes + i % kLanes >= s_.tables) continue;  // padding: code 0, score 0
      codes_[place] = uint16_t(random_bits(kCodes, place) >> (64 - s_.bits));
      scores_[place] = scaled_[place] = 1.5f + random_uniform(kScores, place);
    }
    Layer l = sizes(kMaxSlice);
    l.table_scales = scales_.get(), l.h.table_rows = 1 << s_.bits, l.h.code_bits = s_.bits;
    const size_t slot = size_t(token) * slots_;
    steps_[token] = kernels_.quantise_scores(l, &scaled_[slot], &codes_[slot], &quantised_[slot]);
  }

  Layer sizes(int slice) const {  // as parse_layer makes it, without a projection
    Layer l{};
    l.h.out_features = s_.width, l.h.num_tables = s_.tables, l.h.reads = s_.reads, l.h.table_rows = 1 << s_.bits;
    l.h.slice = slice;
    l.bias = bias_.get();
    l.groups = groups_, l.slots = slots_, l.slices = (s_.width + slice - 1) / slice;
    return l;
  }

  const Tables& tables(Format format, int slice, bool huge) {
    std::unique_ptr<Tables>& t = tables_[{format, slice, huge}];
    if (t) return *t;
    Layer l = sizes(slice);
    l.h.table_type = format == Format::kFloat32 ? TableType::kFloat32
                     : format == Format::kBFloat16 ? TableType::kBFloat16 : TableType::kInt8;
    l.slice_bytes = slice * element_size(l.h.table_type);
    const size_t rows = size_t(s_.tables) << s_.bits;
    const size_t spare = (size_t(3) << s_.bits) * l.slice_bytes + 256;  // three tables more, and a row's last 64 outputs
    t.reset(new Tables{format, l, Pages(l.slices * rows * l.slice_bytes + spare, huge)});
    t->layer.tables = t->memory.data();
    for (int table = 0; table < s_.tables; table++)
      for (int row = 0; row < 1 << s_.bits; row++)
        for (int e = 0; e < s_.width; e++) put(*t, table, row, e);
    return *t;
  }

  static size_t place(const Tables& t, int table, int row, int e) {
    const PackedHeader& h = t.layer.h;
    const int p = e % h.slice;
    int at = p;
    if (t.format == Format::kInterleaved) at = p / 64 * 64 + p % 16 / 4 * 16 + p % 64 / 16 * 4 + p % 4;
    if (t.format == Format::kBFloat16) at = p / 32 * 32 + p % 16 * 2 + p % 32 / 16;
    return ((size_t(e / h.slice) * h.num_tables + table) * h.table_rows + row) * h.slice + at;
  }

  void put(const Tables& t, int table, int row, int e) const {
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

  double stored(const Tables& t, int table, int row, int e) const {
    const size_t i = place(t, table, row, e);
    if (t.format == Format::kFloat32) return reinterpret_cast<const float*>(t.layer.tables)[i];
    if (t.format != Format::kBFloat16) return int8_t(t.layer.tables[i]);
    const uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(t.layer.tables)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  GatherWork given(const Tables& t, int64_t first) const {
    const size_t slot = size_t(first) * slots_;
    const bool integers = t.layer.h.table_type == TableType::kInt8;
    return {t.layer, s_.tokens, &codes_[slot], integers ? &scaled_[slot] : &scores_[slot], &quantised_[slot], &steps_[first],
            sums_.get(), y_.get()};
  }

  // Every row and score that is read, against float32 within half a step of its format; and y of the first inputs against
  // their sum in double, within rounding.
  std::string check(const Tables& t) const {
    std::vector<double> sum(s_.width), magnitude(s_.width);
    for (int64_t token : sampled(s_.tokens)) {
      for (int e = 0; e < s_.width; e++) sum[e] = bias_[e], magnitude[e] = std::abs(bias_[e]);
      for (int i = 0; i < slots_; i++) {
        const int table = i / (kLanes * s_.reads) * kLanes + i % kLanes;
        if (table >= s_.tables) continue;
        const size_t slot = size_t(token) * slots_ + i;
        const bool integers = t.layer.h.table_type == TableType::kInt8;
        const double unit = integers ? scales_[table] : 1, step = steps_[token];
        double score = integers ? scaled_[slot] / unit : scores_[slot];
        if (t.format == Format::kInterleaved) score = quantised_[slot] * step / unit;
        const double score_bound = t.format == Format::kInterleaved ? step / unit / 2 : 1e-6;
        if (!(std::abs(score - scores_[slot]) <= 1.00001 * score_bound))
          return wrong("score", token, i, score, scores_[slot], score_bound);
        for (int e = 0; e < s_.width; e++) {
          const double row = unit * stored(t, table, codes_[slot], e), exact = entry(table, codes_[slot], e);
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
    std::snprintf(text, sizeof text, "%s[%ld, %d] is %.9g, not %.9g within %.3g", what, long(token), i, is, should, bound);
    return text;
  }

  const Shape s_;
  const Kernels& kernels_;
  const int groups_, slots_;
  const Array<float> bias_, scales_;
  const Array<uint16_t> codes_;
  const Array<float> scores_, scaled_;
  const Array<uint8_t> quantised_;
  const Array<float> steps_;
  const Array<int32_t> sums_;
  const Array<float> y_;
  std::map<std::tuple<Format, int, bool>, std::unique_ptr<Tables>> tables_;
};

// ---- Loops -----------------------------------------------------------------------------------------------------------

// Plain C++, compiled for the baseline of the architecture.
void add_read(const GatherWork& w, int64_t token, int table, int slot) {
  const int width = w.layer.h.out_features;
  const size_t i = size_t(token) * w.layer.slots + slot;
  const float score = w.scores[i];
  const float* __restrict row =
      reinterpret_cast<const float*>(w.layer.tables) + (size_t(table) * w.layer.h.table_rows + w.codes[i]) * width;
  float* __restrict y = w.y + token * width;
  for (int e = 0; e < width; e++) y[e] += score * row[e];
}

template <typename Body>
void each_read(const Layer& l, const Body& body) {  // body(table, slot)
  for (int slot = 0; slot < l.slots; slot++) {
    const int table = slot / (kLanes * l.h.reads) * kLanes + slot % kLanes;
    if (table < l.h.num_tables) body(table, slot);
  }
}

void start(const GatherWork& w, int64_t token) {
  std::memcpy(w.y + token * w.layer.h.out_features, w.layer.bias, sizeof(float) * w.layer.h.out_features);
}

void token_by_token(const GatherWork& w) {
  for (int64_t token = 0; token < w.tokens; token++) {
    start(w, token);
    each_read(w.layer, [&](int table, int slot) { add_read(w, token, table, slot); });
  }
}

void table_by_table(const GatherWork& w) {
  for (int64_t token = 0; token < w.tokens; token++) start(w, token);
  each_read(w.layer, [&](int table, int slot) {
    for (int64_t token = 0; token < w.tokens; token++) add_read(w, token, table, slot);
  });
}

// Tokens [begin, end), slices [first, last), all tables, as the engine calls the shipped kernel with default tiling.
void shipped(const Kernels& k, const GatherWork& w, int first, int last, int64_t begin, int64_t end, int64_t ahead) {
  const Layer& l = w.layer;
  for (int slice = first; slice < last; slice++)
    k.gather(l, slice, 0, l.groups, begin, end, w.codes, w.quantised, w.steps, w.sums, {w.y, l.h.out_features, false}, 0,
             int(std::min(ahead, w.tokens - 1)));
}

int64_t engine_ahead(const Layer& l) { return (128 + l.slots - 1) / l.slots; }  // 128 rows, in tokens: engine.cpp

// Each thread its own tables: sums of all but the last are added to y afterwards.
void threads_over_tables(const Kernels& k, const GatherWork& w, Workers& workers, std::vector<Array<int32_t>>& partial) {
  const Layer& l = w.layer;
  const int parts = int(partial.size());
  const size_t slice_sums = size_t(w.tokens) * l.h.slice;
  const auto first_group = [&](int i) { return l.groups * i / parts; };
  workers.run([&](int i) {
    const int first = first_group(i), last = first_group(i + 1);
    if (first == last) return;
    if (first) std::memset(partial[i].get(), 0, partial[i].size() * sizeof(int32_t));
    for (int slice = 0; slice < l.slices; slice++)
      k.gather(l, slice, first, last, 0, w.tokens, w.codes, w.quantised, w.steps, partial[i].get() + slice * slice_sums,
               {w.y, l.h.out_features, false}, 0, int(std::min(engine_ahead(l), w.tokens - 1)));
  });
  workers.run([&](int thread) {
    for (int64_t token = w.tokens * thread / parts; token < w.tokens * (thread + 1) / parts; token++)
      for (int i = 0; i + 1 < parts; i++)
        for (int slice = 0; slice < l.slices && first_group(i) < first_group(i + 1); slice++) {
          const int width = std::min(l.h.slice, l.h.out_features - slice * l.h.slice);
          const int32_t* __restrict sums = partial[i].get() + slice * slice_sums + token * l.h.slice;
          float* __restrict y = w.y + token * l.h.out_features + slice * l.h.slice;
          for (int e = 0; e < width; e++) y[e] += float(sums[e]) * w.steps[token];
        }
  });
}

}  // namespace

std::vector<Rung> gather_rungs(const Shape& shape, const Isa& isa) {
  const auto data = std::make_shared<std::unique_ptr<Gather>>();  // made by the first rung that is prepared
  const int width = shape.width, fitting = round_up(width, 128) * 6 < width * 7 ? 128 : 64;  // packed.slice_width
  const Kernels& k = isa.shipped;
  const LadderKernels& own = isa.own;
  std::vector<Rung> rungs;
  typedef std::function<void(const GatherWork&)> Body;
  const auto add = [&](const char* name, const char* from, const char* change, Format format, int slice, const Body& body,
                       bool huge = false, int threads = 1) {
    rungs.push_back({"gather", name, from, change, k.name, threads, [=, &k] {
                       if (!*data) data->reset(new Gather(shape, k));
                       return (*data)->work(format, slice, huge, body);
                     }});
  };
  const auto dot = [&own](int groups_per_block, int64_t ahead) {
    return [=, &own](const GatherWork& w) {
      const int pass = std::min(groups_per_block, w.layer.groups);
      for (int slice = 0; slice < w.layer.slices; slice++)
        for (int g = 0; g < w.layer.groups; g += pass)
          own.dot(w, slice, g, std::min(g + pass, w.layer.groups), std::min(ahead, w.tokens - 1));
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
  add("table-order", "plain", "table by table over all tokens, the authors' order", Format::kFloat32, width, table_by_table);
  add("vectors", "plain", "vectors of the instruction set", Format::kFloat32, width, own.vectors);
  add("registers", "vectors", "64 outputs of a token at a time: sums stay in registers", Format::kFloat32, width,
      own.registers);
  add("slices", "registers", "tables cut into slices of 64 outputs: all tokens, then the next slice", Format::kFloat32, 64,
      own.slices);
  add("bfloat16", "slices", "bfloat16 rows", Format::kBFloat16, 64, own.slices);
  add("converted", "bfloat16", "int8 rows, converted to float32", Format::kInt8, 64, own.slices);
  add("dot", "converted", "four rows and scores of seven bits through the 8-bit dot product", Format::kInterleaved, 64,
      dot(kAll, 0));
  add("two-lines", "dot", "slices of 128 outputs: two lines of a row", Format::kInterleaved, 128, dot(kAll, 0));
  add("pass-1", "two-lines", "16 tables a pass", Format::kInterleaved, 128, dot(1, 0));
  add("pass-2", "two-lines", "32 tables a pass", Format::kInterleaved, 128, dot(2, 0));
  add("ahead-1", "two-lines", "rows asked for 1 token ahead", Format::kInterleaved, 128, dot(kAll, 1));
  add("ahead-2", "two-lines", "rows asked for 2 tokens ahead", Format::kInterleaved, 128, dot(kAll, 2));
  add("ahead-8", "two-lines", "rows asked for 8 tokens ahead", Format::kInterleaved, 128, dot(kAll, 8));
  add("huge-pages", "ahead-1", "tables on huge pages", Format::kInterleaved, 128, dot(kAll, 1), true);
  add("shipped", "huge-pages", "the shipped kernel, 128 rows ahead", Format::kInterleaved, fitting,
      [&k](const GatherWork& w) { shipped(k, w, 0, w.layer.slices, 0, w.tokens, engine_ahead(w.layer)); }, true);
  add("early", "shipped", "all rows of the batch asked for at once, into L2, before the first is read", Format::kInterleaved,
      fitting, [&k](const GatherWork& w) {
        for (int64_t token = 0; token < w.tokens; token++)
          k.prefetch_rows(w.layer, 0, w.layer.slices, 0, w.layer.groups, w.codes + token * w.layer.slots);
        shipped(k, w, 0, w.layer.slices, 0, w.tokens, 0);
      }, true);
  add("threads-tokens", "shipped", "threads share out tokens", Format::kInterleaved, fitting,
      threaded([&k, n](const GatherWork& w, Workers& t) {
        t.run([&](int i) {
          shipped(k, w, 0, w.layer.slices, w.tokens * i / n, w.tokens * (i + 1) / n, engine_ahead(w.layer));
        });
      }), true, n);
  add("threads-slices", "shipped", "threads share out slices of outputs", Format::kInterleaved, fitting,
      threaded([&k, n](const GatherWork& w, Workers& t) {
        t.run([&](int i) {
          shipped(k, w, w.layer.slices * i / n, w.layer.slices * (i + 1) / n, 0, w.tokens, engine_ahead(w.layer));
        });
      }), true, n);
  add("threads-tables", "shipped", "threads share out tables, and add their sums", Format::kInterleaved, fitting,
      threaded([&k, n, partial](const GatherWork& w, Workers& t) {
        while (int(partial->size()) < n) partial->emplace_back(size_t(w.tokens) * w.layer.slices * w.layer.h.slice);
        threads_over_tables(k, w, t, *partial);
      }), true, n);
  return rungs;
}

}  // namespace lookupffn
