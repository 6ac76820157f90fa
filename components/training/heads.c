/* Attention of all heads in bfloat16, forward and backward, for x86 processors that multiply pairs of bfloat16.

   One task is one head of one row. Its scores stay in the cache of one core, and the backward pass computes them again
   (Dao et al. 2022). Every product is made of tiles, 8 rows of 32 sums; what is summed lies in pairs, two neighbours in
   one word of 32 bits, as vdpbf16ps reads them.

   qkv         (tokens, 3, heads, features): queries, whose scores are exponents of two, keys, values
   seen        (tokens, heads, features): what each query sees
   norms       (tokens, heads): of each query, log2 of its sum of powers
   row r       has length[r] tokens from first[r] on; what belongs to no row is not touched
   workspace   of `threads` threads, each `workspace(...)` bytes, which lie on a multiple of 64 */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define TILE 8   /* rows of a tile */
#define LANES 16 /* sums that a register holds; there are two beside each other */
#define WIDE (2 * LANES)
#define LN_2 0.6931471806f

typedef uint16_t half; /* the bits of a bfloat16 */
typedef uint32_t pair;
typedef struct {
    long tokens, hidden; /* words from a token to the next in qkv, and in seen */
    int length, filled, features, heads;
} Head;

static long up(long n, long to) { return (n + to - 1) / to * to; }

/* --- products */

/* sums[i][:] = sum over s of a[i * row + s * step] · b[s * wide + :], each of pairs. */
static inline __attribute__((always_inline)) void tile(const pair *a, long row, long step, int steps, const pair *b,
                                                       long wide, __m512 sums[TILE][2]) {
    for (int i = 0; i < TILE; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int s = 0; s < steps; s++, a += step, b += wide) {
        __m512bh left = (__m512bh)_mm512_loadu_si512(b), right = (__m512bh)_mm512_loadu_si512(b + LANES);
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) {
            __m512bh each = (__m512bh)_mm512_set1_epi32((int)a[i * row]);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], each, left);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], each, right);
        }
    }
}

/* Into c, (TILE, across). */
static void product(const pair *a, long row, long step, int steps, const pair *b, long wide, float *c, long across) {
    __m512 sums[TILE][2];
    tile(a, row, step, steps, b, wide, sums);
    for (int i = 0; i < TILE; i++, c += across) {
        _mm512_store_ps(c, sums[i][0]);
        _mm512_store_ps(c + LANES, sums[i][1]);
    }
}

static __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

/* The first `rows` of them, each times its factor, as bfloat16. */
static void product_narrow(const pair *a, long row, long step, int steps, const pair *b, long wide, half *c,
                           long across, int rows, const float factors[TILE]) {
    __m512 sums[TILE][2];
    tile(a, row, step, steps, b, wide, sums);
    for (int i = 0; i < rows; i++, c += across) {
        __m512 factor = _mm512_set1_ps(factors[i]);
        _mm256_storeu_si256((__m256i *)c, narrow(_mm512_mul_ps(sums[i][0], factor)));
        _mm256_storeu_si256((__m256i *)(c + LANES), narrow(_mm512_mul_ps(sums[i][1], factor)));
    }
}

/* --- where what is multiplied lies */

static void *piece(char **workspace, size_t bytes) {
    char *begin = *workspace;
    *workspace += up(bytes, 64);
    return begin;
}

/* The rows of one head, behind each other, (filled, features), with zeros after the last. */
static half *rows_of(const half *from, long apart, Head at, half *to) {
    for (int t = 0; t < at.length; t++)
        for (int f = 0; f < at.features; f += WIDE)
            _mm512_store_si512(to + (long)t * at.features + f, _mm512_loadu_si512(from + t * apart + f));
    memset(to + (long)at.length * at.features, 0, sizeof(half) * (at.filled - at.length) * at.features);
    return to;
}

static __m512i paired(__m256i one, __m256i two) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(one), _mm512_slli_epi32(_mm512_cvtepu16_epi32(two), 16));
}

/* Pairs of neighbouring features, (features / 2, filled): for sums over features. */
static pair *by_feature(const half *rows, Head at, pair *to) {
    int pairs = at.features / 2;
    const pair *from = (const pair *)rows;
    __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                        _mm512_set1_epi32(pairs));
    for (int t = 0; t < at.filled; t += LANES)
        for (int p = 0; p < pairs; p++)
            _mm512_store_si512(to + (long)p * at.filled + t,
                               _mm512_i32gather_epi32(places, from + (long)t * pairs + p, 4));
    return to;
}

/* Pairs of neighbouring tokens, (filled / 2, features): for sums over tokens. */
static pair *by_token(const half *rows, Head at, pair *to) {
    pair *next = to;
    for (int t = 0; t < at.filled; t += 2, rows += 2 * at.features)
        for (int f = 0; f < at.features; f += LANES, next += LANES)
            _mm512_store_si512(next, paired(_mm256_load_si256((const __m256i *)(rows + f)),
                                            _mm256_load_si256((const __m256i *)(rows + at.features + f))));
    return to;
}

/* --- softmax by powers of two */

/* 2^x to 4e-6 of it: least squares at Chebyshev's points of half an exponent around a whole one. */
static inline __attribute__((always_inline)) __m512 power(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, 8), rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(0.00967604f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.05592204f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.24022107f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.69312103f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

/* Which of the lanes from `from` on are of a key. */
static __mmask16 keys_at(Head at, int from) {
    int left = at.length - from;
    return left >= LANES ? 0xFFFF : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

/* Powers of one query's scores, the largest of which is 1, as bfloat16. Returns the largest score; `total` is their sum.
   Keys that are none have no power. */
static float powers_of(float *scores, Head at, half *powers, float *total) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int j = 0; j < at.filled; j += LANES)
        most = _mm512_mask_max_ps(most, keys_at(at, j), most, _mm512_load_ps(scores + j));
    float largest = _mm512_reduce_max_ps(most);
    for (int j = 0; j < at.filled; j += LANES) {
        __m512 each = power(_mm512_sub_ps(_mm512_load_ps(scores + j), _mm512_set1_ps(largest)));
        each = _mm512_maskz_mov_ps(keys_at(at, j), each);
        sum = _mm512_add_ps(sum, each);
        _mm256_store_si256((__m256i *)(powers + j), narrow(each));
    }
    *total = _mm512_reduce_add_ps(sum);
    return largest;
}

/* --- one head */

static void forward(const half *q, const half *k, const half *v, half *seen, float *norms, Head at, char *space) {
    int pairs = at.features / 2;
    size_t matrix = sizeof(half) * at.filled * at.features;
    half *queries = piece(&space, matrix), *rows = piece(&space, matrix);
    pair *keys = piece(&space, matrix), *values = piece(&space, matrix);
    float *scores = piece(&space, sizeof(float) * TILE * at.filled);
    half *powers = piece(&space, sizeof(half) * TILE * at.filled);

    rows_of(q, at.tokens, at, queries);
    by_feature(rows_of(k, at.tokens, at, rows), at, keys);
    by_token(rows_of(v, at.tokens, at, rows), at, values);
    for (int i = 0; i < at.length; i += TILE) {
        int there = at.length - i < TILE ? at.length - i : TILE;
        float shares[TILE];
        for (int j = 0; j < at.filled; j += WIDE)
            product((pair *)queries + (long)i * pairs, pairs, 1, pairs, keys + j, at.filled, scores + j, at.filled);
        for (int r = 0; r < there; r++) {
            float total, largest = powers_of(scores + (long)r * at.filled, at, powers + (long)r * at.filled, &total);
            shares[r] = 1 / total;
            norms[(long)(i + r) * at.heads] = largest + log2f(total);
        }
        for (int f = 0; f < at.features; f += WIDE)
            product_narrow((pair *)powers, at.filled / 2, 1, at.filled / 2, values + f, at.features,
                           seen + i * at.hidden + f, at.hidden, there, shares);
    }
}

static void backward(const half *q, const half *k, const half *v, const half *grad, const float *norms, half *of_q,
                     half *of_k, half *of_v, Head at, char *space) {
    int pairs = at.features / 2, tiled = up(at.length, TILE);
    size_t matrix = sizeof(half) * at.filled * at.features, square = sizeof(half) * at.filled * at.filled;
    size_t strip = sizeof(float) * TILE * at.filled;
    half *queries = piece(&space, matrix), *grads = piece(&space, matrix), *rows = piece(&space, matrix);
    pair *keys = piece(&space, matrix), *values = piece(&space, matrix), *queries_by_token = piece(&space, matrix),
         *keys_by_token = piece(&space, matrix), *grads_by_token = piece(&space, matrix);
    float *shares = piece(&space, strip), *changes = piece(&space, strip);
    half *narrowed = piece(&space, strip);
    pair *shares_by_token = piece(&space, square), *changes_by_token = piece(&space, square);
    float means[TILE], ones[TILE] = {1, 1, 1, 1, 1, 1, 1, 1};

    by_token(rows_of(q, at.tokens, at, queries), at, queries_by_token);
    by_token(rows_of(grad, at.hidden, at, grads), at, grads_by_token);
    by_token(rows_of(k, at.tokens, at, rows), at, keys_by_token);
    by_feature(rows, at, keys);
    by_feature(rows_of(v, at.tokens, at, rows), at, values);
    for (int i = 0; i < at.length; i += TILE) {
        int there = at.length - i < TILE ? at.length - i : TILE;
        for (int j = 0; j < at.filled; j += WIDE) {
            product((pair *)queries + (long)i * pairs, pairs, 1, pairs, keys + j, at.filled, shares + j, at.filled);
            product((pair *)grads + (long)i * pairs, pairs, 1, pairs, values + j, at.filled, changes + j, at.filled);
        }
        for (int r = 0; r < TILE; r++) {
            float *share = shares + (long)r * at.filled, *change = changes + (long)r * at.filled;
            __m512 norm = _mm512_set1_ps(r < there ? norms[(long)(i + r) * at.heads] : 0);
            __m512 sum = _mm512_setzero_ps();
            for (int j = 0; j < at.filled; j += LANES) {
                __mmask16 kept = r < there ? keys_at(at, j) : 0; /* beyond the last row nothing is seen */
                __m512 each = _mm512_maskz_mov_ps(kept, power(_mm512_sub_ps(_mm512_load_ps(share + j), norm)));
                _mm512_store_ps(share + j, each);
                sum = _mm512_fmadd_ps(each, _mm512_load_ps(change + j), sum);
            }
            means[r] = _mm512_reduce_add_ps(sum);
        }
        __m512 unit = _mm512_set1_ps(LN_2);
        for (int r = 0; r < TILE; r += 2) { /* two queries make pairs */
            float *share = shares + (long)r * at.filled, *change = changes + (long)r * at.filled;
            half *narrow_row = narrowed + (long)r * at.filled;
            pair *share_row = shares_by_token + (long)(i + r) / 2 * at.filled;
            pair *change_row = changes_by_token + (long)(i + r) / 2 * at.filled;
            for (int j = 0; j < at.filled; j += LANES) {
                __m512 one = _mm512_load_ps(share + j), two = _mm512_load_ps(share + at.filled + j);
                __m512 of_one = _mm512_sub_ps(_mm512_load_ps(change + j), _mm512_set1_ps(means[r]));
                __m512 of_two = _mm512_sub_ps(_mm512_load_ps(change + at.filled + j), _mm512_set1_ps(means[r + 1]));
                __m256i score = narrow(_mm512_mul_ps(_mm512_mul_ps(one, unit), of_one));
                __m256i next = narrow(_mm512_mul_ps(_mm512_mul_ps(two, unit), of_two));
                _mm256_store_si256((__m256i *)(narrow_row + j), score);
                _mm256_store_si256((__m256i *)(narrow_row + at.filled + j), next);
                _mm512_store_si512(change_row + j, paired(score, next));
                _mm512_store_si512(share_row + j, paired(narrow(one), narrow(two)));
            }
        }
        for (int f = 0; f < at.features; f += WIDE)
            product_narrow((pair *)narrowed, at.filled / 2, 1, at.filled / 2, keys_by_token + f, at.features,
                           of_q + i * at.tokens + f, at.tokens, there, ones);
    }
    for (int j = 0; j < at.length; j += TILE) {
        int there = at.length - j < TILE ? at.length - j : TILE;
        for (int f = 0; f < at.features; f += WIDE) {
            product_narrow(changes_by_token + j, 1, at.filled, tiled / 2, queries_by_token + f, at.features,
                           of_k + j * at.tokens + f, at.tokens, there, ones);
            product_narrow(shares_by_token + j, 1, at.filled, tiled / 2, grads_by_token + f, at.features,
                           of_v + j * at.tokens + f, at.tokens, there, ones);
        }
    }
}

/* --- all heads of all rows */

/* Bytes that a thread works in; `back` for `attend_back`. */
int64_t workspace(int64_t longest, int64_t features, int back) {
    int64_t filled = up(longest, WIDE), matrix = sizeof(half) * filled * features, strip = sizeof(float) * TILE * filled;
    return back ? 8 * matrix + 3 * strip + 2 * sizeof(half) * filled * filled : 4 * matrix + 2 * strip;
}

static Head head_of(long length, int heads, int features) {
    long hidden = (long)heads * features;
    return (Head){3 * hidden, hidden, length, up(length, WIDE), features, heads};
}

void attend(const half *qkv, const int64_t *first, const int64_t *length, int rows, int heads, int features, half *seen,
            float *norms, char *spaces, int64_t space, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int task = 0; task < rows * heads; task++) {
        Head at = head_of(length[task / heads], heads, features);
        long token = first[task / heads], place = (long)(task % heads) * features;
        const half *q = qkv + token * at.tokens + place;
        forward(q, q + at.hidden, q + 2 * at.hidden, seen + token * at.hidden + place,
                norms + token * heads + task % heads, at, spaces + space * omp_get_thread_num());
    }
}

/* grads: of seen.  made: of qkv, as it lies. */
void attend_back(const half *qkv, const int64_t *first, const int64_t *length, int rows, int heads, int features,
                 const half *grads, const float *norms, half *made, char *spaces, int64_t space, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int task = 0; task < rows * heads; task++) {
        Head at = head_of(length[task / heads], heads, features);
        long token = first[task / heads], place = (long)(task % heads) * features;
        const half *q = qkv + token * at.tokens + place;
        half *of_q = made + token * at.tokens + place;
        backward(q, q + at.hidden, q + 2 * at.hidden, grads + token * at.hidden + place,
                 norms + token * heads + task % heads, of_q, of_q + at.hidden, of_q + 2 * at.hidden, at,
                 spaces + space * omp_get_thread_num());
    }
}
