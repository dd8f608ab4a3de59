// The ladder's kernels for each instruction set, in the target regions of csrc/kernels/isa_*.cpp. What the shims lack
// for it is written here: what ships converts no int8 rows.
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "ladder.h"

#pragma GCC diagnostic ignored "-Wunused-function"  // of loops-inl.h: a ladder takes parts of it

namespace lookupffn {
namespace scalar {
#define LOOKUPFFN_NAME "scalar"
#include "simd/scalar.h"
#include "kernels/loops-inl.h"
LOOKUPFFN_VECTOR(int8_t, SignedBytes, 16);
LOOKUPFFN_INLINE f32x16 int8_to_float(const uint8_t* p) {
  return {__builtin_convertvector(read<SignedBytes>(p), Floats)};
}
#include "ladder-inl.h"
#undef LOOKUPFFN_NAME
}  // namespace scalar
}  // namespace lookupffn

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace lookupffn {
namespace avx2 {
#define LOOKUPFFN_NAME "avx2"
#include "simd/avx2.h"
#include "kernels/loops-inl.h"
LOOKUPFFN_INLINE __m256 eight_to_float(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
LOOKUPFFN_INLINE f32x16 int8_to_float(const uint8_t* p) { return {eight_to_float(p), eight_to_float(p + 8)}; }
#include "ladder-inl.h"
#undef LOOKUPFFN_NAME
}  // namespace avx2
}  // namespace lookupffn
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace lookupffn {
namespace avx512 {
#define LOOKUPFFN_NAME "avx512"
#include "simd/avx512.h"
#include "kernels/loops-inl.h"
LOOKUPFFN_INLINE f32x16 int8_to_float(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
#include "ladder-inl.h"
#undef LOOKUPFFN_NAME
}  // namespace avx512
}  // namespace lookupffn
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#define LOOKUPFFN_VNNI
namespace lookupffn {
namespace avx512_vnni {
#define LOOKUPFFN_NAME "avx512_vnni"
#include "simd/avx512.h"
#include "kernels/loops-inl.h"
LOOKUPFFN_INLINE f32x16 int8_to_float(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
#include "ladder-inl.h"
#undef LOOKUPFFN_NAME
}  // namespace avx512_vnni
}  // namespace lookupffn
#pragma GCC pop_options

#elif defined(__aarch64__)

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#define LOOKUPFFN_DOT
namespace lookupffn {
namespace neon_dot {
#define LOOKUPFFN_NAME "neon_dot"
#include "simd/neon.h"
#include "kernels/loops-inl.h"
LOOKUPFFN_INLINE float32x4_t four_to_float(int16x4_t x) { return vcvtq_f32_s32(vmovl_s16(x)); }
LOOKUPFFN_INLINE f32x16 int8_to_float(const uint8_t* p) {
  const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(p));
  const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
  return {four_to_float(vget_low_s16(low)), four_to_float(vget_high_s16(low)), four_to_float(vget_low_s16(high)),
          four_to_float(vget_high_s16(high))};
}
#include "ladder-inl.h"
#undef LOOKUPFFN_NAME
}  // namespace neon_dot
}  // namespace lookupffn
#pragma GCC pop_options

#endif

namespace lookupffn {

const LadderKernels* ladder_kernels(const std::string& name) {
  static const LadderKernels* const all[] = {
#if defined(__x86_64__)
      &avx512_vnni::kLadder,
      &avx512::kLadder,
      &avx2::kLadder,
#elif defined(__aarch64__)
      &neon_dot::kLadder,
#endif
      &scalar::kLadder,
  };
  for (const LadderKernels* kernels : all)
    if (kernels->name == name) return kernels;
  return nullptr;
}

}  // namespace lookupffn
