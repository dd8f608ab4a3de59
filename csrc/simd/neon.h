// The vector shim on AArch64 NEON: sixteen lanes as four registers; with LOOKUPFFN_DOT also Armv8.2's 8-bit dot
// products. Included inside a namespace (and a target region) of one isa_*.cpp. simd/scalar.h says what each function
// means.

#define LOOKUPFFN_INLINE inline __attribute__((always_inline))
#define LOOKUPFFN_1(f) {f(x.a), f(x.b), f(x.c), f(x.d)}
#define LOOKUPFFN_2(f) {f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)}
#define LOOKUPFFN_3(f) {f(x.a, y.a, z.a), f(x.b, y.b, z.b), f(x.c, y.c, z.c), f(x.d, y.d, z.d)}

struct f32x16 { float32x4_t a, b, c, d; };
struct i32x16 { int32x4_t a, b, c, d; };
struct bytes64 { uint8x16_t a, b, c, d; };
struct mask16 { uint32x4_t a, b, c, d; };  // all bits of a lane, or none

constexpr int kTileTokens = 4;  // 4 x 1 sums of four registers each, 4 of weights and 4 for products, of 32
constexpr int kTilePanels = 1;
constexpr int kActivationOffset = 0;  // dot4_i8 takes its 128 off first: NEON multiplies signed by signed
constexpr int kActivationPlanes = 1;
constexpr int kIndependent = 4;  // values that fit the registers, enough to hide an instruction's latency
constexpr int kQueryTile = 2, kKeyVectors = 2;  // of attention: queries x 16 keys whose scores stay in registers

LOOKUPFFN_INLINE f32x16 set1(float s) {
  const float32x4_t v = vdupq_n_f32(s);
  return {v, v, v, v};
}
LOOKUPFFN_INLINE f32x16 zero_f32() { return set1(0.0f); }
LOOKUPFFN_INLINE f32x16 load(const float* p) {
  return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
LOOKUPFFN_INLINE void store(float* p, f32x16 x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
  vst1q_f32(p + 8, x.c);
  vst1q_f32(p + 12, x.d);
}
LOOKUPFFN_INLINE f32x16 add(f32x16 x, f32x16 y) { return LOOKUPFFN_2(vaddq_f32); }
LOOKUPFFN_INLINE f32x16 sub(f32x16 x, f32x16 y) { return LOOKUPFFN_2(vsubq_f32); }
LOOKUPFFN_INLINE f32x16 mul(f32x16 x, f32x16 y) { return LOOKUPFFN_2(vmulq_f32); }
LOOKUPFFN_INLINE f32x16 div(f32x16 x, f32x16 y) { return LOOKUPFFN_2(vdivq_f32); }
LOOKUPFFN_INLINE f32x16 fma(f32x16 y, f32x16 z, f32x16 x) { return LOOKUPFFN_3(vfmaq_f32); }  // vfmaq adds to its first
LOOKUPFFN_INLINE f32x16 abs(f32x16 x) { return LOOKUPFFN_1(vabsq_f32); }

LOOKUPFFN_INLINE i32x16 set1(int32_t s) {
  const int32x4_t v = vdupq_n_s32(s);
  return {v, v, v, v};
}
LOOKUPFFN_INLINE i32x16 zero_i32() { return set1((int32_t)0); }
LOOKUPFFN_INLINE i32x16 load(const int32_t* p) {
  return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)};
}
LOOKUPFFN_INLINE void store(int32_t* p, i32x16 x) {
  vst1q_s32(p, x.a);
  vst1q_s32(p + 4, x.b);
  vst1q_s32(p + 8, x.c);
  vst1q_s32(p + 12, x.d);
}
LOOKUPFFN_INLINE i32x16 add(i32x16 x, i32x16 y) { return LOOKUPFFN_2(vaddq_s32); }
LOOKUPFFN_INLINE i32x16 sub(i32x16 x, i32x16 y) { return LOOKUPFFN_2(vsubq_s32); }
LOOKUPFFN_INLINE i32x16 bit_or(i32x16 x, i32x16 y) { return LOOKUPFFN_2(vorrq_s32); }
LOOKUPFFN_INLINE i32x16 bit_xor(i32x16 x, i32x16 y) { return LOOKUPFFN_2(veorq_s32); }
LOOKUPFFN_INLINE i32x16 max(i32x16 x, i32x16 y) { return LOOKUPFFN_2(vmaxq_s32); }
LOOKUPFFN_INLINE int32_t reduce_max(i32x16 x) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.a, x.b), vmaxq_s32(x.c, x.d)));
}

LOOKUPFFN_INLINE f32x16 to_float(i32x16 x) { return LOOKUPFFN_1(vcvtq_f32_s32); }
LOOKUPFFN_INLINE i32x16 round_to_int(f32x16 x) { return LOOKUPFFN_1(vcvtnq_s32_f32); }
LOOKUPFFN_INLINE i32x16 bits_of(f32x16 x) { return LOOKUPFFN_1(vreinterpretq_s32_f32); }
LOOKUPFFN_INLINE f32x16 float_of(i32x16 x) { return LOOKUPFFN_1(vreinterpretq_f32_s32); }
LOOKUPFFN_INLINE i32x16 abs_bits(f32x16 x) { return bits_of(abs(x)); }
LOOKUPFFN_INLINE int32x4_t left_16(int32x4_t x) { return vshlq_n_s32(x, 16); }
LOOKUPFFN_INLINE int32x4_t left_23(int32x4_t x) { return vshlq_n_s32(x, 23); }
LOOKUPFFN_INLINE i32x16 shift_16(i32x16 x) { return LOOKUPFFN_1(left_16); }
LOOKUPFFN_INLINE i32x16 shift_23(i32x16 x) { return LOOKUPFFN_1(left_23); }
LOOKUPFFN_INLINE i32x16 max_abs_bits(i32x16 largest, f32x16 x) { return max(largest, abs_bits(x)); }
LOOKUPFFN_INLINE f32x16 max(f32x16 x, f32x16 y) { return LOOKUPFFN_2(vmaxq_f32); }
LOOKUPFFN_INLINE f32x16 round(f32x16 x) { return LOOKUPFFN_1(vrndnq_f32); }
LOOKUPFFN_INLINE f32x16 scale(f32x16 a, f32x16 n) {
  return mul(a, float_of(shift_23(add(round_to_int(n), set1((int32_t)127)))));
}

LOOKUPFFN_INLINE mask16 less(f32x16 x, f32x16 y) { return LOOKUPFFN_2(vcltq_f32); }
LOOKUPFFN_INLINE mask16 less(i32x16 x, i32x16 y) { return LOOKUPFFN_2(vcltq_s32); }
LOOKUPFFN_INLINE f32x16 select(mask16 x, f32x16 y, f32x16 z) { return LOOKUPFFN_3(vbslq_f32); }
LOOKUPFFN_INLINE i32x16 select(mask16 x, i32x16 y, i32x16 z) { return LOOKUPFFN_3(vbslq_s32); }

LOOKUPFFN_INLINE uint16x8_t low_halves(int32x4_t x, int32x4_t y) {
  return vuzp1q_u16(vreinterpretq_u16_s32(x), vreinterpretq_u16_s32(y));
}
LOOKUPFFN_INLINE void store_16(void* p, i32x16 x) {
  vst1q_u16((uint16_t*)p, low_halves(x.a, x.b));
  vst1q_u16((uint16_t*)p + 8, low_halves(x.c, x.d));
}
LOOKUPFFN_INLINE void store_u8(uint8_t* p, i32x16 x) {
  vst1q_u8(p, vuzp1q_u8(vreinterpretq_u8_u16(low_halves(x.a, x.b)), vreinterpretq_u8_u16(low_halves(x.c, x.d))));
}
LOOKUPFFN_INLINE void store_activations(uint8_t* p, size_t, i32x16 x) { store_u8(p, add(x, set1((int32_t)128))); }
LOOKUPFFN_INLINE void store_activations(uint8_t* p, size_t plane, const i32x16 x[4]) {
  for (int i = 0; i < 4; i++) store_activations(p + 16 * i, plane, x[i]);
}
LOOKUPFFN_INLINE i32x16 load_u16(const uint16_t* p) {
  const uint16x8_t x = vld1q_u16(p), y = vld1q_u16(p + 8), zero = vdupq_n_u16(0);
  return {vreinterpretq_s32_u16(vzip1q_u16(x, zero)), vreinterpretq_s32_u16(vzip2q_u16(x, zero)),
          vreinterpretq_s32_u16(vzip1q_u16(y, zero)), vreinterpretq_s32_u16(vzip2q_u16(y, zero))};
}

LOOKUPFFN_INLINE f32x16 load_bf16(const uint16_t* p) { return float_of(shift_16(load_u16(p))); }
LOOKUPFFN_INLINE uint16x8_t
round_to_bf16(float32x4_t x) {  // in the high halves: to nearest, ties to even; a NaN stays one
  const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vreinterpretq_u16_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet));
}
LOOKUPFFN_INLINE void store_bf16(uint16_t* p, f32x16 x) {
  vst1q_u16(p, vuzp2q_u16(round_to_bf16(x.a), round_to_bf16(x.b)));
  vst1q_u16(p + 8, vuzp2q_u16(round_to_bf16(x.c), round_to_bf16(x.d)));
}

LOOKUPFFN_INLINE bytes64 load_bytes(const void* p) {
  const uint8_t* bytes = (const uint8_t*)p;
  return {vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)};
}
LOOKUPFFN_INLINE i32x16 as_i32(bytes64 x) { return LOOKUPFFN_1(vreinterpretq_s32_u8); }
LOOKUPFFN_INLINE f32x16 as_f32(bytes64 x) { return LOOKUPFFN_1(vreinterpretq_f32_u8); }
LOOKUPFFN_INLINE uint8x16_t left_4(uint8x16_t x) { return vshlq_n_u8(x, 4); }
LOOKUPFFN_INLINE uint8x16_t high_4(uint8x16_t x) { return vandq_u8(x, vdupq_n_u8(0xf0)); }
LOOKUPFFN_INLINE bytes64 low_halves(bytes64 x) { return LOOKUPFFN_1(left_4); }
LOOKUPFFN_INLINE bytes64 high_halves(bytes64 x) { return LOOKUPFFN_1(high_4); }
LOOKUPFFN_INLINE f32x16 low_bf16(bytes64 x) { return float_of(shift_16(as_i32(x))); }
LOOKUPFFN_INLINE f32x16 high_bf16(bytes64 words) {
  const i32x16 x = as_i32(words), y = set1((int32_t)0xffff0000);
  return float_of(LOOKUPFFN_2(vandq_s32));
}
LOOKUPFFN_INLINE int32x4_t byte_of_quarter(uint8x16_t a, int32x4_t left) {
  return vshrq_n_s32(vshlq_s32(vreinterpretq_s32_u8(a), left), 24);
}
LOOKUPFFN_INLINE i32x16 byte_of(bytes64 a, int index) {
  const int32x4_t left = vdupq_n_s32(24 - 8 * index);
  return {byte_of_quarter(a.a, left), byte_of_quarter(a.b, left), byte_of_quarter(a.c, left),
          byte_of_quarter(a.d, left)};
}
LOOKUPFFN_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
LOOKUPFFN_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

LOOKUPFFN_INLINE bytes64 broadcast_word(const void* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  const uint8x16_t v = vreinterpretq_u8_u32(vdupq_n_u32(word));
  return {v, v, v, v};
}
LOOKUPFFN_INLINE f32x16 dot_f32(f32x16 acc, bytes64 x, bytes64 w) { return fma(as_f32(x), as_f32(w), acc); }

// Two registers of words: the even and the odd int16 are multiplied apart. Taking w apart is shared by a tile's tokens.
LOOKUPFFN_INLINE void dot2_pair(int32x4_t* p, int32x4_t* q, uint8x16_t x_p, uint8x16_t x_q, uint8x16_t w_p,
                                uint8x16_t w_q) {
  const int16x8_t x0 = vreinterpretq_s16_u8(x_p), x1 = vreinterpretq_s16_u8(x_q);
  const int16x8_t w0 = vreinterpretq_s16_u8(w_p), w1 = vreinterpretq_s16_u8(w_q);
  const int16x8_t x_even = vuzp1q_s16(x0, x1), x_odd = vuzp2q_s16(x0, x1);
  const int16x8_t w_even = vuzp1q_s16(w0, w1), w_odd = vuzp2q_s16(w0, w1);
  *p = vmlal_s16(vmlal_s16(*p, vget_low_s16(x_even), vget_low_s16(w_even)), vget_low_s16(x_odd), vget_low_s16(w_odd));
  *q = vmlal_high_s16(vmlal_high_s16(*q, x_even, w_even), x_odd, w_odd);
}
LOOKUPFFN_INLINE i32x16 dot2_i16(i32x16 acc, bytes64 x, bytes64 w) {
  dot2_pair(&acc.a, &acc.b, x.a, x.b, w.a, w.b);
  dot2_pair(&acc.c, &acc.d, x.c, x.d, w.c, w.d);
  return acc;
}

LOOKUPFFN_INLINE int8x16_t as_s8(uint8x16_t x) { return vreinterpretq_s8_u8(x); }
#ifdef LOOKUPFFN_DOT
LOOKUPFFN_INLINE int32x4_t dot4(int32x4_t acc, int8x16_t x, int8x16_t w) { return vdotq_s32(acc, x, w); }
#else
LOOKUPFFN_INLINE int32x4_t dot4(int32x4_t acc, int8x16_t x, int8x16_t w) {  // |x| <= 127: two products fit 16 bits
  const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(w)), high = vmull_high_s8(x, w);
  return vpadalq_s16(acc, vpaddq_s16(low, high));
}
#endif
typedef bytes64 activation4;
LOOKUPFFN_INLINE int32_t sum_of_negatives(const uint8_t*, size_t, int) { return 0; }
LOOKUPFFN_INLINE activation4 broadcast_activations(const uint8_t* p, size_t) { return broadcast_word(p); }
LOOKUPFFN_INLINE i32x16 dot4_i8(i32x16 acc, activation4 x, bytes64 w) {
  const uint8x16_t offset = vdupq_n_u8(128);
  return {dot4(acc.a, as_s8(veorq_u8(x.a, offset)), as_s8(w.a)), dot4(acc.b, as_s8(veorq_u8(x.b, offset)), as_s8(w.b)),
          dot4(acc.c, as_s8(veorq_u8(x.c, offset)), as_s8(w.c)), dot4(acc.d, as_s8(veorq_u8(x.d, offset)), as_s8(w.d))};
}

#ifdef LOOKUPFFN_DOT
#define LOOKUPFFN_QUARTER(L)                                                                                           \
  {                                                                                                                    \
    const uint16x8_t p = vreinterpretq_u16_u8(vzip1q_u8(r0.L, r1.L)), q = vreinterpretq_u16_u8(vzip2q_u8(r0.L, r1.L)); \
    const uint16x8_t r = vreinterpretq_u16_u8(vzip1q_u8(r2.L, r3.L)), s = vreinterpretq_u16_u8(vzip2q_u8(r2.L, r3.L)); \
    acc[0].L = vdotq_s32(acc[0].L, weight, vreinterpretq_s8_u16(vzip1q_u16(p, r)));                                    \
    acc[1].L = vdotq_s32(acc[1].L, weight, vreinterpretq_s8_u16(vzip2q_u16(p, r)));                                    \
    acc[2].L = vdotq_s32(acc[2].L, weight, vreinterpretq_s8_u16(vzip1q_u16(q, s)));                                    \
    acc[3].L = vdotq_s32(acc[3].L, weight, vreinterpretq_s8_u16(vzip2q_u16(q, s)));                                    \
  }
LOOKUPFFN_INLINE void dot4_rows(i32x16 acc[4], bytes64 r0, bytes64 r1, bytes64 r2, bytes64 r3, const uint8_t* scores) {
  const int8x16_t weight = as_s8(broadcast_word(scores).a);
#else
// Without the dot product whole rows are multiplied, with no interleaving: two of them, 2 * 127 * 128, fit 16 bits.
#define LOOKUPFFN_QUARTER(L)                                                                              \
  {                                                                                                       \
    const int8x16_t p = as_s8(r0.L), q = as_s8(r1.L), r = as_s8(r2.L), s = as_s8(r3.L);                   \
    const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(p), s0), vget_low_s8(q), s1);                     \
    const int16x8_t low2 = vmlal_s8(vmull_s8(vget_low_s8(r), s2), vget_low_s8(s), s3);                    \
    const int16x8_t high = vmlal_high_s8(vmull_high_s8(p, vcombine_s8(s0, s0)), q, vcombine_s8(s1, s1));  \
    const int16x8_t high2 = vmlal_high_s8(vmull_high_s8(r, vcombine_s8(s2, s2)), s, vcombine_s8(s3, s3)); \
    acc[0].L = vaddq_s32(acc[0].L, vaddl_s16(vget_low_s16(low), vget_low_s16(low2)));                     \
    acc[1].L = vaddq_s32(acc[1].L, vaddl_high_s16(low, low2));                                            \
    acc[2].L = vaddq_s32(acc[2].L, vaddl_s16(vget_low_s16(high), vget_low_s16(high2)));                   \
    acc[3].L = vaddq_s32(acc[3].L, vaddl_high_s16(high, high2));                                          \
  }
LOOKUPFFN_INLINE void dot4_rows(i32x16 acc[4], bytes64 r0, bytes64 r1, bytes64 r2, bytes64 r3, const uint8_t* scores) {
  const int8x8_t s0 = vdup_n_s8((int8_t)scores[0]), s1 = vdup_n_s8((int8_t)scores[1]);
  const int8x8_t s2 = vdup_n_s8((int8_t)scores[2]), s3 = vdup_n_s8((int8_t)scores[3]);
#endif
  LOOKUPFFN_QUARTER(a)
  LOOKUPFFN_QUARTER(b)
  LOOKUPFFN_QUARTER(c)
  LOOKUPFFN_QUARTER(d)
}
#undef LOOKUPFFN_QUARTER

LOOKUPFFN_INLINE void transpose_4x4(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
  const float64x2_t p = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), q = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
  const float64x2_t r = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), s = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
  a = vreinterpretq_f32_f64(vtrn1q_f64(p, r));
  b = vreinterpretq_f32_f64(vtrn1q_f64(q, s));
  c = vreinterpretq_f32_f64(vtrn2q_f64(p, r));
  d = vreinterpretq_f32_f64(vtrn2q_f64(q, s));
}
#define LOOKUPFFN_QUARTERS(p, i, q, j) /* quarter p of rows 4 i to 4 i + 3, and its mirror image */ \
  transpose_4x4(r[4 * i].p, r[4 * i + 1].p, r[4 * i + 2].p, r[4 * i + 3].p);                        \
  if (i != j) {                                                                                     \
    transpose_4x4(r[4 * j].q, r[4 * j + 1].q, r[4 * j + 2].q, r[4 * j + 3].q);                      \
    for (int k = 0; k < 4; k++) {                                                                   \
      const float32x4_t other = r[4 * i + k].p;                                                     \
      r[4 * i + k].p = r[4 * j + k].q;                                                              \
      r[4 * j + k].q = other;                                                                       \
    }                                                                                               \
  }
LOOKUPFFN_INLINE void transpose(f32x16 r[16]){
    LOOKUPFFN_QUARTERS(a, 0, a, 0) LOOKUPFFN_QUARTERS(b, 0, a, 1) LOOKUPFFN_QUARTERS(c, 0, a, 2)
        LOOKUPFFN_QUARTERS(d, 0, a, 3) LOOKUPFFN_QUARTERS(b, 1, b, 1) LOOKUPFFN_QUARTERS(c, 1, b, 2)
            LOOKUPFFN_QUARTERS(d, 1, b, 3) LOOKUPFFN_QUARTERS(c, 2, c, 2) LOOKUPFFN_QUARTERS(d, 2, c, 3)
                LOOKUPFFN_QUARTERS(d, 3, d, 3)}
#undef LOOKUPFFN_QUARTERS
#define LOOKUPFFN_FOUR_ROWS(i, quarter)                                                \
  for (int j = 0; j < 8; j += 4) {                                                     \
    for (int k = 0; k < 4; k++) r[j + k].quarter = vld1q_f32(p + 32 * i + 8 * k + j);  \
    transpose_4x4(r[j].quarter, r[j + 1].quarter, r[j + 2].quarter, r[j + 3].quarter); \
  }
LOOKUPFFN_INLINE void load_transposed_8(const float* p, f32x16 r[8]){
    LOOKUPFFN_FOUR_ROWS(0, a) LOOKUPFFN_FOUR_ROWS(1, b) LOOKUPFFN_FOUR_ROWS(2, c) LOOKUPFFN_FOUR_ROWS(3, d)}
#undef LOOKUPFFN_FOUR_ROWS
#undef LOOKUPFFN_1
#undef LOOKUPFFN_2
#undef LOOKUPFFN_3

// For measuring: the value is used and may have changed.
LOOKUPFFN_INLINE void keep(f32x16& x) {
  __asm__ volatile("" : "+w"(x.a), "+w"(x.b), "+w"(x.c), "+w"(x.d));
}
LOOKUPFFN_INLINE void keep(i32x16& x) { __asm__ volatile("" : "+w"(x.a), "+w"(x.b), "+w"(x.c), "+w"(x.d)); }
LOOKUPFFN_INLINE void keep(bytes64& x) { __asm__ volatile("" : "+w"(x.a), "+w"(x.b), "+w"(x.c), "+w"(x.d)); }
