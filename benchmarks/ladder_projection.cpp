// The projection's rungs: every one computes the same z = P(x), and the last two go on to codes and scores. From
// "tile-1" on they are the shipped kernel project, called with the tile and on the weights of the rung. z of a tile is
// overwritten by the next tile's: the hash takes it from there.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>

#include "ladder.h"
#include "ladder_tools.h"
#include "ladder_weights.h"

namespace lookupffn {
namespace {

constexpr int kStages = 4;  // of BH4
constexpr double kDecay = 0.7;
constexpr int kLargestTile = 48;

enum class Form { kTransposed, kDense, kUnfolded, kFolded, kInt16, kInt8 };  // of the weights

enum Stream : uint64_t { kWeightValues = 100, kInputs, kCodeBiases };

// The unnormalised Walsh-Hadamard transform of `size` numbers, `stride` apart.
void hadamard(double* y, int size, size_t stride) {
  for (int h = 1; h < size; h *= 2)
    for (int i = 0; i < size; i++)
      if (!(i & h)) {
        const double a = y[i * stride], b = y[(i + h) * stride];
        y[i * stride] = a + b;
        y[(i + h) * stride] = a - b;
      }
}

struct Scratch : ProjectScratch {
  explicit Scratch(int width)
      : floats_{Array<float>(size_t(kLargestTile) * width), Array<float>(size_t(kLargestTile) * width),
                Array<float>(size_t(kLargestTile) * width), Array<float>(kLargestTile), Array<float>(kLargestTile)},
        bytes_{Array<uint8_t>(size_t(kLargestTile) * width * 2), Array<uint8_t>(size_t(kLargestTile) * width * 2)} {
    rows = floats_[0].get(), sums[0] = floats_[1].get(), sums[1] = floats_[2].get();
    scale[0] = floats_[3].get(), scale[1] = floats_[4].get();
    first = bytes_[0].get(), activations = bytes_[1].get();
  }

 private:
  Array<float> floats_[5];
  Array<uint8_t> bytes_[2];
};

class Projecting {
 public:
  explicit Projecting(const Shape& shape, const LadderKernels& own)
      : s_(shape),
        own_(own),
        padded_(power_of_two(shape.width)),
        block_(std::min(64, padded_)),
        blocks_(padded_ / block_),
        outputs_(shape.tables * shape.bits),
        repeats_((outputs_ + padded_ - 1) / padded_),
        groups_(groups_of(shape.tables)),
        slots_(groups_ * shape.reads * kLanes),
        z_stride_(size_t(std::max(repeats_ * padded_, round_up(outputs_, 64)) + kLanes * (kLanes + 1))),
        weight_(size_t(repeats_) * kStages * padded_ * block_),
        x_(size_t(shape.inputs) * shape.width),
        bias_(z_stride_),
        z_(size_t(shape.tokens) * z_stride_),
        codes_(size_t(shape.tokens) * slots_),
        scores_(size_t(shape.tokens) * slots_),
        scratch_(std::max(padded_, round_up(outputs_, 64))) {
    const float deviation = 1 / std::sqrt(float(block_));  // an orthonormal H keeps the size of x: design, "Scale"
    for (size_t i = 0; i < weight_.size(); i++) weight_[i] = deviation * random_normal(kWeightValues, i);
    for (size_t i = 0; i < x_.size(); i++) x_[i] = random_normal(kInputs, i);
    for (int i = 0; i < outputs_; i++) bias_[i] = 0.1f * random_normal(kCodeBiases, i);
  }

  typedef std::function<void(const Weights&, int64_t token, int tokens, float* z)> Body;  // a tile, from `token` on

  Work project(Form form, int tile, const Body& body) {
    const Weights& w = weights(form);
    const auto run = [this, tile, body, &w](int64_t first, bool keep) {
      for (int64_t token = 0; token < s_.tokens; token += tile)
        body(w, first + token, int(std::min<int64_t>(tile, s_.tokens - token)),
             z_.get() + (keep ? token * z_stride_ : 0));
    };
    return {[run](int64_t first) { run(first, false); },
            [this, run, &w] {
              std::fill(z_.get(), z_.get() + z_.size(), std::nanf(""));
              run(0, true);
              return check_z(w.projection.type);
            },
            double(w.words.size()) / double(std::min<int64_t>(tile, s_.tokens))};
  }
  Work project(Form form, const InferenceKernels& k, int tile) {
    return project(form, tile, [this, &k](const Weights& w, int64_t token, int tokens, float* z) {
      project_tile(w.projection, k, token, tokens, z);
    });
  }

  // The ladder's own loops, one token a tile.
  Work plain_product() {
    return project(Form::kTransposed, 1, [this](const Weights& w, int64_t token, int, float* z) {
      multiply_columns(reinterpret_cast<const float*>(w.words.get()), x_.get() + token * s_.width, z);
    });
  }
  Work own_bh4(bool folded) {
    const auto project_token = folded ? own_.folded : own_.unfolded;
    return project(folded ? Form::kFolded : Form::kUnfolded, 1,
                   [this, project_token](const Weights& w, int64_t token, int, float* z) {
                     project_token(w.projection, x_.get() + token * s_.width, z, scratch_);
                   });
  }

  // Codes and scores too: from the tile that was just projected, or from all z when all is projected.
  Work project_and_hash(const InferenceKernels& k, int tile, bool fused) {
    const Weights& w = weights(Form::kInt8);
    const auto run = [this, tile, fused, &w, &k](int64_t first) {
      for (int64_t token = 0; token < s_.tokens; token += tile) {
        const int64_t end = std::min(s_.tokens, token + tile);
        float* const z = z_.get() + (fused ? 0 : size_t(token) * z_stride_);
        project_tile(w.projection, k, first + token, int(end - token), z);
        if (fused) hash(k, token, end, z);
      }
      if (!fused) hash(k, 0, s_.tokens, z_.get());
    };
    return {run,
            [this, run, &w, &k] {
              std::fill(scores_.get(), scores_.get() + scores_.size(), std::nanf(""));
              run(0);
              return check_hash(w.projection, k);
            },
            double(w.words.size()) / double(std::min<int64_t>(tile, s_.tokens))};
  }

 private:
  static int power_of_two(int n) {
    int p = kLanes;
    while (p < n) p *= 2;
    return p;
  }

  void project_tile(const Projection& p, const InferenceKernels& k, int64_t token, int tokens, float* z) const {
    k.project(p, {.x = {x_.get(), s_.width, false},
                  .token = token,
                  .tokens = tokens,
                  .first = 0,
                  .last = p.repeats,
                  .z = z,
                  .z_stride = z_stride_,
                  .scratch = scratch_});
  }

  void hash_token(const InferenceKernels& k, const float* z, uint16_t* codes, float* scores) const {
    k.hash({.num_tables = s_.tables,
            .code_bits = s_.bits,
            .reads = s_.reads,
            .first = 0,
            .last = groups_,
            .z = z,
            .codes = codes,
            .scores = scores});
  }
  void hash(const InferenceKernels& k, int64_t token, int64_t end, const float* z) const {
    for (; token < end; token++, z += z_stride_)
      hash_token(k, z, codes_.get() + size_t(token) * slots_, scores_.get() + size_t(token) * slots_);
  }

  // z += W[:, i] x[i] for every input in turn, plain C++ for the baseline of the architecture.
  void multiply_columns(const float* transposed, const float* x, float* __restrict z) const {
    std::memcpy(z, bias_.get(), sizeof(float) * outputs_);
    for (int i = 0; i < s_.width; i++) {
      const float* __restrict column = transposed + size_t(i) * outputs_;
      for (int o = 0; o < outputs_; o++) z[o] += x[i] * column[o];
    }
  }

  // ---- Weights ------------------------------------------------------------------------------------------------------

  double weight(int stage, int n, int o, int i) const {
    return weight_[((size_t(stage) * blocks_ + n) * block_ + o) * block_ + i];
  }

  // reference.bh4, without the bias and with the outputs behind the last table's.
  std::vector<double> exact(const std::vector<double>& x) const {
    std::vector<double> z, y, products(padded_);
    for (int r = 0; r < repeats_; r++) {
      y = x;
      for (int stage = r * kStages; stage < (r + 1) * kStages; stage++) {
        for (int n = 0; n < blocks_; n++)
          for (int o = 0; o < block_; o++) {
            double sum = 0;
            for (int i = 0; i < block_; i++) sum += weight(stage, n, o, i) * y[n * block_ + i];
            products[n * block_ + o] = sum / std::sqrt(double(padded_));
          }
        hadamard(products.data(), padded_, 1);
        y = products;
      }
      for (int i = 0; i < padded_; i++) z.push_back(kDecay * y[i] + (1 - kDecay) * x[i]);
    }
    return z;
  }

  const Weights& weights(Form form) {
    std::unique_ptr<Weights>& w = forms_[form];
    if (!w) w = form == Form::kTransposed || form == Form::kDense ? dense(form) : bh4(form);
    return *w;
  }

  // The projection as one matrix, column by column; for the plain loop without packing.
  std::unique_ptr<Weights> dense(Form form) const {
    const int in = round_up(s_.width, kLanes), out = round_up(outputs_, 64);
    std::vector<double> values(size_t(in) * out), unit(padded_);
    for (int i = 0; i < s_.width; i++) {
      unit[i] = 1;
      const std::vector<double> column = exact(unit);
      for (int o = 0; o < outputs_; o++) values[size_t(o) * in + i] = column[o];
      unit[i] = 0;
    }
    if (form == Form::kDense) return packed(sizes(WeightType::kFloat32, 1, 1, 1, in, out, 1, 0), values);
    std::unique_ptr<Weights> w(new Weights{
        {}, Array<uint8_t>(size_t(s_.width) * outputs_ * 4), Array<float>(0), Array<float>(0), Array<int32_t>(0)});
    float* const transposed = reinterpret_cast<float*>(w->words.get());
    for (int i = 0; i < s_.width; i++)
      for (int o = 0; o < outputs_; o++) transposed[size_t(i) * outputs_ + o] = float(values[size_t(o) * in + i]);
    return w;
  }

  // BH4's blocks as they are, for an unnormalised H, or with the part of H inside of a block multiplied in:
  // H_D' = H_n (x) H_b, format._folded_blocks.
  std::unique_ptr<Weights> bh4(Form form) const {
    const bool folds = form != Form::kUnfolded;
    std::vector<double> values(weight_.get(), weight_.get() + weight_.size());
    for (size_t block = 0; block < values.size(); block += size_t(block_) * block_)
      for (int i = 0; i < block_ && folds; i++) hadamard(&values[block + i], block_, block_);
    for (double& value : values) value /= std::sqrt(double(padded_));
    const WeightType type = form == Form::kInt8    ? WeightType::kInt8
                            : form == Form::kInt16 ? WeightType::kInt16
                                                   : WeightType::kFloat32;
    return packed(sizes(type, repeats_, kStages, blocks_, block_, block_, float(kDecay), float(1 - kDecay)), values);
  }

  Projection sizes(WeightType type, int repeats, int stages, int blocks, int in, int out, float scale,
                   float residual) const {
    return {.type = type,
            .in_features = s_.width,
            .stages = stages,
            .repeats = repeats,
            .blocks = blocks,
            .block_in = in,
            .block_out = out,
            .scale = scale,
            .residual = residual,
            .weights = nullptr,
            .scales = nullptr,
            .offsets = nullptr,
            .levels = nullptr,
            .bias = bias_.get()};
  }

  // ---- Checks -------------------------------------------------------------------------------------------------------

  // z of the first inputs against the definition in double: the error of a token, and ten times as much at any place,
  // in root mean squares of its whole z.
  std::string check_z(WeightType type) const {
    const double allowed = type == WeightType::kFloat32 ? 2e-6 : type == WeightType::kInt16 ? 2e-3 : 5e-2;
    for (int64_t token : sampled(s_.tokens)) {
      std::vector<double> x(padded_);
      for (int i = 0; i < s_.width; i++) x[i] = x_[size_t(token) * s_.width + i];
      const std::vector<double> should = exact(x);
      double size = 0, error = 0, largest = 0;
      for (double value : should) size += value * value;
      for (int o = 0; o < outputs_; o++) {
        const double off = z_[size_t(token) * z_stride_ + o] - (should[o] + bias_[o]);
        error += off * off;
        if (!(std::abs(off) <= largest)) largest = std::abs(off);
      }
      size = std::sqrt(size / double(should.size())), error = std::sqrt(error / outputs_);
      if (error <= allowed * size && largest <= 10 * allowed * size) continue;
      char text[160];
      std::snprintf(text, sizeof text, "z of token %ld is off by %.3g of its size and by %.3g at one place, not %.3g",
                    long(token), error / size, largest / size, allowed);
      return text;
    }
    return "";
  }

  // Codes and scores of the first inputs, bit for bit those of each token's z alone; nearest ones also as defined.
  std::string check_hash(const Projection& p, const InferenceKernels& k) const {
    Array<float> z(z_stride_), scores(slots_);
    Array<uint16_t> codes(slots_);
    for (int64_t token : sampled(s_.tokens)) {
      project_tile(p, k, token, 1, z.get());
      hash_token(k, z.get(), codes.get(), scores.get());
      const size_t first = size_t(token) * slots_;
      if (std::memcmp(codes.get(), &codes_[first], slots_ * sizeof(uint16_t)) ||
          std::memcmp(scores.get(), &scores_[first], slots_ * sizeof(float)))
        return "codes or scores of token " + std::to_string(token) + " are not those of its z alone";
      for (int table = 0; table < s_.tables; table++) {
        const float* const bits = z.get() + size_t(table) * s_.bits;
        unsigned code = 0;
        double total = 0, share = 1;
        for (int j = 0; j < s_.bits; j++) {
          code = code << 1 | (bits[j] > 0);
          total += std::abs(bits[j]);
          share /= 1 + std::exp(-2 * std::abs(double(bits[j])));
        }
        const int slot = table / kLanes * kLanes * s_.reads + table % kLanes;
        if (codes[slot] != code || !(std::abs(scores[slot] - total * share) <= 1e-5 * total))
          return "code or score of token " + std::to_string(token) + ", table " + std::to_string(table) + " is wrong";
      }
    }
    return "";
  }

  const Shape s_;
  const LadderKernels& own_;
  const int padded_, block_, blocks_, outputs_, repeats_, groups_, slots_;  // D', b, n, T tau, R
  const size_t z_stride_;
  const Array<float> weight_, x_, bias_;  // weight_: [R][4][n][b][b]
  const Array<float> z_;
  const Array<uint16_t> codes_;
  const Array<float> scores_;
  const Scratch scratch_;
  std::map<Form, std::unique_ptr<Weights>> forms_;
};

const InferenceKernels& amx() {
  try {
    return *implementation(isa_index("amx")).inference;
  } catch (const std::runtime_error& error) {
    throw NotRun(error.what());
  }
}

}  // namespace

std::vector<Rung> projection_rungs(const Shape& shape, const Kernels& kernels) {
  const auto data = std::make_shared<std::unique_ptr<Projecting>>();  // made by the first rung that is prepared
  const InferenceKernels& k = kernels.shipped;
  const LadderKernels& own = kernels.own;
  const char* const isa = kernels.name;
  std::vector<Rung> rungs;
  const auto add = [&](const char* name, const char* from, const char* change, const char* isa_name,
                       const std::function<Work(Projecting&)>& prepare) {
    rungs.push_back({"projection", name, from, change, isa_name, 1, [=, &own] {
                       if (!*data) data->reset(new Projecting(shape, own));
                       return prepare(**data);
                     }});
  };
  const auto project = [&k](Form form, int tile) {
    return [=, &k](Projecting& p) { return p.project(form, k, tile); };
  };

  add("dense-plain", "", "z = W x as one float32 matrix, plain C++", isa,
      [](Projecting& p) { return p.plain_product(); });
  add("dense", "dense-plain", "vectors, sums in registers", isa, project(Form::kDense, 1));
  add("dense-tile-12", "dense", "12 tokens a tile", isa, project(Form::kDense, 12));
  add("unfolded", "dense", "BH4: four block products, a whole Hadamard transform after each", isa,
      [](Projecting& p) { return p.own_bh4(false); });
  add("folded", "unfolded", "the transform inside of blocks folded into the weights, levels across blocks left", isa,
      [](Projecting& p) { return p.own_bh4(true); });
  add("tile-1", "folded", "the shipped kernel on a tile of 1 token", isa, project(Form::kFolded, 1));
  add("tile-6", "tile-1", "6 tokens a tile", isa, project(Form::kFolded, 6));
  add("tile-12", "tile-1", "12 tokens a tile", isa, project(Form::kFolded, 12));
  add("tile-48", "tile-1", "48 tokens a tile", isa, project(Form::kFolded, 48));
  add("int16", "tile-12", "16-bit weights and activations", isa, project(Form::kInt16, 12));
  add("int8", "int16", "8-bit weights and activations: what ships", isa, project(Form::kInt8, 12));
  add("int8-tile-1", "int8", "1 token a tile", isa, project(Form::kInt8, 1));
  add("int8-tile-48", "int8", "48 tokens a tile", isa, project(Form::kInt8, 48));
  add("amx", "int8", "the shipped kernel on AMX tiles, 16 tokens a tile", "amx",
      [](Projecting& p) { return p.project(Form::kInt8, amx(), 16); });
  add("hash-later", "int8", "and codes and scores, when all tokens are projected", isa,
      [&k](Projecting& p) { return p.project_and_hash(k, 12, false); });
  add("hash-fused", "hash-later", "codes and scores of a tile at once: what ships", isa,
      [&k](Projecting& p) { return p.project_and_hash(k, 12, true); });
  return rungs;
}

}  // namespace lookupffn
