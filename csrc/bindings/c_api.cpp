// include/lookupffn.h over model/encoder.h and model/lookup.h: the only file that knows all three.
#include "include/lookupffn.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "model/encoder.h"
#include "ops/pool.h"

#if defined(__unix__) || defined(__APPLE__)
#include <cerrno>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#include <cstdio>
#include <vector>
#endif

namespace lookupffn {
namespace {

// A file's bytes, read-only.
class File {
 public:
#if defined(__unix__) || defined(__APPLE__)
  std::string map(const char* path) {
    const int descriptor = ::open(path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) return std::string(path) + ": " + std::strerror(errno);
    struct stat found;
    std::string wrong;
    if (fstat(descriptor, &found) != 0 || !S_ISREG(found.st_mode)) {
      wrong = std::string(path) + ": not a file";
    } else if (found.st_size > 0) {
      void* const at = mmap(nullptr, size_t(found.st_size), PROT_READ, MAP_SHARED, descriptor, 0);
      if (at == MAP_FAILED)
        wrong = std::string(path) + ": " + std::strerror(errno);
      else
        bytes_ = {static_cast<const uint8_t*>(at), size_t(found.st_size)};
    }
    ::close(descriptor);
    return wrong;
  }
  ~File() {
    if (bytes_.size) munmap(const_cast<uint8_t*>(bytes_.data), bytes_.size);
  }
#else
  std::string map(const char* path) {
    std::FILE* const file = std::fopen(path, "rb");
    if (!file) return std::string(path) + ": cannot be opened";
    char part[1 << 16];
    for (size_t n; (n = std::fread(part, 1, sizeof part, file)) > 0;) held_.insert(held_.end(), part, part + n);
    std::fclose(file);
    bytes_ = {reinterpret_cast<const uint8_t*>(held_.data()), held_.size()};
    return "";
  }

 private:
  std::vector<char> held_;

 public:
#endif
  Bytes bytes() const { return bytes_; }

 private:
  Bytes bytes_ = {nullptr, 0};
};

thread_local std::string last_error;

const char* said(std::string wrong) {
  if (wrong.empty()) return nullptr;
  last_error = std::move(wrong);
  return last_error.c_str();
}

// No exception crosses the C interface.
template <typename Body>
const char* guarded(const Body& body) {
  try {
    return said(body());
  } catch (const std::bad_alloc&) {
    return "out of memory";
  } catch (const std::exception& error) {
    return said(error.what());
  }
}

Batch batch_of(const lookupffn_batch& b) {
  return {.texts = b.texts,
          .lengths = b.lengths,
          .ids = b.ids,
          .positions = b.positions,
          .types = b.types,
          .offsets = b.offsets,
          .places = b.places,
          .place = b.place};
}

ThreadPool pool_of(const lookupffn_pool* pool) {
  return pool ? ThreadPool{pool->threads, pool->run, pool->host} : ThreadPool{1, nullptr, nullptr};
}

// The workspace from a multiple of 64 bytes on; of a size that is asked for with 63 bytes more, and one for none at
// all.
constexpr size_t kAlignment = 64;
std::string align(void** workspace, size_t bytes, size_t needed) {
  if (bytes < needed + kAlignment)
    return "the workspace has " + std::to_string(bytes) + " bytes of " + std::to_string(needed + kAlignment);
  *workspace =
      reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(*workspace) + kAlignment - 1) / kAlignment * kAlignment);
  return "";
}

// The bytes of the layer of this number, of records that follow one another.
std::string layer_of_file(Bytes file, int index, Bytes* layer) {
  Bytes left;
  if (index < 0) return "layers are counted from 0, not " + std::to_string(index);
  std::string wrong = data_of_file(file, &left);
  for (int i = 0; wrong.empty(); i++) {
    RecordKind kind;
    if (i && left.size == 0)
      return "it has " + std::to_string(i) + " layers, and none of number " + std::to_string(index);
    if (!(wrong = record_kind(left, &kind)).empty()) break;
    if (kind != RecordKind::kLookup) return "it is a packed model, no file of packed layers";
    PackedHeader h;
    if (left.size < sizeof h) return "it is cut off in a layer's header";
    std::memcpy(&h, left.data, sizeof h);
    if (h.total_bytes < sizeof h || h.total_bytes > left.size) return "a layer's header says more bytes than there are";
    *layer = {left.data, size_t(h.total_bytes)};
    if (i == index) return "";
    left = {left.data + h.total_bytes, left.size - size_t(h.total_bytes)};
  }
  return wrong;
}

struct OwnPool {
  lookupffn_pool pool;
  WorkerPool workers;

  explicit OwnPool(int threads) : pool{threads, run, this}, workers(threads) {}

  static void run(void* host, int tasks, void (*task)(void*, int), void* context) {
    static_cast<OwnPool*>(host)->workers.run(tasks, task, context);
  }
};

}  // namespace
}  // namespace lookupffn

using namespace lookupffn;

struct lookupffn_model {
  File file;
  Encoder encoder;
};

struct lookupffn_layer {
  File file;
  Layer layer;
};

const char* lookupffn_open(const char* path, lookupffn_model** model) {
  return guarded([&]() -> std::string {
    auto opened = std::make_unique<lookupffn_model>();
    std::string wrong = opened->file.map(path);
    if (!wrong.empty()) return wrong;
    Bytes bytes;
    wrong = model_of_file(opened->file.bytes(), &bytes);
    if (wrong.empty()) wrong = open_encoder(bytes, &opened->encoder);
    if (!wrong.empty()) return std::string(path) + " is damaged or no packed model: " + wrong;
    *model = opened.release();
    return "";
  });
}

const char* lookupffn_open_bytes(const void* bytes, size_t size, lookupffn_model** model) {
  return guarded([&]() -> std::string {
    auto opened = std::make_unique<lookupffn_model>();
    Bytes records;
    std::string wrong = model_of_file({static_cast<const uint8_t*>(bytes), size}, &records);
    if (wrong.empty()) wrong = open_encoder(records, &opened->encoder);
    if (wrong.empty()) *model = opened.release();
    return wrong;
  });
}

void lookupffn_close(lookupffn_model* model) { delete model; }

void lookupffn_describe(const lookupffn_model* model, lookupffn_description* d) {
  const EncoderConfig& c = model->encoder.config;
  *d = {.vocab_size = c.vocab_size,
        .hidden_size = c.width,
        .num_layers = c.layers,
        .num_heads = c.heads,
        .max_positions = c.max_positions,
        .type_vocab_size = c.type_vocab_size,
        .first_position = c.first_position,
        .pooling = int32_t(c.pooling),
        .normalised = c.normalise,
        .lookup_layers = 0,
        .pooled_size = model->encoder.pooled_size(),
        .head = c.head};
  for (const EncoderLayer& l : model->encoder.layers) d->lookup_layers += l.has_lookup;
}

const char* lookupffn_workspace(const lookupffn_model* model, const lookupffn_batch* batch, int threads,
                                size_t* bytes) {
  return guarded([&]() -> std::string {
    int64_t tokens;
    const Batch b = batch_of(*batch);
    std::string wrong = check_batch(model->encoder, b, &tokens);
    if (wrong.empty()) *bytes = plan_encoder(model->encoder, b, threads).workspace_bytes() + kAlignment;
    return wrong;
  });
}

const char* lookupffn_run(const lookupffn_model* model, const lookupffn_batch* batch, float* hidden, float* pooled,
                          void* workspace, size_t bytes, const lookupffn_pool* pool) {
  return guarded([&]() -> std::string {
    const Encoder& e = model->encoder;
    const Batch b = batch_of(*batch);
    int64_t tokens;
    std::string wrong = check_batch(e, b, &tokens);
    if (!wrong.empty()) return wrong;
    if (pooled && e.config.pooling == Pooling::kNone) return "this model has no pooling";
    const ThreadPool threads = pool_of(pool);
    const EncoderPlan plan = plan_encoder(e, b, threads.threads);
    wrong = align(&workspace, bytes, plan.workspace_bytes());
    if (wrong.empty()) run_encoder(implementation(isa_index()), e, plan, b, {hidden, pooled}, workspace, threads);
    return wrong;
  });
}

const char* lookupffn_open_layer(const char* path, int index, lookupffn_layer** layer) {
  return guarded([&]() -> std::string {
    auto opened = std::make_unique<lookupffn_layer>();
    std::string wrong = opened->file.map(path);
    if (!wrong.empty()) return wrong;
    Bytes bytes = {nullptr, 0};
    wrong = layer_of_file(opened->file.bytes(), index, &bytes);
    if (wrong.empty()) wrong = open_layer(bytes.data, bytes.size, &opened->layer);
    if (!wrong.empty()) return std::string(path) + ": " + wrong;
    *layer = opened.release();
    return "";
  });
}

const char* lookupffn_open_layer_bytes(const void* bytes, size_t size, lookupffn_layer** layer) {
  return guarded([&]() -> std::string {
    auto opened = std::make_unique<lookupffn_layer>();
    std::string wrong = open_layer(bytes, size, &opened->layer);
    if (wrong.empty()) *layer = opened.release();
    return wrong;
  });
}

void lookupffn_close_layer(lookupffn_layer* layer) { delete layer; }

void lookupffn_layer_features(const lookupffn_layer* layer, int32_t* in_features, int32_t* out_features) {
  *in_features = layer->layer.h.in_features, *out_features = layer->layer.h.out_features;
}

const char* lookupffn_layer_workspace(const lookupffn_layer* layer, int64_t tokens, int threads, size_t* bytes) {
  return guarded([&]() -> std::string {
    if (tokens < 0 || tokens > int64_t(1) << 40) return "tokens is " + std::to_string(tokens);
    const Layer& l = layer->layer;
    *bytes = make_plan(l, tokens, default_tiling(l), std::max(threads, 1)).workspace_bytes() + kAlignment;
    return "";
  });
}

const char* lookupffn_run_layer(const lookupffn_layer* layer, const float* x, float* y, int64_t tokens, void* workspace,
                                size_t bytes, const lookupffn_pool* pool) {
  return guarded([&]() -> std::string {
    if (tokens < 0 || tokens > int64_t(1) << 40) return "tokens is " + std::to_string(tokens);
    const Layer& l = layer->layer;
    const ThreadPool threads = pool_of(pool);
    const Plan plan = make_plan(l, tokens, default_tiling(l), std::max(threads.threads, 1));
    const std::string wrong = align(&workspace, bytes, plan.workspace_bytes());
    if (wrong.empty())
      run(*implementation(isa_index()).inference, l, plan, {const_cast<float*>(x), l.h.in_features, false},
          {y, l.h.out_features, false}, workspace, threads);
    return wrong;
  });
}

lookupffn_pool* lookupffn_pool_new(int threads) {
  try {
    return &(new OwnPool(threads))->pool;
  } catch (const std::exception&) {
    return nullptr;
  }
}

void lookupffn_pool_free(lookupffn_pool* pool) {
  if (pool) delete static_cast<OwnPool*>(pool->host);
}

const char* lookupffn_isa(const char** name) {
  return guarded([&]() -> std::string {
    int count;
    *name = isas(&count)[isa_index()].name;
    return "";
  });
}
