#include "lab/probe.h"

#include "kernels/isas.h"

namespace lookupffn {

namespace exported {  // by the files isa_*.cpp
#define LOOKUPFFN_IMPORT(isa) extern const ProbeKernels* const probe_##isa;
LOOKUPFFN_ISAS(LOOKUPFFN_IMPORT)
}  // namespace exported

const ProbeKernels& probe_kernels(int isa) {
#define LOOKUPFFN_PROBE(isa) exported::probe_##isa,
  static const ProbeKernels* const all[] = {LOOKUPFFN_ISAS(LOOKUPFFN_PROBE)};
  return *all[isa];
}

}  // namespace lookupffn
