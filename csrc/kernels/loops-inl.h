// All loops of the kernels, written once over the 16-lane shim that was included before this file, and their
// tables.
//
// In the integer paths (int8 and int16 weights, int8 tables) every rounding is written out and sums are exact, so codes
// and outputs are the same bits on every instruction set.
#ifndef LOOKUPFFN_LOOP  // names the loop that follows, for the lab's shim that counts operations (lab/simd_counting.h)
#define LOOKUPFFN_LOOP(name)
#endif

#include "kernels/math-inl.h"
#include "kernels/project-inl.h"
#include "kernels/hash-inl.h"
#include "kernels/gather-inl.h"
#include "kernels/encoder-inl.h"
#include "kernels/attention-inl.h"
#include "kernels/training-inl.h"

static const InferenceKernels kInference = {
    .multiply_i8 = multiply_i8,
    .activation_planes = kActivationPlanes,
    .project = project,
    .hash = hash,
    .prefetch_rows = prefetch_rows,
    .quantise_scores = quantise_scores,
    .gather = gather,
};

static const EncoderKernels kEncoder = {
    .linear = linear,
    .norm_rows = norm_rows,
    .pack_head = pack_head,
    .rotate = rotate,
    .attend = attend,
    .add_rows = add_rows,
    .add_table_row = add_table_row,
    .pool_rows = pool_rows,
};

static const TrainingKernels kTraining = {
    .hash_rows = hash_rows,
    .hash_rows_backward = hash_rows_backward,
    .pack_slice = pack_slice,
    .pack_rows = pack_rows,
    .unpack_slice = unpack_slice,
    .transpose_words = transpose_words,
    .gather_slice = gather_slice,
    .gather_token = gather_token,
    .scatter_slice = scatter_slice,
};

// What dispatch.cpp knows of an implementation.
#define LOOKUPFFN_EXPORT(isa)                                       \
  namespace lookupffn {                                             \
  namespace exported {                                              \
  extern const EncoderKernels* const encoder_##isa;                 \
  const EncoderKernels* const encoder_##isa = &isa::kEncoder;       \
  extern const InferenceKernels* const inference_##isa;             \
  extern const TrainingKernels* const training_##isa;               \
  const InferenceKernels* const inference_##isa = &isa::kInference; \
  const TrainingKernels* const training_##isa = &isa::kTraining;    \
  }                                                                 \
  }
