// Training, as torch sees it: ops.py calls these from its own operators, which carry the autograd
// and shape functions. Checks, allocates, calls ops/training.cpp.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <tuple>

#include "bindings/torch_checks.h"
#include "ops/training.h"

namespace lookupffn {
namespace {

Tensor in_order(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <typename T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* write(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); i++)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

void check_z(const Tensor& z) {
  check(z.is_cpu() && z.dim() == 3 && z.scalar_type() == ScalarType::Float && z.size(2) >= 1 && z.size(2) <= 16,
        "z must be (B, T, 1 to 16) in float32 on the CPU, not " + shape(z));
}

std::tuple<Tensor, Tensor> hash_codes(const Tensor& z, int64_t reads, std::string isa) {
  check_z(z);
  const int bits = int(z.size(2));
  check(reads >= 1 && reads <= kMaxReads && reads <= int64_t(1) << bits,
        "reads must be 1 to " + std::to_string(kMaxReads) + " and at most the number of buckets, not " +
            std::to_string(reads));
  const TrainingKernels& k = *implementation(isa_index(isa)).training;
  const Tensor rows = in_order(z);
  Tensor codes = empty({z.size(0), z.size(1), reads}, ScalarType::Int);
  Tensor scores = empty({z.size(0), z.size(1), reads}, ScalarType::Float);
  train_hash(k,
             {.z = read<float>(rows),
              .rows = z.size(0) * z.size(1),
              .begin = 0,
              .end = 0,
              .bits = bits,
              .reads = int(reads),
              .codes = write<int32_t>(codes),
              .scores = write<float>(scores)},
             torch_threads());
  return {codes, scores};
}

Tensor hash_codes_backward(const Tensor& grad, const Tensor& z, const Tensor& codes, std::string isa) {
  check_z(z);
  check(grad.is_cpu() && codes.is_cpu() && grad.scalar_type() == ScalarType::Float &&
            codes.scalar_type() == ScalarType::Int && same_shape(grad, codes) && grad.dim() == 3 &&
            grad.size(0) == z.size(0) && grad.size(1) == z.size(1) && grad.size(2) >= 1 && grad.size(2) <= kMaxReads,
        "grad (float32) and codes (int32) must be (B, T, 1 to 4) for z " + shape(z) + ", not " + shape(grad) + " and " +
            shape(codes));
  const TrainingKernels& k = *implementation(isa_index(isa)).training;
  const Tensor grad_rows = in_order(grad), rows = in_order(z), code_rows = in_order(codes);
  Tensor grad_z = empty({z.size(0), z.size(1), z.size(2)}, ScalarType::Float);
  train_hash_backward(k,
                      {.grad = read<float>(grad_rows),
                       .z = read<float>(rows),
                       .codes = read<int32_t>(code_rows),
                       .rows = z.size(0) * z.size(1),
                       .begin = 0,
                       .end = 0,
                       .bits = int(z.size(2)),
                       .reads = int(grad.size(2)),
                       .grad_z = write<float>(grad_z)},
                      torch_threads());
  return grad_z;
}

void check_gather(const Tensor& tables, const Tensor& codes, const Tensor& scores) {
  const ScalarType type = tables.scalar_type();
  check(tables.is_cpu() && tables.dim() == 3 && (type == ScalarType::Float || type == ScalarType::BFloat16) &&
            tables.numel() > 0 && tables.size(1) <= INT32_MAX && tables.size(2) <= INT32_MAX - kTrainSlice,
        "tables must be (T, K, E), not empty, in float32 or bfloat16 on the CPU, not " + shape(tables));
  check(codes.is_cpu() && scores.is_cpu() && codes.scalar_type() == ScalarType::Int &&
            scores.scalar_type() == ScalarType::Float && same_shape(codes, scores) && codes.dim() == 3 &&
            codes.size(1) == tables.size(0) && codes.size(2) >= 1 && codes.size(2) <= INT32_MAX,
        "codes (int32) and scores (float32) must be (B, T, N) for tables " + shape(tables) + ", not " + shape(codes) +
            " and " + shape(scores));
}

void check_codes(const Tensor& codes, int64_t rows) {  // every one: a wrong code would read other memory
  const int32_t* p = read<int32_t>(codes);
  const int64_t bad = find_bad_code(p, codes.numel(), rows);
  check(bad < 0, "code " + std::to_string(p[bad]) + " of token " +
                     std::to_string(bad / (codes.size(1) * codes.size(2))) + " lies outside tables of " +
                     std::to_string(rows) + " rows");
}

Tables tables_of(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.size(0), t.size(1), t.size(2),
          t.scalar_type() == ScalarType::BFloat16};
}

Reads reads_of(const Tensor& codes, const Tensor& scores) {
  return {read<int32_t>(codes), read<float>(scores), codes.size(0), int(codes.size(2))};
}

Tensor gather(const Tensor& tables, const Tensor& codes, const Tensor& scores, std::string isa) {
  check_gather(tables, codes, scores);
  const TrainingKernels& k = *implementation(isa_index(isa)).training;
  const Tensor rows = in_order(tables), code_rows = in_order(codes), score_rows = in_order(scores);
  check_codes(code_rows, tables.size(1));
  Tensor y = empty({codes.size(0), tables.size(2)}, tables.scalar_type());
  const Tables all = tables_of(rows);
  const Reads reads = reads_of(code_rows, score_rows);
  const ThreadPool threads = torch_threads();
  const Workspace workspace(gather_workspace_bytes(all, reads, threads.threads));
  train_gather(k, all, reads, y.mutable_data_ptr(), workspace.get(), threads);
  return y;
}

// A gradient as large as the tables is new memory at every step. Asks for it in huge pages, where the system has them
// on request: a page fault every 4 KiB took a third of the backward pass.
void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

std::tuple<Tensor, Tensor> gather_backward(const Tensor& grad, const Tensor& tables, const Tensor& codes,
                                           const Tensor& scores, std::string isa) {
  check_gather(tables, codes, scores);
  check(grad.is_cpu() && grad.dim() == 2 && grad.size(0) == codes.size(0) && grad.size(1) == tables.size(2) &&
            grad.scalar_type() == tables.scalar_type(),
        "grad must be (B, E) in the type of the tables, not " + shape(grad) + " for tables " + shape(tables) +
            " and codes " + shape(codes));
  const TrainingKernels& k = *implementation(isa_index(isa)).training;
  const Tensor rows = in_order(tables), code_rows = in_order(codes), score_rows = in_order(scores),
               grad_rows = in_order(grad);
  check_codes(code_rows, tables.size(1));
  Tensor grad_tables = empty({tables.size(0), tables.size(1), tables.size(2)}, tables.scalar_type());
  advise_huge_pages(grad_tables.mutable_data_ptr(), size_t(grad_tables.numel()) * grad_tables.element_size());
  Tensor grad_scores = empty({codes.size(0), codes.size(1), codes.size(2)}, ScalarType::Float);
  const Tables all = tables_of(rows);
  const Reads reads = reads_of(code_rows, score_rows);
  const ThreadPool threads = torch_threads();
  const Workspace workspace(gather_backward_workspace_bytes(all, reads, threads.threads));
  train_gather_backward(k, grad_rows.const_data_ptr(), all, reads,
                        {grad_tables.mutable_data_ptr(), write<float>(grad_scores)}, workspace.get(), threads);
  return {grad_tables, grad_scores};
}

}  // namespace
}  // namespace lookupffn

STABLE_TORCH_LIBRARY_FRAGMENT(lookupffn, m) {
  m.def("native_hash_codes(Tensor z, int reads, str isa) -> (Tensor, Tensor)");
  m.def("native_hash_codes_backward(Tensor grad, Tensor z, Tensor codes, str isa) -> Tensor");
  m.def("native_gather(Tensor tables, Tensor codes, Tensor scores, str isa) -> Tensor");
  m.def("native_gather_backward(Tensor grad, Tensor tables, Tensor codes, Tensor scores, str isa) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lookupffn, CPU, m) {
  m.impl("native_hash_codes", TORCH_BOX(&lookupffn::hash_codes));
  m.impl("native_hash_codes_backward", TORCH_BOX(&lookupffn::hash_codes_backward));
  m.impl("native_gather", TORCH_BOX(&lookupffn::gather));
  m.impl("native_gather_backward", TORCH_BOX(&lookupffn::gather_backward));
}
