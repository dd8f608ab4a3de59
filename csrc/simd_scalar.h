// The vector shim in plain C++, sixteen lanes as an array: the definition that the other shims are compared with.
// Compilers turn these loops into what the baseline of the target has (SSE2, for instance).
//
// A panel of packed weights is 16 outputs wide and a slice of packed tables 4 x 16 outputs, so 16 lanes is the width of
// every shim, whatever the registers are.

#define LOOKUPFFN_INLINE inline __attribute__((always_inline))
#define LOOKUPFFN_LANES for (int i = 0; i < 16; i++)

struct f32x16 { float v[16]; };
struct i32x16 { int32_t v[16]; };
struct bytes64 { uint8_t v[64]; };
struct mask16 { bool v[16]; };

constexpr int kTileTokens = 2;  // tokens and panels of 16 outputs that are multiplied at once: their sums stay in registers
constexpr int kTilePanels = 1;
constexpr int kActivationOffset = 128;  // dot4_u8i8 takes activations as q + 128; this much of it is left in its result

LOOKUPFFN_INLINE f32x16 set1(float a) { f32x16 r; LOOKUPFFN_LANES r.v[i] = a; return r; }
LOOKUPFFN_INLINE f32x16 zero_f32() { return set1(0.0f); }
LOOKUPFFN_INLINE f32x16 load(const float* p) { f32x16 r; __builtin_memcpy(r.v, p, 64); return r; }
LOOKUPFFN_INLINE void store(float* p, f32x16 a) { __builtin_memcpy(p, a.v, 64); }
LOOKUPFFN_INLINE f32x16 add(f32x16 a, f32x16 b) { LOOKUPFFN_LANES a.v[i] += b.v[i]; return a; }
LOOKUPFFN_INLINE f32x16 sub(f32x16 a, f32x16 b) { LOOKUPFFN_LANES a.v[i] -= b.v[i]; return a; }
LOOKUPFFN_INLINE f32x16 mul(f32x16 a, f32x16 b) { LOOKUPFFN_LANES a.v[i] *= b.v[i]; return a; }
LOOKUPFFN_INLINE f32x16 div(f32x16 a, f32x16 b) { LOOKUPFFN_LANES a.v[i] /= b.v[i]; return a; }
// a * b + c; may round once or twice, so it is used in float32 weights and tables only, never in the integer path
LOOKUPFFN_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { LOOKUPFFN_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
LOOKUPFFN_INLINE f32x16 abs(f32x16 a) { LOOKUPFFN_LANES a.v[i] = __builtin_fabsf(a.v[i]); return a; }

LOOKUPFFN_INLINE i32x16 set1(int32_t a) { i32x16 r; LOOKUPFFN_LANES r.v[i] = a; return r; }
LOOKUPFFN_INLINE i32x16 zero_i32() { return set1((int32_t)0); }
LOOKUPFFN_INLINE i32x16 load(const int32_t* p) { i32x16 r; __builtin_memcpy(r.v, p, 64); return r; }
LOOKUPFFN_INLINE void store(int32_t* p, i32x16 a) { __builtin_memcpy(p, a.v, 64); }
LOOKUPFFN_INLINE i32x16 add(i32x16 a, i32x16 b) { LOOKUPFFN_LANES a.v[i] = (int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i]); return a; }
LOOKUPFFN_INLINE i32x16 sub(i32x16 a, i32x16 b) { LOOKUPFFN_LANES a.v[i] = (int32_t)((uint32_t)a.v[i] - (uint32_t)b.v[i]); return a; }
LOOKUPFFN_INLINE i32x16 bit_or(i32x16 a, i32x16 b) { LOOKUPFFN_LANES a.v[i] |= b.v[i]; return a; }
LOOKUPFFN_INLINE i32x16 bit_xor(i32x16 a, i32x16 b) { LOOKUPFFN_LANES a.v[i] ^= b.v[i]; return a; }
LOOKUPFFN_INLINE i32x16 max(i32x16 a, i32x16 b) { LOOKUPFFN_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
LOOKUPFFN_INLINE int32_t reduce_max(i32x16 a) {
  int32_t m = a.v[0];
  LOOKUPFFN_LANES m = a.v[i] > m ? a.v[i] : m;
  return m;
}

LOOKUPFFN_INLINE f32x16 to_float(i32x16 a) { f32x16 r; LOOKUPFFN_LANES r.v[i] = (float)a.v[i]; return r; }
// To the nearest integer, ties to even; |a| < 2^22, and any integer for a NaN.
LOOKUPFFN_INLINE i32x16 round_to_int(f32x16 a) {
  i32x16 r;
  LOOKUPFFN_LANES {
    float shifted = a.v[i] + 12582912.0f;  // 1.5 * 2^23: the last bit of the sum is worth 1
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    r.v[i] = bits - 0x4b400000;
  }
  return r;
}
// The bits of |a|: as integers they are ordered as the floats are, with infinity and then NaN above all.
LOOKUPFFN_INLINE i32x16 abs_bits(f32x16 a) { i32x16 r; __builtin_memcpy(r.v, a.v, 64); LOOKUPFFN_LANES r.v[i] &= 0x7fffffff; return r; }
// 2^n for -126 <= n <= 127.
LOOKUPFFN_INLINE f32x16 power_of_two(i32x16 n) {
  f32x16 r;
  LOOKUPFFN_LANES n.v[i] = (int32_t)((uint32_t)(n.v[i] + 127) << 23);
  __builtin_memcpy(r.v, n.v, 64);
  return r;
}

LOOKUPFFN_INLINE mask16 less(f32x16 a, f32x16 b) { mask16 m; LOOKUPFFN_LANES m.v[i] = a.v[i] < b.v[i]; return m; }
LOOKUPFFN_INLINE mask16 less(i32x16 a, i32x16 b) { mask16 m; LOOKUPFFN_LANES m.v[i] = a.v[i] < b.v[i]; return m; }
LOOKUPFFN_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) { LOOKUPFFN_LANES b.v[i] = m.v[i] ? a.v[i] : b.v[i]; return b; }
LOOKUPFFN_INLINE i32x16 select(mask16 m, i32x16 a, i32x16 b) { LOOKUPFFN_LANES b.v[i] = m.v[i] ? a.v[i] : b.v[i]; return b; }

// The low 8 or 16 bits of each lane.
LOOKUPFFN_INLINE void store_u8(uint8_t* p, i32x16 a) { LOOKUPFFN_LANES p[i] = (uint8_t)a.v[i]; }
LOOKUPFFN_INLINE void store_16(void* p, i32x16 a) { uint16_t r[16]; LOOKUPFFN_LANES r[i] = (uint16_t)a.v[i]; __builtin_memcpy(p, r, 32); }
LOOKUPFFN_INLINE i32x16 load_u16(const uint16_t* p) { i32x16 r; LOOKUPFFN_LANES r.v[i] = p[i]; return r; }

LOOKUPFFN_INLINE f32x16 load_bf16(const uint16_t* p) {
  f32x16 r;
  uint32_t bits[16];
  LOOKUPFFN_LANES bits[i] = (uint32_t)p[i] << 16;
  __builtin_memcpy(r.v, bits, 64);
  return r;
}
LOOKUPFFN_INLINE void store_bf16(uint16_t* p, f32x16 a) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits[16];
  __builtin_memcpy(bits, a.v, 64);
  LOOKUPFFN_LANES {
    uint32_t rounded = bits[i] + 0x7fff + (bits[i] >> 16 & 1);
    p[i] = (uint16_t)((a.v[i] != a.v[i] ? bits[i] | 0x400000 : rounded) >> 16);
  }
}

LOOKUPFFN_INLINE bytes64 load_bytes(const void* p) { bytes64 r; __builtin_memcpy(r.v, p, 64); return r; }
// 32 bf16 numbers as 16 even and 16 odd ones.
LOOKUPFFN_INLINE f32x16 low_bf16(bytes64 a) { f32x16 r; uint32_t b[16]; __builtin_memcpy(b, a.v, 64); LOOKUPFFN_LANES b[i] <<= 16; __builtin_memcpy(r.v, b, 64); return r; }
LOOKUPFFN_INLINE f32x16 high_bf16(bytes64 a) { f32x16 r; uint32_t b[16]; __builtin_memcpy(b, a.v, 64); LOOKUPFFN_LANES b[i] &= 0xffff0000u; __builtin_memcpy(r.v, b, 64); return r; }
LOOKUPFFN_INLINE void prefetch(const void*) {}

// acc[i] += <word i of x, word i of w>, a word being one float, two int16 or four bytes.
LOOKUPFFN_INLINE bytes64 broadcast_word(const void* p) { bytes64 r; LOOKUPFFN_LANES __builtin_memcpy(r.v + 4 * i, p, 4); return r; }
LOOKUPFFN_INLINE f32x16 dot_f32(f32x16 acc, bytes64 x, bytes64 w) {
  f32x16 a, b;
  __builtin_memcpy(a.v, x.v, 64);
  __builtin_memcpy(b.v, w.v, 64);
  return fma(a, b, acc);
}
LOOKUPFFN_INLINE i32x16 dot2_i16(i32x16 acc, bytes64 x, bytes64 w) {
  int16_t a[32], b[32];
  __builtin_memcpy(a, x.v, 64);
  __builtin_memcpy(b, w.v, 64);
  LOOKUPFFN_LANES acc.v[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return acc;
}
LOOKUPFFN_INLINE i32x16 dot4_u8i8(i32x16 acc, bytes64 x, bytes64 w) {
  LOOKUPFFN_LANES for (int j = 4 * i; j < 4 * i + 4; j++) acc.v[i] += (int32_t)x.v[j] * (int8_t)w.v[j];
  return acc;
}

// acc[0..3] += sum_k scores[k] * r_k for four slices of 64 int8, scores 0 to 127. Byte 16 L + 4 i + d of a slice is
// output 16 i + 4 L + d: the order in which interleaving within 128-bit lanes delivers them.
LOOKUPFFN_INLINE void dot4_rows(i32x16 acc[4], bytes64 r0, bytes64 r1, bytes64 r2, bytes64 r3, const uint8_t* scores) {
  for (int j = 0; j < 4; j++)
    for (int L = 0; L < 4; L++)
      for (int d = 0; d < 4; d++) {
        int p = 16 * L + 4 * j + d;
        acc[j].v[4 * L + d] += scores[0] * (int8_t)r0.v[p] + scores[1] * (int8_t)r1.v[p] + scores[2] * (int8_t)r2.v[p] +
                               scores[3] * (int8_t)r3.v[p];
      }
}

LOOKUPFFN_INLINE void transpose(f32x16 r[16]) {  // 16 x 16
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < i; j++) {
      float t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}
