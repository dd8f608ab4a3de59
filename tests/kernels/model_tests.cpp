// Packed models: records that must be refused, sound models in every division of a batch, damaged ones, the C
// interface.
#include "groups.h"
#include "models.h"

namespace {

constexpr int32_t kMost = std::numeric_limits<int32_t>::max(), kLeast = std::numeric_limits<int32_t>::min();

// What must be refused, as changes of bytes that are sound.
class Refusals {
 public:
  int count = 0;

  Refusals(const char* name, std::string (*open)(Bytes), const Vector& sound)
      : name_(name), open_(open), sound_(sound), changed_(sound) {}

  void expect(const std::string& what, Bytes bytes) {
    set_case(std::string(name_) + ", " + what);
    EXPECT(!open_(bytes).empty(), "it is taken");
    count++;
  }
  template <typename T>
  void expect_at(const std::string& what, size_t at, T value) {
    if (!memcmp(&sound_[at], &value, sizeof value)) return;
    memcpy(changed_.data() + at, &value, sizeof value);
    expect(text("with %s of %lld", what.c_str(), static_cast<long long>(value)), changed_.bytes());
    memcpy(changed_.data() + at, &sound_[at], sizeof value);
  }
  void expect_other_lengths() {
    for (size_t n = 0; n < sound_.size(); n += n < 400 || n + 130 > sound_.size() ? 4 : 256) {
      const GuardedBytes bytes(Vector(sound_.begin(), sound_.begin() + n));
      expect(text("the first %zu of its bytes", n), bytes.bytes());
    }
  }
  void expect_header() {
    for (size_t i = 0; i < 8; i++) expect_at("a magic", i, '?');
    for (uint32_t version : {0u, 1u, 3u, 4u, 0x102u, ~0u}) expect_at("a version", 8, version);
    for (uint32_t kind : {0u, 1u, 2u, 3u, 4u, 5u, 6u, ~0u}) expect_at("a kind", 12, kind);
    uint64_t total;
    memcpy(&total, &sound_[16], 8);
    for (uint64_t value : {uint64_t(0), uint64_t(64), total - 1, total + 1, total - 64, total + 64, ~uint64_t(0),
                           uint64_t(1) << 63, total | uint64_t(1) << 32})
      expect_at("a total of bytes", 16, value);
  }
  void expect_sizes(int sizes) {
    for (int i = 0; i < kRecordSizes; i++)
      for (int32_t value : {-1, 0, 1, 2, 3, 7, 63, 64, 65, 128, 1 << 20, 1 << 24, 1 << 30, kMost, kMost - 63, kLeast}) {
        if (i < sizes && may_be(i, value)) continue;
        expect_at(text("size %d", i), 24 + 4 * size_t(i), value);
      }
  }

 private:
  // Whether a record may have this size too, with the same bytes: fewer or more features within the same padding, the
  // activation of a linear, the kind and the epsilon of a norm.
  bool may_be(int i, int32_t value) const {
    RecordHeader h;
    memcpy(&h, sound_.data(), sizeof h);
    const bool features = value > 64 && value <= 128;  // all records here are padded to 128
    if (h.kind == RecordKind::kLinear) return i < 2 ? features : i == 5 && value >= 0 && value < 6;
    if (h.kind == RecordKind::kBranches)
      return i == 0 ? value == 0 || value == 1 : value >= 0 && value <= 16;  // of one that has both
    if (h.kind == RecordKind::kTokenRows && i >= 4) return value >= 0 && value <= 8;
    if (h.kind == RecordKind::kTokenRows && TableType(h.size[3]) == TableType::kInt4)
      return i == 1 && value > 0 && value <= 128;
    if (h.kind == RecordKind::kNorm)
      return i == 0 ? features
                    : (i == 2 && value == 1) ||
                          (i == 3 && float_of(uint32_t(value)) >= 0 && float_of(uint32_t(value)) < 1);
    return i == 1 && features;
  }
  const char* name_;
  std::string (*open_)(Bytes);
  const Vector& sound_;
  const GuardedBytes changed_;
};

template <typename Record, std::string (*kOpen)(Bytes, Record*)>
std::string opened(Bytes bytes) {
  Record record;
  return kOpen(bytes, &record);
}

}  // namespace

std::string test_records(const Options& options) {
  Random random = {options.seed ^ 0x7265636f};
  int refused = 0;
  const auto check = [&](const char* name, std::string (*open)(Bytes), const Vector& record, int sizes,
                         const auto& more) {
    set_case(name);
    const GuardedBytes sound(record);
    const std::string wrong = open(sound.bytes());
    EXPECT(wrong.empty(), "a sound record is refused: %s", wrong.c_str());
    Refusals refusals(name, open, record);
    refusals.expect_header();
    refusals.expect_other_lengths();
    refusals.expect_sizes(sizes);
    Vector longer = record;
    longer.resize(record.size() + 64);
    refusals.expect("64 bytes too many", GuardedBytes(longer).bytes());
    const uint64_t total = longer.size();
    memcpy(&longer[16], &total, 8);
    refusals.expect("64 bytes too many, and the header agrees", GuardedBytes(longer).bytes());
    more(&refusals);
    refused += refusals.count;
  };
  for (WeightType type : {WeightType::kFloat32, WeightType::kInt8}) {
    const Vector record = linear_record(100, 70, type, Activation::kSilu, random);
    check("a linear", opened<Linear, open_linear>, record, 6, [&](Refusals* r) {
      for (int32_t value : {1, 3, -1}) r->expect_at("a weight type", 24 + 16, value);
      for (int32_t value : {6, -1, kMost}) r->expect_at("an activation", 24 + 20, value);
      // Products of sizes that would fit once they have wrapped around 32 or 64 bits.
      for (int32_t value : {1 << 16, 1 << 20}) {
        Vector large = record;
        const int32_t sizes[4] = {value, value, value, value};
        memcpy(&large[24], sizes, sizeof sizes);
        r->expect("sizes that overflow", GuardedBytes(large).bytes());
      }
    });
  }
  check("a norm", opened<Norm, open_norm>, norm_record(100, false, 1e-5f, random), 4, [](Refusals* r) {
    for (float epsilon : {-1e-5f, 1.0f, kNaN, kInfinity}) r->expect_at("an epsilon", 24 + 12, epsilon);
    for (int32_t rms : {2, -1}) r->expect_at("rms", 24 + 8, rms);
  });
  check("an embedding", opened<Embedding, open_embedding>, embedding_record(7, 100, random), 3, [](Refusals* r) {
    for (int32_t rows : {6, 8, 7 + (1 << 23), 7 + (1 << 24), 7 + (1 << 30)}) r->expect_at("rows", 24, rows);
  });
  for (TableType type : {TableType::kFloat32, TableType::kInt8, TableType::kInt4}) {
    const int padded = 128, rows = 5;
    std::vector<Vector> sections = {Vector(size_t(rows) * padded * bits_of(type) / 8, 1)};
    if (is_integer(type)) sections.push_back(random_floats(1, rows, rows, 1, 0, random));
    const Vector record = record_of(RecordKind::kTokenRows, {rows, 100, padded, int32_t(type), 2, 1}, sections);
    check("rows by ids", opened<TokenRows, open_token_rows>, record, 6, [&](Refusals* r) {
      for (int32_t value : {4, 6, rows + 64, 1 << 28}) r->expect_at("rows", 24, value);
      for (int32_t value : {-1, 1, 4, int32_t(type) ^ 1}) r->expect_at("a table type", 24 + 12, value);
      for (int i : {4, 5})
        for (int32_t value : {-1, 9, kMost}) r->expect_at("neighbours", 24 + 4 * size_t(i), value);
    });
  }
  check("branches", opened<Branches, open_branches>, record_of(RecordKind::kBranches, {1, 3}, {}), 2, [&](Refusals* r) {
    for (int32_t value : {-1, 2, kMost}) r->expect_at("a low rank", 24, value);
    for (int32_t value : {-1, 17, kMost}) r->expect_at("tables of rows", 28, value);
  });
  return text("%d damaged records refused", refused);
}

std::string test_models(const Options& options) {
  Random random = {options.seed ^ 0x6d6f6465};
  const int cases = options.is_long ? 1000 : 32;
  int refused = 0;
  double most = 0;
  for (int n = 0; n < cases; n++) {
    const bool alike = n % 3 == 0;
    const Model model = random_model(random, alike);
    const EncoderConfig& c = model.config;
    const std::string name = text(
        "model %d: width %d, %d layers, %d heads of %d, %d positions from %d on, pooling %d, %d linears behind, "
        "head norm %d, bare start %d, gated %d, rotary %d, relative %d, window %d, every %d global, embeddings of %d, "
        "%d buckets of distances",
        n, c.width, c.layers, c.heads, c.head_dim, c.max_positions, c.first_position, int(c.pooling), c.head,
        c.head_norm, c.bare_start, c.gated, c.rotary, c.relative, c.window, c.global_every, c.embedding_width,
        c.distance_buckets);
    set_case(name);
    const GuardedBytes guarded(model.bytes);
    Encoder e;
    const std::string wrong = open_encoder(guarded.bytes(), &e);
    EXPECT(wrong.empty(), "a sound model is refused: %s", wrong.c_str());

    const Texts texts = random_texts(c, random.pick({1, 2, 3, 7, 25}), random);
    Results scalar;
    for (const Kernels* k : running_here()) {
      set_case(std::string(k->name) + ", " + name);
      const Results whole = run_model(*k, e, texts, 1);
      for (float v : whole.hidden) EXPECT(std::isfinite(v), "a hidden state is %g", double(v));
      for (float v : whole.pooled) EXPECT(std::isfinite(v), "a pooled number is %g", double(v));
      for (int threads : {2, 5}) {
        const Results same = run_model(*k, e, texts, threads);
        EXPECT(same.hidden == whole.hidden, "%d threads give hidden states of other bits", threads);
        EXPECT(same.pooled == whole.pooled, "%d threads give pooled vectors of other bits", threads);
      }
      size_t token = 0, place = 0;
      const bool of_tokens = c.pooling == Pooling::kTokens;
      for (size_t i = 0; i < texts.lengths.size(); token += size_t(texts.lengths[i++])) {
        const Texts one = texts.one(i);
        const size_t answer = of_tokens ? place : i;
        place += one.places.size();
        if (i > 3 && i + 3 < texts.lengths.size()) continue;
        const Results alone = run_model(*k, e, one, 1 + random.below(3));
        EXPECT(!memcmp(alone.hidden.data(), &whole.hidden[token * c.width], 4 * alone.hidden.size()),
               "text %zu by itself has other hidden states", i);
        EXPECT(alone.pooled.empty() ||
                   !memcmp(alone.pooled.data(), &whole.pooled[answer * e.pooled_size()], 4 * alone.pooled.size()),
               "text %zu by itself is pooled to another vector", i);
      }
      if (scalar.hidden.empty()) scalar = whole;
      for (size_t i = 0; alike && i < whole.hidden.size(); i++) {  // two layers: a few thousand roundings
        const double scale = 1 + std::abs(scalar.hidden[i]), off = std::abs(whole.hidden[i] - scalar.hidden[i]) / scale;
        EXPECT(off < 1e-3, "hidden state %zu is %.9g, of scalar %.9g", i, double(whole.hidden[i]),
               double(scalar.hidden[i]));
        most = std::max(most, off);
      }
    }

    // What must be refused, of the model record and its list.
    Refusals refusals("a model", opened<Encoder, open_encoder>, model.bytes);
    const size_t list = sizeof(RecordHeader) + 128;
    const int count = int(model.places.size());
    refusals.expect_header();
    if (n % 8 == 0) refusals.expect_other_lengths();
    for (int32_t value : {-1, 0, 1, count - 1, count + 1, count + 4, kMost, kLeast, 1 << 28})
      refusals.expect_at("a count", 24, value);
    for (int i = 1; i < kRecordSizes; i++)
      refusals.expect_at("a reserved size", 24 + 4 * size_t(i), random.pick({1, -1, kLeast}));
    for (size_t at = sizeof(EncoderConfig); at < 128; at++)
      refusals.expect_at("a reserved byte", sizeof(RecordHeader) + at, uint8_t(1 + random.below(255)));
    for (size_t field = 0; field < sizeof(EncoderConfig) / 4; field++)
      for (int32_t value : {-1, kLeast, kMost})
        refusals.expect_at(text("number %zu", field), sizeof(RecordHeader) + 4 * field, value);
    // Too many of them for the workspace of a text, whatever the records hold: a model without layers has none.
    for (int32_t value : {1, c.distance_buckets + 32, kMostFeatures})
      if (c.distance_buckets)
        refusals.expect_at("buckets", sizeof(RecordHeader) + offsetof(EncoderConfig, distance_buckets), value);
    for (int i = 0; i < count; i++) {
      const Place place = model.places[size_t(i)];
      const uint64_t size = model.bytes.size();
      for (uint64_t begin :
           {place.begin + 1, place.begin + 4, place.begin + 32, place.begin + 64, place.begin - 64, size, size + 64,
            size - 64, ~uint64_t(63), uint64_t(1) << 63, place.begin + (uint64_t(1) << 32)})
        refusals.expect_at(text("a place of record %d", i), list + 16 * size_t(i), begin);
      for (uint64_t bytes : {uint64_t(0), uint64_t(63), place.bytes - 1, place.bytes + 1, place.bytes + 64, size,
                             ~uint64_t(0), ~place.begin + 1, ~place.begin + 65, place.bytes + (uint64_t(1) << 32)})
        refusals.expect_at(text("a length of record %d", i), list + 16 * size_t(i) + 8, bytes);
    }
    // A record that is sound by itself, with one feature more or fewer in the same padding: it does not fit the others.
    for (int i = 0; i < count; i++) {
      const uint64_t begin = model.places[size_t(i)].begin;
      RecordHeader h;
      memcpy(&h, &model.bytes[begin], sizeof h);
      if (h.version != kRecordVersion || h.kind == RecordKind::kBranches) continue;
      const bool linear = h.kind == RecordKind::kLinear, answers = c.head && i == count - 1;
      const int first = linear || h.kind == RecordKind::kNorm ? 0 : 1, last = linear && !answers ? 1 : first;
      for (int size = first; size <= last; size++) {
        const int32_t other = h.size[size] % 64 ? h.size[size] + 1 : h.size[size] - 1;
        refusals.expect_at(text("size %d of record %d", size, i), begin + 24 + 4 * size_t(size), other);
      }
    }
    // A sound record where none may begin, and the list says so.
    Vector between = model.bytes;
    const Place last = model.places.back(), moved = {model.bytes.size() + 32, last.bytes};
    between.resize(moved.begin);
    const auto sound = model.bytes.begin() + int64_t(last.begin);
    between.insert(between.end(), sound, sound + int64_t(last.bytes));
    memcpy(&between[list + 16 * size_t(count - 1)], &moved, sizeof moved);
    refusals.expect("a record 32 bytes behind a multiple of 64", GuardedBytes(between).bytes());
    refused += refusals.count;
  }
  return text("%d models, %d damaged ones refused; implementations within %.1g of each other", cases, refused, most);
}

// Random damage: refused, or a model that runs within its own bytes.
std::string test_model_damage(const Options& options) {
  Random random = {options.seed ^ 0x666c6970};
  std::vector<Model> models;
  while (models.size() < 24) {
    models.push_back(random_model(random));
    if (models.back().bytes.size() > 400000) models.pop_back();
  }
  const std::vector<const Kernels*> implementations = running_here();
  const int count = options.is_long ? 60000 : 3000;
  int taken = 0;
  for (int i = 0; i < count; i++) {
    const Model& model = models[random.below(int(models.size()))];
    Vector bytes = model.bytes;
    std::string name = text("seed %llu, damaged model %d:", static_cast<unsigned long long>(options.seed), i);
    for (int changes = random.pick({1, 1, 2, 3, 40}); changes > 0; changes--) {
      size_t at = size_t(random.next() % bytes.size());
      const int where = random.below(4);
      if (where == 0) at = size_t(random.below(int(model.places[0].begin)));  // the model record
      if (where == 1) at = model.places[random.below(int(model.places.size()))].begin + size_t(random.below(192));
      at = std::min(at, bytes.size() - 1);
      bytes[at] = random.one_in(4) ? random.pick({uint8_t(random.next()), uint8_t(0x7f), uint8_t(0x80), uint8_t(0xff)})
                                   : uint8_t(bytes[at] ^ 1 << random.below(8));
      if (changes < 8) name += text(" [%zu]=%d", at, bytes[at]);
    }
    set_case(name);
    if (random.one_in(20)) bytes.resize(size_t(random.next() % (bytes.size() / 4)) * 4);
    const GuardedBytes guarded(bytes);
    Encoder e;
    if (!open_encoder(guarded.bytes(), &e).empty()) continue;
    taken++;
    const Texts texts = random_texts(e.config, random.between(1, 3), random);
    run_model(*implementations[random.below(int(implementations.size()))], e, texts, random.one_in(8) ? 3 : 1);
  }
  EXPECT(taken > count / 5 && taken < count * 9 / 10, "%d of %d damaged models are taken", taken, count);
  return text("%d damaged models, %d of them still taken for one", count, taken);
}
