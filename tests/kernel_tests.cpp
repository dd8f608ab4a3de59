// Tests of the kernels and the engine, without torch: kernel_tests [--long] [--seed N]. Exit code 1 and a line FAILED
// with the case where something is wrong.
//
// The reference below is double precision, written from the layer's definition (reference.py) and its packed form
// (layer.h), with a bound on how far float32 may be from it. The hash is discontinuous, so the parts of the layer are
// tested one by one, each on what the part before it gave; then forward() must give the very bits of the parts, run one
// token at a time, for every batch, tiling and number of threads. The scalar implementation is tested against the
// reference, the others that run here against both: the same bits wherever a part computes with integers, and in hash.
// Buffers end where a page begins that cannot be touched: reading or writing past one is caught in every build.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "dispatch.h"
#include "engine.h"

namespace lookupffn {
extern const Kernels* const kEmulatedTiles;  // emulated_tiles.cpp
}

using namespace lookupffn;

namespace {

constexpr double kUlp = 0x1p-24;  // half a unit in the last place: what one float32 operation may be off, relatively
constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

// ---- Tools -----------------------------------------------------------------------------------------------------------

char current_case[400] = "";  // named in every failure, and where the program crashes

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  char buffer[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

void set_case(const std::string& name) { snprintf(current_case, sizeof current_case, "%s", name.c_str()); }

// expect(condition, format, ...): arguments are only looked at where the condition is false.
#define EXPECT(condition, ...) \
  do {                         \
    if (!(condition)) throw std::runtime_error(text(__VA_ARGS__)); \
  } while (0)

struct sigaction previous_action[NSIG];

void on_crash(int signal) {
  const char *words[] = {"FAILED  crash in ", current_case, "\n"};
  for (const char* word : words)
    if (write(1, word, strlen(word)) < 0) break;
  sigaction(signal, &previous_action[signal], nullptr);  // then again, so that a sanitizer or a core tells where
}

struct Random {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int below(int n) { return int(next() % uint64_t(n)); }
  int between(int low, int high) { return low + below(high - low + 1); }
  bool one_in(int n) { return below(n) == 0; }
  float uniform() { return float(next() >> 40) * 0x1p-24f; }                                          // [0, 1)
  float normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0f) * 1.7320508f; }  // nearly
  template <typename T>
  T pick(std::initializer_list<T> list) { return list.begin()[below(int(list.size()))]; }
};

// Deals every entry of a list once before any comes again, so that few cases meet all awkward sizes.
class Deck {
 public:
  Deck(std::initializer_list<int> list) : cards_(list) {}
  int deal(Random& random) {
    if (next_ == 0)
      for (size_t i = cards_.size() - 1; i > 0; i--) std::swap(cards_[i], cards_[random.below(int(i) + 1)]);
    const int card = cards_[next_];
    next_ = (next_ + 1) % cards_.size();
    return card;
  }

 private:
  std::vector<int> cards_;
  size_t next_ = 0;
};

// Memory whose last byte lies before a page that may not be touched.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + mapped_ - page, page, PROT_NONE)) throw std::bad_alloc();
    data_ = base_ + mapped_ - page - bytes;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }
  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_, mapped_;
  uint8_t *base_, *data_;
};

uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
bool same_bits(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }  // any two NaN are the same
float from_bf16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
uint16_t to_bf16(float f) {  // to nearest, ties to even
  return f != f ? 0x7fc0 : uint16_t((bits_of(f) + 0x7fff + (bits_of(f) >> 16 & 1)) >> 16);
}

// The thread's floating-point control and status registers.
#if defined(__SSE2__)
uint64_t float_state() { return _mm_getcsr(); }
void set_float_state(uint64_t state) { _mm_setcsr(unsigned(state)); }
constexpr uint64_t kFlushing = 0x9fc0, kOddState = 0x5f91;  // odd: rounds up, two flags are up
#elif defined(__aarch64__)
uint64_t float_state() {
  uint64_t control, status;
  __asm__ volatile("mrs %0, fpcr\n mrs %1, fpsr" : "=r"(control), "=r"(status));
  return control | status << 32;
}
void set_float_state(uint64_t state) {
  __asm__ volatile("msr fpcr, %0\n msr fpsr, %1" : : "r"(state & 0xffffffff), "r"(state >> 32));
}
constexpr uint64_t kFlushing = uint64_t(1) << 24, kOddState = uint64_t(1) << 22 | uint64_t(0x11) << 32;
#else
uint64_t float_state() { return 0; }
void set_float_state(uint64_t) {}
constexpr uint64_t kFlushing = 0, kOddState = 0;
#endif

class FloatMode {  // the engine's is kFlushing
 public:
  explicit FloatMode(uint64_t state) : before_(float_state()) { set_float_state(state); }
  ~FloatMode() { set_float_state(before_); }

 private:
  uint64_t before_;
};

// Threads of an odd state of their own, which the engine must leave as it was; chunks as unequal as torch's may be.
std::atomic<bool> state_changed{false};

Threads threads_of(int count) {
  return {count, [count](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
            const int64_t each = (n + count - 1) / count;
            std::vector<std::thread> threads;
            for (int64_t begin = 0; begin < n; begin += each)
              threads.emplace_back([&body, begin, end = std::min(n, begin + each)] {
                set_float_state(kOddState);
                body(begin, end);
                if (float_state() != kOddState) state_changed = true;
              });
            for (std::thread& thread : threads) thread.join();
          }};
}

std::vector<const Kernels*> running_here() {  // scalar first, and last the loops of AMX on tiles that are emulated
  int count;
  const Implementation* all = implementations(&count);
  std::vector<const Kernels*> kernels;
  for (int i = count - 1; i >= 0; i--)
    if (all[i].runs_here()) kernels.push_back(all[i].kernels);
  kernels.push_back(kEmulatedTiles);
  return kernels;
}

// ---- Layers ----------------------------------------------------------------------------------------------------------

struct Case {
  WeightType weights;
  TableType tables;
  int in_features, out_features, num_tables, code_bits, reads, stages, repeats, blocks, block_in, block_out, slice, tokens;
  bool x_bf16, y_bf16;

  std::string name() const {
    const char* types[][3] = {{"float32", "int16", "int8"}, {"float32", "bfloat16", "int8"}};
    return text("%s weights, %s tables, D %d, E %d, T %d, tau %d, reads %d, stages %d, R %d, n %d, blocks %d to %d, "
                "slices of %d, %d tokens, x %s, y %s", types[0][int(weights)], types[1][int(tables)], in_features,
                out_features, num_tables, code_bits, reads, stages, repeats, blocks, block_in, block_out, slice, tokens,
                x_bf16 ? "bfloat16" : "float32", y_bf16 ? "bfloat16" : "float32");
  }
};

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Where layer.h says that a number lies.
size_t weight_index(const PackedHeader& h, int stage, int n, int o, int i) {  // `stage` counts over all repeats
  const int word = 4 / int(element_size(h.weight_type)), words = h.block_in / word;
  const int panel = o / 16, together = h.block_out >= 64 ? 4 : h.block_out / 16;  // panels whose words come in turn
  const size_t block = (size_t(stage) * h.blocks + n) * (h.block_out / 16);
  const size_t at = (block + panel / together * together) * words + i / word * together + panel % together;
  return (at * 16 + o % 16) * word + i % word;
}
size_t table_index(const PackedHeader& h, int table, int row, int e) {
  const int p = e % h.slice;
  int at = p;
  if (h.table_type == TableType::kInt8) at = p / 64 * 64 + p % 16 / 4 * 16 + p % 64 / 16 * 4 + p % 4;
  if (h.table_type == TableType::kBFloat16) at = p / 32 * 32 + p % 16 * 2 + p % 32 / 16;
  return ((size_t(e / h.slice) * h.num_tables + table) * h.table_rows + row) * h.slice + at;
}

double weight(const Layer& l, int stage, int n, int o, int i) {
  const size_t at = weight_index(l.h, stage, n, o, i);
  if (l.h.weight_type == WeightType::kInt8) return reinterpret_cast<const int8_t*>(l.weights)[at];
  if (l.h.weight_type == WeightType::kInt16) return reinterpret_cast<const int16_t*>(l.weights)[at];
  return reinterpret_cast<const float*>(l.weights)[at];
}
double table_entry(const Layer& l, int table, int row, int e) {
  const size_t at = table_index(l.h, table, row, e);
  if (l.h.table_type == TableType::kInt8) return reinterpret_cast<const int8_t*>(l.tables)[at];
  if (l.h.table_type == TableType::kBFloat16) return from_bf16(reinterpret_cast<const uint16_t*>(l.tables)[at]);
  return reinterpret_cast<const float*>(l.tables)[at];
}

// A random layer in packed bytes. What lies behind the last table or output is NaN where the format leaves it open.
struct Packed {
  std::unique_ptr<Guarded> bytes;
  Layer l;
};

Packed pack(const Case& c, Random& random) {
  const bool projects = c.stages > 0, integer = projects && c.weights != WeightType::kFloat32;
  const bool int8_tables = c.tables == TableType::kInt8;
  const bool negated = int8_tables && c.reads > 1 && c.code_bits < 3;
  const int rows = 1 << c.code_bits, codes = c.num_tables * c.code_bits, slices = (c.out_features + c.slice - 1) / c.slice;
  PackedHeader h = {{}, kFormatVersion, c.in_features, c.out_features, c.num_tables, c.code_bits, c.reads, c.stages,
                    c.repeats, c.blocks, c.block_in, c.block_out, negated ? 2 * rows : rows, c.weights, c.tables, c.slice,
                    0, c.stages == 4 ? 0.7f : 1.0f, 0, 0, {}};
  memcpy(h.magic, "LOOKUPFF", 8);
  if (projects && c.block_in == c.block_out && random.one_in(2)) h.residual = 0.3f;

  const size_t stages = size_t(c.repeats) * c.stages, outputs = stages * c.blocks * c.block_out;
  const size_t table_rows = size_t(slices) * c.num_tables * h.table_rows;
  const size_t size[kSections] = {outputs * c.block_in * element_size(c.weights), integer ? outputs * 4 : 0,
                                  integer && c.weights == WeightType::kInt8 ? outputs * 4 : 0, integer ? stages * 4 : 0,
                                  projects ? size_t(c.repeats) * c.blocks * c.block_out * 4 : 0,
                                  table_rows * c.slice * element_size(c.tables),
                                  int8_tables ? round_up(c.num_tables, 16) * 4 : 0, size_t(slices) * c.slice * 4};
  h.total_bytes = round_up(sizeof h, 64);
  for (int s = 0; s < kSections; s++) {
    h.offset[s] = h.total_bytes;
    h.total_bytes += round_up(size[s], 64);
  }
  Packed p = {std::make_unique<Guarded>(h.total_bytes), {}};
  uint8_t* const data = p.bytes->data();
  memcpy(data, &h, sizeof h);
  const auto floats = [&](Section s) { return reinterpret_cast<float*>(data + h.offset[s]); };

  const float deviation = projects ? 1 / std::sqrt(float(c.block_in) * c.blocks) : 0;  // a stage keeps the size of x
  const int most = c.weights == WeightType::kInt8 ? 128 : random.pick({32767, 3000, 127});
  const size_t weights = outputs * c.block_in;
  for (size_t i = 0; i < weights; i++) {
    const bool extreme = random.one_in(16);
    const int whole = extreme ? (random.one_in(2) ? -most : most - 1) : random.between(-most, most - 1);
    if (c.weights == WeightType::kFloat32) floats(kWeights)[i] = deviation * random.normal();
    if (c.weights == WeightType::kInt16) reinterpret_cast<int16_t*>(data + h.offset[kWeights])[i] = int16_t(whole);
    if (c.weights == WeightType::kInt8) reinterpret_cast<int8_t*>(data + h.offset[kWeights])[i] = int8_t(whole);
  }
  for (size_t i = 0; integer && i < outputs; i++)
    floats(kWeightScales)[i] = deviation * 1.7f / float(most) * (0.5f + random.uniform());
  for (size_t i = 0; i < stages * integer; i++) floats(kLevels)[i] = 1;  // for now
  for (int i = 0; projects && i < c.repeats * c.blocks * c.block_out; i++)
    floats(kCodeBias)[i] = i < codes ? 0.1f * random.normal() : kNaN;

  for (size_t i = 0; i < table_rows * c.slice; i++) {
    if (c.tables == TableType::kFloat32) floats(kTables)[i] = random.uniform() - 0.5f;
    if (c.tables == TableType::kBFloat16)
      reinterpret_cast<uint16_t*>(data + h.offset[kTables])[i] = to_bf16(random.uniform() - 0.5f);
    if (int8_tables) {
      const uint64_t r = random.next();
      data[h.offset[kTables] + i] = r & 0xf00 ? uint8_t(r) : r & 0x1000 ? 127 : 128;  // every 16th is an extreme
    }
  }
  for (int s = 0; negated && s < slices; s++)
    for (int t = 0; t < c.num_tables; t++)
      for (int i = 0; i < rows * c.slice; i++) {
        uint8_t* first = data + h.offset[kTables] + table_index(h, t, 0, c.slice * s) + i;
        if (*first == 128) *first = 129;  // -128 has no negative
        first[rows * c.slice] = uint8_t(-*first);
      }
  for (int i = 0; int8_tables && i < c.num_tables; i++)
    floats(kTableScales)[i] = random.one_in(20) ? 0.0f : (0.5f + random.uniform()) / 128;
  for (int i = 0; i < slices * c.slice; i++) floats(kBias)[i] = i < c.out_features ? random.normal() : kNaN;

  std::string wrong = parse_layer(data, h.total_bytes, &p.l);
  EXPECT(wrong.empty(), "parse_layer refuses a layer: %s", wrong.c_str());
  for (int stage = 0; integer && stage < int(stages); stage++) {
    double largest = 1;  // sum of an output's magnitudes
    for (int n = 0; n < c.blocks; n++)
      for (int o = 0; o < c.block_out; o++) {
        double sum = 0, magnitude = 0;
        for (int i = 0; i < c.block_in; i++) {
          sum += weight(p.l, stage, n, o, i);
          magnitude += std::abs(weight(p.l, stage, n, o, i));
        }
        largest = std::max(largest, magnitude);
        if (c.weights == WeightType::kInt8)
          reinterpret_cast<int32_t*>(data + h.offset[kWeightOffsets])[(stage * c.blocks + n) * c.block_out + o] = -128 * int(sum);
      }
    const double levels = c.weights == WeightType::kInt8 ? 127 : std::min(32767.0, std::floor((0x1p31 - 1) / largest));
    floats(kLevels)[stage] = random.one_in(4) ? std::floor(float(levels) * (0.5f + 0.5f * random.uniform())) : float(levels);
  }
  wrong = parse_layer(data, h.total_bytes, &p.l);
  EXPECT(wrong.empty(), "parse_layer refuses a layer: %s", wrong.c_str());
  return p;
}

// Rows of x that end at a guard page, as the engine gets them and as floats.
struct Input {
  std::unique_ptr<Guarded> memory;
  Rows rows;
  std::vector<std::vector<float>> values;  // [token][feature]

  void set(int token, int i, float value) {
    const size_t at = size_t(token) * size_t(rows.stride) + size_t(i);
    if (rows.bfloat16) {
      const uint16_t narrow = uint16_t(bits_of(value) >> 16);
      static_cast<uint16_t*>(rows.data)[at] = narrow;
      value = from_bf16(narrow);  // not with ?: below, which GCC 12 gets wrong at -O1
    } else {
      static_cast<float*>(rows.data)[at] = value;
    }
    values[token][i] = value;
  }
};

Input make_input(int tokens, int features, bool bfloat16, Random& random) {
  const int stride = features + random.pick({0, 0, 1, 3, 16});
  const size_t elements = tokens ? size_t(tokens - 1) * stride + features : 0;
  Input in = {std::make_unique<Guarded>(elements * (bfloat16 ? 2 : 4)), {}, {}};
  in.rows = {in.memory->data(), stride, bfloat16};
  in.values.assign(tokens, std::vector<float>(features));
  for (int t = 0; t < tokens; t++) {
    const float scale = random.pick({1.0f, 1.0f, 1.0f, 30.0f, 1e-3f});
    const bool zero = random.one_in(12);
    for (int i = 0; i < features; i++) in.set(t, i, zero ? 0.0f : scale * random.normal());
  }
  return in;
}

// Rows of y among bytes that must stay as they are.
class Output {
 public:
  Output(int64_t tokens, int features, bool bfloat16, Random& random)
      : tokens_(tokens), features_(features), size_(bfloat16 ? 2 : 4), before_(random.below(70)),
        memory_((before_ + size_t(tokens) * (features + kMargin)) * size_) {
    rows = {memory_.data() + before_ * size_, features, bfloat16};
    rows.stride += random.pick({0, 0, 1, 5, kMargin});
    memset(memory_.data(), kUntouched, memory_.size());
  }

  float at(int64_t token, int e) const {
    const int64_t i = token * rows.stride + e;
    return rows.bfloat16 ? from_bf16(static_cast<uint16_t*>(rows.data)[i]) : static_cast<float*>(rows.data)[i];
  }
  // The row holds the float32 numbers `expected`, rounded once more for bfloat16.
  void check(int64_t token, const float* expected, const std::string& what) const {
    for (int e = 0; e < features_; e++) {
      const float value = rows.bfloat16 ? from_bf16(to_bf16(expected[e])) : expected[e];
      EXPECT(same_bits(at(token, e), value), "%s: y[%ld, %d] is %.9g, not %.9g", what.c_str(), long(token), e,
             double(at(token, e)), double(value));
    }
  }
  void check_margins(const std::string& what) const {
    const uint8_t* const data = memory_.data();
    const size_t row = size_t(features_) * size_, stride = size_t(rows.stride) * size_, start = before_ * size_;
    for (size_t i = 0; i < memory_.size(); i++) {
      const bool inside = i >= start && (i - start) / stride < size_t(tokens_) && (i - start) % stride < row;
      EXPECT(inside || data[i] == kUntouched, "%s: writes outside y, at byte %ld", what.c_str(), long(i) - long(start));
    }
  }

  Rows rows;

 private:
  static constexpr int kMargin = 16, kUntouched = 0xa5;
  int64_t tokens_;
  int features_;
  size_t size_, before_;
  Guarded memory_;
};

// ---- Reference -------------------------------------------------------------------------------------------------------

struct Approx {
  double value, error;  // float32 arithmetic, in any order and with or without fma, is about this far from it
};

// z of one token with float32 weights. Roundings add up like the steps of a random walk: a bound that let all of them
// add up in one direction would be thousands of times wider after four stages, and hide faults.
std::vector<Approx> reference_z(const Layer& l, const std::vector<float>& x) {
  const PackedHeader& h = l.h;
  const int codes = h.num_tables * h.code_bits;
  std::vector<Approx> z;
  if (h.stages == 0)
    for (float value : x) z.push_back({value, 0});
  for (int r = 0; r < h.repeats && h.stages > 0; r++) {
    std::vector<Approx> y(l.width_in, Approx{0, 0});
    for (size_t i = 0; i < x.size(); i++) y[i].value = x[i];
    for (int stage = r * h.stages; stage < (r + 1) * h.stages; stage++) {
      std::vector<Approx> out(l.width_out);
      for (int n = 0; n < h.blocks; n++)
        for (int o = 0; o < h.block_out; o++) {
          double sum = 0, variance = 0, squares = 0;
          for (int i = 0; i < h.block_in; i++) {
            const double w = weight(l, stage, n, o, i);
            const Approx& a = y[n * h.block_in + i];
            sum += w * a.value;
            variance += w * w * a.error * a.error;
            squares += w * w * a.value * a.value;
          }
          out[n * h.block_out + o] = {sum, std::sqrt(variance + kUlp * kUlp * (0.5 * h.block_in + 1) * squares)};
        }
      y = out;
      for (int half = 1; half < h.blocks; half *= 2)
        for (int n = 0; n < h.blocks; n++)
          for (int i = 0; i < h.block_out && !(n & half); i++) {
            Approx &a = y[n * h.block_out + i], &b = y[(n + half) * h.block_out + i];
            const double sum = a.value + b.value, difference = a.value - b.value, error = std::hypot(a.error, b.error);
            a = {sum, std::hypot(error, kUlp * sum)};
            b = {difference, std::hypot(error, kUlp * difference)};
          }
    }
    for (int i = 0; i < l.width_out && int(z.size()) < codes; i++) {
      const double product = h.scale * y[i].value, bias = l.code_bias[z.size()];
      const double straight = h.residual != 0 && i < int(x.size()) ? h.residual * double(x[i]) : 0;
      z.push_back({product + straight + bias,
                   h.scale * y[i].error + kUlp * (2 * std::abs(product) + 2 * std::abs(straight) + std::abs(bias))});
    }
  }
  return z;
}

// z of one token with integer weights: here every rounding is part of the definition, so there is one right answer.
__attribute__((noinline)) std::vector<float> exact_z(const Layer& l, const std::vector<float>& x) {
  const PackedHeader& h = l.h;
  std::vector<float> z;
  for (int r = 0; r < h.repeats; r++) {
    std::vector<float> y(l.width_in, 0.0f);
    std::copy(x.begin(), x.end(), y.begin());
    float unit = 0;  // what one of y is worth
    for (int stage = r * h.stages; stage < (r + 1) * h.stages; stage++) {
      float largest = 0;
      for (float value : y) largest = std::max(largest, std::fabs(value));
      const bool zero = largest < 1e-30f;
      const float per_unit = zero ? 0 : l.levels[stage] / largest, step = zero ? 0 : largest / l.levels[stage];
      unit = stage == r * h.stages ? step : unit * step;
      std::vector<int> q;
      for (float value : y) q.push_back(int(std::nearbyint(value * per_unit)));
      y.assign(l.width_out, 0);
      for (int n = 0; n < h.blocks; n++)
        for (int o = 0; o < h.block_out; o++) {
          int64_t sum = 0;
          for (int i = 0; i < h.block_in; i++) sum += int(weight(l, stage, n, o, i)) * int64_t(q[n * h.block_in + i]);
          const size_t at = n * h.block_out + o;
          y[at] = float(sum) * l.weight_scales[size_t(stage) * l.width_out + at];
        }
      for (int half = 1; half < h.blocks; half *= 2)
        for (int n = 0; n < h.blocks; n++)
          for (int i = 0; i < h.block_out && !(n & half); i++) {
            const float a = y[n * h.block_out + i], b = y[(n + half) * h.block_out + i];
            y[n * h.block_out + i] = a + b;
            y[(n + half) * h.block_out + i] = a - b;
          }
    }
    const float factor = h.scale * unit;
    for (int i = 0; i < l.width_out; i++) {
      float value = y[i] * factor;
      if (h.residual != 0) value = value + (i < int(x.size()) ? x[i] : 0) * h.residual;
      z.push_back(value + l.code_bias[z.size()]);
    }
  }
  z.resize(h.num_tables * h.code_bits);
  return z;
}

// The cells that hash() must choose for one table: the sign pattern, then the flips of the bits of least |z|. Of equal
// bits the first goes first; two flips go before a third that costs as much. A NaN or infinite |z| is never flipped.
__attribute__((noinline)) void nearest_cells(const float* z, int bits, int reads, uint16_t* cells) {
  struct Flip {
    float cost;
    int cells;
  };
  std::vector<Flip> flips;
  int code = 0;
  for (int j = 0; j < bits; j++) {
    const int bit = 1 << (bits - 1 - j);
    if (z[j] > 0) code |= bit;
    if (std::fabs(z[j]) < kInfinity) flips.push_back({std::fabs(z[j]), bit});
  }
  std::stable_sort(flips.begin(), flips.end(), [](const Flip& a, const Flip& b) { return a.cost < b.cost; });
  while (flips.size() < 3) flips.push_back({kInfinity, 0});
  const float pair = flips[0].cost + flips[1].cost;
  if (reads == 4 && !(flips[2].cost < pair)) flips[2] = {pair, flips[0].cells | flips[1].cells};
  cells[0] = uint16_t(code);
  for (int n = 1; n < reads; n++) cells[n] = uint16_t(code ^ flips[n - 1].cells);
}

// One table's cells and scores by looking at every cell: reference.nearest_cells, for finite z.
void check_cells(const float* z, int bits, int reads, const uint16_t* cells, const float* scores) {
  std::vector<double> inner = {0};  // <z, S_i> of every cell
  double total = 0;
  for (int j = 0; j < bits; j++) {
    total += std::abs(double(z[j]));
    std::vector<double> longer;
    for (double sum : inner) longer.insert(longer.end(), {sum - double(z[j]), sum + double(z[j])});
    inner = longer;
  }
  double partition = 0;
  for (double sum : inner) partition += std::exp(sum - total);
  std::vector<double> best = inner;
  std::partial_sort(best.begin(), best.begin() + reads, best.end(), [](double a, double b) { return a > b; });
  for (int n = 0; n < reads; n++) {
    for (int m = 0; m < n; m++) EXPECT(cells[m] != cells[n], "cell %d is read twice", cells[n]);
    EXPECT(cells[n] < inner.size(), "there is no cell %d", cells[n]);
    const double sum = inner[cells[n]], cost = (total - sum) / 2;
    EXPECT(std::abs(sum - best[n]) <= 4 * bits * kUlp * total, "cell %d is not the %d. nearest: %.9g, not %.9g", cells[n],
           n + 1, sum, best[n]);
    const double probability = std::exp(sum - total) / partition;
    const double bound = (8 * bits + 16 + 8 * cost) * kUlp * total * probability + 0x1p-120 * (1 + total);
    EXPECT(std::abs(scores[n] - sum * probability) <= bound, "the score of cell %d is %.9g, not %.9g +- %.2g", cells[n],
           double(scores[n]), sum * probability, bound);
  }
}

// ---- The parts of a layer, run one token at a time ---------------------------------------------------------------------

struct Parts {
  std::vector<float> z;           // [tokens][z_stride]
  std::vector<uint16_t> cells;    // [tokens][slots] as hash gave them
  std::vector<uint16_t> codes;    // with the sign that quantise_scores adds
  std::vector<float> scores;      // [tokens][slots] as hash gave them
  std::vector<uint8_t> quantised;
  std::vector<float> steps;       // [tokens]
  std::vector<float> y;           // [tokens][E]
};

void project_part(const Kernels& k, const Layer& l, const Input& in, int tokens, Parts* p) {
  p->z.assign(size_t(tokens) * l.z_stride, kNaN);
  std::vector<float> rows(l.width_in), sums[2], units(2);
  std::vector<uint8_t> first(l.width_in * 2), activations(l.width_in * 2);
  for (auto& s : sums) s.resize(l.width_out);
  const ProjectScratch scratch = {rows.data(), {sums[0].data(), sums[1].data()}, first.data(), activations.data(),
                                  {&units[0], &units[1]}};
  for (int t = 0; t < tokens; t++)
    k.project(l, in.rows, t, 1, 0, l.h.repeats, &p->z[size_t(t) * l.z_stride], scratch);
}

void hash_part(const Kernels& k, const Layer& l, int tokens, Parts* p) {  // and quantise_scores
  const size_t slots = size_t(tokens) * l.slots;
  p->cells.assign(slots, 0xffff);
  p->scores.assign(slots, kNaN);
  p->quantised.assign(slots, 0xff);
  p->steps.assign(tokens, kNaN);
  for (int t = 0; t < tokens; t++)
    k.hash(l, 0, l.groups, &p->z[size_t(t) * l.z_stride], &p->cells[size_t(t) * l.slots], &p->scores[size_t(t) * l.slots]);
  p->codes = p->cells;
  std::vector<float> scores = p->scores;
  for (int t = 0; t < tokens && l.h.table_type == TableType::kInt8; t++) {
    const size_t at = size_t(t) * l.slots;
    p->steps[t] = k.quantise_scores(l, &scores[at], &p->codes[at], &p->quantised[at]);
  }
}

void gather_part(const Kernels& k, const Layer& l, int tokens, Parts* p) {
  p->y.assign(size_t(tokens) * l.h.out_features, 0);
  const Rows y = {p->y.data(), l.h.out_features, false};
  const void* scores = p->scores.data();
  if (l.h.table_type == TableType::kInt8) scores = p->quantised.data();
  for (int t = 0; t < tokens; t++)
    for (int slice = 0; slice < l.slices; slice++)
      k.gather(l, slice, 0, l.groups, t, t + 1, p->codes.data(), scores, p->steps.data(), nullptr, y, 0, t % 3);
}

Parts run_parts(const Kernels& k, const Layer& l, const Input& in, int tokens) {
  FloatMode mode(kFlushing);
  Parts p;
  project_part(k, l, in, tokens, &p);
  hash_part(k, l, tokens, &p);
  gather_part(k, l, tokens, &p);
  return p;
}

template <typename T>
void check_equal(const char* what, const std::vector<T>& a, const std::vector<T>& b) {
  EXPECT(a.size() == b.size(), "%s: %zu numbers, not %zu", what, a.size(), b.size());
  for (size_t i = 0; i < a.size(); i++)
    EXPECT(same_bits(float(a[i]), float(b[i])), "%s differs from scalar's at %zu: %.9g, not %.9g", what, i, double(a[i]),
           double(b[i]));
}

// z of float32 weights against the reference; returns the largest distance in units of what is expected of float32.
double check_z(const std::vector<Approx>& reference, const float* z) {
  double most = 0;
  for (size_t i = 0; i < reference.size(); i++) {
    const double off = std::abs(z[i] - reference[i].value), error = reference[i].error + 1e-37;
    EXPECT(off <= 4 * error, "z[%zu] is %.9g, not %.9g +- %.2g", i, double(z[i]), reference[i].value, 4 * error);
    most = std::max(most, off / error);
  }
  return most;
}

void check_hash(const Layer& l, const Parts& p, int t) {
  const int bits = l.h.code_bits, reads = l.h.reads;
  for (int table = 0; table < l.groups * 16; table++) {
    const float* z = &p.z[size_t(t) * l.z_stride + size_t(table) * bits];
    uint16_t cells[kMaxReads], expected[kMaxReads];
    float scores[kMaxReads];
    for (int n = 0; n < reads; n++) {
      const size_t slot = size_t(t) * l.slots + (table / 16 * reads + n) * 16 + table % 16;
      cells[n] = p.cells[slot];
      scores[n] = p.scores[slot];
      EXPECT(table < l.h.num_tables || (cells[n] == 0 && scores[n] == 0), "padding has cell %d and score %g", cells[n],
             double(scores[n]));
    }
    if (table >= l.h.num_tables) continue;
    nearest_cells(z, bits, reads, expected);
    for (int n = 0; n < reads; n++)
      EXPECT(cells[n] == expected[n], "table %d reads cell %d, not %d", table, cells[n], expected[n]);
    if (bits <= 10 || table % 4 == 0) check_cells(z, bits, reads, cells, scores);
  }
}

void check_quantised(const Layer& l, const Parts& p, int t) {
  const size_t at = size_t(t) * l.slots;
  std::vector<float> s(l.slots);
  float largest = 0;
  for (int i = 0; i < l.slots; i++) {
    s[i] = p.scores[at + i] * l.table_scales[i / (16 * l.h.reads) * 16 + i % 16];
    largest = std::max(largest, std::fabs(s[i]));
  }
  const float step = largest < 1e-30f ? 0.0f : largest / 127;
  EXPECT(same_bits(p.steps[t], step), "the step is %.9g, not %.9g", double(p.steps[t]), double(step));
  for (int i = 0; i < l.slots; i++) {
    const double exact = step ? std::abs(double(s[i])) / largest * 127 : 0;
    EXPECT(std::abs(p.quantised[at + i] - exact) <= 0.5 + 1e-4, "score %d is %d, not %.9g", i, p.quantised[at + i], exact);
    const int sign = s[i] < 0 && l.h.table_rows >> l.h.code_bits == 2 ? 1 << l.h.code_bits : 0;
    EXPECT(p.codes[at + i] == (p.cells[at + i] | sign), "code %d is %d, not %d", i, p.codes[at + i], p.cells[at + i] | sign);
    EXPECT(sign || s[i] >= 0, "score %d is %g, and there are no negated rows", i, double(s[i]));
  }
}

void check_gather(const Layer& l, const Parts& p, int t, const float* y) {
  const bool int8 = l.h.table_type == TableType::kInt8;
  const int reads = l.h.reads;
  for (int e = 0; e < l.h.out_features; e++) {
    double sum = 0, magnitude = 0;
    for (int table = 0; table < l.h.num_tables; table++)
      for (int n = 0; n < reads; n++) {
        const size_t slot = size_t(t) * l.slots + (table / 16 * reads + n) * 16 + table % 16;
        const double product = (int8 ? p.quantised[slot] : p.scores[slot]) * table_entry(l, table, p.codes[slot], e);
        sum += product;
        magnitude += std::abs(product);
      }
    if (int8) sum *= p.steps[t];
    const double exact = sum + l.bias[e];
    const double off = int8 ? 2 * std::abs(sum) : (l.h.num_tables * reads + 1) * magnitude;
    const double bound = kUlp * (off + std::abs(exact)) * (1 + 1e-6) + 1e-37;
    EXPECT(std::abs(y[e] - exact) <= bound, "y[%d, %d] is %.9g, not %.9g +- %.2g", t, e, double(y[e]), exact, bound);
  }
}

// ---- Groups of tests ---------------------------------------------------------------------------------------------------

struct Options {
  bool is_long = false;
  uint64_t seed = 1;
};

Tiling random_tiling(Random& random) {
  return {random.pick({1, 2, 3, 5, 7, 8, 24, 48, 96, 1000}), random.pick({1, 1, 2, 1000}), random.pick({0, 1, 100, 5000}),
          random.pick({0, 0, 0, 4, 1000})};
}

// forward() on tokens [begin, end) must give the rows of `y`, and leave all else as it was. With a poisoned token, this
// row must not be finite anywhere.
void check_forward(const Kernels& k, const Layer& l, const Input& in, int begin, int end, bool y_bf16,
                   const std::vector<float>& y, Random& random, int poisoned = -1) {
  const Tiling tiling = random_tiling(random);
  const int count = random.pick({1, 1, 2, 3, 5});
  const std::string what = text("%s, tokens %d to %d, tile %d, %d groups a pass, %d rows ahead, serial to %d, %d threads",
                                k.name, begin, end, tiling.tile_tokens, tiling.groups_a_pass, tiling.prefetch_rows,
                                tiling.serial_tokens, count);
  Output out(end - begin, l.h.out_features, y_bf16, random);
  Rows x = in.rows;
  x.data = static_cast<uint8_t*>(x.data) + begin * x.stride * (x.bfloat16 ? 2 : 4);
  if (random.one_in(8)) {  // timed
    StageSeconds seconds;
    forward(k, l, x, out.rows, end - begin, tiling, threads_of(count), &seconds);
    EXPECT(seconds.project >= 0 && seconds.hash >= 0 && seconds.gather >= 0, "%s: negative seconds", what.c_str());
  } else {
    FloatMode mode(kOddState);
    forward(k, l, x, out.rows, end - begin, tiling, threads_of(count));
    if (float_state() != kOddState) state_changed = true;
  }
  EXPECT(!state_changed, "%s: the caller's floating-point state is not what it was", what.c_str());
  for (int t = begin; t < end; t++) {
    if (t != poisoned) out.check(t - begin, &y[size_t(t) * l.h.out_features], what);
    for (int e = 0; t == poisoned && e < l.h.out_features; e++)
      EXPECT(!std::isfinite(out.at(t - begin, e)), "%s: y of the token that is not finite is", what.c_str());
  }
  out.check_margins(what);
}

struct CaseSource {
  Deck tables{1, 2, 3, 7, 15, 16, 17, 33}, bits{1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13, 14, 15, 16};
  Deck outs{1, 3, 63, 64, 65, 130}, stages{0, 1, 4, 4}, reads{1, 2, 3, 4}, blocks{1, 2, 4, 8, 16, 32}, widths{16, 32, 64};
  Deck dense{1, 3, 15, 16, 17, 31, 64, 100, 130, 257}, tokens{0, 1, 2, 3, 5, 6, 7, 8, 23, 24, 25, 97};

  Case draw(int types, Random& random) {
    Case c = {};
    c.weights = WeightType(types % 3);
    c.tables = TableType(types / 3 % 3);
    c.num_tables = tables.deal(random);
    c.code_bits = bits.deal(random);
    c.out_features = outs.deal(random);
    c.stages = stages.deal(random);
    c.reads = std::min(reads.deal(random), 1 << c.code_bits);
    c.tokens = tokens.deal(random);
    c.slice = random.pick({64, 128});
    c.x_bf16 = random.one_in(3);
    c.y_bf16 = random.one_in(3);
    while (c.num_tables > 1 && size_t(c.num_tables) << c.code_bits > 1 << 14) c.num_tables /= 2;
    if (c.code_bits > 12) c.out_features = std::min(c.out_features, 65);
    const int codes = c.num_tables * c.code_bits;
    c.repeats = c.blocks = 1;
    if (c.stages == 0) {
      c.in_features = codes;
    } else if (c.stages == 1 && random.below(3)) {  // dense
      c.in_features = dense.deal(random);
      c.block_in = int(round_up(c.in_features, 16));
      c.block_out = int(round_up(codes, codes > 48 ? 64 : 16));
    } else {
      c.blocks = blocks.deal(random);
      c.block_in = c.block_out = widths.deal(random);
      const int width = c.blocks * c.block_in;
      c.in_features = std::max(1, width - random.pick({0, 0, 1, 15, width / 2 - 1}));
      c.repeats = (codes + width - 1) / width + random.one_in(8);
    }
    const int64_t products = int64_t(c.repeats) * c.stages * c.blocks * c.block_in * c.block_out;
    while (c.tokens > 8 && products * c.tokens > 3000000) c.tokens /= 2;
    return c;
  }
};

std::string test_layers(const Options& options) {
  Random random = {options.seed};
  CaseSource source;
  const std::vector<const Kernels*> implementations = running_here();
  const Kernels& scalar = *implementations[0];
  const int cases = options.is_long ? 9 * 1000 : 9 * 60, checked = options.is_long ? 24 : 6;
  double most = 0;
  for (int i = 0; i < cases; i++) {
    const Case c = source.draw(i, random);
    set_case(c.name());
    const Packed packed = pack(c, random);
    const Layer& l = packed.l;
    Input in = make_input(c.tokens, c.in_features, c.x_bf16, random);
    const bool integer = c.stages == 0 || c.weights != WeightType::kFloat32;
    std::vector<int> tokens;  // for which the reference is computed
    for (int t = 0; t < c.tokens && t < checked; t++) tokens.push_back(c.tokens <= checked ? t : random.below(c.tokens));
    std::vector<std::vector<Approx>> z;
    for (size_t j = 0; j < tokens.size() && !integer; j++) z.push_back(reference_z(l, in.values[tokens[j]]));

    const Parts expected = run_parts(scalar, l, in, c.tokens);
    for (int t : tokens) {
      FloatMode mode(kFlushing);
      const std::vector<float> exact = !integer ? std::vector<float>() : c.stages ? exact_z(l, in.values[t]) : in.values[t];
      for (size_t i = 0; i < exact.size(); i++) {
        const float value = expected.z[size_t(t) * l.z_stride + i];
        EXPECT(same_bits(value, exact[i]), "z[%d, %zu] is %.9g, not %.9g", t, i, double(value), double(exact[i]));
      }
      check_hash(l, expected, t);
      if (c.tables == TableType::kInt8) check_quantised(l, expected, t);
    }
    for (const Kernels* k : implementations) {
      set_case(std::string(k->name) + ", " + c.name());
      const Parts own = run_parts(*k, l, in, c.tokens);
      for (size_t j = 0; j < z.size(); j++)
        most = std::max(most, check_z(z[j], &own.z[size_t(tokens[j]) * l.z_stride]));
      if (integer) {
        for (int t = 0; t < c.tokens; t++)
          for (int j = 0; j < c.num_tables * c.code_bits; j++)
            EXPECT(same_bits(own.z[size_t(t) * l.z_stride + j], expected.z[size_t(t) * l.z_stride + j]),
                   "z[%d, %d] differs from scalar's", t, j);
        check_equal("the codes", own.codes, expected.codes);
        if (c.tables == TableType::kInt8) check_equal("y", own.y, expected.y);
      }
      Parts same;  // of what scalar gives to hash and gather
      same.z = expected.z;
      {
        FloatMode mode(kFlushing);
        hash_part(*k, l, c.tokens, &same);
        check_equal("cells for the same z", same.cells, expected.cells);
        check_equal("codes for the same z", same.codes, expected.codes);
        check_equal("scores for the same z", same.scores, expected.scores);
        check_equal("quantised scores for the same z", same.quantised, expected.quantised);
        check_equal("steps for the same z", same.steps, expected.steps);
        gather_part(*k, l, c.tokens, &same);
      }
      if (c.tables == TableType::kInt8) check_equal("y for the same scores", same.y, expected.y);
      for (int t : tokens) check_gather(l, same, t, &same.y[size_t(t) * c.out_features]);
      check_forward(*k, l, in, 0, c.tokens, c.y_bf16, own.y, random);
      if (c.tokens == 0) continue;
      const int begin = random.below(c.tokens), end = random.between(begin + 1, c.tokens);
      check_forward(*k, l, in, begin, end, c.y_bf16, own.y, random);

      const int poisoned = random.below(c.tokens), feature = random.below(c.in_features);
      const float before = in.values[poisoned][feature];
      // NaN with a payload too: 0x7fffffff, and 0x7f80ffff, a signalling one
      in.set(poisoned, feature, random.pick({kNaN, kInfinity, -kInfinity, float_of(0x7fffffff), float_of(0xff81ffff)}));
      check_forward(*k, l, in, 0, c.tokens, c.y_bf16, own.y, random, poisoned);
      in.set(poisoned, feature, before);
    }
  }
  return text("%d layers; z of float32 weights at most %.1f times the expected error off, 4 allowed", cases, most);
}

// hash for z that no projection gives: codes and scores of every implementation, with and without denormals.
std::string test_hash(const Options& options) {
  Random random = {options.seed ^ 0x68617368};
  const float special[] = {0.0f, -0.0f, 1e-40f, -1e-40f, 1.2e-38f, 0.5f, -0.5f, 1.0f, -1.0f, 1.5f, 20.0f, -44.0f, 1e5f, 1e30f,
                           -3.4e38f, 3.4e38f, kInfinity, -kInfinity, kNaN, -kNaN, float_of(0x7fc12345)};
  const std::vector<const Kernels*> implementations = running_here();
  const int rounds = options.is_long ? 200 : 6;
  int count = 0;
  for (int round = 0; round < rounds; round++)
    for (int bits = 1; bits <= 16; bits++)
      for (int reads = 1; reads <= std::min(4, 1 << bits); reads++) {
        Case c = {};
        c.tables = TableType(random.below(3));
        c.num_tables = bits > 10 ? random.between(1, 2) : random.pick({1, 5, 16, 17, 40});
        c.code_bits = bits;
        c.reads = reads;
        c.in_features = c.num_tables * bits;
        c.out_features = c.repeats = c.blocks = 1;
        c.slice = 64;
        const Packed packed = pack(c, random);
        const Layer& l = packed.l;
        constexpr int kTokens = 4;
        Parts p;
        p.z.assign(size_t(kTokens) * l.z_stride, kNaN);
        for (int t = 0; t < kTokens; t++)
          for (int table = 0; table < c.num_tables; table++) {
            const int kind = random.below(4);
            for (int j = 0; j < bits; j++) {
              float& z = p.z[size_t(t) * l.z_stride + table * bits + j];
              if (kind == 0) z = special[random.below(int(std::size(special)))];
              if (kind == 1) z = special[random.below(11)];                 // finite and not huge: zeros, denormals, ties
              if (kind == 2) z = random.pick({-1.5f, -1.0f, -0.5f, 0.5f, 1.0f, 1.5f});  // pairs that equal a third
              if (kind == 3) z = random.normal();
            }
          }
        for (const uint64_t mode : {kFlushing, float_state()}) {
          set_case(text("%s z of %d tables, tau %d, reads %d, %s", "special", c.num_tables, bits, reads,
                        mode == kFlushing ? "denormals flushed" : "denormals kept"));
          FloatMode state(mode);
          hash_part(*implementations[0], l, kTokens, &p);
          for (int t = 0; t < kTokens; t++)
            for (int table = 0; table < c.num_tables; table++) {
              uint16_t expected[kMaxReads];
              const float* z = &p.z[size_t(t) * l.z_stride + table * bits];
              nearest_cells(z, bits, reads, expected);
              double total = 0;
              for (int j = 0; j < bits; j++) total += std::abs(z[j]);
              uint16_t cells[kMaxReads];
              float scores[kMaxReads];
              for (int n = 0; n < reads; n++) {
                const size_t slot = size_t(t) * l.slots + (table / 16 * reads + n) * 16 + table % 16;
                cells[n] = p.cells[slot];
                scores[n] = p.scores[slot];
                EXPECT(cells[n] == expected[n], "cell %d of table %d is %d, not %d", n, table, cells[n], expected[n]);
                EXPECT(std::isfinite(total) || n > 0 || !std::isfinite(scores[n]), "z is not finite, its score is");
              }
              if (total < 1e4 && (bits <= 8 || round == 0)) check_cells(z, bits, reads, cells, scores);
              count++;
            }
          for (const Kernels* k : implementations) {
            Parts same;
            same.z = p.z;
            hash_part(*k, l, kTokens, &same);
            check_equal((std::string(k->name) + "'s cells").c_str(), same.cells, p.cells);
            check_equal((std::string(k->name) + "'s codes").c_str(), same.codes, p.codes);
            check_equal((std::string(k->name) + "'s scores").c_str(), same.scores, p.scores);
            check_equal((std::string(k->name) + "'s steps").c_str(), same.steps, p.steps);
            for (int t = 0; t < kTokens; t++)  // where the step is NaN they may be anything
              for (int i = 0; i < l.slots && p.steps[t] == p.steps[t]; i++)
                EXPECT(same.quantised[t * l.slots + i] == p.quantised[t * l.slots + i], "%s's quantised score %d differs",
                       k->name, i);
          }
        }
      }
  return text("%d tables of zeros, denormals, ties, huge numbers, infinities and NaN", count);
}

// Batches longer than what forward() keeps at once, and many callers at the same time.
std::string test_batches(const Options& options) {
  Random random = {options.seed ^ 0x6c6f6e67};
  constexpr int kPeriod = 97;
  for (int types = 0; types < 9; types++) {
    Case c = {};
    c.weights = WeightType(types % 3);
    c.tables = TableType(types / 3);
    c.in_features = 13;
    c.out_features = random.pick({3, 65, 130});
    c.slice = random.pick({64, 128});
    c.num_tables = 33;
    c.code_bits = 3;
    c.reads = 2;
    c.stages = types & 1 ? 4 : 1;
    c.repeats = 7;
    c.blocks = 1;
    c.block_in = c.block_out = 16;
    c.tokens = random.pick({2047, 2048, 2049, 4096, 4097});
    set_case(c.name());
    const Packed packed = pack(c, random);
    const Layer& l = packed.l;
    Input in = make_input(c.tokens, c.in_features, false, random);
    for (int t = kPeriod; t < c.tokens; t++)
      for (int i = 0; i < c.in_features; i++) in.set(t, i, in.values[t - kPeriod][i]);
    for (const Kernels* k : running_here()) {
      set_case(std::string(k->name) + ", " + c.name());
      const Parts parts = run_parts(*k, l, in, kPeriod);
      std::vector<float> y;
      for (int t = 0; t < c.tokens; t++) {
        const auto row = parts.y.begin() + t % kPeriod * c.out_features;
        y.insert(y.end(), row, row + c.out_features);
      }
      check_forward(*k, l, in, 0, c.tokens, false, y, random);

      std::atomic<int> wrong{0};
      std::vector<std::thread> callers;
      for (int caller = 0; caller < 4; caller++)
        callers.emplace_back([&, caller] {
          Random own = {options.seed + uint64_t(caller)};
          for (int i = 0; i < 4; i++) {
            try {
              const int begin = own.below(kPeriod);
              check_forward(*k, l, in, begin, own.between(begin + 1, kPeriod), false, y, own);
            } catch (const std::exception&) {
              wrong++;
            }
          }
        });
      for (std::thread& caller : callers) caller.join();
      EXPECT(wrong == 0, "%d of 16 calls at the same time are wrong", int(wrong));
    }
  }
  return "2047 to 4097 tokens; 4 callers at the same time";
}

std::vector<Case> small_cases() {
  std::vector<Case> cases;
  for (int i = 0; i < 27; i++) {
    Case c = {};
    c.weights = WeightType(i % 3);
    c.tables = TableType(i / 3 % 3);
    c.stages = i / 9 == 2 ? 4 : i / 9;
    c.code_bits = 1 + i % 4;
    c.num_tables = i % 2 ? 3 : 17;
    c.reads = std::min(1 + i % 4, 1 << c.code_bits);
    c.out_features = i % 5 ? 3 : 65;
    c.slice = i % 3 ? 64 : 128;
    const int codes = c.num_tables * c.code_bits;
    c.repeats = c.blocks = 1;
    c.in_features = codes;
    if (c.stages) {
      c.blocks = 2;
      c.block_in = c.block_out = 16;
      c.repeats = (codes + 31) / 32;
      c.in_features = 30;
    }
    cases.push_back(c);
  }
  return cases;
}

// One field of the header changed: each of these must be refused, whatever the layer.
std::string test_refusals(const Options& options) {
  Random random = {options.seed ^ 0x72656675};
  constexpr int kMost = std::numeric_limits<int>::max();
  int refused = 0;
  for (const Case& c : small_cases()) {
    set_case(c.name());
    const Packed good = pack(c, random);
    const PackedHeader& h = good.l.h;
    const auto must_refuse = [&](const char* what, size_t at, const void* value, size_t size) {
      Guarded bytes(good.bytes->size());
      memcpy(bytes.data(), good.bytes->data(), bytes.size());
      memcpy(bytes.data() + at, value, size);
      Layer l;
      EXPECT(!parse_layer(bytes.data(), bytes.size(), &l).empty(), "a layer with another %s is taken", what);
      refused++;
    };
#define REFUSE(type, field, ...)                                      \
  for (const type value : std::initializer_list<type>{__VA_ARGS__}) must_refuse(#field, offsetof(PackedHeader, field), &value, sizeof value);
    REFUSE(uint32_t, version, 0, 2, 0xffffffff)
    REFUSE(int, in_features, 0, -1, kMost, 1 << 25)
    REFUSE(int, out_features, 0, -1, 1000, kMost, kMost - 62)
    REFUSE(int, num_tables, 0, -1, h.num_tables + 16, kMost)
    REFUSE(int, code_bits, 0, -1, 17, kMost)
    REFUSE(int, reads, 0, -1, 5, kMost)
    REFUSE(int, stages, -1, 2, 3, 5, kMost)
    REFUSE(int, table_rows, 0, -1, 3 * (1 << h.code_bits), kMost)
    REFUSE(int, weight_type, -1, 3)
    REFUSE(int, table_type, -1, 3)
    REFUSE(int, slice, 0, -64, 32, 96, 256, kMost)
    REFUSE(int, reserved, 1, -1)
    REFUSE(float, scale, kNaN, kInfinity)
    REFUSE(float, residual, kNaN, -kInfinity)
    REFUSE(uint64_t, total_bytes, 0, h.total_bytes - 1, h.total_bytes + 64, ~uint64_t(0))
    REFUSE(uint64_t, offset[kBias], 32, h.total_bytes, h.total_bytes - 64 * 3, ~uint64_t(0), ~uint64_t(63))
    REFUSE(uint64_t, offset[kTables], h.total_bytes, ~uint64_t(63))
    if (!c.stages) REFUSE(int, repeats, 0, 2, kMost)  // repeats would be shared out among threads
    if (c.stages) {
      REFUSE(int, repeats, 0, -1, kMost, 1 << 20)
      REFUSE(int, blocks, 0, 3, -2, 1 << 30)
      REFUSE(int, block_in, 0, 8, 24, -16, kMost - 15)
      REFUSE(int, block_out, 0, 8, 24, -16, kMost - 15)
      if (c.weights != WeightType::kFloat32)
        for (const float level : {0.0f, -1.0f, kNaN, kInfinity, c.weights == WeightType::kInt8 ? 128.0f : 32768.0f})
          must_refuse("level", h.offset[kLevels], &level, 4);
    }
#undef REFUSE
    for (size_t i = 0; i < 8; i++) must_refuse("magic", i, "?", 1);
    std::vector<size_t> sizes = {h.total_bytes - 1, h.total_bytes - 64};
    for (size_t n = 0; n <= sizeof h; n++) sizes.push_back(n);
    for (size_t n : sizes) {  // truncated, and truncated with a header that agrees
      Guarded bytes(n);
      memcpy(bytes.data(), good.bytes->data(), n);
      Layer l;
      EXPECT(!parse_layer(bytes.data(), n, &l).empty(), "%zu of %zu bytes are taken", n, good.bytes->size());
      const uint64_t total = n;
      if (n >= sizeof h) memcpy(bytes.data() + offsetof(PackedHeader, total_bytes), &total, 8);
      EXPECT(!parse_layer(bytes.data(), n, &l).empty(), "%zu of %zu bytes are taken", n, good.bytes->size());
      refused += 2;
    }
  }
  return text("%d damaged layers refused", refused);
}

// Random damage to the header, to the numbers behind it, or both: refused, or a layer that runs within its own bytes.
std::string test_damage(const Options& options) {
  Random random = {options.seed ^ 0x64616d61};
  std::vector<Packed> layers;
  for (const Case& c : small_cases()) layers.push_back(pack(c, random));
  const std::vector<const Kernels*> implementations = running_here();
  const int count = options.is_long ? 400000 : 20000;
  int taken = 0;
  for (int i = 0; i < count; i++) {
    const Guarded& good = *layers[random.below(int(layers.size()))].bytes;
    size_t size = good.size();
    uint8_t header[sizeof(PackedHeader)];
    memcpy(header, good.data(), sizeof header);
    for (int changes = random.between(1, 3); changes > 0; changes--) {
      const int field = 12 + 4 * random.below(int(sizeof header - 12) / 4);
      const int interesting = random.pick({-1, 0, 1, 2, 3, 4, 8, 15, 16, 17, 32, 48, 64, 128, 1 << 16, 1 << 24, 1 << 30,
                                           (1 << 30) + (1 << 29), std::numeric_limits<int>::max(),
                                           std::numeric_limits<int>::min()});
      const uint64_t offset = 64 * uint64_t(random.below(int(size / 64) + 2));
      switch (random.below(5)) {
        case 0: header[random.below(sizeof header)] ^= uint8_t(1 << random.below(8)); break;
        case 1: header[12 + random.below(sizeof header - 12)] = uint8_t(random.next()); break;
        case 2: memcpy(header + field, &interesting, 4); break;
        case 3: memcpy(header + offsetof(PackedHeader, offset) + 8 * random.below(kSections), &offset, 8); break;
        default:  // shorter, and the header agrees
          size = random.one_in(4) ? size - random.below(int(size) - int(sizeof header)) : size;
          const uint64_t total = size;
          memcpy(header + offsetof(PackedHeader, total_bytes), &total, 8);
      }
    }
    Guarded bytes(round_up(size, 64));  // rounded, so that it begins at a cache line
    memset(bytes.data(), 0, bytes.size());
    memcpy(bytes.data(), good.data(), size);
    if (random.one_in(2)) memcpy(bytes.data(), header, sizeof header);
    for (int changes = random.pick({0, 0, 1, 100}); changes > 0; changes--) {
      const size_t at = sizeof header + random.below(int(bytes.size() - sizeof header));
      bytes.data()[at] = random.pick({uint8_t(random.next()), uint8_t(0x7f), uint8_t(0x80), uint8_t(0xff)});
    }
    std::string name = text("seed %llu, damaged layer %d:", static_cast<unsigned long long>(options.seed), i);
    for (size_t at = 0; at < sizeof header; at += 4) name += text(" %d", reinterpret_cast<const int*>(bytes.data() + at)[0]);
    set_case(name);
    Layer l;
    if (!parse_layer(bytes.data(), size, &l).empty()) continue;
    taken++;
    const int tokens = random.between(1, 3);
    const Input in = make_input(tokens, l.h.in_features, random.one_in(2), random);
    for (const Kernels* k : {implementations[0], implementations[random.below(int(implementations.size()))]}) {
      Output out(tokens, l.h.out_features, random.one_in(2), random);
      forward(*k, l, in.rows, out.rows, tokens, random_tiling(random), threads_of(random.one_in(8) ? 2 : 1));
      out.check_margins(k->name);
    }
  }
  EXPECT(taken > count / 100 && taken < count * 3 / 4, "%d of %d damaged layers are taken", taken, count);
  return text("%d damaged layers, %d of them still taken for one", count, taken);
}

std::string test_dispatch(const Options&) {
  int count;
  const Implementation* all = implementations(&count);
  std::string names;
  bool first = true;
  const char* forced = std::getenv("LOOKUPFFN_ISA");
  for (int i = 0; i < count; i++) {
    set_case(all[i].kernels->name);
    if (all[i].runs_here()) {
      EXPECT(&kernels_named(all[i].kernels->name) == all[i].kernels, "its name gives another");
      EXPECT(!first || (forced && *forced) || &kernels() == all[i].kernels, "the first that runs is not the one in use");
      first = false;
      names += std::string(names.empty() ? "" : ", ") + all[i].kernels->name;
    } else {
      try {
        kernels_named(all[i].kernels->name);
        throw std::logic_error("");
      } catch (const std::runtime_error& error) {
        EXPECT(strstr(error.what(), all[i].needs), "the error does not say what it needs: %s", error.what());
      } catch (const std::logic_error&) {
        EXPECT(false, "it does not run here, but is given");
      }
    }
  }
  EXPECT(all[count - 1].kernels->name == std::string("scalar") && all[count - 1].runs_here(), "the last must be scalar");
  bool refused = false;
  try {
    kernels_named("pentium");
  } catch (const std::runtime_error&) {
    refused = true;
  }
  EXPECT(refused, "an unknown name is taken");

  Random random = {1};  // the one kernel that is for measuring only
  Guarded memory(64 * 50);
  for (size_t i = 0; i < memory.size(); i++) memory.data()[i] = uint8_t(random.next());
  uint32_t lines[40];
  for (uint32_t& line : lines) line = uint32_t(random.below(50));
  for (const Kernels* k : running_here())
    for (int n : {0, 2, 40}) {
      int32_t lane[16] = {}, part[16];
      for (int i = 0; i < n; i++) {
        memcpy(part, memory.data() + 64 * lines[i], 64);
        for (int j = 0; j < 16; j++) lane[j] ^= part[j];
      }
      EXPECT(k->read_lines(memory.data(), lines, n) == *std::max_element(lane, lane + 16), "%s reads other lines", k->name);
    }
  return names + "; in use: " + kernels().name;
}

}  // namespace

int main(int arguments, char** argument) {
  Options options;
  for (int i = 1; i < arguments; i++) {
    if (!strcmp(argument[i], "--long")) {
      options.is_long = true;
    } else if (!strcmp(argument[i], "--seed") && i + 1 < arguments) {
      options.seed = strtoull(argument[++i], nullptr, 10);
    } else {
      fprintf(stderr, "usage: kernel_tests [--long] [--seed N]\n");
      return 2;
    }
  }
  struct sigaction action = {};
  action.sa_handler = on_crash;
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(signal, &action, &previous_action[signal]);

  const struct {
    const char* name;
    std::string (*run)(const Options&);
  } groups[] = {{"dispatch", test_dispatch}, {"hash", test_hash},         {"layers", test_layers},
                {"batches", test_batches},   {"refusals", test_refusals}, {"damage", test_damage}};
  bool failed = false;
  for (const auto& group : groups) {
    const auto start = std::chrono::steady_clock::now();
    std::string result, verdict = "ok    ";
    try {
      result = group.run(options);
    } catch (const std::exception& error) {
      verdict = "FAILED";
      result = std::string(error.what()) + "\n        in: " + current_case +
               text("\n        seed %llu", static_cast<unsigned long long>(options.seed));
      failed = true;
    }
    state_changed = false;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    printf("%s  %-9s %6.2f s  %s\n", verdict.c_str(), group.name, seconds, result.c_str());
    fflush(stdout);
  }
  return failed;
}
