// Runs an opened encoder: chunks of texts through the layers, shared out over threads.
#include <algorithm>
#include <cstring>

#include "model/encoder.h"
#include "model/encoder_memory.h"
#include "ops/float_state.h"
#include "ops/workspace.h"

namespace lookupffn {
namespace {

constexpr int64_t kChunkTokens = 1024;  // whose activations stay in L2 and L3 while weights come by
constexpr int64_t kSerialTokens = 24;   // up to so many on the calling thread alone
constexpr int64_t kPrefetchedTokens = 64;

size_t lookup_bytes(const Encoder& e, int64_t tokens) {
  size_t most = 0;
  for (const EncoderLayer& l : e.layers)
    if (l.has_lookup) most = std::max(most, make_plan(l.lookup, tokens, default_tiling(l.lookup), 1).workspace_bytes());
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

  // For at most kTile rows; y may be the residual or the gate, whose rows lie as those of y.
  void linear(const ThreadMemory& m, const Linear& l, float* x, size_t x_stride, int count, float* y, size_t y_stride,
              const float* residual = nullptr, size_t residual_stride = 0, const float* gate = nullptr) const {
    call.k.encoder->linear({.type = l.type,
                            .w = l.weights,
                            .bias = l.bias,
                            .activation = l.activation,
                            .x = x,
                            .x_stride = x_stride,
                            .tokens = count,
                            .residual = residual,
                            .residual_stride = residual_stride,
                            .gate = gate,
                            .gate_stride = y_stride,
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

  // Of a token of the batch, the i-th of its text.
  int32_t position_of(int64_t token, int i) const {
    return call.batch.positions ? call.batch.positions[token] : config().first_position + i;
  }

  // Calls body(token, i, length) for the chunk's tokens [begin, end), each the i-th of a text of this length.
  template <typename Body>
  void in_texts(int64_t begin, int64_t end, const Body& body) const {
    int64_t text = first, token = 0;
    while (token + call.batch.lengths[text] <= begin) token += call.batch.lengths[text++];
    for (int i = int(begin - token); begin < end; begin++, i++) {
      if (i == call.batch.lengths[text]) i = 0, text++;
      body(begin, i, call.batch.lengths[text]);
    }
  }

  void embed() const {
    const EncoderConfig& c = config();
    const Batch& b = call.batch;
    const size_t padded = size_t(e().words.padded);
    const bool integers = e().has_integer_words();
    tiles([&](const ThreadMemory& m, int64_t t, int count) {
      float* const sums = c.embedding_width ? m.rows[0] : x_of(t);
      in_texts(t, t + count, [&](int64_t token, int i, int) {
        const int64_t at = start + token;
        AddRowsArgs args = {.rows = {}, .count = 0, .padded = int(padded), .y = sums + size_t(token - t) * padded};
        if (!integers) args.rows[args.count++] = e().words.values + size_t(b.ids[at]) * padded;
        if (c.embeds_positions()) args.rows[args.count++] = e().positions.values + size_t(position_of(at, i)) * padded;
        if (c.type_vocab_size) args.rows[args.count++] = e().types.values + size_t(b.types ? b.types[at] : 0) * padded;
        if (args.count) call.k.encoder->add_rows(args);
        if (!integers) return;
        if (!args.count) std::memset(args.y, 0, 4 * padded);
        const TokenRows& words = e().integer_words;
        call.k.encoder->add_table_row({.type = words.type,
                                       .row = words.data + size_t(b.ids[at]) * words.row_bytes(),
                                       .scale = words.scales[b.ids[at]],
                                       .padded = int(padded),
                                       .y = args.y});
      });
      if (c.embedding_norm) norm(e().embedding_norm, sums, count, sums);
      if (c.embedding_width) linear(m, e().embedding_projection, sums, padded, count, x_of(t), size_t(c.padded));
    });
  }

  // Of a head's scores, at distance 0; or null.
  const float* bias_by_distance(int layer, int head) const {
    const EncoderConfig& c = config();
    if (c.relative) return e().relative.values + size_t(head) * e().relative.padded + c.max_positions - 1;
    return c.is_local(layer) ? e().window_bias.data() + c.max_positions - 1 : nullptr;
  }

  // A text whose tokens stand one after another reads its biases where they lie, one step back from query to query;
  // others have theirs written out for a tile of queries.
  void attend_biased(const ThreadMemory& m, AttendArgs a, const float* by_distance, int64_t token, int window) const {
    if (!call.batch.offsets) {
      a.bias = by_distance, a.bias_step = -1, a.reach = window;
      return call.k.encoder->attend(a);
    }
    const int32_t* const offsets = call.batch.offsets + token;
    attend_tiles(m, a, [&](int64_t i, int j) { return by_distance[offsets[j] - offsets[i]]; });
  }

  // Biases of a head: q_i pk[b] + k_j pq[b] of bucket b of the distance j - i (He et al. 2021, equations 4 and 5).
  void attend_disentangled(const ThreadMemory& m, const AttendArgs& a, int number, int head, int64_t token) const {
    const EncoderLayer& l = e().layers[size_t(number)];
    const EncoderConfig& c = config();
    const int32_t* const offsets = call.batch.offsets ? call.batch.offsets + token : nullptr;
    const int32_t* const bucket = e().buckets.data() + c.max_positions - 1;
    int furthest = a.keys - 1;
    if (offsets) {
      const auto [nearest, last] = std::minmax_element(offsets, offsets + a.keys);
      furthest = *last - *nearest;
    }
    const int begin = bucket[furthest] / kPadding * kPadding, end = bucket[-furthest] / kPadding * kPadding + kPadding;
    const size_t stride = size_t(end - begin);
    for (int side = 0; side < 2; side++) {
      const Linear& all = side ? l.position_queries : l.position_keys;
      const Linear some = outputs_of(all, head * c.distance_buckets + begin, head * c.distance_buckets + end);
      for (int64_t t = 0; t < a.keys; t += kTile) {
        const int count = int(std::min<int64_t>(kTile, a.keys - t));
        std::memset(m.rows[0], 0, 4 * size_t(count) * some.block_in);
        for (int i = 0; i < count; i++)
          std::memcpy(m.rows[0] + i * some.block_in, a.q + side * c.attention_width() + (t + i) * a.stride,
                      4 * size_t(c.head_dim));
        linear(m, some, m.rows[0], size_t(some.block_in), count, m.by_bucket[side] + t * stride, stride);
      }
    }
    attend_tiles(m, a, [&](int64_t i, int j) {
      const int b = bucket[offsets ? offsets[j] - offsets[i] : j - i] - begin;
      return m.by_bucket[0][i * stride + b] + m.by_bucket[1][j * stride + b];
    });
  }

  // Writes bias(query, key) out for a tile of queries at a time.
  template <typename Bias>
  void attend_tiles(const ThreadMemory& m, AttendArgs a, const Bias& bias) const {
    a.bias = m.bias, a.bias_step = int64_t(a.keys_stride);
    for (int64_t end = a.keys; a.begin < end; a.begin = a.end) {
      a.end = std::min<int64_t>(a.begin + kMaxQueryTile, end);
      for (int64_t i = a.begin; i < a.end; i++) {
        float* const row = m.bias + (i - a.begin) * a.bias_step;
        for (int j = 0; j < a.keys; j++) row[j] = bias(i, j);
        std::fill(row + a.keys, row + a.bias_step, 0.0f);
      }
      call.k.encoder->attend(a);
    }
  }

  void attention(int number) const {
    const EncoderLayer& l = e().layers[size_t(number)];
    const EncoderConfig& c = config();
    const int64_t stride = l.query_key_value.block_out, width = c.attention_width();
    tiles([&](const ThreadMemory& m, int64_t t, int count) {
      float* x = x_of(t);
      if (c.pre_norm && !(c.bare_start && number == 0)) {
        norm(l.attention_norm, x, count, m.rows[0]);
        x = m.rows[0];
      }
      linear(m, l.query_key_value, x, size_t(c.padded), count, memory.qkv + t * stride, size_t(stride));
      if (!c.rotary) return;
      const Embedding& angles = e().rotations[c.is_local(number)];
      in_texts(t, t + count, [&](int64_t token, int i, int) {
        call.k.encoder->rotate({.x = memory.qkv + token * stride,
                                .heads = 2 * c.heads,
                                .head_dim = c.head_dim,
                                .angles = angles.values + size_t(position_of(start + token, i)) * angles.padded});
      });
    });
    // Threads share out heads of texts.
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
        const AttendArgs all = {.q = q,
                                .stride = stride,
                                .begin = 0,
                                .end = length,
                                .k = m.keys,
                                .v = m.values,
                                .keys_stride = stride_of_keys,
                                .keys = length,
                                .head_dim = c.head_dim,
                                .causal = c.causal != 0,
                                .bias = nullptr,
                                .bias_step = 0,
                                .reach = 0,
                                .scores = m.scores,
                                .y = memory.context + token * l.output.block_in + unit % c.heads * c.head_dim,
                                .y_stride = l.output.block_in};
        if (c.distance_buckets) {
          attend_disentangled(m, all, number, int(unit % c.heads), start + token);
          continue;
        }
        const float* const by_distance = bias_by_distance(number, int(unit % c.heads));
        by_distance ? attend_biased(m, all, by_distance, start + token, c.is_local(number) ? c.window : 0)
                    : call.k.encoder->attend(all);
      }
    });
  }

  // To y of the tokens from t on, the output of a lookup: a linear of low rank.
  void add_low_rank(const ThreadMemory& m, const EncoderLayer& l, float* x, int count, float* y) const {
    const size_t padded = size_t(config().padded);
    linear(m, l.reduce, x, padded, count, m.rows[1], size_t(l.reduce.block_out));
    linear(m, l.expand, m.rows[1], size_t(l.reduce.block_out), count, y, padded, y, padded);
  }

  // To y of the tokens from t on: rows by their ids.
  void add_token_rows(const EncoderLayer& l, int64_t t, int count, float* y) const {
    if (l.token_rows.empty()) return;
    in_texts(t, t + count, [&](int64_t token, int i, int length) {
      for (const TokenRows& rows : l.token_rows) {
        const int64_t row = row_of(rows, call.batch.ids + start + token - i, i, length);
        call.k.encoder->add_table_row({.type = rows.type,
                                       .row = rows.data + size_t(row) * rows.row_bytes(),
                                       .scale = is_integer(rows.type) ? rows.scales[row] : 1.0f,
                                       .padded = config().padded,
                                       .y = y + (token - t) * config().padded});
      }
    });
  }

  // Their addresses are known before the layer runs; those of few tokens stay in L2 until they are used.
  void prefetch_token_rows(const EncoderLayer& l) const {
    if (l.token_rows.empty() || tokens > kPrefetchedTokens) return;
    in_texts(0, tokens, [&](int64_t token, int i, int length) {
      for (const TokenRows& rows : l.token_rows) {
        const int64_t row = row_of(rows, call.batch.ids + start + token - i, i, length);
        for (size_t line = 0; line < rows.row_bytes(); line += 64)
          __builtin_prefetch(rows.data + size_t(row) * rows.row_bytes() + line, 0, 2);
      }
    });
  }

  // Of the i-th token of a text, as lookupffn/branches.py has it: ids count from 1 on, what lies outside is 0.
  int64_t row_of(const TokenRows& rows, const int32_t* ids, int i, int length) const {
    if (rows.before + rows.after == 0 && rows.rows >= config().vocab_size) return ids[i];
    uint32_t h = 0;
    for (int j = i - rows.before; j <= i + rows.after; j++) {
      h = (h + (j >= 0 && j < length ? uint32_t(ids[j]) + 1 : 0)) * 2654435769u;
      h ^= h >> 15;
    }
    return int64_t(uint64_t(h) * uint64_t(rows.rows) >> 32);
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
          if (!l.has_ffn) {
            add_token_rows(l, t, count, x);
            continue;
          }
          float* const normed = l.has_lookup ? memory.branch + t * c.padded : m.rows[0];
          norm(l.ffn_norm, x, count, normed);
          x = normed;
        }
        if (l.has_lookup) continue;
        if (!l.has_ffn) {
          add_token_rows(l, t, count, x);
          norm(l.ffn_norm, x, count, x_of(t));
          continue;
        }
        const size_t inner = size_t(l.up.block_out);
        if (c.gated) linear(m, l.gate, x, padded, count, m.rows[1], inner);
        linear(m, l.up, x, padded, count, m.rows[1], inner, nullptr, 0, c.gated ? m.rows[1] : nullptr);
        linear(m, l.down, m.rows[1], inner, count, x_of(t), padded, x_of(t), padded);
        add_token_rows(l, t, count, x_of(t));
        if (!c.pre_norm) norm(l.ffn_norm, x_of(t), count, x_of(t));
      }
      if (!l.has_lookup) return;
      const float* const x = c.pre_norm ? memory.branch : memory.x;
      const Plan plan = make_plan(l.lookup, end - begin, default_tiling(l.lookup), 1);
      run(*call.k.inference, l.lookup, plan, {const_cast<float*>(x) + begin * c.padded, c.padded, false},
          {memory.lookup + begin * c.padded, c.padded, false}, m.lookup, {1, nullptr, nullptr});
      for (int64_t t = begin; t < end; t += kTile) {
        const int count = int(std::min<int64_t>(kTile, end - t));
        float* const y = memory.lookup + t * c.padded;
        if (l.branches.low_rank) add_low_rank(m, l, const_cast<float*>(x) + t * c.padded, count, y);
        add_token_rows(l, t, count, y);
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
    if (call.out.pooled) config().pooling == Pooling::kTokens ? answer_places() : pool_texts();
  }

  // The chunk's texts, a tile of them at a time.
  void pool_texts() const {
    const EncoderConfig& c = config();
    const ThreadMemory m = of_thread(0);
    const bool apart = !e().head.empty();  // normalised behind the head
    int64_t token = 0;
    for (int64_t text = first, count; text < last; text += count) {
      count = std::min<int64_t>(head_tile(e()), last - text);
      for (int64_t i = 0; i < count; token += call.batch.lengths[text + i++])
        pool_rows(x_of(token), c.pooling == Pooling::kMean ? call.batch.lengths[text + i] : 1, c.padded,
                  c.normalise && !apart, m.rows[0] + i * c.padded);
      answer(m, int(count), c.normalise && apart, call.out.pooled + text * e().pooled_size());
    }
  }

  // The chunk's places.
  void answer_places() const {
    const int64_t* const all = call.batch.place;
    const int64_t begin = std::lower_bound(all, all + call.batch.places, start) - all;
    const int64_t count = std::lower_bound(all, all + call.batch.places, start + tokens) - all - begin;
    share_out_flushing(pool, call.p.inner, count, [&](int thread, int64_t from, int64_t to) {
      const ThreadMemory m = of_thread(thread);
      for (int64_t place = begin + from, rows; place < begin + to; place += rows) {
        rows = std::min<int64_t>(head_tile(e()), begin + to - place);
        for (int64_t i = 0; i < rows; i++)
          std::memcpy(m.rows[0] + i * config().padded, x_of(all[place + i] - start), 4 * size_t(config().padded));
        answer(m, int(rows), false, call.out.pooled + place * e().pooled_size());
      }
    });
  }

  // The head's results for a tile of rows, which lie in m.rows[0].
  void answer(const ThreadMemory& m, int count, bool normalise, float* out) const {
    int side = 0, stride = config().padded;
    for (const Linear& l : e().head) {
      linear(m, l, m.rows[side], size_t(stride), count, m.rows[1 - side], size_t(l.block_out));
      side = 1 - side, stride = l.block_out;
      if (config().head_norm && &l == &e().head[0]) norm(e().head_norm, m.rows[side], count, m.rows[side]);
    }
    const size_t size = size_t(e().pooled_size());
    for (int i = 0; i < count; i++) {
      float* const row = m.rows[side] + size_t(i) * size_t(stride);
      if (normalise) pool_rows(row, 1, stride, true, row);
      std::memcpy(out + size_t(i) * size, row, 4 * size);
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
    for (int i = 0; i < config().layers; i++) {
      prefetch_token_rows(e().layers[size_t(i)]);
      attention(i);
      feed_forward(e().layers[size_t(i)]);
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
