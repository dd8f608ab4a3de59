// A vector shim that counts: simd/scalar.h's arithmetic, and every call adds to `counts` by the kinds of operations
// that lookupffn/lab/hardware/model.py has rates of. One thread only. The including file brings <map>, <string> and
// <vector>.
//
// A function counts as what simd/avx512.h makes of it, once, whatever simd/scalar.h calls for it:
//
//   load      load, load_bytes; broadcast_word (from memory to all lanes); dot4_rows, for its four scores
//   store     store
//   add       float add, sub, max: the adders' work
//   multiply  mul             fma  fma, dot_f32         divide  div
//   convert   to_float, round_to_int, round
//   vector    abs, bit_or, bit_xor, less, select and integer add, sub, max: what any vector pipe does. max_abs_bits
//   too: one
//             instruction with AVX-512, though a float one; elsewhere two of integers
//   shuffle   the narrowing of store_u8 and store_16, the widening of load_u16; 64 of a transpose
//   rows      dot4_rows: 8 shuffles and 4 products          dot_int8, dot_int16  dot4_u8i8, dot2_i16
//   exp       exp_minus_2, by its one scale; see there
//   prefetch  prefetch, prefetch_l2
//
// reduce_max is 4 shuffles and 4 maxima. Constants in registers (set1, zero) are nothing; set1 of a float counts apart,
// as it is a load where the number comes from memory: the program says where that is. Scalar operations are not
// counted.
//
// The kernels name their loops (LOOKUPFFN_LOOP), and what follows a name counts for it.

enum Kind {
  kLoad,
  kStore,
  kAdd,
  kMultiply,
  kFma,
  kDivide,
  kConvert,
  kVector,
  kShuffle,
  kRows,
  kDotInt8,
  kDotInt16,
  kExp,
  kPrefetch,
  kSet1,
  kKinds,
};

constexpr const char* kKindNames[] = {"load",     "store",     "add",    "multiply", "fma",
                                      "divide",   "convert",   "vector", "shuffle",  "rows",
                                      "dot_int8", "dot_int16", "exp",    "prefetch", "set1"};
static_assert(sizeof kKindNames / sizeof *kKindNames == kKinds, "a name for each kind");

static int64_t named;  // loops so far
struct Counts {
  int64_t of[kKinds] = {};
  int64_t place = named++;  // in the order in which they came first
};
static Counts elsewhere;
static int64_t* counts = elsewhere.of;
static std::string counted_stage;  // before the name of each loop
static std::map<std::string, Counts> loops;
static inline void count(Kind kind, int64_t times = 1) { counts[kind] += times; }
#define LOOKUPFFN_LOOP(name) counts = loops[counted_stage + #name].of

// Lines of 64 bytes of a part of memory: how often they are loaded, and which.
struct Lines {
  const uint8_t *begin, *end;
  int64_t loads;
  std::vector<bool> loaded, prefetched;
};
static Lines weight_lines, row_lines;
static void count_prefetch(const void* p) {
  count(kPrefetch);
  if ((const uint8_t*)p >= row_lines.begin && (const uint8_t*)p < row_lines.end)
    row_lines.prefetched[((const uint8_t*)p - row_lines.begin) / 64] = true;
}
static void count_line(const void* p) {
  for (Lines* lines : {&weight_lines, &row_lines})
    if ((const uint8_t*)p >= lines->begin && (const uint8_t*)p < lines->end) {
      lines->loads++;
      lines->loaded[((const uint8_t*)p - lines->begin) / 64] = true;
    }
}

namespace plain {
#include "simd/scalar.h"
}
#undef LOOKUPFFN_INLINE
#define LOOKUPFFN_INLINE inline  // speed is of no matter here, the compiler's time is

// Types of their own: plain's would bring plain's functions with them wherever one is called.
struct f32x16 { plain::f32x16 v; };
struct i32x16 { plain::i32x16 v; };
struct bytes64 { plain::bytes64 v; };
struct mask16 { plain::mask16 v; };

constexpr int kTileTokens = 6, kTilePanels = 4;  // as in simd/avx512.h
constexpr int kQueryTile = 4, kKeyVectors = 4;
constexpr int kActivationOffset = plain::kActivationOffset, kActivationPlanes = 1, kIndependent = plain::kIndependent;

inline f32x16 zero_f32() { return {plain::zero_f32()}; }
inline f32x16 set1(float a) { return count(kSet1), f32x16{plain::set1(a)}; }
inline f32x16 load(const float* p) { return count(kLoad), count_line(p), f32x16{plain::load(p)}; }
inline void store(float* p, f32x16 a) { count(kStore), plain::store(p, a.v); }
inline f32x16 add(f32x16 a, f32x16 b) { return count(kAdd), f32x16{plain::add(a.v, b.v)}; }
inline f32x16 sub(f32x16 a, f32x16 b) { return count(kAdd), f32x16{plain::sub(a.v, b.v)}; }
inline f32x16 max(f32x16 a, f32x16 b) { return count(kAdd), f32x16{plain::max(a.v, b.v)}; }
inline f32x16 mul(f32x16 a, f32x16 b) { return count(kMultiply), f32x16{plain::mul(a.v, b.v)}; }
inline f32x16 div(f32x16 a, f32x16 b) { return count(kDivide), f32x16{plain::div(a.v, b.v)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return count(kFma), f32x16{plain::fma(a.v, b.v, c.v)}; }
inline f32x16 abs(f32x16 a) { return count(kVector), f32x16{plain::abs(a.v)}; }

inline i32x16 zero_i32() { return {plain::zero_i32()}; }
inline i32x16 set1(int32_t a) { return {plain::set1(a)}; }
inline i32x16 load(const int32_t* p) { return count(kLoad), i32x16{plain::load(p)}; }
inline void store(int32_t* p, i32x16 a) { count(kStore), plain::store(p, a.v); }
inline i32x16 add(i32x16 a, i32x16 b) { return count(kVector), i32x16{plain::add(a.v, b.v)}; }
inline i32x16 sub(i32x16 a, i32x16 b) { return count(kVector), i32x16{plain::sub(a.v, b.v)}; }
inline i32x16 max(i32x16 a, i32x16 b) { return count(kVector), i32x16{plain::max(a.v, b.v)}; }
inline i32x16 bit_or(i32x16 a, i32x16 b) { return count(kVector), i32x16{plain::bit_or(a.v, b.v)}; }
inline i32x16 bit_xor(i32x16 a, i32x16 b) { return count(kVector), i32x16{plain::bit_xor(a.v, b.v)}; }
inline i32x16 abs_bits(f32x16 a) { return count(kVector), i32x16{plain::abs_bits(a.v)}; }
inline i32x16 max_abs_bits(i32x16 largest, f32x16 a) {
  return count(kVector), i32x16{plain::max_abs_bits(largest.v, a.v)};
}
inline int32_t reduce_max(i32x16 a) {
  count(kShuffle, 4);
  count(kVector, 4);
  return plain::reduce_max(a.v);
}

inline f32x16 to_float(i32x16 a) { return count(kConvert), f32x16{plain::to_float(a.v)}; }
inline i32x16 round_to_int(f32x16 a) { return count(kConvert), i32x16{plain::round_to_int(a.v)}; }
inline f32x16 round(f32x16 a) { return count(kConvert), f32x16{plain::round(a.v)}; }
// The last step of exp_minus_2, which is counted as a whole: its other operations are taken back here. The program
// checks that nothing is left of them.
inline f32x16 scale(f32x16 a, f32x16 n) {
  count(kExp);
  count(kMultiply, -7), count(kAdd, -7), count(kConvert, -1), count(kSet1, -8);
  return {plain::scale(a.v, n.v)};
}

inline mask16 less(f32x16 a, f32x16 b) { return count(kVector), mask16{plain::less(a.v, b.v)}; }
inline mask16 less(i32x16 a, i32x16 b) { return count(kVector), mask16{plain::less(a.v, b.v)}; }
inline f32x16 select(mask16 m, f32x16 a, f32x16 b) { return count(kVector), f32x16{plain::select(m.v, a.v, b.v)}; }
inline i32x16 select(mask16 m, i32x16 a, i32x16 b) { return count(kVector), i32x16{plain::select(m.v, a.v, b.v)}; }

inline void store_u8(uint8_t* p, i32x16 a) { count(kShuffle), count(kStore), plain::store_u8(p, a.v); }
inline void store_16(void* p, i32x16 a) { count(kShuffle), count(kStore), plain::store_16(p, a.v); }
inline i32x16 load_u16(const uint16_t* p) { return count(kLoad), count(kShuffle), i32x16{plain::load_u16(p)}; }
inline void store_activations(uint8_t* p, size_t plane, i32x16 a) {
  count(kShuffle), count(kVector), count(kStore), plain::store_activations(p, plane, a.v);
}
inline void store_activations(uint8_t* p, size_t plane, const i32x16 a[4]) {
  count(kShuffle, 4), count(kVector), count(kStore);  // three packs, one exclusive or, one permutation
  const plain::i32x16 four[4] = {a[0].v, a[1].v, a[2].v, a[3].v};
  plain::store_activations(p, plane, four);
}

inline f32x16 load_bf16(const uint16_t* p) {
  return count(kLoad), count(kShuffle), count(kVector), f32x16{plain::load_bf16(p)};
}
inline void store_bf16(uint16_t* p, f32x16 a) {
  count(kVector, 7), count(kShuffle), count(kStore);
  plain::store_bf16(p, a.v);
}

inline i32x16 byte_of(bytes64 a, int i) { return count(kVector, 2), i32x16{plain::byte_of(a.v, i)}; }
inline bytes64 load_bytes(const void* p) { return count(kLoad), count_line(p), bytes64{plain::load_bytes(p)}; }
inline bytes64 low_halves(bytes64 a) { return count(kVector, 2), bytes64{plain::low_halves(a.v)}; }
inline bytes64 high_halves(bytes64 a) { return count(kVector), bytes64{plain::high_halves(a.v)}; }
inline f32x16 low_bf16(bytes64 a) { return count(kVector), f32x16{plain::low_bf16(a.v)}; }
inline f32x16 high_bf16(bytes64 a) { return count(kVector), f32x16{plain::high_bf16(a.v)}; }
inline void prefetch(const void* p) { count_prefetch(p); }
inline void prefetch_l2(const void* p) { count_prefetch(p); }

inline bytes64 broadcast_word(const void* p) { return count(kLoad), bytes64{plain::broadcast_word(p)}; }
inline f32x16 dot_f32(f32x16 acc, bytes64 x, bytes64 w) { return count(kFma), f32x16{plain::dot_f32(acc.v, x.v, w.v)}; }
inline i32x16 dot2_i16(i32x16 acc, bytes64 x, bytes64 w) {
  return count(kDotInt16), i32x16{plain::dot2_i16(acc.v, x.v, w.v)};
}
typedef bytes64 activation4;
inline int32_t sum_of_negatives(const uint8_t*, size_t, int) { return 0; }
inline activation4 broadcast_activations(const uint8_t* p, size_t) { return broadcast_word(p); }
inline i32x16 dot4_i8(i32x16 acc, activation4 x, bytes64 w) {
  return count(kDotInt8), i32x16{plain::dot4_i8(acc.v, x.v, w.v)};
}
inline void dot4_rows(i32x16 acc[4], bytes64 r0, bytes64 r1, bytes64 r2, bytes64 r3, const uint8_t* scores) {
  count(kRows), count(kLoad);
  plain::i32x16 sums[4] = {acc[0].v, acc[1].v, acc[2].v, acc[3].v};
  plain::dot4_rows(sums, r0.v, r1.v, r2.v, r3.v, scores);
  for (int i = 0; i < 4; i++) acc[i].v = sums[i];
}

inline void transpose(f32x16 r[16]) {
  count(kShuffle, 64);
  plain::f32x16 rows[16];
  for (int i = 0; i < 16; i++) rows[i] = r[i].v;
  plain::transpose(rows);
  for (int i = 0; i < 16; i++) r[i].v = rows[i];
}
inline void load_transposed_8(const float* p, f32x16 r[8]) {  // halves; every second one is blended into the one before
  count(kLoad, 16), count(kVector, 8), count(kShuffle, 24);
  plain::f32x16 columns[8];
  plain::load_transposed_8(p, columns);
  for (int i = 0; i < 8; i++) r[i].v = columns[i];
}

inline void keep(f32x16& x) { plain::keep(x.v); }
inline void keep(i32x16& x) { plain::keep(x.v); }
inline void keep(bytes64& x) { plain::keep(x.v); }

// The kernels' own copies, of x and of the end of a row of y, are whole vectors; those of one number are registers.
static void copy_bytes(void* to, const void* from, size_t bytes) {
  if (bytes > sizeof(float)) count(kLoad, (bytes + 63) / 64), count(kStore, (bytes + 63) / 64);
  __builtin_memcpy(to, from, bytes);
}
#define __builtin_memcpy(to, from, bytes) copy_bytes(to, from, bytes)
