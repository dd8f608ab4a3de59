// What a run of an encoder needs of the caller's workspace: of a chunk of texts, and of each thread.
#pragma once

#include <algorithm>

#include "model/encoder.h"
#include "ops/workspace.h"

namespace lookupffn {

constexpr int kTile = 48;  // tokens that go through a product at once

inline size_t keys_stride(int64_t longest) { return size_t((longest + kLanes - 1) / kLanes * kLanes); }

// Rows that go through the head at once: fewer where they are as wide as a vocabulary.
inline int head_tile(const Encoder& e) { return std::clamp(kTile * e.widest / e.head_widest, 8, kTile); }

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
  float *keys, *values, *scores, *bias;
  float* by_bucket[2];  // [longest][distance_buckets] products of queries and of keys with those of positions
  void* lookup;         // workspace of the widest lookup

  ThreadMemory(Carver& memory, const Encoder& e, int64_t longest, size_t lookup_bytes) {
    const EncoderConfig& c = e.config;
    const size_t most = std::max(size_t(kTile) * e.widest, size_t(head_tile(e)) * e.head_widest);
    for (float*& r : rows) r = memory.take<float>(most);
    quantised = memory.take<uint8_t>(most * kMaxPlanes);
    sums = memory.take<float>(size_t(kTile) * kPadding);
    keys = memory.take<float>(size_t(c.head_dim) * keys_stride(longest));
    values = memory.take<float>(size_t(c.head_dim) * longest);
    scores = memory.take<float>(size_t(kMaxQueryTile) * keys_stride(longest));
    const bool biased = c.relative || c.window || c.distance_buckets;
    bias = memory.take<float>(biased ? size_t(kMaxQueryTile) * keys_stride(longest) : 0);
    for (float*& products : by_bucket) products = memory.take<float>(size_t(longest) * c.distance_buckets);
    lookup = memory.take<uint8_t>(lookup_bytes);
  }
};

}  // namespace lookupffn
