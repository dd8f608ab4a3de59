// The C interface (csrc/include/lookupffn.h): what it refuses, and that it gives what the engine does.
#include "groups.h"
#include "models.h"

#include "include/lookupffn.h"

namespace {

struct Opened {
  GuardedBytes file;
  lookupffn_model* model = nullptr;

  explicit Opened(const Vector& bytes) : file(bytes) {
    const char* const wrong = lookupffn_open_bytes(file.data(), file.size(), &model);
    EXPECT(!wrong && model, "a sound file is refused: %s", wrong);
  }
  ~Opened() { lookupffn_close(model); }
};

lookupffn_batch c_batch(const Batch& b) {
  return {b.texts, b.lengths, b.ids, b.positions, b.types, b.offsets, b.places, b.place};
}

// A model with everything that a batch can get wrong.
Model strict_model(Random& random) {
  for (;;) {
    const Model m = random_model(random);
    const EncoderConfig& c = m.config;
    if (c.layers && c.type_vocab_size == 2 && c.pooling != Pooling::kNone && c.max_positions > 12 && c.first_position &&
        c.max_positions - c.first_position > 4)
      return m;
  }
}

}  // namespace

std::string test_calls(const Options& options) {
  Random random = {options.seed ^ 0x63616c6c};
  int refused = 0, equal = 0;
  const auto must_refuse = [&](const char* wrong, const char* what) {
    EXPECT(wrong && *wrong, "%s is taken", what);
    refused++;
  };
  for (int n = 0; n < (options.is_long ? 200 : 20); n++) {
    const Model model = n % 2 ? random_model(random) : strict_model(random);
    const EncoderConfig& c = model.config;
    set_case(text("call %d", n));
    const Vector file = file_of(model.bytes);
    for (size_t size : {size_t(0), size_t(7), size_t(8), size_t(63), size_t(64), size_t(128), file.size() - 64}) {
      const GuardedBytes shorter(Vector(file.begin(), file.begin() + size));
      lookupffn_model* none = nullptr;
      must_refuse(lookupffn_open_bytes(shorter.data(), size, &none), "a file that is too short");
      EXPECT(!none, "a model of what is refused");
    }
    for (uint64_t header : {file.size() - 7, file.size(), ~uint64_t(0), uint64_t(1) << 63, ~uint64_t(7), uint64_t(0)}) {
      Vector other = file;
      memcpy(other.data(), &header, 8);
      const GuardedBytes guarded(other);
      lookupffn_model* none = nullptr;
      must_refuse(lookupffn_open_bytes(guarded.data(), other.size(), &none), "a header of another length");
    }
    for (size_t header : {0, 1, 4, 55, 57, 88}) {  // the model would not begin at a multiple of 64 bytes
      const GuardedBytes guarded(file_of(model.bytes, header));
      lookupffn_model* none = nullptr;
      must_refuse(lookupffn_open_bytes(guarded.data(), guarded.size(), &none), "a header that ends between");
    }
    lookupffn_model* none = nullptr;
    must_refuse(lookupffn_open("/nowhere/model.safetensors", &none), "a file that is not there");
    must_refuse(lookupffn_open("/", &none), "a folder");

    const Opened opened(file);
    lookupffn_description d;
    lookupffn_describe(opened.model, &d);
    EXPECT(d.vocab_size == c.vocab_size && d.hidden_size == c.width && d.num_layers == c.layers &&
               d.max_positions == c.max_positions && d.first_position == c.first_position && d.head == c.head,
           "the description is of another model");

    Encoder e;
    const GuardedBytes bytes(model.bytes);
    EXPECT(open_encoder(bytes.bytes(), &e).empty(), "a sound model is refused");
    EXPECT(d.pooled_size == e.pooled_size(), "pooled_size is %d, not %d", d.pooled_size, e.pooled_size());
    const Texts texts = random_texts(c, random.pick({1, 2, 5, 20}), random);
    const GuardedBatch guarded(texts);
    const lookupffn_batch batch = c_batch(guarded.batch);
    const bool pools = c.pooling != Pooling::kNone;
    const int threads = random.between(1, 3);
    size_t needed = 0;
    const char* wrong = lookupffn_workspace(opened.model, &batch, threads, &needed);
    EXPECT(!wrong && needed > 0, "workspace: %s", wrong);
    const size_t answers = c.pooling == Pooling::kTokens ? texts.places.size() : texts.lengths.size();
    const Guarded hidden(4 * size_t(texts.tokens()) * c.width), pooled(4 * answers * e.pooled_size());
    float* const rows = reinterpret_cast<float*>(hidden.data());
    float* const vectors = reinterpret_cast<float*>(pooled.data());
    lookupffn_pool* const pool = threads > 1 ? lookupffn_pool_new(threads) : nullptr;

    // From any address on, and of no byte more.
    const Guarded workspace(needed + size_t(random.below(64)));
    uint8_t* const start = workspace.data() + workspace.size() - needed;
    wrong = lookupffn_run(opened.model, &batch, rows, pools ? vectors : nullptr, start, needed, pool);
    EXPECT(!wrong, "run: %s", wrong);
    int count;
    const Isa* const all = isas(&count);
    for (const Kernels* k : running_here())
      if (!strcmp(k->name, all[isa_index()].name)) {
        const Results expected = run_model(*k, e, texts, 1);
        EXPECT(!memcmp(rows, expected.hidden.data(), hidden.size()), "hidden states have other bits");
        EXPECT(!pools || !memcmp(vectors, expected.pooled.data(), pooled.size()), "pooled vectors have other bits");
        equal++;
      }
    if (pools) {  // either output may be left out
      const std::vector<float> before(vectors, vectors + pooled.size() / 4);
      memset(pooled.data(), 0, pooled.size());
      wrong = lookupffn_run(opened.model, &batch, nullptr, vectors, start, needed, pool);
      EXPECT(!wrong && !memcmp(vectors, before.data(), pooled.size()), "without hidden states: %s", wrong);
    } else {
      must_refuse(lookupffn_run(opened.model, &batch, rows, vectors, start, needed, pool),
                  "pooling where there is none");
    }
    for (size_t too_few : {size_t(0), size_t(1), needed / 2, needed - 1})
      must_refuse(lookupffn_run(opened.model, &batch, rows, nullptr, start, too_few, pool), "a workspace too small");
    must_refuse(lookupffn_run(opened.model, &batch, rows, nullptr, nullptr, 0, pool), "no workspace");
    lookupffn_pool_free(pool);

    // Of no texts nothing is read and nothing written.
    const lookupffn_batch empty = {0, nullptr, nullptr, nullptr, nullptr};
    wrong = lookupffn_workspace(opened.model, &empty, 4, &needed);
    EXPECT(!wrong, "no texts: %s", wrong);
    const Guarded little(needed);
    wrong = lookupffn_run(opened.model, &empty, nullptr, nullptr, little.data(), needed, nullptr);
    EXPECT(!wrong, "no texts: %s", wrong);

    // A batch that is wrong is refused by both calls, before what it does not have is read.
    const auto refused_batch = [&](const Texts& t, const char* what) {
      const GuardedBatch b(t);
      const lookupffn_batch bad = c_batch(b.batch);
      size_t size = 0;
      must_refuse(lookupffn_workspace(opened.model, &bad, 1, &size), what);
      const Guarded large(1 << 16);
      must_refuse(lookupffn_run(opened.model, &bad, rows, nullptr, large.data(), large.size(), nullptr), what);
    };
    const auto changed = [&](std::vector<int32_t> Texts::* field, int32_t value, const char* what) {
      Texts t = texts;
      (t.*field)[random.below(int((t.*field).size()))] = value;
      refused_batch(t, what);
    };
    constexpr int32_t kMost = std::numeric_limits<int32_t>::max(), kLeast = std::numeric_limits<int32_t>::min();
    for (int32_t id : {-1, c.vocab_size, kMost, kLeast}) changed(&Texts::ids, id, "an id out of range");
    for (int32_t length : {0, -1, kLeast}) changed(&Texts::lengths, length, "a length below 1");
    if (!texts.has_positions)
      for (int32_t length : {c.max_positions - c.first_position + 1, kMost})
        changed(&Texts::lengths, length, "a length without positions");
    if (texts.has_positions)
      for (int32_t at : {-1, c.max_positions, kMost, kLeast}) changed(&Texts::positions, at, "a position out of range");
    if (texts.has_types && c.type_vocab_size)
      for (int32_t type : {-1, c.type_vocab_size, kMost, kLeast}) changed(&Texts::types, type, "a type out of range");
    for (int64_t count : {int64_t(-1), std::numeric_limits<int64_t>::min()}) {
      const lookupffn_batch bad = {count, batch.lengths, batch.ids, batch.positions, batch.types};
      must_refuse(lookupffn_workspace(opened.model, &bad, 1, &needed), "a negative number of texts");
    }
    // Lengths that add up to more than memory holds; with positions, which say that texts may be as long.
    const std::vector<int32_t> lengths(1 << 10, kMost);
    const GuardedBatch b(texts);
    const lookupffn_batch huge = {1 << 10, lengths.data(), b.batch.ids, b.batch.ids, nullptr};
    must_refuse(lookupffn_workspace(opened.model, &huge, 1, &needed), "2^41 tokens");

    // Plans of texts of any length, which take the more memory the longer these are.
    size_t before = 0;
    for (int32_t length : {1, 15, 16, 17, 1 << 20, 1 << 30, kMost - 16, kMost - 15, kMost}) {
      const Batch one = {.texts = 1, .lengths = &length, .ids = nullptr, .positions = nullptr, .types = nullptr};
      const size_t size = plan_encoder(e, one, 3).workspace_bytes();
      EXPECT(size >= before && size >= 4 * size_t(length) * c.padded, "%d tokens take %zu bytes, fewer ones %zu",
             length, size, before);
      before = size;
    }
  }
  EXPECT(equal > 0, "no implementation is the one in use");
  return text("%d files and batches refused, %d runs as the engine's", refused, equal);
}
