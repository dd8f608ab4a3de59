// What the kernels of encoders must give: double precision with a bound on float32, exact integers. And their rows.
#pragma once

#include "layers.h"

// Rows of floats that begin behind a margin and end at a guard page. What lies before and between them stays as it is.
class FloatRows {
 public:
  FloatRows(int64_t rows, int width, int gap = 0)
      : stride(size_t(width) + size_t(gap)),
        rows_(size_t(rows)),
        width_(size_t(width)),
        memory_((kMargin + (rows_ ? (rows_ - 1) * stride + width_ : 0)) * 4) {
    for (size_t i = 0; i < memory_.size() / 4; i++) start()[i] = float_of(kUntouched);
  }

  float* data() const { return start() + kMargin; }
  float* row(int64_t r) const { return data() + size_t(r) * stride; }
  float& at(int64_t r, int i) const { return row(r)[i]; }
  std::vector<float> values(int64_t r) const { return {row(r), row(r) + width_}; }
  std::vector<float> all() const { return {start(), start() + memory_.size() / 4}; }
  void set_all(const std::vector<float>& values) const { memcpy(start(), values.data(), values.size() * 4); }

  void check_gaps(const char* what) const {
    for (size_t i = 0; i < memory_.size() / 4; i++) {
      const bool inside = i >= kMargin && (i - kMargin) % stride < width_;
      EXPECT(inside || bits_of(start()[i]) == kUntouched, "%s writes outside of its rows, at float %ld", what,
             long(i) - long(kMargin));
    }
  }
  void check_row_untouched(int64_t r, const char* what) const {
    for (size_t i = 0; i < width_; i++)
      EXPECT(bits_of(row(r)[i]) == kUntouched, "%s writes row %ld, which is not its own", what, long(r));
  }

  const size_t stride;

 private:
  static constexpr size_t kMargin = 16;
  static constexpr uint32_t kUntouched = 0xa5a5a5a5;
  float* start() const { return reinterpret_cast<float*>(memory_.data()); }
  size_t rows_, width_;
  Guarded memory_;
};

// Numbers that end at a guard page.
template <typename T>
struct Numbers : Guarded {
  explicit Numbers(size_t count) : Guarded(count * sizeof(T)), count(count) {}
  T* at() const { return reinterpret_cast<T*>(data()); }
  T& operator[](size_t i) const { return at()[i]; }
  size_t count;
};

inline void check_bits(const float* got, const float* expected, int64_t count, const char* what) {
  for (int64_t i = 0; i < count; i++)
    EXPECT(same_bits(got[i], expected[i]), "%s: number %ld is %.9g, not %.9g", what, long(i), double(got[i]),
           double(expected[i]));
}

// Within the bound; returns how much of it is used up.
inline double check_within(float got, Approx expected, const char* what, int64_t row, int64_t i) {
  const double off = std::abs(double(got) - expected.value);
  EXPECT(off <= expected.error, "%s: [%ld, %ld] is %.9g, not %.9g +- %.2g", what, long(row), long(i), double(got),
         expected.value, expected.error);
  return expected.error > 0 ? off / expected.error : 0;
}

// ---- Activations ----------------------------------------------------------------------------------------------------

constexpr Activation kActivations[] = {Activation::kNone, Activation::kGelu, Activation::kGeluTanh,
                                       Activation::kSilu, Activation::kRelu, Activation::kTanh};
inline const char* name_of(Activation kind) {
  const char* names[] = {"no activation", "gelu", "gelu by tanh", "silu", "relu", "tanh"};
  return names[int(kind)];
}

constexpr double kTiny = 0x1p-125;  // twice what is flushed to 0, and the least that exp_minus_2 gives

inline double inner_of(Activation kind, double x) {  // activation(x) = x / (1 + exp(-2 inner))
  return kind == Activation::kSilu ? x / 2 : std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
}
inline double activation_of(Activation kind, double x) {
  switch (kind) {
    case Activation::kGelu: return 0.5 * x * std::erfc(-x * M_SQRT1_2);
    case Activation::kGeluTanh:
    case Activation::kSilu: return x / (1 + std::exp(-2 * inner_of(kind, x)));
    case Activation::kRelu: return x > 0 ? x : 0;
    case Activation::kTanh: return std::tanh(x);
    default: return x;
  }
}

// How far float32 may be from it for a given x.
//   gelu: what the kernel's comment promises, and two roundings.
//   silu, gelu by tanh: with e = exp(-2 |u|), off relatively by 6 kUlp and by 2 |u| times the roundings of u and of its
//   product, 8 kUlp at most, the sigmoid e / (1 + e) or 1 / (1 + e) is off by that or by e times that, three roundings
//   more, and e is 2^-126 at least.
//   tanh is 2 sigmoid(2 x) - 1: at most 2 (3 + max over |x| of e (6 + 16 |x|)) + 1 = 24 kUlp, e (6 + 16 |x|) being
//   largest near x = 0.1.
inline double activation_error(Activation kind, double x) {
  const double value = std::abs(activation_of(kind, x));
  switch (kind) {
    case Activation::kGelu: return 1e-6 + 2 * kUlp * value + kTiny;
    case Activation::kGeluTanh:
    case Activation::kSilu: {
      const double u = inner_of(kind, x), of_exp = 6 + 16 * std::abs(u);
      return (u < 0 ? of_exp + 4 : of_exp * std::exp(-2 * u) + 4) * kUlp * value + kTiny * (1 + std::abs(x));
    }
    case Activation::kTanh: return 24 * kUlp + kTiny;
    default: return kTiny;
  }
}

// Of an x that is not known exactly: no activation is steeper than 1.13.
inline Approx activate(Activation kind, Approx x) {
  return {activation_of(kind, x.value), 1.13 * x.error + 1.01 * activation_error(kind, x.value)};
}

// ---- Int8 inputs ----------------------------------------------------------------------------------------------------

struct QuantisedRow {
  std::vector<int> q;
  float scale;
  std::vector<int> outliers;  // inputs that are 0 in q and are multiplied in float32; none or four
};

// Of finite inputs, from the definition: the largest input of each of 16 lanes, the first of equals; of these the four
// largest, where the last four bits count for nothing and the later lane wins; apart where the largest of all is more
// than 1.25 times the largest of the rest.
__attribute__((noinline)) inline QuantisedRow quantise_row(const float* x, int width) {
  struct Largest {
    uint32_t bits;
    int index;
  };
  const auto magnitude = [&](int i) { return bits_of(x[i]) & 0x7fffffff; };
  std::vector<Largest> lanes(16, Largest{0, 0});
  for (int lane = 0; lane < 16; lane++) lanes[lane].index = lane;
  for (int i = 0; i < width; i++)
    if (magnitude(i) > lanes[i % 16].bits) lanes[i % 16] = {magnitude(i), i};
  float all = 0, rest = 0;
  for (int i = 0; i < width; i++) all = std::max(all, std::fabs(x[i]));
  std::stable_sort(lanes.begin(), lanes.end(), [](const Largest& a, const Largest& b) {
    const uint32_t p = a.bits >> 4, q = b.bits >> 4;
    return p != q ? p > q : a.index % 16 > b.index % 16;
  });
  QuantisedRow row;
  for (int k = 0; k < 4; k++) row.outliers.push_back(lanes[k].index);
  const auto apart = [&](int i) {
    return std::find(row.outliers.begin(), row.outliers.end(), i) != row.outliers.end();
  };
  for (int i = 0; i < width; i++)
    if (!apart(i)) rest = std::max(rest, std::fabs(x[i]));
  const auto step = [](float largest) { return largest < 1e-30f ? 0.0f : largest / 127.0f; };
  if (!(step(all) > 1.25f * step(rest))) row.outliers.clear();
  const float largest = row.outliers.empty() ? all : rest;
  row.scale = step(largest);
  const float inverse = row.scale == 0 ? 0 : 127.0f / largest;
  for (int i = 0; i < width; i++) row.q.push_back(apart(i) ? 0 : int(std::nearbyint(x[i] * inverse)));
  return row;
}
