#include "model/encoder.h"

#include <algorithm>
#include <cstring>

#include "ops/float_state.h"
#include "ops/workspace.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace lookupffn {
namespace {

constexpr int kTile = 48;               // tokens that go through a product at once
constexpr int64_t kChunkTokens = 1024;  // whose activations stay in L2 and L3 while weights come by
constexpr int64_t kSerialTokens = 24;   // up to so many on the calling thread alone
constexpr int32_t kMostLayers = 1 << 10;
constexpr int32_t kMostHead = 8;

std::string field(const char* name, int64_t value) { return std::string(name) + " is " + std::to_string(value); }

// ---- Opening --------------------------------------------------------------------------------------------------------

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
  if (c.max_positions < 1) return field("max_positions", c.max_positions);
  if (c.type_vocab_size < 0) return field("type_vocab_size", c.type_vocab_size);
  if (c.head < 0 || c.head > kMostHead || (c.head && c.pooling == Pooling::kNone)) return field("head", c.head);
  if (c.pooling < Pooling::kNone || c.pooling > Pooling::kCls) return field("pooling", int(c.pooling));
  for (int32_t flag : {c.pre_norm, c.embedding_norm, c.final_norm, c.causal, c.normalise})
    if (flag != 0 && flag != 1) return field("a flag", flag);
  if (c.first_position < 0 || c.first_position >= c.max_positions) return field("first_position", c.first_position);
  return "";
}

std::string fits(const char* name, const Linear& l, int in, int out) {
  if (l.in_features == in && l.out_features == out) return "";
  return std::string(name) + " takes " + std::to_string(l.in_features) + " to " + std::to_string(l.out_features) +
         ", the model needs " + std::to_string(in) + " to " + std::to_string(out);
}

std::string open_ffn(Records* records, int width, EncoderLayer* l) {
  RecordKind kind;
  std::string wrong = records->kind_of_next(&kind);
  if (!wrong.empty()) return wrong;
  l->has_lookup = kind == RecordKind::kLookup;
  if (l->has_lookup) {
    wrong = records->next("lookup", open_lookup, &l->lookup);
    if (wrong.empty() && (l->lookup.h.in_features != width || l->lookup.h.out_features != width))
      wrong = "the lookup is of another width";
    return wrong;
  }
  wrong = records->next("up", open_linear, &l->up);
  if (wrong.empty()) wrong = records->next("down", open_linear, &l->down);
  if (wrong.empty()) wrong = fits("up", l->up, width, l->down.in_features);
  if (wrong.empty()) wrong = fits("down", l->down, l->up.out_features, width);
  return wrong;
}

}  // namespace

std::string model_of_file(Bytes file, Bytes* model) {
  uint64_t header;
  if (file.size < 8) return "it has " + std::to_string(file.size) + " bytes, fewer than a safetensors file";
  std::memcpy(&header, file.data, 8);
  if (header > file.size - 8) return "its header says " + std::to_string(header) + " bytes, more than there are";
  if ((8 + header) % 64) return "its header ends at byte " + std::to_string(8 + header) + ", no multiple of 64";
  *model = {file.data + 8 + header, size_t(file.size - 8 - header)};
  return "";
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
  const auto norm = [&](const char* name, Norm* n) {
    std::string wrong = records.next(name, open_norm, n);
    return wrong.empty() && n->width != c.width ? std::string(name) + " is of another width" : wrong;
  };
  const auto embedding = [&](const char* name, int rows, Embedding* table) {
    std::string wrong = records.next(name, open_embedding, table);
    if (wrong.empty() && (table->rows != rows || table->width != c.width)) wrong = std::string(name) + " does not fit";
    return wrong;
  };
  if (!(wrong = embedding("words", c.vocab_size, &e->words)).empty()) return wrong;
  if (!(wrong = embedding("positions", c.max_positions, &e->positions)).empty()) return wrong;
  if (c.type_vocab_size && !(wrong = embedding("types", c.type_vocab_size, &e->types)).empty()) return wrong;
  if (c.embedding_norm && !(wrong = norm("embedding norm", &e->embedding_norm)).empty()) return wrong;
  e->layers.resize(size_t(c.layers));
  e->widest = c.padded;
  for (EncoderLayer& l : e->layers) {
    if (!(wrong = norm("attention norm", &l.attention_norm)).empty()) return wrong;
    if (!(wrong = records.next("query, key, value", open_linear, &l.query_key_value)).empty()) return wrong;
    if (!(wrong = fits("query, key, value", l.query_key_value, c.width, 3 * c.attention_width())).empty()) return wrong;
    if (!(wrong = records.next("output", open_linear, &l.output)).empty()) return wrong;
    if (!(wrong = fits("output", l.output, c.attention_width(), c.width)).empty()) return wrong;
    if (!(wrong = norm("ffn norm", &l.ffn_norm)).empty()) return wrong;
    if (!(wrong = open_ffn(&records, c.width, &l)).empty()) return wrong;
    e->widest = std::max({e->widest, l.output.block_in, l.has_lookup ? 0 : l.up.block_out});
  }
  if (c.final_norm && !(wrong = norm("final norm", &e->final_norm)).empty()) return wrong;
  e->head.resize(size_t(c.head));
  int in = c.width;
  for (Linear& l : e->head) {
    if (!(wrong = records.next("head", open_linear, &l)).empty()) return wrong;
    if (l.in_features != in) return fits("head", l, in, l.out_features);
    in = l.out_features;
    e->widest = std::max(e->widest, l.block_out);
  }
  return records.at_end() ? "" : "it lists more records than its graph needs";
}

std::string check_batch(const Encoder& e, const Batch& b, int64_t* tokens) {
  const EncoderConfig& c = e.config;
  *tokens = 0;
  if (b.texts < 0) return field("texts", b.texts);
  for (int64_t i = 0; i < b.texts; i++) {
    const int32_t length = b.lengths[i];
    if (length < 1) return "text " + std::to_string(i) + " has " + std::to_string(length) + " tokens";
    if (!b.positions && length > c.max_positions - c.first_position)
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
    if (b.types && c.type_vocab_size && (b.types[t] < 0 || b.types[t] >= c.type_vocab_size))
      return "token " + std::to_string(t) + " has type " + std::to_string(b.types[t]) + ", not 0 to " +
             std::to_string(c.type_vocab_size - 1);
  }
  return "";
}

// ---- Running --------------------------------------------------------------------------------------------------------

namespace {

size_t keys_stride(int64_t longest) { return size_t((longest + kLanes - 1) / kLanes * kLanes); }

// Of a chunk: what waits between the phases of a layer.
struct ChunkMemory {
  float* x;        // [tokens][padded] the residual stream
  float* qkv;      // [tokens][its padded width]
  float* context;  // [tokens][its padded width]
  float* branch;   // [tokens][padded] of a lookup: its normed input, then its output
  float* lookup;   // [tokens][padded]

  ChunkMemory(Carver& memory, const Encoder& e, int64_t tokens) {
    const EncoderConfig& c = e.config;
    size_t qkv_width = 0, context_width = 0;
    bool lookups = false;
    for (const EncoderLayer& l : e.layers) {
      qkv_width = size_t(l.query_key_value.block_out), context_width = size_t(l.output.block_in);
      lookups |= l.has_lookup;
    }
    x = memory.take<float>(tokens * c.padded);
    qkv = memory.take<float>(tokens * qkv_width);
    context = memory.take<float>(tokens * context_width);
    branch = lookups ? memory.take<float>(tokens * c.padded) : nullptr;
    lookup = lookups ? memory.take<float>(tokens * c.padded) : nullptr;
  }
};

// Of a thread.
struct ThreadMemory {
  float* rows[2];      // [tile][widest]
  uint8_t* quantised;  // [tile][widest][kMaxPlanes]
  float* sums;         // [tile][64]
  float *keys, *values, *scores;
  void* lookup;  // workspace of the widest lookup

  ThreadMemory(Carver& memory, const Encoder& e, int64_t longest, size_t lookup_bytes) {
    const EncoderConfig& c = e.config;
    for (float*& r : rows) r = memory.take<float>(size_t(kTile) * e.widest);
    quantised = memory.take<uint8_t>(size_t(kTile) * e.widest * kMaxPlanes);
    sums = memory.take<float>(size_t(kTile) * kPadding);
    keys = memory.take<float>(size_t(c.head_dim) * keys_stride(longest));
    values = memory.take<float>(size_t(c.head_dim) * longest);
    scores = memory.take<float>(size_t(kMaxQueryTile) * keys_stride(longest));
    lookup = memory.take<uint8_t>(lookup_bytes);
  }
};

size_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return size_t(found);
#endif
  return size_t(1) << 20;
}

// By the caches, as runtime/tuning.py has it.
Tiling tiling_of(const Layer& l) {
  const size_t group_bytes = kLanes * l.tables.table_bytes();
  int groups = l.groups;
  if (groups * group_bytes > 2 * l2_bytes()) {
    groups = 1;
    for (int halved = l.groups / 2; halved >= 1; halved /= 2)
      if (halved * group_bytes <= l2_bytes() * 3 / 4) {
        groups = halved;
        break;
      }
  }
  return {.tile_tokens = 16, .groups_per_block = groups, .prefetch_distance = 128, .serial_tokens = 4};
}

size_t lookup_bytes(const Encoder& e, int64_t tokens) {
  size_t most = 0;
  for (const EncoderLayer& l : e.layers)
    if (l.has_lookup) most = std::max(most, make_plan(l.lookup, tokens, tiling_of(l.lookup), 1).workspace_bytes());
  return most;
}

struct Call {
  const Implementation& k;
  const Encoder& e;
  const EncoderPlan& p;
  const Batch& batch;
  const Outputs& out;
  size_t lookup_bytes;
};

// One chunk: texts [first, last), whose first token is `start` of the batch.
struct Chunk {
  const Call& call;
  const ThreadPool& pool;
  int64_t first, last, start, tokens;
  ChunkMemory memory;
  uint8_t* thread_memory;

  const Encoder& e() const { return call.e; }
  const EncoderConfig& config() const { return call.e.config; }

  ThreadMemory of_thread(int thread) const {
    Carver carver(thread_memory + size_t(thread) * call.p.thread_bytes);
    return ThreadMemory(carver, call.e, call.p.longest, call.lookup_bytes);
  }

  // body(memory, token, tokens) for tiles of the chunk.
  template <typename Body>
  void tiles(const Body& body) const {
    share_out_flushing(pool, call.p.inner, tokens, [&](int thread, int64_t begin, int64_t end) {
      const ThreadMemory m = of_thread(thread);
      for (int64_t t = begin; t < end; t += kTile) body(m, t, int(std::min<int64_t>(kTile, end - t)));
    });
  }

  // For at most kTile rows; y may be the residual.
  void linear(const ThreadMemory& m, const Linear& l, float* x, size_t x_stride, int count, float* y, size_t y_stride,
              const float* residual = nullptr, size_t residual_stride = 0) const {
    call.k.encoder->linear({.type = l.type,
                            .w = l.weights,
                            .bias = l.bias,
                            .activation = l.activation,
                            .x = x,
                            .x_stride = x_stride,
                            .tokens = count,
                            .residual = residual,
                            .residual_stride = residual_stride,
                            .y = y,
                            .y_stride = y_stride,
                            .quantised = m.quantised,
                            .sums = m.sums});
  }

  void norm(const Norm& n, const float* x, int count, float* y) const {
    call.k.encoder->norm_rows({.x = x,
                               .x_stride = size_t(n.padded),
                               .tokens = count,
                               .width = n.width,
                               .padded = n.padded,
                               .rms = n.rms,
                               .epsilon = n.epsilon,
                               .weight = n.weight,
                               .bias = n.bias,
                               .y = y,
                               .y_stride = size_t(n.padded)});
  }

  float* x_of(int64_t token) const { return memory.x + token * config().padded; }

  void embed() const {
    const EncoderConfig& c = config();
    const Batch& b = call.batch;
    int64_t token = 0;
    for (int64_t text = first; text < last; text++)
      for (int32_t i = 0; i < b.lengths[text]; i++, token++) {
        const int64_t at = start + token;
        const int32_t position = b.positions ? b.positions[at] : c.first_position + i;
        AddRowsArgs args = {.rows = {}, .count = 2, .padded = c.padded, .y = x_of(token)};
        args.rows[0] = e().words.values + size_t(b.ids[at]) * c.padded;
        args.rows[1] = e().positions.values + size_t(position) * c.padded;
        if (c.type_vocab_size)
          args.rows[args.count++] = e().types.values + size_t(b.types ? b.types[at] : 0) * c.padded;
        call.k.encoder->add_rows(args);
      }
    if (c.embedding_norm)
      tiles([&](const ThreadMemory&, int64_t t, int count) { norm(e().embedding_norm, x_of(t), count, x_of(t)); });
  }

  void attention(const EncoderLayer& l) const {
    const EncoderConfig& c = config();
    const int64_t stride = l.query_key_value.block_out, width = c.attention_width();
    tiles([&](const ThreadMemory& m, int64_t t, int count) {
      float* x = x_of(t);
      if (c.pre_norm) {
        norm(l.attention_norm, x, count, m.rows[0]);
        x = m.rows[0];
      }
      linear(m, l.query_key_value, x, size_t(c.padded), count, memory.qkv + t * stride, size_t(stride));
    });
    // Queries of a text may be shared out too, where texts and heads are fewer than threads.
    share_out_flushing(pool, call.p.inner, (last - first) * c.heads, [&](int thread, int64_t begin, int64_t end) {
      const ThreadMemory m = of_thread(thread);
      int64_t token = 0, text = first;
      for (int64_t unit = begin, seen = 0; unit < end; unit++) {
        for (; seen < unit / c.heads; seen++) token += call.batch.lengths[text++];
        const int length = call.batch.lengths[text];
        const float* const q = memory.qkv + token * stride + unit % c.heads * c.head_dim;
        const size_t stride_of_keys = keys_stride(length);
        call.k.encoder->pack_head({.k = q + width,
                                   .v = q + 2 * width,
                                   .stride = stride,
                                   .keys = length,
                                   .head_dim = c.head_dim,
                                   .keys_out = m.keys,
                                   .keys_stride = stride_of_keys,
                                   .values_out = m.values});
        call.k.encoder->attend({.q = q,
                                .stride = stride,
                                .begin = 0,
                                .end = length,
                                .k = m.keys,
                                .v = m.values,
                                .keys_stride = stride_of_keys,
                                .keys = length,
                                .head_dim = c.head_dim,
                                .causal = c.causal != 0,
                                .scores = m.scores,
                                .y = memory.context + token * l.output.block_in + unit % c.heads * c.head_dim,
                                .y_stride = l.output.block_in});
      }
    });
  }

  // The rest of a layer, token by token; a lookup's tokens all at once, as its gather wants them.
  void feed_forward(const EncoderLayer& l) const {
    const EncoderConfig& c = config();
    const size_t padded = size_t(c.padded);
    share_out_flushing(pool, call.p.inner, tokens, [&](int thread, int64_t begin, int64_t end) {
      const ThreadMemory m = of_thread(thread);
      for (int64_t t = begin; t < end; t += kTile) {
        const int count = int(std::min<int64_t>(kTile, end - t));
        linear(m, l.output, memory.context + t * l.output.block_in, size_t(l.output.block_in), count, x_of(t), padded,
               x_of(t), padded);
        float* x = x_of(t);
        if (!c.pre_norm) norm(l.attention_norm, x, count, x_of(t));
        if (c.pre_norm) {
          float* const normed = l.has_lookup ? memory.branch + t * c.padded : m.rows[0];
          norm(l.ffn_norm, x, count, normed);
          x = normed;
        }
        if (l.has_lookup) continue;
        linear(m, l.up, x, padded, count, m.rows[1], size_t(l.up.block_out));
        linear(m, l.down, m.rows[1], size_t(l.up.block_out), count, x_of(t), padded, x_of(t), padded);
        if (!c.pre_norm) norm(l.ffn_norm, x_of(t), count, x_of(t));
      }
      if (!l.has_lookup) return;
      const float* const x = c.pre_norm ? memory.branch : memory.x;
      const Plan plan = make_plan(l.lookup, end - begin, tiling_of(l.lookup), 1);
      run(*call.k.inference, l.lookup, plan, {const_cast<float*>(x) + begin * c.padded, c.padded, false},
          {memory.lookup + begin * c.padded, c.padded, false}, m.lookup, {1, nullptr, nullptr});
      for (int64_t t = begin; t < end; t += kTile) {
        const int count = int(std::min<int64_t>(kTile, end - t));
        for (int i = 0; i < count; i++)
          call.k.encoder->add_rows({.rows = {x_of(t + i), memory.lookup + (t + i) * c.padded},
                                    .count = 2,
                                    .padded = c.padded,
                                    .y = x_of(t + i)});
        if (!c.pre_norm) norm(l.ffn_norm, x_of(t), count, x_of(t));
      }
    });
  }

  void finish() const {
    const EncoderConfig& c = config();
    tiles([&](const ThreadMemory&, int64_t t, int count) {
      if (c.final_norm) norm(e().final_norm, x_of(t), count, x_of(t));
      if (call.out.hidden)
        for (int i = 0; i < count; i++)
          std::memcpy(call.out.hidden + (start + t + i) * c.width, x_of(t + i), 4 * size_t(c.width));
    });
    if (call.out.pooled) pool_texts();
  }

  // The chunk's texts, a tile of them at a time.
  void pool_texts() const {
    const EncoderConfig& c = config();
    const ThreadMemory m = of_thread(0);
    const bool apart = !e().head.empty();  // normalised behind the head
    int64_t token = 0;
    for (int64_t text = first, count; text < last; text += count) {
      count = std::min<int64_t>(kTile, last - text);
      for (int64_t i = 0; i < count; token += call.batch.lengths[text + i++])
        pool_rows(x_of(token), c.pooling == Pooling::kMean ? call.batch.lengths[text + i] : 1, c.padded,
                  c.normalise && !apart, m.rows[0] + i * c.padded);
      int side = 0, stride = c.padded;
      for (const Linear& l : e().head) {
        linear(m, l, m.rows[side], size_t(l.block_in), int(count), m.rows[1 - side], size_t(l.block_out));
        side = 1 - side, stride = l.block_out;
      }
      const size_t size = size_t(e().pooled_size());
      for (int64_t i = 0; i < count; i++) {
        float* const row = m.rows[side] + i * stride;
        if (c.normalise && apart) pool_rows(row, 1, stride, true, row);
        std::memcpy(call.out.pooled + size_t(text + i) * size, row, 4 * size);
      }
    }
  }

  void pool_rows(const float* x, int64_t tokens, int padded, bool normalise, float* y) const {
    call.k.encoder->pool_rows(
        {.x = x, .stride = padded, .tokens = tokens, .padded = padded, .normalise = normalise, .y = y});
  }

  void run_all() const {
    const EncoderConfig& c = config();
    if (memory.lookup) std::memset(memory.lookup, 0, 4 * size_t(tokens) * c.padded);  // what pads its rows stays 0
    if (!e().layers.empty()) std::memset(memory.context, 0, 4 * size_t(tokens) * e().layers[0].output.block_in);
    FloatState state;
    embed();
    for (const EncoderLayer& l : e().layers) {
      attention(l);
      feed_forward(l);
    }
    finish();
  }
};

}  // namespace

EncoderPlan plan_encoder(const Encoder& e, const Batch& b, int threads) {
  EncoderPlan p = {};
  int64_t tokens = 0;
  for (int64_t i = 0; i < b.texts; i++) {
    p.longest = std::max<int64_t>(p.longest, b.lengths[i]);
    tokens += b.lengths[i];
  }
  threads = tokens <= kSerialTokens ? 1 : std::max(threads, 1);
  // As many chunks at a time as there are threads, where there are as many; else the threads share out one.
  const int64_t even = ceil_div(tokens, threads);
  const bool apart = b.texts >= threads && p.longest <= even;
  p.chunk_tokens = std::max<int64_t>(std::min(kChunkTokens, std::max<int64_t>(even, 1)), p.longest);
  p.outer = apart ? threads : 1;
  p.inner = apart ? 1 : threads;
  Carver chunk(nullptr), thread(nullptr);
  ChunkMemory(chunk, e, p.chunk_tokens);
  ThreadMemory(thread, e, p.longest, lookup_bytes(e, p.chunk_tokens));
  p.chunk_bytes = chunk.bytes();
  p.thread_bytes = thread.bytes();
  return p;
}

void run_encoder(const Implementation& k, const Encoder& e, const EncoderPlan& p, const Batch& b, const Outputs& out,
                 void* workspace, const ThreadPool& pool) {
  struct Texts { int64_t first, last, start, tokens; };
  std::vector<Texts> chunks;
  Texts next = {0, 0, 0, 0};
  for (int64_t text = 0; text < b.texts; text++) {
    if (next.tokens && next.tokens + b.lengths[text] > p.chunk_tokens) {
      chunks.push_back(next);
      next = {text, text, next.start + next.tokens, 0};
    }
    next.last = text + 1;
    next.tokens += b.lengths[text];
  }
  if (next.tokens) chunks.push_back(next);

  const Call call = {k, e, p, b, out, lookup_bytes(e, p.chunk_tokens)};
  const size_t bytes = p.chunk_bytes + p.inner * p.thread_bytes;
  // Each of `outer` threads takes every outer-th chunk: as even as chunks are.
  const int tasks = int(std::min<int64_t>(p.outer, int64_t(chunks.size())));
  if (tasks == 0) return;
  run_tasks(pool, tasks, [&](int task) {
    uint8_t* const memory = static_cast<uint8_t*>(workspace) + size_t(task) * bytes;
    for (size_t i = size_t(task); i < chunks.size(); i += size_t(tasks)) {
      Carver carver(memory);
      const Texts& t = chunks[i];
      Chunk{call,
            pool,
            t.first,
            t.last,
            t.start,
            t.tokens,
            ChunkMemory(carver, e, p.chunk_tokens),
            memory + p.chunk_bytes}
          .run_all();
    }
  });
}

}  // namespace lookupffn
