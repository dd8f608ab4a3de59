#include "kernels/dispatch.h"

namespace lookupffn {

namespace exported {  // by the files isa_*.cpp
#define LOOKUPFFN_IMPORT(isa)                           \
  extern const InferenceKernels* const inference_##isa; \
  extern const TrainingKernels* const training_##isa;   \
  extern const EncoderKernels* const encoder_##isa;
LOOKUPFFN_ISAS(LOOKUPFFN_IMPORT)
}  // namespace exported

const Implementation& implementation(int isa) {
#define LOOKUPFFN_ENTRY(isa) {exported::inference_##isa, exported::training_##isa, exported::encoder_##isa},
  static const Implementation all[] = {LOOKUPFFN_ISAS(LOOKUPFFN_ENTRY)};
  return all[isa];
}

}  // namespace lookupffn
