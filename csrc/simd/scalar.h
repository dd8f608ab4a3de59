// The vector shim in portable C++, by the compilers' vector extension: the definition that the other shims are compared
// with. Compilers turn it into what the baseline of the target has (SSE2, for instance).
//
// A panel of packed weights is 16 outputs wide and a slice of packed tables 4 x 16 outputs, so 16 lanes is the width of
// every shim, whatever the registers are.

#define LOOKUPFFN_INLINE inline __attribute__((always_inline))
#define LOOKUPFFN_VECTOR(type, name, lanes) typedef type name __attribute__((vector_size(sizeof(type) * lanes)))

LOOKUPFFN_VECTOR(float, Floats, 16);
LOOKUPFFN_VECTOR(int32_t, Ints, 16);
LOOKUPFFN_VECTOR(uint32_t, Words, 16);
LOOKUPFFN_VECTOR(int16_t, Shorts, 32);
LOOKUPFFN_VECTOR(uint16_t, Halves, 16);
LOOKUPFFN_VECTOR(uint8_t, Bytes, 16);
LOOKUPFFN_VECTOR(int8_t, WideBytes, 64);
LOOKUPFFN_VECTOR(int16_t, WideShorts, 64);
LOOKUPFFN_VECTOR(uint16_t, WideHalves, 64);
LOOKUPFFN_VECTOR(int32_t, WideInts, 64);

struct f32x16 { Floats v; };
struct i32x16 { Ints v; };
struct bytes64 { Words v; };
struct mask16 { Ints v; };  // -1 where true

// Tokens and panels of 16 outputs that are multiplied at once: their sums stay in registers.
constexpr int kTileTokens = 2, kTilePanels = 1;
constexpr int kActivationOffset = 128;  // this much of it is left in the result of dot4_i8, which takes q + 128
constexpr int kActivationPlanes =
    1;                           // bytes of an activation of int8: q + 128, or |q| and, one plane on, the mask of q < 0
constexpr int kIndependent = 4;  // values that fit the registers, enough to hide an instruction's latency
constexpr int kQueryTile = 1, kKeyVectors = 1;  // of attention: queries x 16 keys whose scores stay in registers

// From and to any address.
template <typename V>
LOOKUPFFN_INLINE V read(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V>
LOOKUPFFN_INLINE void write(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

LOOKUPFFN_INLINE f32x16 set1(float a) { return {a - Floats{}}; }  // a - 0: of a + 0, -0 would come back as 0
LOOKUPFFN_INLINE f32x16 zero_f32() { return {Floats{}}; }
LOOKUPFFN_INLINE f32x16 load(const float* p) { return {read<Floats>(p)}; }
LOOKUPFFN_INLINE void store(float* p, f32x16 a) { write(p, a.v); }
LOOKUPFFN_INLINE f32x16 add(f32x16 a, f32x16 b) { return {a.v + b.v}; }
LOOKUPFFN_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {a.v - b.v}; }
LOOKUPFFN_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {a.v * b.v}; }
LOOKUPFFN_INLINE f32x16 div(f32x16 a, f32x16 b) { return {a.v / b.v}; }
// a * b + c; may round once or twice, so it is used in float32 weights and tables only, never in the integer path
LOOKUPFFN_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {c.v + a.v * b.v}; }
LOOKUPFFN_INLINE f32x16 abs(f32x16 a) { return {(Floats)((Ints)a.v & 0x7fffffff)}; }

LOOKUPFFN_INLINE i32x16 set1(int32_t a) { return {a + Ints{}}; }
LOOKUPFFN_INLINE i32x16 zero_i32() { return {Ints{}}; }
LOOKUPFFN_INLINE i32x16 load(const int32_t* p) { return {read<Ints>(p)}; }
LOOKUPFFN_INLINE void store(int32_t* p, i32x16 a) { write(p, a.v); }
LOOKUPFFN_INLINE i32x16 add(i32x16 a, i32x16 b) { return {(Ints)((Words)a.v + (Words)b.v)}; }
LOOKUPFFN_INLINE i32x16 sub(i32x16 a, i32x16 b) { return {(Ints)((Words)a.v - (Words)b.v)}; }
LOOKUPFFN_INLINE i32x16 bit_or(i32x16 a, i32x16 b) { return {a.v | b.v}; }
LOOKUPFFN_INLINE i32x16 bit_xor(i32x16 a, i32x16 b) { return {a.v ^ b.v}; }
LOOKUPFFN_INLINE i32x16 max(i32x16 a, i32x16 b) { return {a.v > b.v ? a.v : b.v}; }
LOOKUPFFN_INLINE int32_t reduce_max(i32x16 a) {
  int32_t m = a.v[0];
  for (int i = 1; i < 16; i++) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

LOOKUPFFN_INLINE f32x16 to_float(i32x16 a) { return {__builtin_convertvector(a.v, Floats)}; }
// To the nearest integer, ties to even; |a| < 2^22, and any integer for a NaN.
LOOKUPFFN_INLINE i32x16 round_to_int(f32x16 a) {
  return {(Ints)(a.v + 12582912.0f) - 0x4b400000};  // 1.5 * 2^23: the last bit of the sum is worth 1
}
// The bits of |a|: as integers they are ordered as the floats are, with infinity and then NaN above all.
LOOKUPFFN_INLINE i32x16 abs_bits(f32x16 a) { return {(Ints)a.v & 0x7fffffff}; }
// The larger of `largest` and abs_bits(a); a may be taken as 0 where it is a NaN.
LOOKUPFFN_INLINE i32x16 max_abs_bits(i32x16 largest, f32x16 a) { return max(largest, abs_bits(a)); }
// b where one of them is a NaN.
LOOKUPFFN_INLINE f32x16 max(f32x16 a, f32x16 b) { return {a.v > b.v ? a.v : b.v}; }
// To the nearest integer, ties to even; |a| < 2^22, and a NaN stays one.
LOOKUPFFN_INLINE f32x16 round(f32x16 a) { return {(a.v + 12582912.0f) - 12582912.0f}; }
// a * 2^n for whole n, -126 <= n <= 127.
LOOKUPFFN_INLINE f32x16 scale(f32x16 a, f32x16 n) { return {a.v * (Floats)(((Words)round_to_int(n).v + 127) << 23)}; }

LOOKUPFFN_INLINE mask16 less(f32x16 a, f32x16 b) { return {a.v < b.v}; }
LOOKUPFFN_INLINE mask16 less(i32x16 a, i32x16 b) { return {a.v < b.v}; }
LOOKUPFFN_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) { return {m.v ? a.v : b.v}; }
LOOKUPFFN_INLINE i32x16 select(mask16 m, i32x16 a, i32x16 b) { return {m.v ? a.v : b.v}; }

// The low 8 or 16 bits of each lane.
LOOKUPFFN_INLINE void store_u8(uint8_t* p, i32x16 a) { write(p, __builtin_convertvector((Words)a.v, Bytes)); }
LOOKUPFFN_INLINE void store_16(void* p, i32x16 a) { write(p, __builtin_convertvector((Words)a.v, Halves)); }
LOOKUPFFN_INLINE i32x16 load_u16(const uint16_t* p) { return {__builtin_convertvector(read<Halves>(p), Ints)}; }
// Activations of int8, lanes of -127 to 127, 16 or four times 16, as dot4_i8 takes them.
LOOKUPFFN_INLINE void store_activations(uint8_t* p, size_t, i32x16 a) { store_u8(p, {(Ints)((Words)a.v + 128)}); }
LOOKUPFFN_INLINE void store_activations(uint8_t* p, size_t plane, const i32x16 a[4]) {
  for (int i = 0; i < 4; i++) store_activations(p + 16 * i, plane, a[i]);
}

LOOKUPFFN_INLINE f32x16 load_bf16(const uint16_t* p) { return {(Floats)((Words)load_u16(p).v << 16)}; }
LOOKUPFFN_INLINE void store_bf16(uint16_t* p, f32x16 a) {  // to nearest, ties to even; a NaN stays one
  const Words bits = (Words)a.v, rounded = bits + 0x7fff + (bits >> 16 & 1);
  const Words kept = (Words)(a.v != a.v ? (Ints)(bits | 0x400000) : (Ints)rounded);
  write(p, __builtin_convertvector(kept >> 16, Halves));
}

LOOKUPFFN_INLINE bytes64 load_bytes(const void* p) { return {read<Words>(p)}; }
// 32 bf16 numbers as 16 even and 16 odd ones.
LOOKUPFFN_INLINE f32x16 low_bf16(bytes64 a) { return {(Floats)(a.v << 16)}; }
LOOKUPFFN_INLINE f32x16 high_bf16(bytes64 a) { return {(Floats)(a.v & 0xffff0000u)}; }
// Byte `index` of each word, with its sign.
LOOKUPFFN_INLINE i32x16 byte_of(bytes64 a, int index) { return {(Ints)(a.v << (24 - 8 * index)) >> 24}; }
LOOKUPFFN_INLINE void prefetch(const void*) {}
LOOKUPFFN_INLINE void prefetch_l2(const void*) {}

// acc[i] += <word i of x, word i of w>, a word being one float, two int16 or four bytes.
LOOKUPFFN_INLINE bytes64 broadcast_word(const void* p) { return {read<uint32_t>(p) + Words{}}; }
LOOKUPFFN_INLINE f32x16 dot_f32(f32x16 acc, bytes64 x, bytes64 w) { return {acc.v + (Floats)x.v * (Floats)w.v}; }
// Sums wrap around: those of a sound layer cannot, and a damaged one's may do so without harm.
LOOKUPFFN_INLINE Words low_half(Words a) { return (Words)((Ints)(a << 16) >> 16); }  // of each word, with its sign
LOOKUPFFN_INLINE Words high_half(Words a) { return (Words)((Ints)a >> 16); }
LOOKUPFFN_INLINE i32x16 dot2_i16(i32x16 acc, bytes64 x, bytes64 w) {
  return {(Ints)((Words)acc.v + low_half(x.v) * low_half(w.v) + high_half(x.v) * high_half(w.v))};
}
typedef bytes64 activation4;  // four of int8
// What sums of dot4_i8 lack with two planes: |q| of the negative of `count` activations, a multiple of 16.
LOOKUPFFN_INLINE int32_t sum_of_negatives(const uint8_t*, size_t, int) { return 0; }
LOOKUPFFN_INLINE activation4 broadcast_activations(const uint8_t* p, size_t) { return broadcast_word(p); }
LOOKUPFFN_INLINE i32x16 dot4_i8(i32x16 acc, activation4 x, bytes64 w) {  // 255 * 128 < 2^15
  const Shorts activations = (Shorts)x.v, weights = (Shorts)w.v;
  const Words even = (Words)((activations & 0xff) * ((Shorts)((Words)w.v << 8 & 0xff00ff00u) >> 8));
  const Words odd = (Words)(((activations >> 8) & 0xff) * (weights >> 8));
  return {(Ints)((Words)acc.v + low_half(even) + high_half(even) + low_half(odd) + high_half(odd))};
}

// 16 times the signed numbers in the low or high halves of bytes.
LOOKUPFFN_INLINE bytes64 low_halves(bytes64 a) { return {a.v << 4 & 0xf0f0f0f0u}; }
LOOKUPFFN_INLINE bytes64 high_halves(bytes64 a) { return {a.v & 0xf0f0f0f0u}; }

// acc[0..3] += sum_k scores[k] * r_k for four slices of 64 int8, scores 0 to 127. Byte 16 L + 4 i + d of a slice is
// output 16 i + 4 L + d: the order in which interleaving within 128-bit lanes delivers them.
LOOKUPFFN_INLINE WideHalves weighed(uint8_t score, bytes64 row) {
  return (uint16_t)score * (WideHalves) __builtin_convertvector((WideBytes)row.v, WideShorts);
}
LOOKUPFFN_INLINE void dot4_rows(i32x16 acc[4], bytes64 r0, bytes64 r1, bytes64 r2, bytes64 r3, const uint8_t* scores) {
  const WideHalves a = weighed(scores[0], r0) + weighed(scores[1], r1);  // 2 * 127 * 128 < 2^15
  const WideHalves b = weighed(scores[2], r2) + weighed(scores[3], r3);
  const WideInts sum =
      __builtin_convertvector((WideShorts)a, WideInts) + __builtin_convertvector((WideShorts)b, WideInts);
  const int32_t* words = (const int32_t*)&sum;
  for (int i = 0; i < 4; i++) {
    Words part;
    for (int lane = 0; lane < 4; lane++) __builtin_memcpy((uint32_t*)&part + 4 * lane, words + 16 * lane + 4 * i, 16);
    acc[i].v = (Ints)((Words)acc[i].v + part);
  }
}

LOOKUPFFN_INLINE void transpose(f32x16 r[16]) {  // 16 x 16
  float rows[16][16], columns[16][16];
  for (int i = 0; i < 16; i++) store(rows[i], r[i]);
#pragma GCC unroll 1
  for (int j = 0; j < 16; j++)
#pragma GCC unroll 1
    for (int i = 0; i < 16; i++) columns[j][i] = rows[i][j];
  for (int j = 0; j < 16; j++) r[j] = load(columns[j]);
}
LOOKUPFFN_INLINE void load_transposed_8(const float* p, f32x16 r[8]) {  // r[j] = p[8 i + j]
  float columns[8][16];
#pragma GCC unroll 1
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) columns[j][i] = p[8 * i + j];
  for (int j = 0; j < 8; j++) r[j] = load(columns[j]);
}

// For measuring: the value is used and may have changed.
LOOKUPFFN_INLINE void keep(f32x16& x) { __asm__ volatile("" : "+m"(x)); }
LOOKUPFFN_INLINE void keep(i32x16& x) { __asm__ volatile("" : "+m"(x)); }
LOOKUPFFN_INLINE void keep(bytes64& x) { __asm__ volatile("" : "+m"(x)); }
