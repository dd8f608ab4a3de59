// A packed encoder (docs/format.md, version 2): token ids to hidden states and pooled vectors, in one call.
#pragma once

#include <string>
#include <vector>

#include "kernels/dispatch.h"
#include "model/lookup.h"
#include "model/records.h"

namespace lookupffn {

enum class Pooling : int32_t { kNone = 0, kMean = 1, kCls = 2, kTokens = 3 };  // of places that a batch names

// The numbers of a model record, in this order.
struct EncoderConfig {
  int32_t vocab_size, width, padded, layers, heads;
  int32_t head_dim;  // padded to a multiple of 16
  int32_t max_positions, type_vocab_size;
  int32_t pre_norm;  // norms stand before attention and FFN, not behind the sums
  int32_t embedding_norm, final_norm, causal;
  Pooling pooling;
  int32_t normalise;
  int32_t first_position;   // of a text's first token, where positions are not given
  int32_t head;             // linears behind the pooling, as of a classifier
  int32_t head_norm;        // behind the first of them
  int32_t bare_start;       // the first layer's attention takes the embeddings as they are, without its norm
  int32_t gated;            // dense FFNs are down(activation(up x) * gate x)
  int32_t rotary;           // positions turn queries and keys, and are not embedded
  int32_t relative;         // scores have a bias by head and distance
  int32_t window;           // of local layers: keys further away are not attended to; 0: no layer is local
  int32_t global_every;     // with a window: layers 0, n, 2 n, ... attend to all keys
  int32_t embedding_width;  // of embeddings that a linear takes to the width of layers; 0: they have it, without one
  // Of disentangled attention: scores have products of queries and keys with those of positions, a bucket of distances
  // each; padded to a multiple of 64. Positions are not embedded then. 0: there are none.
  int32_t distance_buckets;

  bool is_local(int layer) const { return window && layer % global_every; }
  int attention_width() const { return heads * head_dim; }
  bool embeds_positions() const { return !rotary && !distance_buckets; }
};

struct EncoderLayer {
  Norm attention_norm, ffn_norm;
  Linear query_key_value, output;
  Linear position_keys, position_queries;  // head_dim to [heads][distance_buckets], with distance_buckets
  bool has_lookup, has_ffn;
  Linear up, gate, down;  // a dense FFN
  Layer lookup;           // or a lookup, and what is added to it
  Branches branches;
  Linear reduce, expand;
  std::vector<TokenRows> token_rows;
};

struct Encoder {
  EncoderConfig config;
  Embedding words, positions, types;
  TokenRows integer_words;  // in the place of words, where they are integers; rows by the id alone
  Embedding rotations[2];   // [max_positions][head_dim], of global and of local layers
  Embedding relative;       // [heads][2 max_positions + 14], from distance 1 - max_positions on
  Norm embedding_norm, final_norm, head_norm;
  Linear embedding_projection;  // with an embedding_width
  std::vector<EncoderLayer> layers;
  std::vector<Linear> head;
  std::vector<float> window_bias;  // a row as of `relative`: 0 within the window, minus infinity behind
  std::vector<int32_t> buckets;    // of distances, from 1 - max_positions on, with distance_buckets
  int widest, head_widest;         // of rows between the layers' products, of the head's; padded

  bool has_integer_words() const { return integer_words.data != nullptr; }
  int pooled_size() const { return head.empty() ? config.width : head.back().out_features; }
};

// Opens the bytes of a model, every record of it. They begin with the model record; a file is a safetensors file, whose
// bytes these are behind its header (`model_of_file`). Returns an empty string, or what is wrong.
std::string open_encoder(Bytes, Encoder*);
std::string data_of_file(Bytes file, Bytes* data);  // what lies behind the header, wherever it begins
std::string model_of_file(Bytes file, Bytes* model);

// Texts one after another, without padding.
struct Batch {
  int64_t texts;
  const int32_t* lengths;            // [texts], each at least 1
  const int32_t* ids;                // [tokens]
  const int32_t* positions;          // [tokens], or null: 0, 1, ... from config.first_position on
  const int32_t* types;              // [tokens], or null: 0
  const int32_t* offsets = nullptr;  // [tokens] between which distances are taken, or null: 0, 1, ... in each text
  int64_t places = 0;                // tokens that the head answers for, with Pooling::kTokens
  const int64_t* place = nullptr;    // [places], in rising order
};

struct Outputs {
  float* hidden;  // [tokens][width], or null
  float* pooled;  // [texts, or places][pooled_size], or null
};

// What is wrong with a batch; and how many tokens it has.
std::string check_batch(const Encoder&, const Batch&, int64_t* tokens);

// How a call is divided: into chunks of whole texts.
struct EncoderPlan {
  int64_t chunk_tokens;  // at most, or the longest text
  int64_t longest;
  int outer, inner;  // chunks at a time, threads of each
  size_t chunk_bytes, thread_bytes;

  size_t workspace_bytes() const { return outer * (chunk_bytes + inner * thread_bytes); }
};

EncoderPlan plan_encoder(const Encoder&, const Batch&, int threads);

// Runs a checked batch. A text's result depends on that text alone, bit for bit. `workspace` as in lookup.h.
void run_encoder(const Implementation&, const Encoder&, const EncoderPlan&, const Batch&, const Outputs&,
                 void* workspace, const ThreadPool&);

}  // namespace lookupffn
