/* Packed encoders, token ids to hidden states and pooled vectors; packed lookup layers, rows to rows. Plain C; no
 * torch, no Python, no exceptions.
 *
 * A function that can fail returns NULL, or what is wrong, in words; the text is the calling thread's until its next
 * call. A model may be used by several threads at once, each with a workspace of its own. */
#ifndef LOOKUPFFN_H
#define LOOKUPFFN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define LOOKUPFFN_API __declspec(dllexport)
#else
#define LOOKUPFFN_API __attribute__((visibility("default")))
#endif

typedef struct lookupffn_model lookupffn_model;
typedef struct lookupffn_layer lookupffn_layer;

typedef struct {
  int32_t vocab_size, hidden_size, num_layers, num_heads, max_positions, type_vocab_size;
  int32_t first_position; /* of a text's first token, where no positions are given */
  int32_t pooling;        /* 0 none, 1 mean, 2 the first token, 3 the tokens that a batch names */
  int32_t normalised;     /* whether pooled vectors have length 1 */
  int32_t lookup_layers;  /* feed-forward layers that are lookups */
  int32_t pooled_size;    /* of a pooled vector: hidden_size, or the outputs of the head behind it */
  int32_t head;           /* linears behind the pooling, as of a classifier or a masked LM; 0 for none */
} lookupffn_description;

/* Texts one after another, without padding. */
typedef struct {
  int64_t texts;
  const int32_t* lengths;   /* [texts], each at least 1 */
  const int32_t* ids;       /* [tokens] */
  const int32_t* positions; /* [tokens], or NULL */
  const int32_t* types;     /* [tokens], or NULL */
  const int32_t* offsets;   /* [tokens] between which distances are taken, or NULL: 0, 1, ... in each text */
  int64_t places;           /* with pooling 3, the tokens that are answered for */
  const int64_t* place;     /* [places], in rising order */
} lookupffn_batch;

/* Threads of the caller's: run(host, ...) calls task(context, i) for every i < tasks, in any order, and returns when
 * all have ended. */
typedef struct {
  int32_t threads;
  void (*run)(void* host, int tasks, void (*task)(void* context, int index), void* context);
  void* host;
} lookupffn_pool;

/* Maps a file read-only, or takes bytes that stay where they are until the model is closed; checks all of it. */
LOOKUPFFN_API const char* lookupffn_open(const char* path, lookupffn_model** model);
LOOKUPFFN_API const char* lookupffn_open_bytes(const void* bytes, size_t size, lookupffn_model** model);
LOOKUPFFN_API void lookupffn_close(lookupffn_model* model);
LOOKUPFFN_API void lookupffn_describe(const lookupffn_model* model, lookupffn_description* description);

/* Bytes that a call needs, from any address on. */
LOOKUPFFN_API const char* lookupffn_workspace(const lookupffn_model* model, const lookupffn_batch* batch, int threads,
                                              size_t* bytes);

/* hidden [tokens][hidden_size] and pooled [texts, or places][pooled_size], either of which may be NULL. A text's result
 * has the same bits whatever else is in the batch and however many threads take part. Without a pool: one thread. */
LOOKUPFFN_API const char* lookupffn_run(const lookupffn_model* model, const lookupffn_batch* batch, float* hidden,
                                        float* pooled, void* workspace, size_t bytes, const lookupffn_pool* pool);

/* A single lookup layer: of a file of packed layers (format version 1), which are counted from 0 in the order of their
 * bytes, or of the bytes of one, which stay where they are until it is closed. */
LOOKUPFFN_API const char* lookupffn_open_layer(const char* path, int index, lookupffn_layer** layer);
LOOKUPFFN_API const char* lookupffn_open_layer_bytes(const void* bytes, size_t size, lookupffn_layer** layer);
LOOKUPFFN_API void lookupffn_close_layer(lookupffn_layer* layer);
LOOKUPFFN_API void lookupffn_layer_features(const lookupffn_layer* layer, int32_t* in_features, int32_t* out_features);
LOOKUPFFN_API const char* lookupffn_layer_workspace(const lookupffn_layer* layer, int64_t tokens, int threads,
                                                    size_t* bytes);

/* y [tokens][out_features] of x [tokens][in_features], float32. A token's result has the same bits in every batch. */
LOOKUPFFN_API const char* lookupffn_run_layer(const lookupffn_layer* layer, const float* x, float* y, int64_t tokens,
                                              void* workspace, size_t bytes, const lookupffn_pool* pool);

/* Threads for those who have none: they sleep between calls. A call that finds them busy, or that is made in the child
 * of a fork, runs on its own thread. */
LOOKUPFFN_API lookupffn_pool* lookupffn_pool_new(int threads);
LOOKUPFFN_API void lookupffn_pool_free(lookupffn_pool* pool);

/* The instruction set in use, as "avx512_vnni"; LOOKUPFFN_ISA forces one. */
LOOKUPFFN_API const char* lookupffn_isa(const char** name);

#ifdef __cplusplus
}
#endif
#endif
