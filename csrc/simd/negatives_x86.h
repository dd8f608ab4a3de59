// sum_of_negatives (simd/scalar.h) for x86 without VNNI. Included by a shim whose activations lie in two planes.

LOOKUPFFN_INLINE int32_t sum_of_negatives(const uint8_t* p, size_t plane, int count) {
  __m128i sum = _mm_setzero_si128();
  for (int i = 0; i < count; i += 16) {
    const __m128i q = _mm_loadu_si128((const __m128i*)(p + i)), m = _mm_loadu_si128((const __m128i*)(p + plane + i));
    sum = _mm_add_epi64(sum, _mm_sad_epu8(_mm_and_si128(q, m), _mm_setzero_si128()));
  }
  return _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 2);
}
