// Which implementations this build has, which of them this processor runs, and the one in use.
#pragma once

#include <string>

#include "kernels.h"

namespace lookupffn {

struct Implementation {
  const Kernels* kernels;
  const char* needs;   // for people: what a processor must have
  bool (*runs_here)();
};

// Best first; the last one runs everywhere.
const Implementation* implementations(int* count);

// The implementation named by the environment variable LOOKUPFFN_ISA, or the first that runs here; chosen once.
// Throws std::runtime_error for a name that is unknown or that this processor cannot run.
const Kernels& kernels();

// The implementation of this name; throws as above.
const Kernels& kernels_named(const std::string& name);

}  // namespace lookupffn
