#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lookupffn {

#if defined(__x86_64__)
extern const Kernels* const kAmx;
extern const Kernels* const kAvx512Vnni;
extern const Kernels* const kAvx512;
extern const Kernels* const kAvx2Vnni;
extern const Kernels* const kAvx2;
#elif defined(__aarch64__)
extern const Kernels* const kNeonDot;
extern const Kernels* const kNeon;
#endif
extern const Kernels* const kScalar;

namespace {

// The compiler's runtime also asks whether the system saves the wide registers (xgetbv).
#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_amx() {  // leaf 7, EDX: bit 24 tiles, bit 25 int8 products
  unsigned a = 7, b, c = 0, d;
  if (!has_avx512_vnni()) return false;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if ((d >> 24 & 3) != 3) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM for tile data: every process must ask
#else
  return false;
#endif
}
bool has_avx2_vnni() {  // GCC 12 has no name for this bit: leaf 7, subleaf 1, EAX bit 4
  unsigned a = 7, b, c = 1, d;
  if (!has_avx2()) return false;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return a >> 4 & 1;
}
#elif defined(__aarch64__)
bool has_neon_dot() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return false;
#endif
}
#endif
bool always() { return true; }

}  // namespace

const Implementation* implementations(int* count) {
  static const Implementation all[] = {
#if defined(__x86_64__)
      {kAmx, "AMX with int8, granted by the system, and AVX-512 F, BW, DQ, VL and VNNI", has_amx},
      {kAvx512Vnni, "AVX-512 F, BW, DQ, VL and VNNI", has_avx512_vnni},
      {kAvx512, "AVX-512 F, BW, DQ and VL", has_avx512},
      {kAvx2Vnni, "AVX2, FMA and AVX-VNNI", has_avx2_vnni},
      {kAvx2, "AVX2 and FMA", has_avx2},
#elif defined(__aarch64__)
      {kNeonDot, "NEON and its dot product (Armv8.2)", has_neon_dot},
      {kNeon, "NEON", always},
#endif
      {kScalar, "any processor", always},
  };
  *count = sizeof all / sizeof *all;
  return all;
}

const Kernels& kernels_named(const std::string& name) {
  int count;
  const Implementation* all = implementations(&count);
  std::string known;
  for (int i = 0; i < count; i++) {
    if (name == all[i].kernels->name) {
      if (all[i].runs_here()) return *all[i].kernels;
      throw std::runtime_error("implementation '" + name + "' needs " + all[i].needs + ", which this processor lacks");
    }
    known += (i ? ", " : "") + std::string(all[i].kernels->name);
  }
  throw std::runtime_error("there is no implementation '" + name + "'; this build has " + known);
}

const Kernels& kernels() {
  static const Kernels& chosen = [&]() -> const Kernels& {
    const char* forced = std::getenv("LOOKUPFFN_ISA");
    if (forced && *forced) {
      try {
        return kernels_named(forced);
      } catch (const std::runtime_error& error) {
        throw std::runtime_error(std::string("LOOKUPFFN_ISA: ") + error.what());
      }
    }
    int count;
    const Implementation* all = implementations(&count);
    for (int i = 0; i < count; i++)
      if (all[i].runs_here()) return *all[i].kernels;
    return *kScalar;
  }();
  return chosen;
}

}  // namespace lookupffn
