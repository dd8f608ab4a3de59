#include "kernels/isas.h"

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

int find(const std::string& name) {
  int count;
  const Isa* all = isas(&count);
  std::string known, here, needs;
  for (int i = 0; i < count; i++) {
    const bool runs = all[i].runs_here();
    if (name == all[i].name) {
      if (runs) return i;
      needs = all[i].needs;
    }
    known += (i ? ", " : "") + std::string(all[i].name);
    if (runs) here += (here.empty() ? "" : ", ") + std::string(all[i].name);
  }
  throw std::runtime_error((needs.empty()
                                ? "there is no implementation '" + name + "'; this build has " + known
                                : "implementation '" + name + "' needs " + needs + ", which this processor lacks") +
                           "; here run " + here);
}

int choose() {
  if (const char* forced = std::getenv("LOOKUPFFN_ISA"); forced && *forced) {
    try {
      return find(forced);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(std::string("LOOKUPFFN_ISA: ") + error.what());
    }
  }
  int count, i = 0;
  const Isa* all = isas(&count);
  while (!all[i].runs_here()) i++;  // the last one does
  return i;
}

}  // namespace

const Isa* isas(int* count) {
  static const Isa all[] = {
#if defined(__x86_64__)
      {"amx", "AMX with int8, granted by the system, and AVX-512 F, BW, DQ, VL and VNNI", has_amx},
      {"avx512_vnni", "AVX-512 F, BW, DQ, VL and VNNI", has_avx512_vnni},
      {"avx512", "AVX-512 F, BW, DQ and VL", has_avx512},
      {"avx2_vnni", "AVX2, FMA and AVX-VNNI", has_avx2_vnni},
      {"avx2", "AVX2 and FMA", has_avx2},
#elif defined(__aarch64__)
      {"neon_dot", "NEON and its dot product (Armv8.2)", has_neon_dot},
      {"neon", "NEON", always},
#endif
      {"scalar", "any processor", always},
  };
  *count = sizeof all / sizeof *all;
  return all;
}

int isa_index(const std::string& name) {
  if (!name.empty()) return find(name);
  static const int chosen = choose();
  return chosen;
}

}  // namespace lookupffn
