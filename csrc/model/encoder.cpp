#include "model/encoder.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace lookupffn {
namespace {

constexpr int32_t kMostLayers = 1 << 10;
constexpr int32_t kMostHead = 8;
constexpr int32_t kMostBuckets = 1 << 14;

std::string field(const char* name, int64_t value) { return std::string(name) + " is " + std::to_string(value); }

// The records of a model, one after another as its first record lists them.
class Records {
 public:
  Records(Bytes model, const uint8_t* list, int count) : model_(model), list_(list), count_(count) {}

  template <typename Record>
  std::string next(const char* name, std::string (*open)(Bytes, Record*), Record* record) {
    Bytes bytes;
    std::string wrong = take(&bytes);
    if (wrong.empty()) wrong = open(bytes, record);
    return wrong.empty() ? "" : "record " + std::to_string(index_ - 1) + ", " + name + ": " + wrong;
  }

  std::string kind_of_next(RecordKind* kind) {
    Bytes bytes;
    const std::string wrong = take(&bytes);
    index_--;
    return wrong.empty() ? record_kind(bytes, kind) : wrong;
  }

  bool at_end() const { return index_ == count_; }

 private:
  std::string take(Bytes* bytes) {
    if (index_ >= count_) return index_++, "the model lists " + std::to_string(count_) + " records, and needs more";
    uint64_t place[2];  // from the first byte of the model, and how many
    std::memcpy(place, list_ + 16 * size_t(index_++), sizeof place);
    if (place[0] % 64 || place[0] > model_.size || place[1] > model_.size - place[0])
      return "its bytes lie outside of the model's " + std::to_string(model_.size);
    *bytes = {model_.data + place[0], size_t(place[1])};
    return "";
  }
  Bytes model_;
  const uint8_t* list_;
  int count_, index_ = 0;
};

std::string open_lookup(Bytes bytes, Layer* layer) { return open_layer(bytes.data, bytes.size, layer); }

std::string check_config(const EncoderConfig& c) {
  if (c.vocab_size < 1) return field("vocab_size", c.vocab_size);
  if (c.width < 1 || c.width > kMostFeatures) return field("width", c.width);
  if (c.padded != (c.width + kPadding - 1) / kPadding * kPadding) return field("padded", c.padded);
  if (c.layers < 0 || c.layers > kMostLayers) return field("layers", c.layers);
  if (c.heads < 1 || c.heads > 4096) return field("heads", c.heads);
  if (c.head_dim < kLanes || c.head_dim % kLanes || c.head_dim > 4096) return field("head_dim", c.head_dim);
  if (c.max_positions < 1 || c.max_positions > kMostFeatures) return field("max_positions", c.max_positions);
  if (c.type_vocab_size < 0) return field("type_vocab_size", c.type_vocab_size);
  if (c.head < 0 || c.head > kMostHead || (c.head && c.pooling == Pooling::kNone)) return field("head", c.head);
  if (c.pooling < Pooling::kNone || c.pooling > Pooling::kTokens) return field("pooling", int(c.pooling));
  for (int32_t flag : {c.pre_norm, c.embedding_norm, c.final_norm, c.causal, c.normalise, c.head_norm, c.bare_start,
                       c.gated, c.rotary, c.relative})
    if (flag != 0 && flag != 1) return field("a flag", flag);
  if (c.head_norm && !c.head) return field("head_norm", c.head_norm) + " without a head";
  if (c.pooling == Pooling::kTokens && (!c.head || c.normalise)) return field("pooling", int(c.pooling));
  if (c.bare_start && !c.pre_norm) return field("bare_start", c.bare_start) + " with norms behind the sums";
  if (c.rotary && c.head_dim % (2 * kLanes)) return field("head_dim", c.head_dim) + ", whose halves cannot be turned";
  if (c.window < 0 || c.window > c.max_positions || (c.window && (c.relative || c.causal)))
    return field("window", c.window);
  if (c.window ? c.global_every < 1 || c.global_every > kMostLayers : c.global_every != 0)
    return field("global_every", c.global_every);
  if (c.embedding_width < 0 || c.embedding_width > kMostFeatures) return field("embedding_width", c.embedding_width);
  if (c.distance_buckets < 0 || c.distance_buckets % kPadding || c.distance_buckets > kMostBuckets ||
      int64_t(c.heads) * c.distance_buckets > kMostFeatures ||
      (c.distance_buckets && (c.rotary || c.relative || c.window || c.causal)))
    return field("distance_buckets", c.distance_buckets);
  if (c.first_position < 0 || c.first_position >= c.max_positions) return field("first_position", c.first_position);
  return "";
}

std::string fits(const char* name, const Linear& l, int in, int out) {
  if (l.in_features == in && l.out_features == out) return "";
  return std::string(name) + " takes " + std::to_string(l.in_features) + " to " + std::to_string(l.out_features) +
         ", the model needs " + std::to_string(in) + " to " + std::to_string(out);
}

// A bucket for each distance, as whole numbers in one row.
std::string open_buckets(Records* records, const EncoderConfig& c, std::vector<int32_t>* buckets) {
  Embedding row;
  std::string wrong = records->next("distance buckets", open_embedding, &row);
  if (!wrong.empty()) return wrong;
  if (row.rows != 1 || row.width != 2 * c.max_positions - 1) return "distance buckets do not fit";
  for (int i = 0; i < row.width; i++) {
    const float bucket = row.values[i];
    if (!(bucket >= 0 && bucket < float(c.distance_buckets)) || bucket != float(int32_t(bucket)))
      return "a distance has bucket " + std::to_string(bucket) + " of " + std::to_string(c.distance_buckets);
    if (i && bucket > row.values[i - 1]) return "buckets rise with the distance";
    buckets->push_back(int32_t(bucket));
  }
  return "";
}

// Of each id its row, in float32 or integers.
std::string open_words(Records* records, const EncoderConfig& c, int width, Encoder* e) {
  RecordKind kind;
  e->integer_words.data = nullptr;
  std::string wrong = records->kind_of_next(&kind);
  if (!wrong.empty()) return wrong;
  if (kind == RecordKind::kTokenRows) {
    TokenRows& rows = e->integer_words;
    wrong = records->next("words", open_token_rows, &rows);
    if (wrong.empty() && (rows.rows != c.vocab_size || rows.width != width || rows.before || rows.after ||
                          rows.type != TableType::kInt8))
      wrong = "words do not fit";
    e->words = {rows.rows, rows.width, rows.padded, nullptr};
    return wrong;
  }
  wrong = records->next("words", open_embedding, &e->words);
  return wrong.empty() && (e->words.rows != c.vocab_size || e->words.width != width) ? "words do not fit" : wrong;
}

std::string open_branches_of(Records* records, int width, EncoderLayer* l) {
  RecordKind kind;
  l->branches = {false, 0};
  if (records->at_end()) return "";
  std::string wrong = records->kind_of_next(&kind);
  if (!wrong.empty() || kind != RecordKind::kBranches) return wrong;
  if (!(wrong = records->next("branches", open_branches, &l->branches)).empty()) return wrong;
  if (l->has_ffn && !l->branches.low_rank && !l->branches.token_rows) return "a layer has a record of no branches";
  if (!l->has_lookup && l->branches.low_rank) return "a low rank stands without a lookup";
  if (l->branches.low_rank) {
    wrong = records->next("reduce", open_linear, &l->reduce);
    if (wrong.empty()) wrong = records->next("expand", open_linear, &l->expand);
    if (wrong.empty()) wrong = fits("reduce", l->reduce, width, l->expand.in_features);
    if (wrong.empty()) wrong = fits("expand", l->expand, l->reduce.out_features, width);
  }
  l->token_rows.resize(size_t(l->branches.token_rows));
  for (TokenRows& rows : l->token_rows) {
    if (wrong.empty()) wrong = records->next("token rows", open_token_rows, &rows);
    if (wrong.empty() && rows.width != width) wrong = "token rows are of another width";
  }
  return wrong;
}

std::string open_ffn(Records* records, int width, bool gated, EncoderLayer* l) {
  RecordKind kind;
  std::string wrong = records->kind_of_next(&kind);
  if (!wrong.empty()) return wrong;
  l->has_lookup = kind == RecordKind::kLookup;
  l->has_ffn = kind != RecordKind::kBranches;
  l->branches = {false, 0};
  if (!l->has_ffn) return open_branches_of(records, width, l);
  if (l->has_lookup) {
    wrong = records->next("lookup", open_lookup, &l->lookup);
    if (wrong.empty() && (l->lookup.h.in_features != width || l->lookup.h.out_features != width))
      wrong = "the lookup is of another width";
    return wrong.empty() ? open_branches_of(records, width, l) : wrong;
  }
  wrong = records->next("up", open_linear, &l->up);
  if (wrong.empty() && gated) wrong = records->next("gate", open_linear, &l->gate);
  if (wrong.empty() && gated) wrong = fits("gate", l->gate, width, l->up.out_features);
  if (wrong.empty()) wrong = records->next("down", open_linear, &l->down);
  if (wrong.empty()) wrong = fits("up", l->up, width, l->down.in_features);
  if (wrong.empty()) wrong = fits("down", l->down, l->up.out_features, width);
  return wrong.empty() ? open_branches_of(records, width, l) : wrong;
}

}  // namespace

std::string data_of_file(Bytes file, Bytes* data) {
  uint64_t header;
  if (file.size < 8) return "it has " + std::to_string(file.size) + " bytes, fewer than a safetensors file";
  std::memcpy(&header, file.data, 8);
  if (header > file.size - 8) return "its header says " + std::to_string(header) + " bytes, more than there are";
  *data = {file.data + 8 + header, size_t(file.size - 8 - header)};
  return "";
}

std::string model_of_file(Bytes file, Bytes* model) {
  const std::string wrong = data_of_file(file, model);
  if (!wrong.empty()) return wrong;
  const size_t header = file.size - model->size;
  return header % 64 ? "its header ends at byte " + std::to_string(header) + ", no multiple of 64" : "";
}

std::string open_encoder(Bytes model, Encoder* e) {
  RecordKind kind;
  std::string wrong = record_kind(model, &kind);
  if (!wrong.empty()) return wrong;
  RecordHeader h;
  std::memcpy(&h, model.data, sizeof h);
  const int64_t count = h.size[0];
  if (kind != RecordKind::kModel) return "its first record is of kind " + std::to_string(int(kind)) + ", no model";
  if (h.total_bytes > model.size) return "its first record says more bytes than there are";
  if (count < 0 || count > 16 * kMostLayers || h.total_bytes != (sizeof h + 128 + 16 * uint64_t(count) + 63) / 64 * 64)
    return field("the number of records", count) + ", in a record of " + std::to_string(h.total_bytes) + " bytes";
  EncoderConfig& c = e->config;
  static_assert(sizeof c <= 128, "the numbers of a model record");
  std::memcpy(&c, model.data + sizeof h, sizeof c);
  for (size_t i = sizeof c; i < 128; i++)
    if (model.data[sizeof h + i] != 0) return "reserved bytes of the model record are not 0";
  for (int i = 1; i < kRecordSizes; i++)
    if (h.size[i] != 0) return field("a reserved size", h.size[i]);
  if (!(wrong = check_config(c)).empty()) return wrong;

  Records records(model, model.data + sizeof h + 128, int(count));
  const auto norm = [&](const char* name, int width, Norm* n) {
    std::string wrong = records.next(name, open_norm, n);
    return wrong.empty() && n->width != width ? std::string(name) + " is of another width" : wrong;
  };
  const auto embedding = [&](const char* name, int rows, int width, Embedding* table) {
    std::string wrong = records.next(name, open_embedding, table);
    if (wrong.empty() && (table->rows != rows || table->width != width)) wrong = std::string(name) + " does not fit";
    return wrong;
  };
  const int distances = 2 * c.max_positions + kLanes - 2;  // and what a vector reads behind the last
  const int embedded = c.embedding_width ? c.embedding_width : c.width;
  if (!(wrong = open_words(&records, c, embedded, e)).empty()) return wrong;
  if (c.embeds_positions() && !(wrong = embedding("positions", c.max_positions, embedded, &e->positions)).empty())
    return wrong;
  for (int i = 0; i < (c.rotary ? c.window ? 2 : 1 : 0); i++)
    if (!(wrong = embedding("rotations", c.max_positions, c.head_dim, &e->rotations[i])).empty()) return wrong;
  if (c.relative && !(wrong = embedding("relative", c.heads, distances, &e->relative)).empty()) return wrong;
  e->buckets.clear();
  if (c.distance_buckets && !(wrong = open_buckets(&records, c, &e->buckets)).empty()) return wrong;
  if (c.window) {
    e->window_bias.assign(size_t(distances), -std::numeric_limits<float>::infinity());
    const int middle = c.max_positions - 1;
    for (int i = std::max(0, middle - c.window); i <= middle + c.window && i < distances; i++) e->window_bias[i] = 0;
  }
  if (c.type_vocab_size && !(wrong = embedding("types", c.type_vocab_size, embedded, &e->types)).empty()) return wrong;
  if (c.embedding_norm && !(wrong = norm("embedding norm", embedded, &e->embedding_norm)).empty()) return wrong;
  if (c.embedding_width) {
    wrong = records.next("embedding projection", open_linear, &e->embedding_projection);
    if (wrong.empty()) wrong = fits("embedding projection", e->embedding_projection, embedded, c.width);
    if (!wrong.empty()) return wrong;
  }
  e->layers.resize(size_t(c.layers));
  e->widest = std::max(c.padded, e->words.padded);
  for (EncoderLayer& l : e->layers) {
    const bool bare = c.bare_start && &l == &e->layers[0];
    if (!bare && !(wrong = norm("attention norm", c.width, &l.attention_norm)).empty()) return wrong;
    if (!(wrong = records.next("query, key, value", open_linear, &l.query_key_value)).empty()) return wrong;
    if (!(wrong = fits("query, key, value", l.query_key_value, c.width, 3 * c.attention_width())).empty()) return wrong;
    for (Linear* by_bucket : {&l.position_keys, &l.position_queries}) {
      if (!c.distance_buckets) break;
      const char* const name = by_bucket == &l.position_keys ? "position keys" : "position queries";
      if (!(wrong = records.next(name, open_linear, by_bucket)).empty()) return wrong;
      if (!(wrong = fits(name, *by_bucket, c.head_dim, c.heads * c.distance_buckets)).empty()) return wrong;
    }
    if (!(wrong = records.next("output", open_linear, &l.output)).empty()) return wrong;
    if (!(wrong = fits("output", l.output, c.attention_width(), c.width)).empty()) return wrong;
    if (!(wrong = norm("ffn norm", c.width, &l.ffn_norm)).empty()) return wrong;
    if (!(wrong = open_ffn(&records, c.width, c.gated, &l)).empty()) return wrong;
    e->widest = std::max({e->widest, l.output.block_in, l.has_lookup ? 0 : l.up.block_out,
                          l.branches.low_rank ? l.reduce.block_out : 0});
  }
  if (c.final_norm && !(wrong = norm("final norm", c.width, &e->final_norm)).empty()) return wrong;
  e->head.resize(size_t(c.head));
  e->head_widest = c.padded;
  int in = c.width;
  for (Linear& l : e->head) {
    if (!(wrong = records.next("head", open_linear, &l)).empty()) return wrong;
    if (l.in_features != in) return fits("head", l, in, l.out_features);
    in = l.out_features;
    e->head_widest = std::max(e->head_widest, l.block_out);
    if (c.head_norm && &l == &e->head[0]) {
      wrong = records.next("head norm", open_norm, &e->head_norm);
      if (wrong.empty() && e->head_norm.width != in) wrong = "head norm is of another width";
      if (!wrong.empty()) return wrong;
    }
  }
  return records.at_end() ? "" : "it lists more records than its graph needs";
}

std::string check_batch(const Encoder& e, const Batch& b, int64_t* tokens) {
  const EncoderConfig& c = e.config;
  *tokens = 0;
  if (b.texts < 0) return field("texts", b.texts);
  if (b.places < 0) return field("places", b.places);
  if (b.texts && (!b.lengths || !b.ids)) return "lengths or ids are missing";
  if (b.places && !b.place) return field("places", b.places) + ", but there is no list of them";
  for (int64_t i = 0; i < b.texts; i++) {
    const int32_t length = b.lengths[i];
    if (length < 1) return "text " + std::to_string(i) + " has " + std::to_string(length) + " tokens";
    const bool far = (c.relative || c.window || c.distance_buckets) && !b.offsets && length > c.max_positions;
    if (far || (!b.positions && length > c.max_positions - c.first_position))
      return "text " + std::to_string(i) + " has " + std::to_string(length) + " tokens, the model has positions for " +
             std::to_string(c.max_positions - c.first_position);
    if (*tokens > (int64_t(1) << 40)) return "too many tokens";
    *tokens += length;
  }
  for (int64_t t = 0; t < *tokens; t++) {
    if (b.ids[t] < 0 || b.ids[t] >= c.vocab_size)
      return "token " + std::to_string(t) + " has id " + std::to_string(b.ids[t]) + ", not 0 to " +
             std::to_string(c.vocab_size - 1);
    if (b.positions && (b.positions[t] < 0 || b.positions[t] >= c.max_positions))
      return "token " + std::to_string(t) + " has position " + std::to_string(b.positions[t]) + ", not 0 to " +
             std::to_string(c.max_positions - 1);
    if (b.offsets && (b.offsets[t] < 0 || b.offsets[t] >= c.max_positions))
      return "token " + std::to_string(t) + " has offset " + std::to_string(b.offsets[t]) + ", not 0 to " +
             std::to_string(c.max_positions - 1);
    if (b.types && c.type_vocab_size && (b.types[t] < 0 || b.types[t] >= c.type_vocab_size))
      return "token " + std::to_string(t) + " has type " + std::to_string(b.types[t]) + ", not 0 to " +
             std::to_string(c.type_vocab_size - 1);
  }
  for (int64_t i = 0; i < (c.pooling == Pooling::kTokens ? b.places : 0); i++)
    if (b.place[i] < 0 || b.place[i] >= *tokens || (i && b.place[i] <= b.place[i - 1]))
      return "place " + std::to_string(i) + " is token " + std::to_string(b.place[i]) + " of " +
             std::to_string(*tokens) + ", behind that of the place before";
  return "";
}

}  // namespace lookupffn
