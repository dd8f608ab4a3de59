// Functions of whole vectors that are no single instruction.

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// exp(-2 m) for m >= 0, within 3 ulp and the rounding of 2 m / ln 2, and at least 2^-126; multiply and add apart, so
// that it is the same bits everywhere.
LOOKUPFFN_INLINE f32x16 exp_minus_2(f32x16 m) {
  const f32x16 t = max(set1(-126.0f), mul(m, set1(-2.885390081777927f)));  // -2 / ln 2; a NaN stays one
  const f32x16 n = round(t), f = sub(t, n), f2 = mul(f, f);                // f in [-1/2, 1/2]
  // 2^f, Chebyshev's fit of degree 5, as a tree: the chain of operations is what takes the time here, not their number
  const f32x16 low = add(mul(f, set1(0.6931471880f)), set1(1.0f));
  const f32x16 middle = add(mul(f, set1(5.5503571142e-2f)), set1(0.2402210749f));
  const f32x16 high = add(mul(f, set1(1.3390863365e-3f)), set1(9.6760319183e-3f));
  return scale(add(mul(add(mul(high, f2), middle), f2), low), n);
}
