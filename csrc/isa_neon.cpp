// NEON as every 64-bit Arm processor has it.
#include <arm_neon.h>

#include "kernels.h"

#define LOOKUPFFN_NAME "neon"
namespace lookupffn { namespace neon {
#include "simd_neon.h"
#include "kernels-inl.h"
#include "probe-inl.h"
#include "training-inl.h"
} }

namespace lookupffn {
extern const Kernels* const kNeon;
const Kernels* const kNeon = &neon::kKernels;
}
