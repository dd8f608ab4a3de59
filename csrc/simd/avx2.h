// The vector shim on AVX2 and FMA: sixteen lanes as two registers; with LOOKUPFFN_VNNI also AVX-VNNI's dot products.
// Included inside a target region and a namespace of one isa_*.cpp. simd/scalar.h says what each function means.

#define LOOKUPFFN_INLINE inline __attribute__((always_inline))

struct f32x16 { __m256 a, b; };
struct i32x16 { __m256i a, b; };
struct bytes64 { __m256i a, b; };
struct mask16 { __m256i a, b; };  // all bits of a lane, or none

#ifdef LOOKUPFFN_VNNI
constexpr int kTileTokens = 4, kTilePanels = 1;  // sums of two registers each, 2 of weights and 2 of activations, of 16
constexpr int kActivationOffset = 128, kActivationPlanes = 1;
#else
constexpr int kTileTokens = 2, kTilePanels = 2;  // 8 registers of sums, 4 of weights, 2 of activations, of 16
constexpr int kActivationOffset = 0, kActivationPlanes = 2;
#endif
constexpr int kIndependent = 5;  // values that fit the registers, enough to hide an instruction's latency
constexpr int kQueryTile = 2, kKeyVectors = 2;  // of attention: queries x 16 keys whose scores stay in registers

LOOKUPFFN_INLINE f32x16 zero_f32() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
LOOKUPFFN_INLINE f32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LOOKUPFFN_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LOOKUPFFN_INLINE void store(float* p, f32x16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
LOOKUPFFN_INLINE f32x16 add(f32x16 x, f32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
LOOKUPFFN_INLINE f32x16 sub(f32x16 x, f32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
LOOKUPFFN_INLINE f32x16 mul(f32x16 x, f32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
LOOKUPFFN_INLINE f32x16 div(f32x16 x, f32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
LOOKUPFFN_INLINE f32x16 fma(f32x16 x, f32x16 y, f32x16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
LOOKUPFFN_INLINE f32x16 abs(f32x16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}

LOOKUPFFN_INLINE i32x16 zero_i32() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
LOOKUPFFN_INLINE i32x16 set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
LOOKUPFFN_INLINE i32x16 load(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
LOOKUPFFN_INLINE void store(int32_t* p, i32x16 x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)(p + 8), x.b);
}
LOOKUPFFN_INLINE i32x16 add(i32x16 x, i32x16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
LOOKUPFFN_INLINE i32x16 sub(i32x16 x, i32x16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
LOOKUPFFN_INLINE i32x16 bit_or(i32x16 x, i32x16 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
LOOKUPFFN_INLINE i32x16 bit_xor(i32x16 x, i32x16 y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
LOOKUPFFN_INLINE i32x16 max(i32x16 x, i32x16 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
LOOKUPFFN_INLINE int32_t reduce_max(i32x16 x) {
  const __m256i m = _mm256_max_epi32(x.a, x.b);
  __m128i n = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  n = _mm_max_epi32(n, _mm_shuffle_epi32(n, 0x4e));
  n = _mm_max_epi32(n, _mm_shuffle_epi32(n, 0xb1));
  return _mm_cvtsi128_si32(n);
}

LOOKUPFFN_INLINE f32x16 to_float(i32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
LOOKUPFFN_INLINE i32x16 round_to_int(f32x16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
LOOKUPFFN_INLINE i32x16 abs_bits(f32x16 x) {
  const f32x16 m = abs(x);
  return {_mm256_castps_si256(m.a), _mm256_castps_si256(m.b)};
}
LOOKUPFFN_INLINE i32x16 max_abs_bits(i32x16 largest, f32x16 x) { return max(largest, abs_bits(x)); }
LOOKUPFFN_INLINE f32x16 max(f32x16 x, f32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
LOOKUPFFN_INLINE __m256 round_half(__m256 x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
LOOKUPFFN_INLINE f32x16 round(f32x16 x) { return {round_half(x.a), round_half(x.b)}; }
LOOKUPFFN_INLINE __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
LOOKUPFFN_INLINE f32x16 scale(f32x16 x, f32x16 n) { return mul(x, {power_of_two(n.a), power_of_two(n.b)}); }

LOOKUPFFN_INLINE mask16 less(f32x16 x, f32x16 y) {
  return {_mm256_castps_si256(_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_castps_si256(_mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
LOOKUPFFN_INLINE mask16 less(i32x16 x, i32x16 y) {
  return {_mm256_cmpgt_epi32(y.a, x.a), _mm256_cmpgt_epi32(y.b, x.b)};
}
LOOKUPFFN_INLINE i32x16 select(mask16 m, i32x16 x, i32x16 y) {
  return {_mm256_blendv_epi8(y.a, x.a, m.a), _mm256_blendv_epi8(y.b, x.b, m.b)};
}
LOOKUPFFN_INLINE f32x16 select(mask16 m, f32x16 x, f32x16 y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(m.a)), _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(m.b))};
}

// The low 16 bits of each lane, in order.
LOOKUPFFN_INLINE __m256i narrow_16(i32x16 x) {
  const __m256i low = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
LOOKUPFFN_INLINE void store_16(void* p, i32x16 x) { _mm256_storeu_si256((__m256i*)p, narrow_16(x)); }
LOOKUPFFN_INLINE void store_u8(uint8_t* p, i32x16 x) {
  const __m256i words = _mm256_and_si256(narrow_16(x), _mm256_set1_epi16(0xff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
LOOKUPFFN_INLINE i32x16 load_u16(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)))};
}

LOOKUPFFN_INLINE __m256i narrow_i8(i32x16 x, i32x16 y) {
  const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(x.a, x.b), _mm256_packs_epi32(y.a, y.b));
  return _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
#ifdef LOOKUPFFN_VNNI
LOOKUPFFN_INLINE void store_activations(uint8_t* p, size_t, i32x16 a) { store_u8(p, add(a, set1((int32_t)128))); }
LOOKUPFFN_INLINE void store_activations(uint8_t* p, size_t, const i32x16 a[4]) {
  for (int i = 0; i < 4; i += 2) {
    const __m256i offset = _mm256_xor_si256(narrow_i8(a[i], a[i + 1]), _mm256_set1_epi8((char)0x80));
    _mm256_storeu_si256((__m256i*)(p + 16 * i), offset);
  }
}
#else
LOOKUPFFN_INLINE void store_activations(uint8_t* p, size_t plane, i32x16 a) {
  const __m128i q = _mm256_castsi256_si128(narrow_i8(a, a));
  _mm_storeu_si128((__m128i*)p, _mm_abs_epi8(q));
  _mm_storeu_si128((__m128i*)(p + plane), _mm_cmpgt_epi8(_mm_setzero_si128(), q));
}
LOOKUPFFN_INLINE void store_activations(uint8_t* p, size_t plane, const i32x16 a[4]) {
  for (int i = 0; i < 4; i += 2) {
    const __m256i q = narrow_i8(a[i], a[i + 1]);
    _mm256_storeu_si256((__m256i*)(p + 16 * i), _mm256_abs_epi8(q));
    _mm256_storeu_si256((__m256i*)(p + plane + 16 * i), _mm256_cmpgt_epi8(_mm256_setzero_si256(), q));
  }
}
#endif

LOOKUPFFN_INLINE f32x16 load_bf16(const uint16_t* p) {
  const i32x16 x = load_u16(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
LOOKUPFFN_INLINE __m256i round_to_bf16(__m256 x) {  // to nearest, ties to even; a NaN stays one
  const __m256i bits = _mm256_castps_si256(x),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
LOOKUPFFN_INLINE void store_bf16(uint16_t* p, f32x16 x) { store_16(p, {round_to_bf16(x.a), round_to_bf16(x.b)}); }

LOOKUPFFN_INLINE bytes64 load_bytes(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
LOOKUPFFN_INLINE f32x16 low_bf16(bytes64 x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
LOOKUPFFN_INLINE f32x16 high_bf16(bytes64 x) {
  const __m256i high = _mm256_set1_epi32((int)0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, high)), _mm256_castsi256_ps(_mm256_and_si256(x.b, high))};
}
LOOKUPFFN_INLINE i32x16 byte_of(bytes64 a, int index) {
  const __m128i left = _mm_cvtsi32_si128(24 - 8 * index);
  return {_mm256_srai_epi32(_mm256_sll_epi32(a.a, left), 24), _mm256_srai_epi32(_mm256_sll_epi32(a.b, left), 24)};
}
LOOKUPFFN_INLINE bytes64 high_halves(bytes64 a) {
  const __m256i high = _mm256_set1_epi8((char)0xf0);
  return {_mm256_and_si256(a.a, high), _mm256_and_si256(a.b, high)};
}
LOOKUPFFN_INLINE bytes64 low_halves(bytes64 a) {
  return high_halves({_mm256_slli_epi16(a.a, 4), _mm256_slli_epi16(a.b, 4)});
}
LOOKUPFFN_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
LOOKUPFFN_INLINE void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

LOOKUPFFN_INLINE bytes64 broadcast_word(const void* p) {
  int word;
  __builtin_memcpy(&word, p, 4);
  const __m256i x = _mm256_set1_epi32(word);
  return {x, x};
}
LOOKUPFFN_INLINE f32x16 dot_f32(f32x16 acc, bytes64 x, bytes64 w) {
  return {_mm256_fmadd_ps(_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(w.a), acc.a),
          _mm256_fmadd_ps(_mm256_castsi256_ps(x.b), _mm256_castsi256_ps(w.b), acc.b)};
}
#ifdef LOOKUPFFN_VNNI
LOOKUPFFN_INLINE i32x16 dot2_i16(i32x16 acc, bytes64 x, bytes64 w) {
  return {_mm256_dpwssd_avx_epi32(acc.a, x.a, w.a), _mm256_dpwssd_avx_epi32(acc.b, x.b, w.b)};
}
typedef bytes64 activation4;
LOOKUPFFN_INLINE int32_t sum_of_negatives(const uint8_t*, size_t, int) { return 0; }
LOOKUPFFN_INLINE activation4 broadcast_activations(const uint8_t* p, size_t) { return broadcast_word(p); }
LOOKUPFFN_INLINE i32x16 dot4_i8(i32x16 acc, activation4 x, bytes64 w) {
  return {_mm256_dpbusd_avx_epi32(acc.a, x.a, w.a), _mm256_dpbusd_avx_epi32(acc.b, x.b, w.b)};
}
LOOKUPFFN_INLINE __m256i dot4_u7i8(__m256i acc, __m256i x, __m256i w) { return _mm256_dpbusd_avx_epi32(acc, x, w); }
#else
LOOKUPFFN_INLINE i32x16 dot2_i16(i32x16 acc, bytes64 x, bytes64 w) {
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(x.a, w.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(x.b, w.b))};
}
LOOKUPFFN_INLINE __m256i dot4_u7i8(__m256i acc, __m256i x, __m256i w) {  // 2 * 127 * 128 < 2^15: no saturation
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
}
// Without VNNI signed products go through vpmaddubsw, whose left side is unsigned: |q| (w ^ mask), the mask all ones
// where q < 0. There ~w = -w - 1, so that |q| is missing: sums start with the |q| of the negative ones. vpsignb would
// not need that, but takes the multipliers' ports: a fifth slower.
struct activation4 { __m256i magnitude, negative; };
LOOKUPFFN_INLINE activation4 broadcast_activations(const uint8_t* p, size_t plane) {
  return {broadcast_word(p).a, broadcast_word(p + plane).a};
}
LOOKUPFFN_INLINE __m256i add_products(__m256i acc, activation4 x, __m256i w) {
  const __m256i pairs = _mm256_maddubs_epi16(x.magnitude, _mm256_xor_si256(w, x.negative));
  const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(fours));  // as an intrinsic GCC 12 copies and spills the sums of a tile
  return acc;
}
LOOKUPFFN_INLINE i32x16 dot4_i8(i32x16 acc, activation4 x, bytes64 w) {
  return {add_products(acc.a, x, w.a), add_products(acc.b, x, w.b)};
}
#include "simd/negatives_x86.h"
#endif

#define LOOKUPFFN_HALF(half)                                                                              \
  {                                                                                                       \
    const __m256i p = _mm256_unpacklo_epi8(r0.half, r1.half), q = _mm256_unpackhi_epi8(r0.half, r1.half); \
    const __m256i r = _mm256_unpacklo_epi8(r2.half, r3.half), s = _mm256_unpackhi_epi8(r2.half, r3.half); \
    acc[0].half = dot4_u7i8(acc[0].half, w.half, _mm256_unpacklo_epi16(p, r));                            \
    acc[1].half = dot4_u7i8(acc[1].half, w.half, _mm256_unpackhi_epi16(p, r));                            \
    acc[2].half = dot4_u7i8(acc[2].half, w.half, _mm256_unpacklo_epi16(q, s));                            \
    acc[3].half = dot4_u7i8(acc[3].half, w.half, _mm256_unpackhi_epi16(q, s));                            \
  }
LOOKUPFFN_INLINE void dot4_rows(i32x16 acc[4], bytes64 r0, bytes64 r1, bytes64 r2, bytes64 r3, const uint8_t* scores) {
  const bytes64 w = broadcast_word(scores);
  LOOKUPFFN_HALF(a)
  LOOKUPFFN_HALF(b)
}
#undef LOOKUPFFN_HALF

LOOKUPFFN_INLINE void transpose_8x8(__m256 r[8]) {
  __m256 s[8], t[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    t[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    t[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    t[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    t[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}
LOOKUPFFN_INLINE void transpose(f32x16 r[16]) {
  __m256 q[8];
  for (int half = 0; half < 2; half++) {  // diagonal quarters in place, the other two change places
    for (int i = 0; i < 8; i++) q[i] = half ? r[8 + i].b : r[i].a;
    transpose_8x8(q);
    for (int i = 0; i < 8; i++) (half ? r[8 + i].b : r[i].a) = q[i];
  }
  __m256 p[8];
  for (int i = 0; i < 8; i++) {
    q[i] = r[i].b;
    p[i] = r[8 + i].a;
  }
  transpose_8x8(q);
  transpose_8x8(p);
  for (int i = 0; i < 8; i++) {
    r[i].b = p[i];
    r[8 + i].a = q[i];
  }
}
LOOKUPFFN_INLINE void load_transposed_8(const float* p, f32x16 r[8]) {
  for (int half = 0; half < 2; half++) {
    __m256 q[8];
    for (int i = 0; i < 8; i++) q[i] = _mm256_loadu_ps(p + 64 * half + 8 * i);
    transpose_8x8(q);
    for (int i = 0; i < 8; i++) (half ? r[i].b : r[i].a) = q[i];
  }
}

// For measuring: the value is used and may have changed.
LOOKUPFFN_INLINE void keep(f32x16& x) { __asm__ volatile("" : "+x"(x.a), "+x"(x.b)); }
LOOKUPFFN_INLINE void keep(i32x16& x) { __asm__ volatile("" : "+x"(x.a), "+x"(x.b)); }
LOOKUPFFN_INLINE void keep(bytes64& x) { __asm__ volatile("" : "+x"(x.a), "+x"(x.b)); }
