// Matrix products of many rows with weights of 16 bits, float16 or bfloat16: computed in float32 with activations as they
// are, finer than the float16 or bfloat16 that llama.cpp rounds them to.
#pragma once

#include "kernel.h"

// Weights of so many k are widened at a time: they and a tile of rows stay in the first-level cache.
constexpr int HALF_CHUNK = 256;

inline void widen(const uint16_t * from, float * to, int64_t count, bool bfloat) {
    for (int64_t i = 0; i < count; i += 8) {
        const __m128i halves = _mm_loadu_si128((const __m128i *) (from + i));
        const __m256 wide = bfloat ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)) : _mm256_cvtph_ps(halves);
        _mm256_store_ps(to + i, wide);
    }
}

// sums[ROWS][COLS] += rows · weights over `n_k` numbers; `a` is [k][ROWS], `w` [k][COLS].
inline void multiply_floats(int n_k, const float * a, const float * w, float * sums) {
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
    __m512 total[ROWS];
    for (int r = 0; r < ROWS; r++) total[r] = _mm512_load_ps(sums + r * COLS);
    for (int k = 0; k < n_k; k++, a += ROWS, w += COLS) {
        const __m512 weights = _mm512_load_ps(w);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) total[r] = _mm512_fmadd_ps(_mm512_set1_ps(a[r]), weights, total[r]);
    }
    for (int r = 0; r < ROWS; r++) _mm512_store_ps(sums + r * COLS, total[r]);
#else
    __m256 total[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 2; c++) total[r][c] = _mm256_load_ps(sums + r * COLS + 8 * c);
    for (int k = 0; k < n_k; k++, a += ROWS, w += COLS) {
        const __m256 w0 = _mm256_load_ps(w), w1 = _mm256_load_ps(w + 8);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const __m256 x = _mm256_broadcast_ss(a + r);
            total[r][0] = _mm256_fmadd_ps(x, w0, total[r][0]);
            total[r][1] = _mm256_fmadd_ps(x, w1, total[r][1]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 2; c++) _mm256_store_ps(sums + r * COLS + 8 * c, total[r][c]);
#endif
}
