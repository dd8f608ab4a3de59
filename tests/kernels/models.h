// Small packed models (docs/format.md, version 2) with random numbers, batches for them, and runs of these in memory of
// just the size that is asked for.
#pragma once

#include "layers.h"
#include "model/encoder.h"

typedef std::vector<uint8_t> Vector;

inline void append(Vector* to, const void* data, size_t bytes) {  // padded to a multiple of 64
  const uint8_t* const first = static_cast<const uint8_t*>(data);
  to->insert(to->end(), first, first + bytes);
  to->resize(round_up(to->size(), 64), 0);
}

inline Vector record_of(RecordKind kind, std::initializer_list<int32_t> sizes, const std::vector<Vector>& sections) {
  RecordHeader h = {{}, kRecordVersion, kind, sizeof h, {}};
  memcpy(h.magic, "LOOKUPFF", 8);
  std::copy(sizes.begin(), sizes.end(), h.size);
  for (const Vector& section : sections) h.total_bytes += round_up(section.size(), 64);
  Vector bytes;
  append(&bytes, &h, sizeof h);
  for (const Vector& section : sections) append(&bytes, section.data(), section.size());
  return bytes;
}

inline Vector random_floats(size_t count, size_t width, size_t padded, float scale, float shift, Random& random) {
  std::vector<float> values;
  for (size_t r = 0; r < count; r++)
    for (size_t i = 0; i < padded; i++) values.push_back(i < width ? shift + scale * random.normal() : 0);
  const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(values.data());
  return Vector(bytes, bytes + 4 * values.size());
}

inline Vector linear_record(int in, int out, WeightType type, Activation activation, Random& random) {
  const int block_in = int(round_up(in, 64)), block_out = int(round_up(out, 64));
  const float deviation = 1 / std::sqrt(float(in));
  PackedHeader layout = {};
  layout.weight_type = type, layout.blocks = 1, layout.block_in = block_in, layout.block_out = block_out;
  Vector words(size_t(block_in) * block_out * element_size(type), 0);
  std::vector<float> scales;
  std::vector<int32_t> offsets;
  for (int o = 0; o < block_out; o++) {
    int sum = 0;
    for (int i = 0; i < in && o < out; i++) {
      const size_t at = weight_index(layout, 0, 0, o, i);
      const int whole = random.between(-127, 127);
      const float value = deviation * random.normal();
      if (type == WeightType::kInt8)
        words[at] = uint8_t(int8_t(whole)), sum += whole;
      else if (type == WeightType::kBFloat16)
        memcpy(&words[2 * at], reinterpret_cast<const char*>(&value) + 2, 2);
      else
        memcpy(&words[4 * at], &value, 4);
    }
    scales.push_back(deviation / 70), offsets.push_back(-128 * sum);
  }
  const auto bytes_of = [](const void* data, size_t bytes) {
    return Vector(static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(data) + bytes);
  };
  std::vector<Vector> sections = {words};
  if (type == WeightType::kInt8) {
    sections.push_back(bytes_of(scales.data(), 4 * scales.size()));
    sections.push_back(bytes_of(offsets.data(), 4 * offsets.size()));
  }
  sections.push_back(random_floats(1, out, block_out, 0.1f, 0, random));
  return record_of(RecordKind::kLinear, {in, out, block_in, block_out, int32_t(type), int32_t(activation)}, sections);
}

inline Vector norm_record(int width, bool rms, float epsilon, Random& random) {
  const int padded = int(round_up(width, 64));
  return record_of(
      RecordKind::kNorm, {width, padded, rms, int32_t(bits_of(epsilon))},
      {random_floats(1, width, padded, 0.1f, 1, random), random_floats(1, width, padded, 0.1f, 0, random)});
}

inline Vector embedding_record(int rows, int width, Random& random) {
  const int padded = int(round_up(width, 64));
  return record_of(RecordKind::kEmbedding, {rows, width, padded}, {random_floats(rows, width, padded, 1, 0, random)});
}

inline Vector lookup_record(int width, Random& random) {
  const int blocks = random.one_in(2) ? 1 : 2;
  const Packed packed = pack({.weights = WeightType(random.below(3)),
                              .tables = TableType(random.below(4)),
                              .in_features = width,
                              .out_features = width,
                              .num_tables = random.pick({3, 17}),
                              .code_bits = random.between(1, 4),
                              .reads = random.between(1, 2),
                              .stages = 4,
                              .repeats = 2,
                              .blocks = blocks,
                              .block_in = int(round_up(width, 64)) / blocks,
                              .block_out = int(round_up(width, 64)) / blocks,
                              .slice = 128,
                              .tokens = 0,
                              .x_bf16 = false,
                              .y_bf16 = false},
                             random);
  return Vector(packed.bytes->data(), packed.bytes->data() + packed.bytes->size());
}

inline Vector token_rows_record(int rows, int width, TableType type, int before, int after, Random& random) {
  const int padded = int(round_up(width, type == TableType::kInt4 ? 128 : 64));
  Vector data(size_t(rows) * padded * bits_of(type) / 8, 0);
  for (size_t at = 0; at < data.size() && is_integer(type); at++) data[at] = uint8_t(random.below(256));
  std::vector<Vector> sections = {data};
  if (is_integer(type)) sections.push_back(random_floats(1, size_t(rows), size_t(rows), 0.01f, 0, random));
  return record_of(RecordKind::kTokenRows, {rows, width, padded, int32_t(type), before, after}, sections);
}

// What may stand behind a lookup: a low rank, rows by ids.
inline std::vector<Vector> branch_records(int width, int vocab_size, WeightType type, Random& random) {
  const int rank = random.below(2), tables = random.between(1 - rank, 2);
  std::vector<Vector> records = {record_of(RecordKind::kBranches, {rank, tables}, {})};
  if (rank) {
    const int between = random.pick({1, 64, 70});
    records.push_back(linear_record(width, between, type, Activation::kNone, random));
    records.push_back(linear_record(between, width, type, Activation::kNone, random));
  }
  for (int i = 0; i < tables; i++) {
    const TableType of_rows = random.pick({TableType::kFloat32, TableType::kInt8, TableType::kInt4});
    records.push_back(
        token_rows_record(random.pick({1, 7, vocab_size}), width, of_rows, random.below(3), random.below(3), random));
  }
  return records;
}

struct Place { uint64_t begin, bytes; };

struct Model {
  EncoderConfig config;
  Vector bytes;
  std::vector<Place> places;  // of the records behind the first
};

// Records that are equal, as those of layers that are shared, are stored once.
inline Model model_of(const EncoderConfig& config, const std::vector<Vector>& records) {
  Model model = {config, {}, {}};
  std::vector<const Vector*> stored;
  uint64_t begin = sizeof(RecordHeader) + 128 + round_up(16 * records.size(), 64);
  for (auto record = records.begin(); record != records.end(); record++) {
    const auto first = std::find(records.begin(), record, *record);
    if (first != record) {
      model.places.push_back(model.places[size_t(first - records.begin())]);
      continue;
    }
    stored.push_back(&*record);
    model.places.push_back({begin, record->size()});
    begin += record->size();
  }
  Vector numbers(128, 0), list(16 * records.size(), 0);
  memcpy(numbers.data(), &config, sizeof config);
  memcpy(list.data(), model.places.data(), list.size());
  model.bytes = record_of(RecordKind::kModel, {int32_t(records.size())}, {numbers, list});
  for (const Vector* record : stored) model.bytes.insert(model.bytes.end(), record->begin(), record->end());
  return model;
}

// A bucket for each distance, which falls as they rise.
inline Vector buckets_record(int distances, int buckets, Random& random) {
  Vector row(4 * round_up(size_t(distances), 64), 0);
  int bucket = buckets - 1;
  for (int i = 0; i < distances; i++) {
    const float value = float(bucket);
    memcpy(row.data() + 4 * i, &value, 4);
    bucket = std::max(0, bucket - random.below(4));
  }
  return record_of(RecordKind::kEmbedding, {1, distances, int32_t(row.size() / 4)}, {row});
}

// A model of one or two layers, of any kind that there is. With `alike` results of implementations can be compared: no
// hash, which is not continuous, and no int8.
inline Model random_model(Random& random, bool alike = false) {
  EncoderConfig c = {};
  c.vocab_size = random.between(1, 30);
  c.width = random.pick({1, 40, 64, 70});
  c.padded = int(round_up(c.width, 64));
  c.layers = random.between(0, 2);
  c.heads = random.between(1, 3);
  c.head_dim = random.pick({16, 32});
  c.max_positions = random.between(1, 70);
  c.type_vocab_size = random.pick({0, 1, 2});
  c.pre_norm = random.below(2), c.embedding_norm = random.below(2), c.final_norm = random.below(2);
  c.causal = random.below(2), c.normalise = random.below(2);
  c.pooling = Pooling(random.below(4));
  c.first_position = random.one_in(2) ? 0 : random.below(c.max_positions);
  c.head = c.pooling == Pooling::kNone ? 0 : random.below(3);
  if (c.pooling == Pooling::kTokens) c.head = random.between(1, 2), c.normalise = 0;
  c.head_norm = c.head ? random.below(2) : 0;
  c.bare_start = c.pre_norm ? random.below(2) : 0;
  c.gated = random.below(2), c.relative = random.one_in(3);
  c.rotary = random.one_in(3);
  if (c.rotary) c.head_dim = 32;
  if (!c.relative && !c.causal && random.one_in(2)) {
    c.window = random.between(1, std::min(12, c.max_positions));
    c.global_every = random.between(1, 3);
  }
  if (random.one_in(4)) {  // which none of these goes with
    c.distance_buckets = random.pick({64, 128, 192});
    c.causal = c.relative = c.rotary = c.window = c.global_every = 0;
  }
  c.embedding_width = random.pick({0, 0, 1, 64, 70, 130});
  const WeightType floats = random.one_in(2) ? WeightType::kFloat32 : WeightType::kBFloat16;
  const WeightType type = alike || random.one_in(3) ? floats : WeightType::kInt8;
  const bool rms = random.one_in(3);
  const int embedded = c.embedding_width ? c.embedding_width : c.width;
  std::vector<Vector> records = {type == WeightType::kInt8 && random.one_in(2)
                                     ? token_rows_record(c.vocab_size, embedded, TableType::kInt8, 0, 0, random)
                                     : embedding_record(c.vocab_size, embedded, random)};
  if (c.embeds_positions()) records.push_back(embedding_record(c.max_positions, embedded, random));
  for (int i = 0; i < (c.rotary ? c.window ? 2 : 1 : 0); i++)
    records.push_back(embedding_record(c.max_positions, c.head_dim, random));
  if (c.relative) records.push_back(embedding_record(c.heads, 2 * c.max_positions + 14, random));
  if (c.distance_buckets) records.push_back(buckets_record(2 * c.max_positions - 1, c.distance_buckets, random));
  const auto norm = [&](int width) { records.push_back(norm_record(width, rms, 1e-6f, random)); };
  const auto linear = [&](int in, int out) {
    records.push_back(linear_record(in, out, type, Activation(random.below(6)), random));
  };
  if (c.type_vocab_size) records.push_back(embedding_record(c.type_vocab_size, embedded, random));
  if (c.embedding_norm) norm(embedded);
  if (c.embedding_width) linear(embedded, c.width);
  const size_t first_layer = records.size();
  for (int i = 0; i < c.layers; i++) {
    if (i && !c.bare_start && random.one_in(3)) {  // the layer before once more
      const std::vector<Vector> shared(records.begin() + long(first_layer), records.end());
      records.insert(records.end(), shared.begin(), shared.end());
      continue;
    }
    if (i || !c.bare_start) norm(c.width);
    records.push_back(linear_record(c.width, 3 * c.attention_width(), type, Activation::kNone, random));
    for (int side = 0; side < (c.distance_buckets ? 2 : 0); side++)
      records.push_back(linear_record(c.head_dim, c.heads * c.distance_buckets, type, Activation::kNone, random));
    records.push_back(linear_record(c.attention_width(), c.width, type, Activation::kNone, random));
    norm(c.width);
    if (!alike && random.one_in(2)) {
      records.push_back(lookup_record(c.width, random));
      if (random.one_in(2))
        for (const Vector& record : branch_records(c.width, c.vocab_size, type, random)) records.push_back(record);
    } else {
      const int middle = random.pick({1, 64, 200});
      linear(c.width, middle);
      if (c.gated) linear(c.width, middle);
      linear(middle, c.width);
    }
  }
  if (c.final_norm) norm(c.width);
  int in = c.width;
  for (int i = 0; i < c.head; i++) {
    const int out = random.pick({1, 3, 70});
    linear(in, out);
    in = out;
    if (i == 0 && c.head_norm) norm(out);
  }
  return model_of(c, records);
}

// A file of it: a safetensors header, which is no business of the runtime's, then the model.
inline Vector file_of(const Vector& model, size_t header = 56) {
  Vector file(8 + header, ' ');
  const uint64_t length = header;
  memcpy(file.data(), &length, 8);
  file.insert(file.end(), model.begin(), model.end());
  return file;
}

// Bytes that end at a guard page. Those of a sound model begin at a multiple of 64 then.
struct GuardedBytes : Guarded {
  explicit GuardedBytes(const Vector& v) : Guarded(v.size()) {
    if (!v.empty()) memcpy(data(), v.data(), v.size());
  }
  Bytes bytes() const { return {data(), size()}; }
};

struct Texts {
  std::vector<int32_t> lengths, ids, positions, types, offsets;
  bool has_positions, has_types, has_offsets;
  std::vector<int64_t> places;

  int64_t tokens() const { return int64_t(ids.size()); }
  Texts one(size_t text) const {
    size_t first = 0;
    for (size_t i = 0; i < text; i++) first += size_t(lengths[i]);
    const size_t last = first + size_t(lengths[text]);
    const auto part = [&](const std::vector<int32_t>& v) {
      return std::vector<int32_t>(v.begin() + first, v.begin() + last);
    };
    Texts found = {{lengths[text]}, part(ids), part(positions), part(types), part(offsets),
                   has_positions,   has_types, has_offsets,     {}};
    for (int64_t place : places)
      if (place >= int64_t(first) && place < int64_t(last)) found.places.push_back(place - int64_t(first));
    return found;
  }
};

inline Texts random_texts(const EncoderConfig& c, int count, Random& random) {
  Texts t;
  t.has_positions = random.one_in(3), t.has_types = random.one_in(2);
  t.has_offsets = random.one_in(3);
  const bool near =
      (c.relative || c.window || c.distance_buckets) && !t.has_offsets;  // texts no longer than distances go
  const int longest = c.max_positions - (t.has_positions ? 0 : c.first_position) + (t.has_positions && !near ? 5 : 0);
  for (int i = 0; i < count; i++) {
    t.lengths.push_back(random.one_in(3) ? random.between(1, longest) : std::min(longest, random.between(1, 9)));
    for (int j = 0; j < t.lengths[i]; j++) {
      t.ids.push_back(random.below(c.vocab_size));
      t.positions.push_back(random.below(c.max_positions));
      t.offsets.push_back(random.below(c.max_positions));
      if (random.one_in(3)) t.places.push_back(t.tokens() - 1);
      t.types.push_back(c.type_vocab_size ? random.below(c.type_vocab_size) : random.between(-9, 9));
    }
  }
  return t;
}

// A batch whose arrays end at guard pages.
struct GuardedBatch {
  Guarded lengths, ids, positions, types, offsets, places;
  Batch batch;

  explicit GuardedBatch(const Texts& t)
      : lengths(4 * t.lengths.size()),
        ids(4 * t.ids.size()),
        positions(ids.size()),
        types(ids.size()),
        offsets(ids.size()),
        places(8 * t.places.size()) {
    const auto copy = [](const Guarded& to, const auto& from) {
      if (!from.empty()) memcpy(to.data(), from.data(), sizeof from[0] * from.size());
      return reinterpret_cast<decltype(from.data())>(to.data());
    };
    batch = {.texts = int64_t(t.lengths.size()),
             .lengths = copy(lengths, t.lengths),
             .ids = copy(ids, t.ids),
             .positions = copy(positions, t.positions),
             .types = copy(types, t.types),
             .offsets = copy(offsets, t.offsets),
             .places = int64_t(t.places.size()),
             .place = copy(places, t.places)};
    if (!t.has_positions) batch.positions = nullptr;
    if (!t.has_types) batch.types = nullptr;
    if (!t.has_offsets) batch.offsets = nullptr;
  }
};

struct Results { std::vector<float> hidden, pooled; };

// A checked run; pooled stays empty where the model has no pooling.
inline Results run_model(const Kernels& k, const Encoder& e, const Texts& texts, int threads) {
  const GuardedBatch b(texts);
  int64_t tokens;
  const std::string wrong = check_batch(e, b.batch, &tokens);
  EXPECT(wrong.empty() && tokens == texts.tokens(), "check_batch: %ld tokens, %s", long(tokens), wrong.c_str());
  const EncoderPlan plan = plan_encoder(e, b.batch, threads);
  const Guarded workspace(plan.workspace_bytes());
  memset(workspace.data(), 0xff, workspace.size());  // NaN
  const size_t width = size_t(e.config.width), size = size_t(e.pooled_size());
  const bool pools = e.config.pooling != Pooling::kNone;
  const size_t answers = e.config.pooling == Pooling::kTokens ? texts.places.size() : texts.lengths.size();
  const Guarded hidden(4 * size_t(tokens) * width), pooled(pools ? 4 * answers * size : 0);
  float* const rows = reinterpret_cast<float*>(hidden.data());
  float* const vectors = reinterpret_cast<float*>(pooled.data());
  run_encoder({&k, nullptr, k.encoder}, e, plan, b.batch, {rows, pools ? vectors : nullptr}, workspace.data(),
              threads_of(threads));
  return {{rows, rows + hidden.size() / 4}, {vectors, vectors + pooled.size() / 4}};
}
