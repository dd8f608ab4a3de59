// What the kernels execute, by running them on the counting shim: operations by loop and kind, for the roofline. The
// kernels are the ones that ship, so an edit of theirs is told nowhere else.
#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "bindings/torch_checks.h"
#include "model/lookup.h"
#include "ops/training.h"

namespace lookupffn {
namespace counting {
#include "lab/simd_counting.h"
#include "kernels/loops-inl.h"
#undef __builtin_memcpy
}  // namespace counting
}  // namespace lookupffn

namespace lookupffn {
namespace {

using namespace counting;

std::mutex one_at_a_time;  // the counters are the program's

// Counts of `body` as JSON: {"loop": {"kind": operations}}, loops in the order in which they ran. set1 is a load in
// `from_memory`.
template <typename Body>
std::string counted(const std::set<std::string>& from_memory, const std::string& more, const Body& body) {
  loops.clear();
  body();
  counts = elsewhere.of;
  std::vector<std::pair<std::string, Counts>> in_order(loops.begin(), loops.end());
  std::sort(in_order.begin(), in_order.end(),
            [](const auto& a, const auto& b) { return a.second.place < b.second.place; });
  std::string json = "{\"loops\": {";
  for (auto& [loop, kinds] : in_order) {
    if (from_memory.count(loop)) kinds.of[kLoad] += kinds.of[kSet1];
    json += (json.back() == '{' ? "\"" : ", \"") + loop + "\": {";
    for (int kind = 0; kind < kSet1; kind++)
      if (kinds.of[kind])
        json += std::string(json.back() == '{' ? "\"" : ", \"") + kKindNames[kind] +
                "\": " + std::to_string(kinds.of[kind]);
    json += "}";
  }
  return json + "}" + more + "}";
}

// An exp must count as one, and as nothing else.
void check_exp() {
  loops.clear();
  const f32x16 one = set1(1.0f);
  counts = loops["exp"].of;
  exp_minus_2(one);
  counts = elsewhere.of;
  for (int kind = 0; kind < kKinds; kind++)
    check(loops["exp"].of[kind] == (kind == kExp),
          "exp_minus_2 has changed: scale() in simd_counting.h must take back its operations");
}

std::vector<float> numbers(size_t count) {  // nearly normal, a sum of four uniform ones; the same in each call
  std::vector<float> made(count);
  uint32_t state = 1;
  for (float& value : made) {
    value = -2.0f;
    for (int i = 0; i < 4; i++) state = state * 1664525u + 1013904223u, value += float(state >> 8) * 0x1p-24f;
  }
  return made;
}

Lines lines_of(const void* begin, const void* end) {
  const uint8_t *first = static_cast<const uint8_t*>(begin), *last = static_cast<const uint8_t*>(end);
  const size_t lines = (last - first + 63) / 64;
  return {first, last, 0, std::vector<bool>(lines), std::vector<bool>(lines)};
}

std::string json(const char* name, const Lines& lines) {
  int64_t different = 0, prefetched = 0;
  for (size_t i = 0; i < lines.loaded.size(); i++) {
    different += lines.loaded[i];
    prefetched += lines.loaded[i] && lines.prefetched[i];
  }
  return std::string("\"") + name + "\": {\"loads\": " + std::to_string(lines.loads) +
         ", \"different\": " + std::to_string(different) + ", \"prefetched\": " + std::to_string(prefetched) + "}";
}

// A pool of any number of threads, of which the calling one does the work.
void in_turn(void*, int tasks, void (*task)(void* context, int index), void* context) {
  for (int i = 0; i < tasks; i++) task(context, i);
}

Layer open(const Tensor& packed) {
  check(packed.is_cpu() && packed.dim() == 1 && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
        "packed must be a contiguous vector of bytes on the CPU, not " + shape(packed));
  Layer layer;
  const std::string wrong = open_layer(packed.const_data_ptr(), size_t(packed.numel()), &layer);
  check(wrong.empty(), "the packed layer cannot be used: " + wrong);
  return layer;
}

Plan plan_of(const Layer& layer, int64_t tokens, const Tensor& tiling, int64_t threads) {
  check(tiling.is_cpu() && tiling.scalar_type() == ScalarType::Int && tiling.numel() == 4 && tiling.is_contiguous(),
        "tiling must be four int32: tile_tokens, groups_per_block, prefetch_distance, serial_tokens");
  check(tokens >= 1 && threads >= 1 && threads <= 4096, "tokens and threads must be positive");
  const int32_t* t = static_cast<const int32_t*>(tiling.const_data_ptr());
  return make_plan(layer, tokens, {t[0], t[1], t[2], t[3]}, int(threads));
}

// What a call does (Plan): chunk, threads, tile, groups_per_block, token_parts, early_slices, tokens_ahead, bytes of
// workspace.
Tensor plan(const Tensor& packed, int64_t tokens, const Tensor& tiling, int64_t threads) {
  const Plan p = plan_of(open(packed), tokens, tiling, threads);
  const int64_t fields[] = {p.chunk,
                            p.threads,
                            p.tile,
                            p.groups_per_block,
                            p.token_parts,
                            p.prefetch.early_slices,
                            p.prefetch.tokens_ahead,
                            int64_t(p.workspace_bytes())};
  Tensor out = empty({int64_t(std::size(fields))}, ScalarType::Long);
  std::copy(std::begin(fields), std::end(fields), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

// Runs a call with `tokens` random tokens, its threads in turn. `larger` are groups_per_block, early_slices and
// tokens_ahead of the plan of a larger call, where these tokens are a part of one. Returns {"loops": {"stage.loop":
// {kind: operations}}, "lines": {...}, "project_calls": n}; lines of 64 bytes loaded from the weights and from the
// tables' rows, all and different ones.
std::string count_operations(const Tensor& packed, int64_t tokens, const Tensor& tiling, int64_t threads,
                             std::vector<int64_t> larger) {
  const Layer l = open(packed);
  Plan p = plan_of(l, tokens, tiling, threads);
  check(larger.empty() || (larger.size() == 3 && larger[0] >= 1),
        "larger must be groups_per_block, early_slices and tokens_ahead, or nothing");
  if (!larger.empty()) {
    p.groups_per_block = int(std::min<int64_t>(larger[0], l.groups));
    p.prefetch = {.early_slices = int(larger[1]), .tokens_ahead = int(larger[2])};
    p.thread_bytes +=
        size_t(p.chunk) * kMaxSlice * sizeof(float) + 128;  // sums between blocks, which this call has not
  }
  const std::vector<float> x = numbers(size_t(tokens) * l.h.in_features);
  std::vector<float> y(size_t(tokens) * l.h.out_features);
  const Workspace workspace(p.workspace_bytes());

  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check_exp();
  const uint8_t* const bytes = static_cast<const uint8_t*>(packed.const_data_ptr());
  weight_lines = lines_of(l.projection.weights, bytes + l.h.offset[kWeightScales]);
  row_lines = lines_of(l.tables.rows, bytes + l.h.offset[kTableScales]);
  static int64_t project_calls;
  project_calls = 0;
  const InferenceKernels kernels = {
      .multiply_i8 = counting::multiply_i8,
      .activation_planes = counting::kActivationPlanes,
      .project = [](const Projection& q,
                    const ProjectArgs& a) { counted_stage = "project.", project_calls++, counting::project(q, a); },
      .hash = [](const HashArgs& a) { counted_stage = "hash.", counting::hash(a); },
      .prefetch_rows = [](const PrefetchArgs& a) { counted_stage = "hash.", counting::prefetch_rows(a); },
      .quantise_scores =
          [](const QuantiseScoresArgs& a) { return counted_stage = "hash.", counting::quantise_scores(a); },
      .gather = [](const GatherArgs& a) { counted_stage = "gather.", counting::gather(a); },
  };
  std::set<std::string> from_memory;  // of a gather of float rows, the score of each
  if (l.h.table_type != TableType::kInt8) from_memory.insert("gather.rows");
  std::string text = counted(from_memory, "LINES", [&] {
    run(kernels, l, p, {const_cast<float*>(x.data()), l.h.in_features, false}, {y.data(), l.h.out_features, false},
        workspace.get(), {p.threads, in_turn, nullptr});
  });
  for (float value : y) check(std::isfinite(value), "an output is not finite");
  const std::string lines = ", \"lines\": {" + json("weights", weight_lines) + ", " + json("rows", row_lines) +
                            "}, \"project_calls\": " + std::to_string(project_calls);
  weight_lines = row_lines = lines_of(nullptr, nullptr);
  return text.replace(text.find("LINES"), 5, lines);
}

// Hash and gather of a layer in training and their backward passes, on one thread:
// {"loops": {"stage.loop": {kind: operations}}}, stages "hash", "gather", "gather backward" and "hash backward".
std::string count_training(int64_t num_tables, int64_t code_bits, int64_t reads, int64_t width, int64_t tokens) {
  check(num_tables >= 1 && code_bits >= 1 && code_bits <= 16 && reads >= 1 && reads <= kMaxReads && width >= 1 &&
            tokens >= 1 && num_tables * width <= int64_t(1) << (28 - code_bits),
        "sizes must be positive, code_bits at most 16, reads at most 4, the tables at most 2^28 numbers");
  const int64_t rows = int64_t(1) << code_bits, count = tokens * num_tables;
  const std::vector<float> z = numbers(count * code_bits), weights = numbers(num_tables * rows * width);
  const std::vector<float> grad = numbers(tokens * width);
  std::vector<float> scores(count * reads), grad_scores(scores.size()), grad_z(z.size()), y(grad.size());
  std::vector<float> grad_tables(weights.size());
  std::vector<int32_t> codes(scores.size());
  const ThreadPool one = {1, nullptr, nullptr};
  const Tables tables = {const_cast<float*>(weights.data()), num_tables, rows, width, false};
  const Reads read = {codes.data(), scores.data(), tokens, int(reads)};
  const Workspace workspace(
      std::max(gather_workspace_bytes(tables, read, 1), gather_backward_workspace_bytes(tables, read, 1)));

  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const TrainingKernels& k = counting::kTraining;
  // A score, or a gradient's, is set for all lanes from memory; what the hashes set are constants.
  return counted({"gather.rows", "gather backward.scatter"}, "", [&] {
    counted_stage = "hash.";
    train_hash(k, {z.data(), count, 0, 0, int(code_bits), int(reads), codes.data(), scores.data()}, one);
    counted_stage = "gather.";
    train_gather(k, tables, read, y.data(), workspace.get(), one);
    counted_stage = "gather backward.";
    train_gather_backward(k, grad.data(), tables, read, {grad_tables.data(), grad_scores.data()}, workspace.get(), one);
    counted_stage = "hash backward.";
    train_hash_backward(
        k, {grad_scores.data(), z.data(), codes.data(), count, 0, 0, int(code_bits), int(reads), grad_z.data()}, one);
  });
}

}  // namespace
}  // namespace lookupffn

STABLE_TORCH_LIBRARY_FRAGMENT(lookupffn_lab, m) {
  m.def("plan(Tensor packed, int tokens, Tensor tiling, int threads) -> Tensor");
  m.def("count_operations(Tensor packed, int tokens, Tensor tiling, int threads, int[] larger=[]) -> str");
  m.def("count_training(int num_tables, int code_bits, int reads, int width, int tokens) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lookupffn_lab, CPU, m) {
  m.impl("plan", TORCH_BOX(&lookupffn::plan));
  m.impl("count_operations", TORCH_BOX(&lookupffn::count_operations));
}

STABLE_TORCH_LIBRARY_IMPL(lookupffn_lab, CompositeExplicitAutograd, m) {
  m.impl("count_training", TORCH_BOX(&lookupffn::count_training));
}
