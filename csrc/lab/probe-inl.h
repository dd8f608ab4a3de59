// Loops for measuring what a core gives: instructions as the kernels use them, with nothing else in the way. Over the
// same shim as the kernels' loops, in a library of its own.
//
// Every loop repeats one function of the shim on kIndependent values that do not depend on each other, so that its rate
// counts and not its latency. keep() tells the compiler that a value is used and changed; it costs no instruction.
#include "kernels/math-inl.h"

template <typename Value, typename Step>
LOOKUPFFN_INLINE int64_t repeat_step(int64_t rounds, Value start, const Step& step) {
  Value value[kIndependent];
#pragma GCC unroll 16
  for (int i = 0; i < kIndependent; i++) value[i] = start, keep(value[i]);
  for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 4
    for (int again = 0; again < 4; again++)
#pragma GCC unroll 16
      for (int i = 0; i < kIndependent; i++) value[i] = step(value[i], i), keep(value[i]);
  return rounds * 4 * kIndependent;
}

// `rounds` rounds of one instruction; memory: 4 KiB, read and written by those that load and store. How many were run.
static int64_t repeat(Instruction instruction, int64_t rounds, uint8_t* memory) {
  f32x16 one = set1(1.0f), half = set1(0.5f);
  keep(one), keep(half);
  bytes64 bytes = load_bytes(memory);
  const float* floats = (const float*)memory;
  switch (instruction) {
    case Instruction::kAdd:
      return repeat_step(rounds, one, [&](f32x16 v, int) __attribute__((always_inline)) { return add(v, half); });
    case Instruction::kMultiply:
      return repeat_step(rounds, one, [&](f32x16 v, int) __attribute__((always_inline)) { return mul(v, one); });
    case Instruction::kFma:
      return repeat_step(rounds, one, [&](f32x16 v, int) __attribute__((always_inline)) { return fma(v, one, half); });
    case Instruction::kDivide:
      return repeat_step(rounds, one, [&](f32x16 v, int) __attribute__((always_inline)) { return div(v, one); });
    case Instruction::kConvert:
      return repeat_step(rounds, set1((int32_t)1),
                         [&](i32x16 v, int) __attribute__((always_inline)) { return round_to_int(to_float(v)); }) *
             2;
    case Instruction::kVector:  // a mixture that every kind of vector pipe has a part in
      return repeat_step(rounds, one, [&](f32x16 v, int i) __attribute__((always_inline)) {
        return i % 4 == 0 ? add(v, half) : i % 4 == 1 ? mul(v, one) : abs(v);
      });
    case Instruction::kExp:  // the hash's
      return repeat_step(rounds, one, [&](f32x16 v, int) __attribute__((always_inline)) { return exp_minus_2(v); });
    case Instruction::kDotInt8: {
      const activation4 x = broadcast_activations(memory, 0);
      return repeat_step(rounds, zero_i32(), [&](i32x16 v, int) __attribute__((always_inline)) {
        bytes64 w = bytes;
        keep(w);  // else what does not depend on v would be done once
        return dot4_i8(v, x, w);
      });
    }
    case Instruction::kDotInt16:
      return repeat_step(rounds, zero_i32(),
                         [&](i32x16 v, int) __attribute__((always_inline)) { return dot2_i16(v, bytes, bytes); });
    case Instruction::kRows: {  // four rows in registers, interleaved and multiplied; two lines, as the kernel has them
      i32x16 sum[8];
      bytes64 row[4] = {bytes, bytes, bytes, bytes};
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) sum[i] = zero_i32();
      for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 2
        for (int line = 0; line < 2; line++) {
#pragma GCC unroll 4
          for (int k = 0; k < 4; k++) keep(row[k]);
          dot4_rows(sum + 4 * line, row[0], row[1], row[2], row[3], memory);
        }
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) keep(sum[k]);
      return rounds * 2;
    }
    case Instruction::kTranspose: {
      f32x16 v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) v[i] = one;
      for (int64_t i = 0; i < rounds; i++) {
        transpose(v);
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++) keep(v[k]);
      }
      return rounds;
    }
    case Instruction::kLoad:
      return repeat_step(rounds, one, [&](f32x16, int i) __attribute__((always_inline)) {
        __asm__ volatile("" : "+r"(floats));  // or the loads would move out of the loop
        return load(floats + 16 * i);
      });
    case Instruction::kStore:
      return repeat_step(rounds, one, [&](f32x16 v, int i) __attribute__((always_inline)) {
        __asm__ volatile("" : "+r"(memory) : : "memory");
        store((float*)memory + 16 * i, v);
        return v;
      });
    case Instruction::kPrefetch:
      for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) prefetch(memory + 64 * i);
      return rounds * 16;
    case Instruction::kWord: {  // loads of 32 bits into scalar registers
      const uint32_t* words = (const uint32_t*)memory;
      for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
          uint32_t word = words[16 * i];
          __asm__ volatile("" : : "r"(word) : "memory");
        }
      return rounds * 16;
    }
    case Instruction::kScalar: {
      int64_t v[8] = {1, 2, 3, 4, 5, 6, 7, 8};
      for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 8
        for (int again = 0; again < 8; again++)
#pragma GCC unroll 8
          for (int i = 0; i < 8; i++) {
            v[i] += 3;
            __asm__ volatile("" : "+r"(v[i]));
          }
      return rounds * 64;
    }
    case Instruction::kIssue: {  // what the kernels have side by side: four scalar, two loads, two vector
      int64_t s[4] = {1, 2, 3, 4};
      f32x16 v[8], loaded[2];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) v[i] = one;
      for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 4
        for (int again = 0; again < 4; again++) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) {
            s[i] += 3;
            __asm__ volatile("" : "+r"(s[i]));
          }
#pragma GCC unroll 2
          for (int i = 0; i < 2; i++) {
            __asm__ volatile("" : "+r"(floats));
            loaded[i] = load(floats + 16 * i), keep(loaded[i]);
          }
          v[2 * again] = add(v[2 * again], half), keep(v[2 * again]);
          v[2 * again + 1] = mul(v[2 * again + 1], one), keep(v[2 * again + 1]);
        }
      return rounds * 4 * 8;
    }
    case Instruction::kCycle:
    case Instruction::kWideCycle: {  // one scalar operation after the other: a cycle each; beside them wide products
      int64_t v = 1;
      f32x16 wide[kIndependent];
#pragma GCC unroll 16
      for (int i = 0; i < kIndependent; i++) wide[i] = one;
      for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 64
        for (int i = 0; i < 64; i++) {
          v ^= i;  // some processors fold additions of constants away
          __asm__ volatile("" : "+r"(v));
          if (instruction == Instruction::kWideCycle && i % 2)
            wide[i % kIndependent] = fma(wide[i % kIndependent], one, half), keep(wide[i % kIndependent]);
        }
      return rounds * 64;
    }
  }
  return 0;
}

static int32_t read_stream(const uint8_t* memory, int64_t lines) {
  i32x16 sum[4] = {zero_i32(), zero_i32(), zero_i32(), zero_i32()};
  for (int64_t i = 0; i + 4 <= lines; i += 4)
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) sum[k] = bit_xor(sum[k], load((const int32_t*)(memory + (size_t)(i + k) * 64)));
  return reduce_max(bit_xor(bit_xor(sum[0], sum[1]), bit_xor(sum[2], sum[3])));
}

// Each line is prefetched `distance` lines before it is read, 0 for not at all.
static int32_t read_lines(const uint8_t* memory, const uint32_t* lines, int64_t count, int64_t distance) {
  i32x16 a = zero_i32(), b = zero_i32();
  int64_t i = 0;
  if (distance > 0)
    for (; i + distance + 2 <= count; i += 2) {
      prefetch(memory + (size_t)lines[i + distance] * 64);
      prefetch(memory + (size_t)lines[i + distance + 1] * 64);
      a = bit_xor(a, load((const int32_t*)(memory + (size_t)lines[i] * 64)));
      b = bit_xor(b, load((const int32_t*)(memory + (size_t)lines[i + 1] * 64)));
    }
  for (; i + 2 <= count; i += 2) {
    a = bit_xor(a, load((const int32_t*)(memory + (size_t)lines[i] * 64)));
    b = bit_xor(b, load((const int32_t*)(memory + (size_t)lines[i + 1] * 64)));
  }
  return reduce_max(bit_xor(a, b));
}

static const ProbeKernels kProbe = {.read_lines = read_lines, .read_stream = read_stream, .repeat = repeat};

#define LOOKUPFFN_EXPORT(isa)                           \
  namespace lookupffn {                                 \
  namespace exported {                                  \
  extern const ProbeKernels* const probe_##isa;         \
  const ProbeKernels* const probe_##isa = &isa::kProbe; \
  }                                                     \
  }
