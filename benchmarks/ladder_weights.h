// Packed weights for the ladder's projections, as the kernels take them and as runtime/format.py makes them.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "ladder_tools.h"

namespace lookupffn {

// A projection in packed weights (kernels.h).
struct Weights {
  Projection projection;
  Array<uint8_t> words;
  Array<float> scales, levels;
  Array<int32_t> offsets;
};

inline size_t word_place(const Projection& p, int stage, int n, int o, int i) {  // `stage` counts over all repeats
  const int word = 4 / int(element_size(p.type)), words = p.block_in / word, group = panels_of_group(p.block_out);
  const size_t panel = (size_t(stage) * p.blocks + n) * (p.block_out / kLanes) + o / kLanes / group * group;
  return ((panel * words + i / word * group + o / kLanes % group) * kLanes + o % kLanes) * word + i % word;
}

// values (R, stages, n, out, in) as the words of `p`, whose pointers are set here but for the bias; integers as
// format._quantised_weights chooses them.
inline std::unique_ptr<Weights> packed(const Projection& p, const std::vector<double>& values) {
  const int in = p.block_in, out = p.block_out;
  const WeightType type = p.type;
  const size_t stages = size_t(p.repeats) * p.stages, each = size_t(p.blocks) * out, outputs = stages * each;
  std::unique_ptr<Weights> w(new Weights{p, Array<uint8_t>(values.size() * element_size(type)), Array<float>(outputs),
                                         Array<float>(stages), Array<int32_t>(outputs)});
  w->projection.weights = w->words.get(), w->projection.scales = w->scales.get();
  w->projection.offsets = w->offsets.get(), w->projection.levels = w->levels.get();

  std::vector<double> largest(outputs), sum(outputs);
  for (size_t o = 0; o < outputs; o++)
    for (int i = 0; i < in; i++) {
      const double magnitude = std::abs(values[o * in + i]);
      largest[o] = std::max(largest[o], magnitude);
      sum[o] += magnitude;
    }
  double most = 127, ratio = 1;
  for (size_t o = 0; o < outputs; o++) ratio = std::max(ratio, sum[o] / largest[o]);
  if (type == WeightType::kInt16) most = std::min(32767.0, std::floor(std::sqrt(0x1p31 / (2 * ratio))));
  std::vector<double> largest_sum(stages, 1);
  for (size_t o = 0; o < outputs; o++) {
    const size_t stage = o / each, n = o % each / out;
    w->scales[o] = float(largest[o] / most);
    double magnitudes = 0;
    for (int i = 0; i < in; i++) {
      const size_t place = word_place(w->projection, int(stage), int(n), int(o % out), i);
      const double value = values[o * in + i];
      const int whole = type == WeightType::kFloat32 ? 0 : int(std::lrint(value / w->scales[o]));
      if (type == WeightType::kFloat32) reinterpret_cast<float*>(w->words.get())[place] = float(value);
      if (type == WeightType::kInt16) reinterpret_cast<int16_t*>(w->words.get())[place] = int16_t(whole);
      if (type == WeightType::kInt8) w->words[place] = uint8_t(int8_t(whole));
      w->offsets[o] -= 128 * whole;
      magnitudes += std::abs(whole);
    }
    largest_sum[stage] = std::max(largest_sum[stage], magnitudes);
  }
  for (size_t stage = 0; stage < w->levels.size(); stage++) {
    const double level = type == WeightType::kInt8 ? 127 : std::floor((0x1p31 - 1) / largest_sum[stage]);
    w->levels[stage] = float(std::min(32767.0, level));
  }
  return w;
}

}  // namespace lookupffn
