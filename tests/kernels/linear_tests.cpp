// The linear of encoders: its activations, its product in float32, in int8 and with inputs apart, its residual.
#include "groups.h"
#include "encoder_reference.h"

namespace {

struct LinearCase {
  WeightType type;
  Activation activation;
  int in, out, tokens;
  bool residual, in_place;  // in place: y is the residual, or else the gate
  bool gate;
  int x_gap, y_gap;

  std::string name() const {
    const char* types[] = {"float32", "int16", "int8", "bfloat16"};
    return text("%s, %d to %d, %d tokens, gaps of %d and %d, %s%s%s%s", types[int(type)], in, out, tokens, x_gap, y_gap,
                name_of(activation), residual ? ", with a residual" : "", gate ? ", gated" : "",
                in_place ? ", in place" : "");
  }
};

// A linear in packed form, and a tile of its inputs.
struct LinearLayer {
  LinearCase c;
  Numbers<uint8_t> words;
  Numbers<float> scales, bias;
  Numbers<int32_t> offsets;
  FloatRows x, residual, gate, y;
  std::vector<double> weights;  // [out][in], integers for int8
  std::vector<float> before;    // the residual, or without one the gate

  LinearLayer(const LinearCase& c, Random& random)
      : c(c),
        words(size_t(c.in) * c.out * element_size(c.type)),
        scales(c.type == WeightType::kInt8 ? c.out : 0),
        bias(c.out),
        offsets(scales.count),
        x(c.tokens, c.in, c.x_gap),
        residual(c.residual && !c.in_place ? c.tokens : 0, c.out, c.y_gap),
        gate(c.gate && (c.residual || !c.in_place) ? c.tokens : 0, c.out, c.y_gap),
        y(c.tokens, c.out, c.y_gap),
        weights(size_t(c.in) * c.out) {
    PackedHeader layout = {};
    layout.weight_type = c.type, layout.blocks = 1, layout.block_in = c.in, layout.block_out = c.out;
    const float deviation = 1 / std::sqrt(float(c.in));
    for (int o = 0; o < c.out; o++) {
      int sum = 0;
      for (int i = 0; i < c.in; i++) {
        const size_t at = weight_index(layout, 0, 0, o, i);
        double& w = weights[size_t(o) * c.in + i];
        if (c.type == WeightType::kInt8) {
          const int value = random.one_in(16) ? (random.one_in(2) ? -127 : 127) : random.between(-127, 127);
          words[at] = uint8_t(int8_t(value)), w = value, sum += value;
        } else {
          const float value = deviation * random.normal(), rounded = float_of(bits_of(value) & 0xffff0000);
          const bool half = c.type == WeightType::kBFloat16;
          const uint16_t upper = uint16_t(bits_of(value) >> 16);
          half ? memcpy(words.at() + 2 * at, &upper, 2) : memcpy(words.at() + 4 * at, &value, 4);
          w = half ? rounded : value;
        }
      }
      if (scales.count) scales[o] = deviation / 70 * (0.5f + random.uniform()), offsets[o] = -128 * sum;
      bias[o] = random.normal();
    }
    for (int t = 0; t < c.tokens; t++) make_row(t, random);
    for (int t = 0; t < c.tokens; t++)
      for (int o = 0; o < c.out; o++) {
        if (c.residual) residuals().at(t, o) = random.normal();
        if (c.gate) gates().at(t, o) = random.normal();
      }
    before = y.all();
  }
  const FloatRows& residuals() const { return c.in_place ? y : residual; }
  const FloatRows& gates() const { return c.in_place && !c.residual ? y : gate; }

  // Zeros, one giant or a few among small inputs, equal magnitudes, inputs that are all in one of the 16 lanes.
  void make_row(int t, Random& random) {
    const float scale = random.pick({1.0f, 1.0f, 20.0f, 1e-3f, 1e-33f});
    const int kind = random.below(10);
    for (int i = 0; i < c.in; i++) {
      float value = scale * random.normal();
      if (kind == 0) value = 0;
      if (kind == 1) value = random.one_in(2) ? scale : -scale;
      if (kind == 2 && i % 16 != t % 16) value = 0;
      if (kind == 3) value = random.one_in(20) ? 50 * value : value;  // more of them than are taken apart
      x.at(t, i) = value;
    }
    const int giants = kind == 4 ? 1 : kind == 5 ? random.between(2, 6) : 0;
    for (int n = 0; n < giants; n++) x.at(t, random.below(c.in)) = scale * random.pick({3.0f, 40.0f, -1e4f, 1e9f});
  }

  double residual_of(int t, int o) const { return !c.residual ? 0 : c.in_place ? of_before(t, o) : residual.at(t, o); }
  float gate_of(int t, int o) const {
    return !c.gate ? 1 : c.in_place && !c.residual ? of_before(t, o) : gate.at(t, o);
  }
  float of_before(int t, int o) const { return before[16 + size_t(t) * y.stride + o]; }  // behind the margin

  // Tokens [first, first + count), with scratch of just the size that the contract says; returns the integers of x.
  std::vector<uint8_t> run(const Kernels& k, int first, int count) const {
    const Numbers<uint8_t> quantised(c.type == WeightType::kInt8 ? size_t(count) * c.in * k.activation_planes : 0);
    const Numbers<float> sums(size_t(count) * 64);
    memset(sums.data(), 0xff, sums.size());
    const FloatRows &r = residuals(), &g = gates();
    FloatMode mode(kFlushing);
    k.encoder->linear({.type = c.type,
                       .w = {.words = words.at(),
                             .scales = scales.at(),
                             .offsets = offsets.at(),
                             .blocks = 1,
                             .block_in = c.in,
                             .block_out = c.out},
                       .bias = bias.at(),
                       .activation = c.activation,
                       .x = x.row(first),
                       .x_stride = x.stride,
                       .tokens = count,
                       .residual = c.residual ? r.row(first) : nullptr,
                       .residual_stride = r.stride,
                       .gate = c.gate ? g.row(first) : nullptr,
                       .gate_stride = g.stride,
                       .y = y.row(first),
                       .y_stride = y.stride,
                       .quantised = quantised.at(),
                       .sums = sums.at()});
    return {quantised.data(), quantised.data() + quantised.size()};
  }
  void restore() const {
    if (c.in_place) y.set_all(before);
  }
};

// Before the activation. Products of n inputs, summed in any order: n kUlp of their magnitudes.
Approx product_f32(const LinearLayer& l, int t, int o) {
  double sum = l.bias[o], magnitude = std::abs(sum);
  for (int i = 0; i < l.c.in; i++) {
    const double p = l.weights[size_t(o) * l.c.in + i] * l.x.at(t, i);
    sum += p, magnitude += std::abs(p);
  }
  return {sum, (l.c.in + 2) * kUlp * magnitude + kTiny};
}

// Sums of integers are exact, their two scales and the four products beside them are not.
Approx product_i8(const LinearLayer& l, const QuantisedRow& q, int t, int o, int64_t* exact) {
  const double* w = &l.weights[size_t(o) * l.c.in];
  *exact = 0;
  for (int i = 0; i < l.c.in; i++) *exact += int(w[i]) * q.q[i];
  const double main = double(*exact) * l.scales[o] * q.scale;
  double apart = 0, magnitude = 0;
  for (int i : q.outliers) {
    const double p = w[i] * l.x.at(t, i) * l.scales[o];
    apart += p, magnitude += std::abs(p);
  }
  return {main + apart + l.bias[o],
          kUlp * (5 * std::abs(main) + 10 * magnitude + 2 * std::abs(double(l.bias[o]))) + kTiny};
}

void check_integers(const QuantisedRow& q, const uint8_t* got, int width, int planes, int t) {
  for (int i = 0; i < width; i++) {
    const int first = planes == 1 ? q.q[i] + 128 : std::abs(q.q[i]);
    EXPECT(got[i] == first, "input %d of token %d is %d as an integer, not %d", i, t, got[i], first);
    if (planes == 2)
      EXPECT(got[width + i] == (q.q[i] < 0 ? 255 : 0), "input %d of token %d has the mask %d", i, t, got[width + i]);
  }
}

// One linear on every implementation; returns the largest part of the bound that is used up.
double check_linear(LinearLayer& l, Random& random) {
  const LinearCase& c = l.c;
  const bool integer = c.type == WeightType::kInt8;
  std::vector<QuantisedRow> quantised;
  std::vector<std::vector<Approx>> expected(c.tokens);
  std::vector<std::vector<float>> exact(c.tokens);  // where only + and * are left, in the kernels' order
  for (int t = 0; t < c.tokens; t++) {
    if (integer) quantised.push_back(quantise_row(l.x.row(t), c.in));
    const bool plain = integer && quantised[t].outliers.empty() &&
                       (c.activation == Activation::kNone || c.activation == Activation::kRelu);
    for (int o = 0; o < c.out; o++) {
      int64_t sum = 0;
      Approx v = activate(c.activation, integer ? product_i8(l, quantised[t], t, o, &sum) : product_f32(l, t, o));
      const double gate = l.gate_of(t, o);
      v.value *= gate, v.error = v.error * std::abs(gate) + kUlp * std::abs(v.value) + kTiny;
      v.value += l.residual_of(t, o);
      v.error += kUlp * std::abs(v.value);
      expected[t].push_back(v);
      if (!plain) continue;
      float y = float(sum) * l.scales[o];
      y = y * quantised[t].scale;
      y = y + l.bias[o];
      if (c.activation == Activation::kRelu && !(y > 0)) y = 0;
      if (c.gate) y = y * l.gate_of(t, o);
      exact[t].push_back(c.residual ? y + float(l.residual_of(t, o)) : y);
    }
  }
  double most = 0;
  const std::vector<float> x = l.x.all();
  const int poisoned = random.below(c.tokens), where = random.below(c.in);
  const float poison = random.pick({kNaN, kInfinity, -kInfinity, float_of(0xff81ffff)}),
              sound = l.x.at(poisoned, where);
  for (const Kernels* k : running_here()) {
    set_case(std::string(k->name) + ", " + c.name());
    l.restore();
    const std::vector<uint8_t> integers = l.run(*k, 0, c.tokens);
    check_bits(l.x.all().data(), x.data(), int64_t(x.size()), "x behind it");
    l.y.check_gaps("the linear");
    std::vector<std::vector<float>> whole;
    for (int t = 0; t < c.tokens; t++) {
      if (integer) {
        const size_t bytes = size_t(c.in) * k->activation_planes;
        check_integers(quantised[t], &integers[t * bytes], c.in, k->activation_planes, t);
      }
      for (int o = 0; o < c.out; o++) most = std::max(most, check_within(l.y.at(t, o), expected[t][o], "y", t, o));
      if (!exact[t].empty()) check_bits(l.y.row(t), exact[t].data(), c.out, "y, which is exact");
      whole.push_back(l.y.values(t));
    }
    l.restore();
    const int first = random.below(c.tokens), count = random.between(1, c.tokens - first);
    l.run(*k, first, count);
    for (int t = first; t < first + count; t++) check_bits(l.y.row(t), whole[t].data(), c.out, "a row of fewer");
    l.restore();
    for (int t : {0, c.tokens / 2, c.tokens - 1}) {
      l.restore();
      l.run(*k, t, 1);
      check_bits(l.y.row(t), whole[t].data(), c.out, "a row by itself");
    }
    l.restore();
    l.x.at(poisoned, where) = poison;
    l.run(*k, 0, c.tokens);
    EXPECT(bits_of(l.x.at(poisoned, where)) == bits_of(poison), "%g in x is not what it was", double(poison));
    l.x.at(poisoned, where) = sound;
    for (int t = 0; t < c.tokens; t++)
      if (t != poisoned) check_bits(l.y.row(t), whole[t].data(), c.out, "a row beside one that is not finite");
    if (poison == poison && c.activation != Activation::kNone) continue;  // tanh(-inf) is a number
    for (int o = 0; o < c.out; o++)
      EXPECT(!std::isfinite(l.y.at(poisoned, o)), "y[%d, %d] of an input that is not finite is %g", poisoned, o,
             double(l.y.at(poisoned, o)));
  }
  return most;
}

}  // namespace

// Activations of a dense sweep of floats, as the bias of a product of zeros.
std::string test_activations(const Options& options) {
  constexpr int kOutputs = 4096;
  std::vector<float> inputs = {0.0f,      -0.0f,      1e-40f, -1e-40f, 1.2e-38f, 1e4f, -1e4f, 5.0f,  -5.0f, 1e30f,
                               kInfinity, -kInfinity, -1e30f, 3.4e38f, -3.4e38f, kNaN, -kNaN, 44.0f, -44.0f};
  const uint32_t step = options.is_long ? 10007 : 100003;  // over all floats, and some near 0
  for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += step) inputs.push_back(float_of(uint32_t(bits)));
  for (double x = -12; x < 12; x += options.is_long ? 1e-5 : 1e-4) inputs.push_back(float(x));
  const size_t count = inputs.size();
  inputs.resize(round_up(count, kOutputs), 0.0f);
  const Numbers<uint8_t> weights(size_t(kOutputs) * 64 * 4);
  const Numbers<float> x(64), y(kOutputs), bias(kOutputs), sums(64);
  std::string said;
  for (Activation kind : kActivations) {
    double most = 0;
    std::vector<Approx> expected;
    for (float v : inputs) expected.push_back({activation_of(kind, v), activation_error(kind, v)});
    for (const Kernels* k : running_here()) {
      set_case(std::string(k->name) + ", " + name_of(kind));
      for (size_t first = 0; first < inputs.size(); first += kOutputs) {
        memcpy(bias.data(), &inputs[first], bias.size());
        {
          FloatMode mode(kFlushing);
          k->encoder->linear({.type = WeightType::kFloat32,
                              .w = {.words = weights.at(),
                                    .scales = nullptr,
                                    .offsets = nullptr,
                                    .blocks = 1,
                                    .block_in = 64,
                                    .block_out = kOutputs},
                              .bias = bias.at(),
                              .activation = kind,
                              .x = x.at(),
                              .x_stride = 64,
                              .tokens = 1,
                              .residual = nullptr,
                              .residual_stride = 0,
                              .y = y.at(),
                              .y_stride = kOutputs,
                              .quantised = nullptr,
                              .sums = sums.at()});
        }
        for (int i = 0; i < kOutputs; i++) {
          const float in = inputs[first + i];
          if (in != in) {
            EXPECT(y[i] != y[i], "of NaN it is %g", double(y[i]));
          } else if (std::isfinite(in)) {
            const double off = std::abs(double(y[i]) - expected[first + i].value);
            EXPECT(off <= expected[first + i].error, "of %.9g it is %.9g, not %.9g +- %.2g", double(in), double(y[i]),
                   expected[first + i].value, expected[first + i].error);
            most = std::max(most, off / expected[first + i].error);
          } else if (kind == Activation::kTanh) {
            EXPECT(y[i] == (in > 0 ? 1 : -1), "of %g it is %g", double(in), double(y[i]));
          } else {  // x times a sigmoid of 0 may be anything but a positive number
            EXPECT(in > 0 ? y[i] == in : !(y[i] > 0), "of %g it is %g", double(in), double(y[i]));
          }
        }
      }
    }
    if (kind != Activation::kNone && kind != Activation::kRelu) said += text(", %s %.2f", name_of(kind), most);
  }
  return text("%zu numbers; of the bounds at most%s", count, said.c_str() + 1);
}

std::string test_linears(const Options& options) {
  Random random = {options.seed ^ 0x6c696e73};
  Deck tokens{1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 15, 16, 17, 18, 24, 31, 32, 33, 47, 48, 96};
  Deck ins{64, 64, 128, 192, 320}, outs{64, 64, 128, 192, 320}, kinds{0, 1, 2, 3, 4, 5, 0};
  const int cases = options.is_long ? 2000 : 88;
  double most = 0;
  for (int n = 0; n < cases; n++) {
    const WeightType types[] = {WeightType::kInt8, WeightType::kFloat32, WeightType::kInt8, WeightType::kBFloat16};
    LinearCase c = {.type = types[n % 4],
                    .activation = kActivations[kinds.deal(random)],
                    .in = ins.deal(random),
                    .out = outs.deal(random),
                    .tokens = tokens.deal(random),
                    .residual = random.one_in(2),
                    .in_place = random.one_in(2),
                    .gate = random.one_in(3),
                    .x_gap = random.pick({0, 0, 16, 64, 3}),
                    .y_gap = random.pick({0, 0, 16, 64, 3})};
    if (!c.residual && !c.gate) c.in_place = false;
    set_case(c.name());
    LinearLayer layer(c, random);
    most = std::max(most, check_linear(layer, random));
  }
  return text("%d linears, at most %.2f of the bound", cases, most);
}
