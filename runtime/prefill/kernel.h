// Matrix products of many rows on x86-64 with AVX2: weights as panels of 16 columns, activations as tiles of ROWS rows.
//
// Quantized weights become int8 with a float16 scale per 32, which is exact for Q8_0, Q4_0, Q5_0 and IQ4_NL. Activations
// become int16 with one scale per row, finer than the int8 that llama.cpp multiplies by. Of float16 and bfloat16, weights
// and activations become int16 with a scale per 32, finer than the activations in 16 bits that llama.cpp multiplies by.
// A product of 32 pairs fits into int32; sums of blocks are float32.
#pragma once

#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int COLS = 16, BLOCK = 32, PAIRS = BLOCK / 2;
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
constexpr int ROWS = 12;
#else
constexpr int ROWS = 6;
#endif
// Weights of so many k are widened at a time: they and a tile of rows stay in the first-level cache.
constexpr int CHUNK_BLOCKS = 16, CHUNK = CHUNK_BLOCKS * BLOCK;

struct PanelBlock {  // 16 columns, 32 k
    uint16_t scale[COLS];
    int8_t q[PAIRS][COLS][2];
};
struct alignas(64) WideBlock {
    float scale[COLS];
    int16_t q[PAIRS][COLS][2];
};

inline float half_to_float(uint16_t half) { return _cvtsh_ss(half); }
inline uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

inline void widen(const PanelBlock * from, WideBlock * to, int n_blocks) {
    for (int b = 0; b < n_blocks; b++) {
        for (int j = 0; j < COLS; j += 8)
            _mm256_store_ps(to[b].scale + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (from[b].scale + j))));
        const int8_t * q = &from[b].q[0][0][0];
        int16_t * wide = &to[b].q[0][0][0];
        for (int i = 0; i < BLOCK * COLS; i += 16)
            _mm256_store_si256((__m256i *) (wide + i), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) (q + i))));
    }
}

// sums[ROWS][COLS] += rows · weights over `n_blocks` blocks; `a` is int16 [k / 2][ROWS][2]. With BY_BLOCK the rows have a
// scale for each block, `scales` [block][ROWS]; else it is left to the caller.
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
template <bool BY_BLOCK>
inline void multiply_blocks(int n_blocks, const int16_t * a, const float * scales, const WideBlock * w, float * sums) {
    __m512 total[ROWS];
    for (int r = 0; r < ROWS; r++) total[r] = _mm512_load_ps(sums + r * COLS);
    for (int b = 0; b < n_blocks; b++, a += BLOCK * ROWS) {
        __m512i acc[ROWS];
        for (auto & one : acc) one = _mm512_setzero_si512();
#pragma GCC unroll 2
        for (int p = 0; p < PAIRS; p++) {
            const __m512i weights = _mm512_load_si512(&w[b].q[p][0][0]);
            const int32_t * pair = (const int32_t *) a + p * ROWS;
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) acc[r] = _mm512_dpwssd_epi32(acc[r], _mm512_set1_epi32(pair[r]), weights);
        }
        const __m512 scale = _mm512_load_ps(w[b].scale);
        for (int r = 0; r < ROWS; r++) {
            const __m512 by = BY_BLOCK ? _mm512_mul_ps(scale, _mm512_set1_ps(scales[b * ROWS + r])) : scale;
            total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r]), by, total[r]);
        }
    }
    for (int r = 0; r < ROWS; r++) _mm512_store_ps(sums + r * COLS, total[r]);
}
#elif defined(__AVXVNNI__)
template <bool BY_BLOCK>
inline void multiply_blocks(int n_blocks, const int16_t * a, const float * scales, const WideBlock * w, float * sums) {
    for (int b = 0; b < n_blocks; b++, a += BLOCK * ROWS) {
        __m256i acc[ROWS][2];
        for (auto & one : acc) one[0] = one[1] = _mm256_setzero_si256();
#pragma GCC unroll 2
        for (int p = 0; p < PAIRS; p++) {
            const __m256i w0 = _mm256_load_si256((const __m256i *) &w[b].q[p][0][0]);
            const __m256i w1 = _mm256_load_si256((const __m256i *) &w[b].q[p][8][0]);
            const int32_t * pair = (const int32_t *) a + p * ROWS;
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const __m256i x = _mm256_set1_epi32(pair[r]);
                acc[r][0] = _mm256_dpwssd_avx_epi32(acc[r][0], x, w0);
                acc[r][1] = _mm256_dpwssd_avx_epi32(acc[r][1], x, w1);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 2; c++) {
                float * sum = sums + r * COLS + 8 * c;
                __m256 scale = _mm256_load_ps(w[b].scale + 8 * c);
                if (BY_BLOCK) scale = _mm256_mul_ps(scale, _mm256_set1_ps(scales[b * ROWS + r]));
                _mm256_store_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][c]), scale, _mm256_load_ps(sum)));
            }
    }
}
#else
// In assembly, since GCC writes the twelve sums to memory in every step: half the speed.
#define ROW(p, r, low, high)                                                  \
    "vpbroadcastd 24*" #p "+4*" #r "(%[a]), %%ymm14\n\t"                      \
    "vpmaddwd %%ymm12, %%ymm14, %%ymm15\n\t"                                  \
    "vpmaddwd %%ymm13, %%ymm14, %%ymm14\n\t"                                  \
    "vpaddd %%ymm15, %%ymm" #low ", %%ymm" #low "\n\t"                        \
    "vpaddd %%ymm14, %%ymm" #high ", %%ymm" #high "\n\t"
#define FIRST_ROW(r, low, high)                                               \
    "vpbroadcastd 4*" #r "(%[a]), %%ymm14\n\t"                                \
    "vpmaddwd %%ymm12, %%ymm14, %%ymm" #low "\n\t"                            \
    "vpmaddwd %%ymm13, %%ymm14, %%ymm" #high "\n\t"
#define WEIGHTS(p)                                                            \
    "vmovdqa 64+64*" #p "(%[w]), %%ymm12\n\t"                                 \
    "vmovdqa 96+64*" #p "(%[w]), %%ymm13\n\t"
#define STEP(p) WEIGHTS(p) ROW(p, 0, 0, 1) ROW(p, 1, 2, 3) ROW(p, 2, 4, 5) ROW(p, 3, 6, 7) ROW(p, 4, 8, 9) ROW(p, 5, 10, 11)
#define NO_SCALE(r, low, high)
#define ROW_SCALE(r, low, high)                                               \
    "vbroadcastss 4*" #r "(%[scales]), %%ymm14\n\t"                           \
    "vmulps %%ymm14, %%ymm" #low ", %%ymm" #low "\n\t"                        \
    "vmulps %%ymm14, %%ymm" #high ", %%ymm" #high "\n\t"
#define SUM(scale, r, low, high)                                              \
    "vcvtdq2ps %%ymm" #low ", %%ymm" #low "\n\t"                              \
    "vcvtdq2ps %%ymm" #high ", %%ymm" #high "\n\t"                            \
    scale(r, low, high)                                                       \
    "vfmadd213ps 64*" #r "(%[sums]), %%ymm12, %%ymm" #low "\n\t"              \
    "vfmadd213ps 64*" #r "+32(%[sums]), %%ymm13, %%ymm" #high "\n\t"          \
    "vmovaps %%ymm" #low ", 64*" #r "(%[sums])\n\t"                           \
    "vmovaps %%ymm" #high ", 64*" #r "+32(%[sums])\n\t"
#define BLOCK_SUMS(scale)                                                     \
    asm volatile(                                                             \
        WEIGHTS(0) FIRST_ROW(0, 0, 1) FIRST_ROW(1, 2, 3) FIRST_ROW(2, 4, 5) FIRST_ROW(3, 6, 7) FIRST_ROW(4, 8, 9) FIRST_ROW(5, 10, 11) \
        STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8)       \
        STEP(9) STEP(10) STEP(11) STEP(12) STEP(13) STEP(14) STEP(15)         \
        "vmovaps (%[w]), %%ymm12\n\t"                                         \
        "vmovaps 32(%[w]), %%ymm13\n\t"                                       \
        SUM(scale, 0, 0, 1) SUM(scale, 1, 2, 3) SUM(scale, 2, 4, 5) SUM(scale, 3, 6, 7) SUM(scale, 4, 8, 9) SUM(scale, 5, 10, 11) \
        :                                                                     \
        : [a] "r"(a), [scales] "r"(scales), [w] "r"(w), [sums] "r"(sums)      \
        : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
          "xmm12", "xmm13", "xmm14", "xmm15")
template <bool BY_BLOCK>
inline void multiply_blocks(int n_blocks, const int16_t * a, const float * scales, const WideBlock * w, float * sums) {
    for (int b = 0; b < n_blocks; b++, a += BLOCK * ROWS, scales += ROWS, w++)
        if constexpr (BY_BLOCK) BLOCK_SUMS(ROW_SCALE);
        else BLOCK_SUMS(NO_SCALE);
}
#undef ROW
#undef FIRST_ROW
#undef WEIGHTS
#undef STEP
#undef NO_SCALE
#undef ROW_SCALE
#undef SUM
#undef BLOCK_SUMS
#endif

// A row as int16; the scale, or NaN if it holds one or an infinity.
inline float quantize_row(const float * row, int n_k, int16_t * q) {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 most = _mm256_setzero_ps(), sum = most;
    for (int k = 0; k < n_k; k += 8) {
        const __m256 size = _mm256_and_ps(no_sign, _mm256_loadu_ps(row + k));
        most = _mm256_max_ps(most, size);
        sum = _mm256_add_ps(sum, _mm256_mul_ps(size, _mm256_setzero_ps()));  // NaN where a number is not finite
    }
    float parts[8], bad[8], peak = 0, check = 0;
    _mm256_storeu_ps(parts, most);
    _mm256_storeu_ps(bad, sum);
    for (int i = 0; i < 8; i++) peak = fmaxf(peak, parts[i]), check += bad[i];
    const float scale = peak / 32767;
    const __m256 inverse = _mm256_set1_ps(scale > 0 ? 1 / scale : 0);
    for (int k = 0; k < n_k; k += 16) {
        const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(row + k), inverse));
        const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(row + k + 8), inverse));
        _mm256_storeu_si256((__m256i *) (q + k), _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
    }
    return check == 0 ? scale : NAN;
}

// 32 numbers as int16 with a scale, NaN if one is not finite. Their euclidean norm is MAX_NORM at most: so is a product of
// two such blocks, and each sum on the way to it, less than 2^31.
constexpr float MAX_NORM = 46336, MAX_INT16 = 32767;
inline float quantize_block(const float * numbers, int16_t * q) {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 x[BLOCK / 8], most = _mm256_setzero_ps(), zeros = most, squares = most;
    for (int i = 0; i < BLOCK / 8; i++) {
        x[i] = _mm256_loadu_ps(numbers + 8 * i);
        most = _mm256_max_ps(most, _mm256_and_ps(no_sign, x[i]));
        zeros = _mm256_fmadd_ps(x[i], _mm256_setzero_ps(), zeros);  // NaN where a number is not finite
    }
    const auto reduce = [](__m256 of, auto add) {
        const __m128 four = add(_mm256_castps256_ps128(of), _mm256_extractf128_ps(of, 1));
        const __m128 two = add(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(add(two, _mm_movehdup_ps(two)));
    };
    const auto sum = [](__m128 a, __m128 b) { return _mm_add_ps(a, b); };
    const float peak = reduce(most, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
    if (reduce(zeros, sum) != 0) return NAN;
    const __m256 relative = _mm256_set1_ps(peak > 0 ? 1 / peak : 0);  // the square of a large number is no float
    for (const __m256 & part : x) squares = _mm256_fmadd_ps(_mm256_mul_ps(part, relative), _mm256_mul_ps(part, relative), squares);
    const float scale = peak * fmaxf(sqrtf(reduce(squares, sum)) / MAX_NORM, 1 / MAX_INT16);
    const __m256 inverse = _mm256_set1_ps(scale > 0 ? 1 / scale : 0);
    for (int i = 0; i < BLOCK / 8; i += 2) {
        const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], inverse)), high = _mm256_cvtps_epi32(_mm256_mul_ps(x[i + 1], inverse));
        _mm256_storeu_si256((__m256i *) (q + 8 * i), _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
    }
    return scale;
}
