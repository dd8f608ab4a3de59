// include/lookupffn.h over model/encoder.h: the only file that knows both.
#include "include/lookupffn.h"

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
    if (wrong.empty()) *bytes = plan_encoder(model->encoder, b, threads).workspace_bytes() + 64;
    return wrong;
  });
}

const char* lookupffn_run(const lookupffn_model* model, const lookupffn_batch* batch, float* hidden, float* pooled,
                          void* workspace, size_t bytes, const lookupffn_pool* pool) {
  return guarded([&]() -> std::string {
    const Encoder& e = model->encoder;
    const Batch b = batch_of(*batch);
    int64_t tokens;
    const std::string wrong = check_batch(e, b, &tokens);
    if (!wrong.empty()) return wrong;
    if (pooled && e.config.pooling == Pooling::kNone) return "this model has no pooling";
    const ThreadPool threads =
        pool ? ThreadPool{pool->threads, pool->run, pool->host} : ThreadPool{1, nullptr, nullptr};
    const EncoderPlan plan = plan_encoder(e, b, threads.threads);
    const uintptr_t start = (reinterpret_cast<uintptr_t>(workspace) + 63) / 64 * 64;
    if (bytes < plan.workspace_bytes() + 64)
      return "the workspace has " + std::to_string(bytes) + " bytes of " + std::to_string(plan.workspace_bytes() + 64);
    run_encoder(implementation(isa_index()), e, plan, b, {hidden, pooled}, reinterpret_cast<void*>(start), threads);
    return "";
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
