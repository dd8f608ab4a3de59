// The kernels of every instruction set that this build has.
#pragma once

#include "kernels/isas.h"
#include "kernels/kernels.h"

namespace lookupffn {

struct Implementation {
  const InferenceKernels* inference;
  const TrainingKernels* training;
  const EncoderKernels* encoder;
};

// Of one of isas(), by its place: implementation(isa_index()) is the one in use.
const Implementation& implementation(int isa);

}  // namespace lookupffn
