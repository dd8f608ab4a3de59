// count_operations PACKED TOKENS TILE_TOKENS PREFETCH_ROWS GROUPS_A_PASS
//
// Runs a packed layer on random tokens, on one thread, and prints what its kernels executed: operations of the vector shim
// by stage and kind (simd_counting.h), then lines of 64 bytes loaded from the weights and from the tables' rows, all and
// different ones, and how often the projection was called. tests/test_hardware_work.py compares them with the formulas of
// lookupffn/hardware/work.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "engine.h"

namespace lookupffn { namespace counting {
#include "simd_counting.h"
#include "kernels-inl.h"
#undef __builtin_memcpy
} }

using namespace lookupffn;
using namespace lookupffn::counting;

namespace {

constexpr const char* kKindNames[] = {"load",    "store", "add",  "multiply", "fma",       "divide", "convert", "vector",
                                      "shuffle", "rows",  "dot_int8", "dot_int16", "exp", "prefetch", "set1"};
static_assert(sizeof kKindNames / sizeof *kKindNames == kKinds, "a name for each kind");

enum Stage { kProject, kHash, kGather, kStages };
constexpr const char* kStageNames[] = {"project", "hash", "gather"};
int64_t of_stage[kStages][kKinds], calls[kStages];

// The kernel `f` with what it does counted to a stage.
template <Stage kStage, auto kFunction, typename... Arguments>
auto counted(Arguments... arguments) {
  struct Counting {
    Counting() { counts = of_stage[kStage], calls[kStage]++; }
    ~Counting() { counts = no_counts; }
  } counting;
  return kFunction(arguments...);
}

int fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  return 1;
}

void print(const char* name, const Lines& lines) {
  int64_t different = 0;
  for (bool loaded : lines.loaded) different += loaded;
  printf("\"%s\": {\"loads\": %lld, \"different\": %lld}", name, (long long)lines.loads, (long long)different);
}

// An exp must count as one, and as nothing else.
bool exp_counts_as_one() {
  int64_t of_exp[kKinds] = {};
  const f32x16 one = set1(1.0f);
  counts = of_exp;
  exp_minus_2(one);
  counts = no_counts;
  for (int kind = 0; kind < kKinds; kind++)
    if (of_exp[kind] != (kind == kExp)) return false;
  return true;
}

Lines lines_of(const void* begin, const void* end) {
  const uint8_t *first = static_cast<const uint8_t*>(begin), *last = static_cast<const uint8_t*>(end);
  return {first, last, 0, std::vector<bool>((last - first + 63) / 64)};
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 7) return fail("usage: count_operations PACKED TOKENS TILE_TOKENS PREFETCH_ROWS GROUPS_A_PASS THREADS");
  if (!exp_counts_as_one()) return fail("exp_minus_2 has changed: scale() in simd_counting.h must take back its operations");

  FILE* file = fopen(arguments[1], "rb");
  if (!file) return fail("cannot read the packed layer");
  fseek(file, 0, SEEK_END);
  const size_t bytes = size_t(ftell(file));
  rewind(file);
  uint8_t* packed = static_cast<uint8_t*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!packed || fread(packed, 1, bytes, file) != bytes) return fail("cannot read the packed layer");
  fclose(file);
  Layer l;
  const std::string wrong = parse_layer(packed, bytes, &l);
  if (!wrong.empty()) return fail(wrong.c_str());
  weight_lines = lines_of(l.weights, packed + l.h.offset[kWeightScales]);
  row_lines = lines_of(l.tables, packed + l.h.offset[kTableScales]);

  const int64_t tokens = atoll(arguments[2]);
  std::vector<float> x(size_t(tokens) * l.h.in_features), y(size_t(tokens) * l.h.out_features);
  uint32_t state = 1;
  for (float& value : x) {  // nearly normal, a sum of four uniform numbers
    value = -2.0f;
    for (int i = 0; i < 4; i++) state = state * 1664525u + 1013904223u, value += float(state >> 8) * 0x1p-24f;
  }

  Kernels kernels = {};  // those that forward() calls
  kernels.project = [](auto... a) { counted<kProject, counting::project>(a...); };
  kernels.hash = [](auto... a) { counted<kHash, counting::hash>(a...); };
  kernels.prefetch_rows = [](auto... a) { counted<kHash, counting::prefetch_rows>(a...); };
  kernels.quantise_scores = [](auto... a) { return counted<kHash, counting::quantise_scores>(a...); };
  kernels.gather = [](auto... a) { counted<kGather, counting::gather>(a...); };
  const Tiling tiling = {atoi(arguments[3]), atoi(arguments[5]), atoi(arguments[4]), 0};
  const int threads = atoi(arguments[6]);  // one after another, each with its share
  const auto run = [threads](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
    const int64_t share = (n + threads - 1) / threads;
    for (int64_t begin = 0; begin < n; begin += share) body(begin, std::min(n, begin + share));
  };
  const Rows in = {x.data(), l.h.in_features, false}, out = {y.data(), l.h.out_features, false};
  forward(kernels, l, in, out, tokens, tiling, {threads, run});
  for (float value : y)
    if (!std::isfinite(value)) return fail("an output is not finite");

  // A gather of float rows has one set1 a row: of its score, from memory.
  if (l.h.table_type != TableType::kInt8) of_stage[kGather][kLoad] += of_stage[kGather][kSet1];
  printf("{");
  for (int stage = 0; stage < kStages; stage++) {
    printf("\"%s\": {", kStageNames[stage]);
    for (int kind = 0; kind < kSet1; kind++)
      printf("%s\"%s\": %lld", kind ? ", " : "", kKindNames[kind], (long long)of_stage[stage][kind]);
    printf("}, ");
  }
  printf("\"lines\": {");
  print("weights", weight_lines);
  printf(", ");
  print("rows", row_lines);
  printf("}, \"project_calls\": %lld}\n", (long long)calls[kProject]);
  free(packed);
}
