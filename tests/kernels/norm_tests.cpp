// Norms, sums of embeddings and pooling.
#include "groups.h"
#include "encoder_reference.h"

namespace {

struct NormCase {
  int width, tokens;
  bool rms, in_place;
  float epsilon;
  int x_gap, y_gap;
  int padded() const { return int(round_up(size_t(width), 64)); }
};

// y of one row. With n additions of a sum, in any order, off by n kUlp of its magnitudes:
//   the mean is off by m = (n + 1) kUlp mean |x|, by nothing for rms, and each distance from it by m + kUlp |d|;
//   the variance, as distances from the true mean add up to 0, is between v (1 - r) and (v + m^2) (1 + r),
//   r = (n + 8) kUlp with the roundings of squares, of the root and of the reciprocal.
std::vector<Approx> norm_of(const NormCase& c, const float* x, const float* weight, const float* bias) {
  const double n = c.width / 16 + 4 + 15 + 1, r = (n + 8) * kUlp;
  double mean = 0, magnitude = 0, variance = 0;
  for (int i = 0; i < c.width && !c.rms; i++) mean += x[i], magnitude += std::abs(double(x[i]));
  mean /= c.width, magnitude /= c.width;
  const double m = (n + 1) * kUlp * magnitude;
  for (int i = 0; i < c.width; i++) variance += (x[i] - mean) * (x[i] - mean) / c.width;
  const double exact = std::sqrt(variance + c.epsilon), low = exact * (1 - r);
  const double high = std::sqrt(variance + m * m + c.epsilon + kTiny) * (1 + r);
  std::vector<Approx> y;
  for (int i = 0; i < c.width; i++) {
    const double d = x[i] - mean, w = weight[i], value = d / exact * w + bias[i];
    const double of_root = std::abs(d) * (1 / low - 1 / high), of_distance = (m + kUlp * std::abs(d)) / low;
    y.push_back({value, std::abs(w) * (of_root + of_distance) +
                            kUlp * (3 * std::abs(d / exact * w) + 2 * std::abs(value)) + kTiny});
  }
  return y;
}

void run_norm(const Kernels& k, const NormCase& c, const float* x, size_t x_stride, int tokens, const float* weight,
              const float* bias, float* y, size_t y_stride) {
  FloatMode mode(kFlushing);
  k.encoder->norm_rows({.x = x,
                        .x_stride = x_stride,
                        .tokens = tokens,
                        .width = c.width,
                        .padded = c.padded(),
                        .rms = c.rms,
                        .epsilon = c.epsilon,
                        .weight = weight,
                        .bias = bias,
                        .y = y,
                        .y_stride = y_stride});
}

}  // namespace

std::string test_norms(const Options& options) {
  Random random = {options.seed ^ 0x6e6f726d};
  Deck widths{1, 2, 15, 16, 17, 31, 40, 63, 64, 65, 100, 127, 128, 130, 384, 757};
  const int cases = options.is_long ? 3000 : 160;
  double most = 0;
  for (int n = 0; n < cases; n++) {
    const NormCase c = {.width = widths.deal(random),
                        .tokens = random.pick({1, 2, 3, 7, 16, 48}),
                        .rms = random.one_in(2),
                        .in_place = random.one_in(2),
                        .epsilon = random.pick({1e-12f, 1e-6f, 1e-5f, 0.1f}),
                        .x_gap = random.pick({0, 0, 1, 16, 64}),
                        .y_gap = random.pick({0, 0, 1, 16, 64})};
    const std::string name =
        text("%s of %d, epsilon %g, %d tokens, gaps of %d and %d%s", c.rms ? "rms" : "norm", c.width, double(c.epsilon),
             c.tokens, c.x_gap, c.y_gap, c.in_place ? ", in place" : "");
    set_case(name);
    FloatRows x(c.tokens, c.padded(), c.x_gap);
    const FloatRows weight(1, c.padded()), bias(1, c.padded());
    for (int i = 0; i < c.padded(); i++) {
      weight.at(0, i) = i < c.width ? 1 + 0.3f * random.normal() : 0;
      bias.at(0, i) = i < c.width && !c.rms ? random.normal() : 0;
    }
    std::vector<std::vector<Approx>> expected;
    for (int t = 0; t < c.tokens; t++) {
      // Rows whose variance is much more or much less than epsilon, or 0; and far from 0, as their mean is taken first.
      const float scale = random.pick({1.0f, 1.0f, 30.0f, 1e-3f, 1e-6f, 0.0f});
      const float shift = random.pick({0.0f, 0.0f, 0.5f, 10.0f, -300.0f});
      for (int i = 0; i < c.padded(); i++) x.at(t, i) = i < c.width ? shift + scale * random.normal() : 0;
      expected.push_back(norm_of(c, x.row(t), weight.data(), bias.data()));
    }
    const int poisoned = random.below(c.tokens), where = random.below(c.width);
    const float poison = random.pick({kNaN, kInfinity, -kInfinity});
    for (const Kernels* k : running_here()) {
      set_case(std::string(k->name) + ", " + name);
      const FloatRows own(c.tokens, c.padded(), c.y_gap);
      const FloatRows& y = c.in_place ? x : own;
      const std::vector<float> before = x.all();
      const auto restore = [&] { x.set_all(before); };
      const auto run = [&](int first, int count) {
        run_norm(*k, c, x.row(first), x.stride, count, weight.data(), bias.data(), y.row(first), y.stride);
      };
      run(0, c.tokens);
      if (!c.in_place) check_bits(x.all().data(), before.data(), int64_t(before.size()), "x behind it");
      y.check_gaps("the norm");
      std::vector<std::vector<float>> whole;
      for (int t = 0; t < c.tokens; t++) {
        for (int i = 0; i < c.width; i++) most = std::max(most, check_within(y.at(t, i), expected[t][i], "y", t, i));
        for (int i = c.width; i < c.padded(); i++)
          EXPECT(y.at(t, i) == 0, "what pads row %d is %g", t, double(y.at(t, i)));
        whole.push_back(y.values(t));
      }
      restore();
      for (int t = 0; t < c.tokens; t++) {
        run(t, 1);
        check_bits(y.row(t), whole[t].data(), c.padded(), "a row by itself");
      }
      restore();
      x.at(poisoned, where) = poison;
      run(0, c.tokens);
      for (int t = 0; t < c.tokens; t++)
        if (t != poisoned) check_bits(y.row(t), whole[t].data(), c.padded(), "a row beside one that is not finite");
      bool finite = true;  // with rms an infinity makes zeros of the other inputs
      for (int i = 0; i < c.width; i++) finite = finite && std::isfinite(y.at(poisoned, i));
      EXPECT(!finite, "the norm of %g is finite", double(poison));
      restore();
    }
  }
  return text("%d norms, at most %.2f of the bound", cases, most);
}

std::string test_sums(const Options& options) {
  Random random = {options.seed ^ 0x73756d73};
  const int cases = options.is_long ? 2000 : 200;
  for (int n = 0; n < cases; n++) {
    const int count = random.between(1, 4), padded = 16 * random.between(1, 20);
    const bool in_place = random.one_in(2);
    set_case(text("%d rows of %d%s", count, padded, in_place ? ", in place" : ""));
    std::vector<std::unique_ptr<FloatRows>> rows;
    AddRowsArgs args = {.rows = {}, .count = count, .padded = padded, .y = nullptr};
    for (int r = 0; r < count; r++) {
      rows.push_back(std::make_unique<FloatRows>(1, padded));
      for (int i = 0; i < padded; i++) rows[r]->at(0, i) = random.one_in(30) ? kInfinity : random.normal();
      args.rows[r] = rows[r]->data();
    }
    std::vector<float> expected = rows[0]->values(0);
    for (int r = 1; r < count; r++)
      for (int i = 0; i < padded; i++) expected[i] += rows[r]->at(0, i);
    const std::vector<float> before = rows[0]->values(0);
    for (const Kernels* k : running_here()) {
      const FloatRows own(1, padded);
      const FloatRows& y = in_place ? *rows[0] : own;
      args.y = y.data();
      k->encoder->add_rows(args);
      check_bits(y.data(), expected.data(), padded, k->name);
      y.check_gaps(k->name);
      std::copy(before.begin(), before.end(), rows[0]->data());
    }
  }
  return text("%d sums of up to 4 rows, bit for bit", cases);
}

// Rows by ids. Scale times integer and the sum with y may be one rounding or two.
std::string test_table_rows(const Options& options) {
  Random random = {options.seed ^ 0x726f7773};
  const int cases = options.is_long ? 2000 : 200;
  for (int n = 0; n < cases; n++) {
    const TableType type = random.pick({TableType::kFloat32, TableType::kInt8, TableType::kInt4});
    const int padded = 64 * random.between(1, 9);
    const float scale = type == TableType::kFloat32 ? 1 : random.pick({1.0f, 0.01f, 3e-5f});
    set_case(text("type %d, %d outputs, scale %g", int(type), padded, double(scale)));
    const Numbers<uint8_t> row(type == TableType::kInt4 ? round_up(padded, 128) / 2
                                                        : size_t(padded) * bits_of(type) / 8);
    const FloatRows y(1, padded);
    std::vector<Approx> expected;
    std::vector<double> values;
    for (int i = 0; i < padded; i++) {
      const int most = type == TableType::kInt4 ? 7 : 127, value = random.between(-most, most);
      // Byte k of word l of a line is its output 16 k + l; of int4 the low halves are 64 outputs, the high ones the
      // next.
      const int line = i / (type == TableType::kInt4 ? 128 : 64), output = i % 64, high = i / 64 % 2;
      const size_t at = size_t(line) * 64 + size_t(output % 16) * 4 + size_t(output / 16);
      const float number = random.normal();
      if (type == TableType::kFloat32) memcpy(row.at() + 4 * i, &number, 4);
      if (type == TableType::kInt8) row[at] = uint8_t(int8_t(value));
      if (type == TableType::kInt4)
        row[at] = uint8_t(high ? (row[at] & 15) | (value << 4) : (row[at] & 240) | (value & 15));
      values.push_back(type == TableType::kFloat32 ? number : double(value) * scale);
    }
    const FloatRows start(1, padded);
    for (int i = 0; i < padded; i++) start.at(0, i) = random.normal();
    for (const Kernels* k : running_here()) {
      memcpy(y.data(), start.data(), 4 * size_t(padded));
      k->encoder->add_table_row({.type = type, .row = row.at(), .scale = scale, .padded = padded, .y = y.data()});
      y.check_gaps(k->name);
      for (int i = 0; i < padded; i++) {
        const double sum = start.at(0, i) + values[i];
        check_within(y.at(0, i), {sum, kUlp * (std::abs(sum) + std::abs(values[i])) + kTiny}, k->name, 0, i);
      }
    }
  }
  return text("%d rows of three types", cases);
}

// A mean of n rows is off by n kUlp of its magnitudes. Its length by half of that of the sum of squares, with the
// mean's own error in each of them, and divided by it y by both.
std::string test_pooling(const Options& options) {
  Random random = {options.seed ^ 0x706f6f6c};
  const int cases = options.is_long ? 2000 : 200;
  double most = 0;
  for (int n = 0; n < cases; n++) {
    const int padded = 64 * random.between(1, 6), width = padded - random.below(64);
    const int tokens = random.pick({1, 1, 2, 3, 16, 31, 70}), gap = random.pick({0, 0, 16, 5});
    const bool normalise = random.one_in(2), in_place = tokens == 1 && random.one_in(2);
    const float scale = random.pick({1.0f, 1.0f, 1e3f, 1e-3f, 1e-9f, 0.0f});
    const std::string name = text("%d rows of %d, gap of %d, times %g%s%s", tokens, width, gap, double(scale),
                                  normalise ? ", normalised" : "", in_place ? ", in place" : "");
    FloatRows x(tokens, padded, gap);
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < padded; i++) x.at(t, i) = i < width ? scale * random.normal() : 0;
    std::vector<Approx> mean(size_t(padded), Approx{0, 0});
    double squares = 0, of_squares = 0;
    for (int i = 0; i < width; i++) {
      double magnitude = 0;
      for (int t = 0; t < tokens; t++) mean[i].value += x.at(t, i) / double(tokens), magnitude += std::abs(x.at(t, i));
      mean[i].error = tokens > 1 ? tokens * kUlp * magnitude / tokens : 0;
      squares += mean[i].value * mean[i].value;
      of_squares += 2 * std::abs(mean[i].value) * mean[i].error + mean[i].error * mean[i].error;
    }
    const double length = std::sqrt(squares), least = 1e-12;
    const double of_length = length > 0 ? of_squares / (2 * length) + (padded / 32 + 8) * kUlp * length : 0;
    const std::vector<float> before = x.all();
    for (const Kernels* k : running_here()) {
      set_case(std::string(k->name) + ", " + name);
      const FloatRows own(1, padded);
      const FloatRows& y = in_place ? x : own;
      {
        FloatMode mode(kFlushing);
        k->encoder->pool_rows({.x = x.data(),
                               .stride = int64_t(x.stride),
                               .tokens = tokens,
                               .padded = padded,
                               .normalise = normalise,
                               .y = y.data()});
      }
      y.check_gaps("pooling");
      double got = 0;
      for (int i = 0; i < padded; i++) {
        Approx e = mean[i];
        if (normalise) {
          const double by = std::max(length, least);
          e.value /= by;
          e.error = (e.error + std::abs(mean[i].value) * of_length / by) / by * 1.001 + 3 * kUlp * std::abs(e.value);
        }
        e.error += kTiny;
        most = std::max(most, check_within(y.at(0, i), e, "y", 0, i));
        got += double(y.at(0, i)) * y.at(0, i);
      }
      if (normalise && length > 1e-6) EXPECT(std::abs(std::sqrt(got) - 1) < 1e-5, "its length is %.9g", std::sqrt(got));
      x.set_all(before);
    }
  }
  return text("%d means of up to 70 rows, at most %.2f of the bound", cases, most);
}
