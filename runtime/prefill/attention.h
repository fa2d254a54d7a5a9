// Attention on x86-64 with AVX2: softmax(q · K) · V over a float16 cache, the heads that share K and V together.
//
// Four vectors of queries (heads of one token, or of several) go through the cells in blocks, so that K and V are read
// and widened once for all four. Sums are float32 and go through the cells in their order: a vector's result does not
// depend on the others, nor on the threads. A block that no vector may look at is left out; what is masked adds nothing.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int VECTORS = 4, CELLS = 64;
constexpr uint16_t HALF_MINUS_INFINITY = 0xfc00;

inline __m256 load_half(const uint16_t * at) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) at)); }

inline float sum(__m256 x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// e^x for x ≤ 0, within 2 units in the last place; exactly 0 below -87.
inline __m256 exponential(__m256 x) {
    const __m256 keeps = _mm256_cmp_ps(x, _mm256_set1_ps(-87.f), _CMP_GT_OQ);
    x = _mm256_max_ps(x, _mm256_set1_ps(-87.f));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
    y = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(y, r), r, r), _mm256_set1_ps(1));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(keeps, _mm256_mul_ps(y, _mm256_castsi256_ps(power)));
}

struct Cells {  // of one stream and one head of K and V, float16
    const char *k, *v;
    size_t k_stride, v_stride;
};

struct Vectors {  // VECTORS queries on their way through the cells
    const float * q;                   // [VECTORS][n_k], scaled
    float * total;                     // [VECTORS][n_v], the sum of the values so far
    const uint16_t * masks[VECTORS];   // float16, one number for each cell
    float highest[VECTORS], weight[VECTORS];
};

// scores[VECTORS][CELLS] = q · K
inline void score(const Vectors & x, const char * k, size_t stride, int n, int n_k, float * scores) {
    for (int j = 0; j < n; j += 2) {
        const auto * one = (const uint16_t *) (k + j * stride);
        const auto * two = j + 1 < n ? (const uint16_t *) (k + (j + 1) * stride) : one;
        __m256 a[VECTORS], b[VECTORS];
        for (int r = 0; r < VECTORS; r++) a[r] = b[r] = _mm256_setzero_ps();
        for (int d = 0; d < n_k; d += 8) {
            const __m256 first = load_half(one + d), second = load_half(two + d);
#pragma GCC unroll 4
            for (int r = 0; r < VECTORS; r++) {
                const __m256 q = _mm256_loadu_ps(x.q + r * n_k + d);
                a[r] = _mm256_fmadd_ps(q, first, a[r]);
                b[r] = _mm256_fmadd_ps(q, second, b[r]);
            }
        }
        for (int r = 0; r < VECTORS; r++) {
            scores[r * CELLS + j] = sum(a[r]);
            if (j + 1 < n) scores[r * CELLS + j + 1] = sum(b[r]);
        }
    }
}

// Weights of the cells in place of their scores. Returns the factor for the sums so far.
inline float weigh(float * scores, const uint16_t * mask, int n, float cap, float & highest, float & weight) {
    __m256 most = _mm256_set1_ps(-INFINITY);
    for (int j = n; j < CELLS; j++) scores[j] = -INFINITY;
    if (cap != 0)
        for (int j = 0; j < n; j++) scores[j] = cap * tanhf(scores[j]);
    alignas(32) uint16_t part[CELLS];
    if (n < CELLS) {
        memset(part, 0, sizeof part);
        memcpy(part, mask, n * sizeof *part);
        mask = part;
    }
    for (int j = 0; j < CELLS; j += 8) {
        const __m256 s = _mm256_add_ps(_mm256_loadu_ps(scores + j), load_half(mask + j));
        _mm256_storeu_ps(scores + j, s);
        most = _mm256_max_ps(most, s);
    }
    float parts[8], top = highest;
    _mm256_storeu_ps(parts, most);
    for (const float part_top : parts) top = fmaxf(top, part_top);
    if (top == -INFINITY) {
        memset(scores, 0, CELLS * sizeof *scores);
        return 1;
    }
    __m256 total = _mm256_setzero_ps();
    for (int j = 0; j < CELLS; j += 8) {
        const __m256 p = exponential(_mm256_sub_ps(_mm256_loadu_ps(scores + j), _mm256_set1_ps(top)));
        _mm256_storeu_ps(scores + j, p);
        total = _mm256_add_ps(total, p);
    }
    const float factor = highest == top ? 1 : highest == -INFINITY ? 0 : expf(highest - top);
    weight = weight * factor + sum(total);
    highest = top;
    return factor;
}

// total = total · factor + weights · V
inline void add_values(const Vectors & x, const char * v, size_t stride, int n, int n_v, const float * weights, const float * factors) {
    for (int d = 0; d < n_v; d += 16) {
        __m256 low[VECTORS], high[VECTORS];
#pragma GCC unroll 4
        for (int r = 0; r < VECTORS; r++) {
            const __m256 factor = _mm256_set1_ps(factors[r]);
            low[r] = _mm256_mul_ps(factor, _mm256_loadu_ps(x.total + r * n_v + d));
            high[r] = _mm256_mul_ps(factor, _mm256_loadu_ps(x.total + r * n_v + d + 8));
        }
        for (int j = 0; j < n; j++) {
            const auto * row = (const uint16_t *) (v + j * stride) + d;
            const __m256 first = load_half(row), second = load_half(row + 8);
#pragma GCC unroll 4
            for (int r = 0; r < VECTORS; r++) {
                const __m256 p = _mm256_broadcast_ss(weights + r * CELLS + j);
                low[r] = _mm256_fmadd_ps(p, first, low[r]);
                high[r] = _mm256_fmadd_ps(p, second, high[r]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < VECTORS; r++) {
            _mm256_storeu_ps(x.total + r * n_v + d, low[r]);
            _mm256_storeu_ps(x.total + r * n_v + d + 8, high[r]);
        }
    }
}

inline bool is_masked(const uint16_t * mask, int n) {
    int j = 0;
    for (const __m256i infinite = _mm256_set1_epi16((short) HALF_MINUS_INFINITY); j + 16 <= n; j += 16)
        if (_mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_loadu_si256((const __m256i *) (mask + j)), infinite)) != -1) return false;
    for (; j < n; j++)
        if (mask[j] != HALF_MINUS_INFINITY) return false;
    return true;
}

// Take the vectors through the `n` cells from `first` on.
inline void attend_block(Vectors & x, const Cells & cells, int64_t first, int n, int n_k, int n_v, float cap) {
    bool sees = false;
    for (int r = 0; r < VECTORS && !sees; r++) sees = !is_masked(x.masks[r] + first, n);
    if (!sees) return;
    alignas(32) float weights[VECTORS * CELLS];
    float factors[VECTORS];
    score(x, cells.k + first * cells.k_stride, cells.k_stride, n, n_k, weights);
    for (int r = 0; r < VECTORS; r++)
        factors[r] = weigh(weights + r * CELLS, x.masks[r] + first, n, cap, x.highest[r], x.weight[r]);
    add_values(x, cells.v + first * cells.v_stride, cells.v_stride, n, n_v, weights, factors);
}
