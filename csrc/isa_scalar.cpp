// Plain C++ for any processor, and what the other implementations are tested against.
#include "kernels.h"

#define LOOKUPFFN_NAME "scalar"
namespace lookupffn { namespace scalar {
#include "simd_scalar.h"
#include "kernels-inl.h"
#include "probe-inl.h"
#include "training-inl.h"
} }

namespace lookupffn {
extern const Kernels* const kScalar;
const Kernels* const kScalar = &scalar::kKernels;
}
