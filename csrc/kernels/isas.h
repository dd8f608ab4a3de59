// The instruction sets that the kernels are written for, which of them this processor runs, and the one in use.
#pragma once

#include <string>

// Best first; the last one runs everywhere. One file isa_NAME.cpp each.
#if defined(__x86_64__)
#define LOOKUPFFN_ISAS(X) X(amx) X(avx512_vnni) X(avx512) X(avx2_vnni) X(avx2) X(scalar)
#elif defined(__aarch64__)
#define LOOKUPFFN_ISAS(X) X(neon_dot) X(neon) X(scalar)
#else
#define LOOKUPFFN_ISAS(X) X(scalar)
#endif

namespace lookupffn {

struct Isa {
  const char* name;
  const char* needs;  // for people: what a processor must have
  bool (*runs_here)();
};

// In the order of LOOKUPFFN_ISAS.
const Isa* isas(int* count);

// Place of the one with this name; without a name that of the environment variable LOOKUPFFN_ISA, or the first that
// runs here, chosen once. Throws std::runtime_error for a name that is unknown or that this processor cannot run.
int isa_index(const std::string& name = "");

}  // namespace lookupffn
