// Plain C++ for any processor, and what the other implementations are tested against.
#include LOOKUPFFN_TABLES

namespace lookupffn {
namespace scalar {
#include "simd/scalar.h"
#include LOOKUPFFN_LOOPS
}  // namespace scalar
}  // namespace lookupffn

LOOKUPFFN_EXPORT(scalar)
