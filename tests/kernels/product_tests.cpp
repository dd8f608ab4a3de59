#include "groups.h"
#include "layers.h"

// A dense linear is one block: exact sums of int8 products for every implementation, times the scales.
std::string test_linear(const Options& options) {
  Random random = {options.seed ^ 0x6c696e65};
  const int cases = options.is_long ? 400 : 40;
  for (int i = 0; i < cases; i++) {
    const int in = 16 * random.pick({1, 2, 3, 4, 5, 8, 12, 24}),
              tokens = random.pick({1, 2, 3, 5, 6, 7, 15, 16, 17, 33, kMaxTile});
    const int out = random.pick({16, 32, 48, 64, 128, 192, 384}), blocks = random.pick({1, 1, 2, 4});
    const int all_in = blocks * in, all_out = blocks * out, gap = random.pick({0, 4, 64});
    set_case(text("%d blocks of %d to %d, %d tokens", blocks, in, out, tokens));
    Guarded words(size_t(all_out) * in), scales(size_t(all_out) * 4), offsets(size_t(all_out) * 4);
    std::vector<int> q(size_t(tokens) * all_in);
    Guarded y((size_t(tokens - 1) * (all_out + gap) + all_out) * 4);
    PackedHeader layout = {};
    layout.weight_type = WeightType::kInt8;
    layout.blocks = blocks, layout.block_in = in, layout.block_out = out;
    std::vector<int> w(size_t(all_out) * in), sum(all_out);
    for (int n = 0; n < blocks; n++)
      for (int o = 0; o < out; o++)
        for (int j = 0; j < in; j++) {
          const int value = random.one_in(16) ? (random.one_in(2) ? -127 : 127) : random.between(-127, 127);
          w[(size_t(n) * out + o) * in + j] = value;
          sum[n * out + o] += value;
          words.data()[weight_index(layout, 0, n, o, j)] = uint8_t(int8_t(value));
        }
    for (int o = 0; o < all_out; o++) {
      reinterpret_cast<float*>(scales.data())[o] = 0.5f + random.uniform();
      reinterpret_cast<int32_t*>(offsets.data())[o] = -128 * sum[o];
    }
    for (int& value : q) value = random.one_in(16) ? (random.one_in(2) ? -127 : 127) : random.between(-127, 127);
    for (const Kernels* k : running_here()) {
      const int planes = k->activation_planes;
      const size_t plane = size_t(all_in + gap);
      Guarded x(size_t(tokens - 1) * plane * planes + plane * (planes - 1) + all_in);
      for (int t = 0; t < tokens; t++)
        for (int j = 0; j < all_in; j++) {
          const int value = q[size_t(t) * all_in + j];
          uint8_t* const at = x.data() + size_t(t) * plane * planes + j;
          at[0] = uint8_t(planes == 1 ? value + 128 : std::abs(value));
          if (planes == 2) at[plane] = value < 0 ? 255 : 0;
        }
      memset(y.data(), 0xff, y.size());
      k->multiply_i8({.w = {.words = words.data(),
                            .scales = reinterpret_cast<float*>(scales.data()),
                            .offsets = reinterpret_cast<int32_t*>(offsets.data()),
                            .blocks = blocks,
                            .block_in = in,
                            .block_out = out},
                      .x = x.data(),
                      .x_bytes = plane * planes,
                      .tokens = tokens,
                      .y = reinterpret_cast<float*>(y.data()),
                      .y_stride = size_t(all_out + gap)});
      for (int t = 0; t < tokens; t++)
        for (int o = 0; o < all_out; o++) {
          int64_t exact = 0;
          for (int j = 0; j < in; j++) exact += w[size_t(o) * in + j] * q[size_t(t) * all_in + o / out * in + j];
          const float expected = float(exact) * reinterpret_cast<float*>(scales.data())[o];
          const float got = reinterpret_cast<float*>(y.data())[size_t(t) * (all_out + gap) + o];
          EXPECT(same_bits(got, expected), "%s: y[%d, %d] is %.9g, not %.9g", k->name, t, o, double(got),
                 double(expected));
        }
      for (int t = 0; t + 1 < tokens; t++)
        for (int j = 0; j < gap * 4; j++)
          EXPECT(y.data()[(size_t(t) * (all_out + gap) + all_out) * 4 + j] == 0xff, "%s writes between rows of y",
                 k->name);
    }
  }
  return text("%d int8 products, of one block and of several", cases);
}
