// The vector shim on AVX-512 (F, BW, DQ, VL); with LOOKUPFFN_VNNI also its 8-bit and 16-bit dot products.
// Included inside a target region and a namespace of one isa_*.cpp. simd/scalar.h says what each function means.

#define LOOKUPFFN_INLINE inline __attribute__((always_inline))

struct f32x16 { __m512 v; };
struct i32x16 { __m512i v; };
struct bytes64 { __m512i v; };
struct mask16 { __mmask16 v; };

constexpr int kTileTokens = 6;  // 6 x 4 accumulators, 4 weights and 1 activation of 32 registers
constexpr int kTilePanels = 4;
#ifdef LOOKUPFFN_VNNI
constexpr int kActivationOffset = 128, kActivationPlanes = 1;
#else
constexpr int kActivationOffset = 0, kActivationPlanes = 2;
#endif
constexpr int kIndependent = 16;  // values that fit the registers, enough to hide an instruction's latency
constexpr int kQueryTile = 4, kKeyVectors = 4;  // of attention: queries x 16 keys whose scores stay in registers

LOOKUPFFN_INLINE f32x16 zero_f32() { return {_mm512_setzero_ps()}; }
LOOKUPFFN_INLINE f32x16 set1(float a) { return {_mm512_set1_ps(a)}; }
LOOKUPFFN_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
LOOKUPFFN_INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
LOOKUPFFN_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
LOOKUPFFN_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
LOOKUPFFN_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
LOOKUPFFN_INLINE f32x16 div(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
LOOKUPFFN_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LOOKUPFFN_INLINE f32x16 abs(f32x16 a) { return {_mm512_abs_ps(a.v)}; }

LOOKUPFFN_INLINE i32x16 zero_i32() { return {_mm512_setzero_si512()}; }
LOOKUPFFN_INLINE i32x16 set1(int32_t a) { return {_mm512_set1_epi32(a)}; }
LOOKUPFFN_INLINE i32x16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
LOOKUPFFN_INLINE void store(int32_t* p, i32x16 a) { _mm512_storeu_si512(p, a.v); }
LOOKUPFFN_INLINE i32x16 add(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
LOOKUPFFN_INLINE i32x16 sub(i32x16 a, i32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
LOOKUPFFN_INLINE i32x16 bit_or(i32x16 a, i32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
LOOKUPFFN_INLINE i32x16 bit_xor(i32x16 a, i32x16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
LOOKUPFFN_INLINE i32x16 max(i32x16 a, i32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
LOOKUPFFN_INLINE int32_t reduce_max(i32x16 a) { return _mm512_reduce_max_epi32(a.v); }

LOOKUPFFN_INLINE f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
LOOKUPFFN_INLINE i32x16 round_to_int(f32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
LOOKUPFFN_INLINE i32x16 abs_bits(f32x16 a) { return {_mm512_castps_si512(_mm512_abs_ps(a.v))}; }
LOOKUPFFN_INLINE i32x16 max_abs_bits(i32x16 largest, f32x16 a) {
  return {_mm512_castps_si512(_mm512_range_ps(_mm512_castsi512_ps(largest.v), a.v, 11))};  // 11: the larger magnitude
}
LOOKUPFFN_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
LOOKUPFFN_INLINE f32x16 round(f32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
LOOKUPFFN_INLINE f32x16 scale(f32x16 a, f32x16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

LOOKUPFFN_INLINE mask16 less(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
LOOKUPFFN_INLINE mask16 less(i32x16 a, i32x16 b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
LOOKUPFFN_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
LOOKUPFFN_INLINE i32x16 select(mask16 m, i32x16 a, i32x16 b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }

LOOKUPFFN_INLINE void store_u8(uint8_t* p, i32x16 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
LOOKUPFFN_INLINE void store_16(void* p, i32x16 a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a.v)); }
LOOKUPFFN_INLINE i32x16 load_u16(const uint16_t* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))};
}

#ifdef LOOKUPFFN_VNNI
LOOKUPFFN_INLINE void store_activations(uint8_t* p, size_t, i32x16 a) {
  store_u8(p, {_mm512_add_epi32(a.v, _mm512_set1_epi32(128))});
}
LOOKUPFFN_INLINE void store_activations(uint8_t* p, size_t, const i32x16 a[4]) {
  const __m512i low = _mm512_packs_epi32(a[0].v, a[1].v), high = _mm512_packs_epi32(a[2].v, a[3].v);
  const __m512i bytes = _mm512_packs_epi16(low, high);  // of each vector four lanes in every quarter
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i offset = _mm512_xor_si512(bytes, _mm512_set1_epi8((char)0x80));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, offset));
}
#else
LOOKUPFFN_INLINE void store_activations(uint8_t* p, size_t plane, i32x16 a) {
  store_u8(p, {_mm512_abs_epi32(a.v)});
  store_u8(p + plane, {_mm512_srai_epi32(a.v, 31)});
}
LOOKUPFFN_INLINE void store_activations(uint8_t* p, size_t plane, const i32x16 a[4]) {
  for (int i = 0; i < 4; i++) store_activations(p + 16 * i, plane, a[i]);
}
#endif

LOOKUPFFN_INLINE f32x16 load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(load_u16(p).v, 16))};
}
LOOKUPFFN_INLINE void store_bf16(uint16_t* p, f32x16 a) {
  __m512i bits = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));  // to nearest, ties to even
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  even = _mm512_mask_or_epi32(even, nan, bits, _mm512_set1_epi32(0x400000));
  store_16(p, {_mm512_srli_epi32(even, 16)});
}

LOOKUPFFN_INLINE bytes64 load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
LOOKUPFFN_INLINE f32x16 low_bf16(bytes64 a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
LOOKUPFFN_INLINE f32x16 high_bf16(bytes64 a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32((int)0xffff0000)))};
}
LOOKUPFFN_INLINE i32x16 byte_of(bytes64 a, int index) {
  return {_mm512_srai_epi32(_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(24 - 8 * index)), 24)};
}
LOOKUPFFN_INLINE bytes64 high_halves(bytes64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8((char)0xf0))}; }
LOOKUPFFN_INLINE bytes64 low_halves(bytes64 a) { return high_halves({_mm512_slli_epi16(a.v, 4)}); }
LOOKUPFFN_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
LOOKUPFFN_INLINE void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

LOOKUPFFN_INLINE f32x16 dot_f32(f32x16 acc, bytes64 x, bytes64 w) {
  return {_mm512_fmadd_ps(_mm512_castsi512_ps(x.v), _mm512_castsi512_ps(w.v), acc.v)};
}
LOOKUPFFN_INLINE bytes64 broadcast_word(const void* p) {
  int word;
  __builtin_memcpy(&word, p, 4);
  return {_mm512_set1_epi32(word)};
}
#ifdef LOOKUPFFN_VNNI
// As assembly, because GCC 12 copies and spills the sums of a tile around the intrinsics: half the speed.
LOOKUPFFN_INLINE i32x16 dot2_i16(i32x16 acc, bytes64 x, bytes64 w) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(x.v), "v"(w.v));
  return acc;
}
typedef bytes64 activation4;
LOOKUPFFN_INLINE int32_t sum_of_negatives(const uint8_t*, size_t, int) { return 0; }
LOOKUPFFN_INLINE activation4 broadcast_activations(const uint8_t* p, size_t) { return broadcast_word(p); }
LOOKUPFFN_INLINE i32x16 dot4_i8(i32x16 acc, activation4 x, bytes64 w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(x.v), "v"(w.v));
  return acc;
}
LOOKUPFFN_INLINE i32x16 dot4_u7i8(i32x16 acc, bytes64 x, bytes64 w) { return {_mm512_dpbusd_epi32(acc.v, x.v, w.v)}; }
#else
LOOKUPFFN_INLINE i32x16 dot2_i16(i32x16 acc, bytes64 x, bytes64 w) {
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(x.v, w.v))};
}
LOOKUPFFN_INLINE i32x16 dot4_u7i8(i32x16 acc, bytes64 x, bytes64 w) {  // 2 * 127 * 128 < 2^15: no saturation
  __m512i pairs = _mm512_maddubs_epi16(x.v, w.v);
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
struct activation4 { bytes64 magnitude, negative; };
LOOKUPFFN_INLINE activation4 broadcast_activations(const uint8_t* p, size_t plane) {
  return {broadcast_word(p), broadcast_word(p + plane)};
}
LOOKUPFFN_INLINE i32x16 dot4_i8(i32x16 acc, activation4 x, bytes64 w) {  // as in simd/avx2.h
  return dot4_u7i8(acc, x.magnitude, {_mm512_xor_si512(w.v, x.negative.v)});
}
#include "simd/negatives_x86.h"
#endif

LOOKUPFFN_INLINE void dot4_rows(i32x16 acc[4], bytes64 r0, bytes64 r1, bytes64 r2, bytes64 r3, const uint8_t* scores) {
  bytes64 s = broadcast_word(scores);
  __m512i a = _mm512_unpacklo_epi8(r0.v, r1.v), b = _mm512_unpackhi_epi8(r0.v, r1.v);
  __m512i c = _mm512_unpacklo_epi8(r2.v, r3.v), d = _mm512_unpackhi_epi8(r2.v, r3.v);
  acc[0] = dot4_u7i8(acc[0], s, {_mm512_unpacklo_epi16(a, c)});
  acc[1] = dot4_u7i8(acc[1], s, {_mm512_unpackhi_epi16(a, c)});
  acc[2] = dot4_u7i8(acc[2], s, {_mm512_unpacklo_epi16(b, d)});
  acc[3] = dot4_u7i8(acc[3], s, {_mm512_unpackhi_epi16(b, d)});
}

LOOKUPFFN_INLINE void transpose(f32x16 r[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
    b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
    b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
    b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
  }
  for (int i = 0; i < 4; i++) {  // b[4k + i]: rows 4k to 4k+3, columns i, 4+i, 8+i, 12+i in its four quarters
    __m512 low = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), high = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
    __m512 low2 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88),
           high2 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
    r[i].v = _mm512_shuffle_f32x4(low, low2, 0x88);
    r[8 + i].v = _mm512_shuffle_f32x4(low, low2, 0xdd);
    r[4 + i].v = _mm512_shuffle_f32x4(high, high2, 0x88);
    r[12 + i].v = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
}
LOOKUPFFN_INLINE void load_transposed_8(const float* p, f32x16 r[8]) {
  __m512 a[8], b[8];
  for (int i = 0; i < 8; i++) {  // rows i and i + 8
    const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(p + 8 * i));
    a[i] = _mm512_castpd_ps(
        _mm512_insertf64x4(_mm512_castps_pd(low), _mm256_castps_pd(_mm256_loadu_ps(p + 8 * i + 64)), 1));
  }
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)  // a[4k + c]: columns c and 4 + c of rows 4k to 4k + 3, then those of rows 8 more
    for (int c = 0; c < 2; c++) {
      const __m512d even = _mm512_castps_pd(b[i + c]), odd = _mm512_castps_pd(b[i + c + 2]);
      a[i + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd));
      a[i + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
    }
  const __m512i columns = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const __m512i later = _mm512_add_epi32(columns, _mm512_set1_epi32(4));
  for (int c = 0; c < 4; c++) {
    r[c].v = _mm512_permutex2var_ps(a[c], columns, a[4 + c]);
    r[4 + c].v = _mm512_permutex2var_ps(a[c], later, a[4 + c]);
  }
}

// For measuring: the value is used and may have changed.
LOOKUPFFN_INLINE void keep(f32x16& x) { __asm__ volatile("" : "+v"(x.v)); }
LOOKUPFFN_INLINE void keep(i32x16& x) { __asm__ volatile("" : "+v"(x.v)); }
LOOKUPFFN_INLINE void keep(bytes64& x) { __asm__ volatile("" : "+v"(x.v)); }
