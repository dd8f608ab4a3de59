#include "model/records.h"

#include <cmath>
#include <cstring>

namespace lookupffn {
namespace {

std::string field(const char* name, int64_t value) { return std::string(name) + " is " + std::to_string(value); }

// Hands out the sections of a record in turn, each from the next multiple of 64 bytes on.
class Sections {
 public:
  Sections(Bytes record) : record_(record), position_(sizeof(RecordHeader)) {}

  // count items of so many bytes, or null where they do not lie within the record.
  const uint8_t* take(int64_t count, int64_t item_bytes) {
    uint64_t bytes;
    if (count < 0 || __builtin_mul_overflow(uint64_t(count), uint64_t(item_bytes), &bytes) || bytes >> 62)
      return fail();
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > record_.size - position_) return fail();
    const uint8_t* const section = record_.data + position_;
    position_ += bytes;
    return section;
  }
  const float* floats(int64_t count) { return reinterpret_cast<const float*>(take(count, 4)); }

  std::string end() const {
    if (failed_) return "its sections do not fit its " + std::to_string(record_.size) + " bytes";
    if (position_ != record_.size)
      return "its sections end at byte " + std::to_string(position_) + ", but it has " + std::to_string(record_.size);
    return "";
  }

 private:
  const uint8_t* fail() {
    failed_ = true;
    return nullptr;
  }
  Bytes record_;
  size_t position_;
  bool failed_ = false;
};

bool padded(int features, int width) {
  return features >= 1 && features <= kMostFeatures && width >= features && width % kPadding == 0 &&
         width < features + kPadding;
}

}  // namespace

std::string record_kind(Bytes bytes, RecordKind* kind) {
  RecordHeader h;
  if (bytes.size < sizeof h) return "it has " + std::to_string(bytes.size) + " bytes, fewer than a record's header";
  std::memcpy(&h, bytes.data, sizeof h);
  if (std::memcmp(h.magic, "LOOKUPFF", 8) != 0) return "it does not begin with LOOKUPFF";
  if (h.version == 1) {
    *kind = RecordKind::kLookup;
    return "";
  }
  if (h.version != kRecordVersion)
    return "its format version is " + std::to_string(h.version) + ", this build reads 1 and " +
           std::to_string(kRecordVersion);
  if (h.kind < RecordKind::kLinear || h.kind > RecordKind::kTokenRows) return field("kind", int64_t(h.kind));
  *kind = h.kind;
  return "";
}

std::string open_record(Bytes bytes, RecordKind wanted, int sizes, RecordHeader* h) {
  RecordKind kind;
  std::string wrong = record_kind(bytes, &kind);
  if (!wrong.empty()) return wrong;
  if (kind != wanted) return "its kind is " + std::to_string(int(kind)) + ", not " + std::to_string(int(wanted));
  std::memcpy(h, bytes.data, sizeof *h);
  if (h->total_bytes != bytes.size)
    return "its header says " + std::to_string(h->total_bytes) + " bytes, but it has " + std::to_string(bytes.size);
  for (int i = sizes; i < kRecordSizes; i++)
    if (h->size[i] != 0) return field("a reserved size", h->size[i]);
  return "";
}

std::string open_linear(Bytes bytes, Linear* l) {
  RecordHeader h;
  std::string wrong = open_record(bytes, RecordKind::kLinear, 6, &h);
  if (!wrong.empty()) return wrong;
  l->in_features = h.size[0], l->out_features = h.size[1], l->block_in = h.size[2], l->block_out = h.size[3];
  l->type = WeightType(h.size[4]), l->activation = Activation(h.size[5]);
  if (!padded(l->in_features, l->block_in)) return field("block_in", l->block_in);
  if (!padded(l->out_features, l->block_out)) return field("block_out", l->block_out);
  if (l->type != WeightType::kFloat32 && l->type != WeightType::kBFloat16 && l->type != WeightType::kInt8)
    return field("weight_type", h.size[4]);
  if (l->activation < Activation::kNone || l->activation > Activation::kTanh) return field("activation", h.size[5]);
  const bool integer = l->type == WeightType::kInt8;
  if (integer && l->block_in > 66000) return field("block_in", l->block_in) + ", too many for 32-bit sums";
  Sections sections(bytes);
  l->weights = {.words = sections.take(int64_t(l->block_in) * l->block_out, int64_t(element_size(l->type))),
                .scales = sections.floats(integer ? l->block_out : 0),
                .offsets = reinterpret_cast<const int32_t*>(sections.floats(integer ? l->block_out : 0)),
                .blocks = 1,
                .block_in = l->block_in,
                .block_out = l->block_out};
  l->bias = sections.floats(l->block_out);
  return sections.end();
}

Linear outputs_of(const Linear& l, int begin, int end) {
  Linear some = l;
  some.out_features = some.block_out = some.weights.block_out = end - begin;
  some.weights.words += size_t(begin) * size_t(l.block_in) * element_size(l.type);
  if (l.type == WeightType::kInt8) some.weights.scales += begin, some.weights.offsets += begin;
  some.bias += begin;
  return some;
}

std::string open_norm(Bytes bytes, Norm* n) {
  RecordHeader h;
  std::string wrong = open_record(bytes, RecordKind::kNorm, 4, &h);
  if (!wrong.empty()) return wrong;
  n->width = h.size[0], n->padded = h.size[1], n->rms = h.size[2] == 1;
  if (h.size[2] != 0 && h.size[2] != 1) return field("rms", h.size[2]);
  std::memcpy(&n->epsilon, &h.size[3], 4);
  if (!padded(n->width, n->padded)) return field("padded", n->padded);
  if (!(n->epsilon >= 0 && n->epsilon < 1)) return "epsilon is " + std::to_string(n->epsilon);
  Sections sections(bytes);
  n->weight = sections.floats(n->padded);
  n->bias = sections.floats(n->padded);
  return sections.end();
}

std::string open_token_rows(Bytes bytes, TokenRows* t) {
  RecordHeader h;
  std::string wrong = open_record(bytes, RecordKind::kTokenRows, 6, &h);
  if (!wrong.empty()) return wrong;
  t->rows = h.size[0], t->width = h.size[1], t->padded = h.size[2], t->type = TableType(h.size[3]);
  t->before = h.size[4], t->after = h.size[5];
  if (t->type != TableType::kFloat32 && !is_integer(t->type)) return field("table_type", h.size[3]);
  if (t->type > TableType::kInt4) return field("table_type", h.size[3]);
  const int multiple = t->type == TableType::kInt4 ? 2 * kPadding : kPadding;
  if (t->rows < 1) return field("rows", t->rows);
  if (t->width < 1 || t->width > kMostFeatures || t->padded != (t->width + multiple - 1) / multiple * multiple)
    return field("padded", t->padded);
  for (int n : {t->before, t->after})
    if (n < 0 || n > kMostNeighbours) return field("neighbours", n);
  Sections sections(bytes);
  t->data = sections.take(t->rows, int64_t(t->row_bytes()));
  t->scales = sections.floats(is_integer(t->type) ? t->rows : 0);
  return sections.end();
}

std::string open_branches(Bytes bytes, Branches* b) {
  RecordHeader h;
  std::string wrong = open_record(bytes, RecordKind::kBranches, 2, &h);
  if (!wrong.empty()) return wrong;
  if (h.size[0] != 0 && h.size[0] != 1) return field("low_rank", h.size[0]);
  if (h.size[1] < 0 || h.size[1] > kMostBranches) return field("token_rows", h.size[1]);
  b->low_rank = h.size[0], b->token_rows = h.size[1];
  return Sections(bytes).end();
}

std::string open_embedding(Bytes bytes, Embedding* e) {
  RecordHeader h;
  std::string wrong = open_record(bytes, RecordKind::kEmbedding, 3, &h);
  if (!wrong.empty()) return wrong;
  e->rows = h.size[0], e->width = h.size[1], e->padded = h.size[2];
  if (e->rows < 1) return field("rows", e->rows);
  if (!padded(e->width, e->padded)) return field("padded", e->padded);
  Sections sections(bytes);
  e->values = sections.floats(int64_t(e->rows) * e->padded);
  return sections.end();
}

}  // namespace lookupffn
