/* One decoding step of a model built like Llama, on a CPU: what decoder.Step computes.

Two things make it faster than the same in torch. A product of few rows waits for its weights: here the next
rows of W are fetched while these are multiplied. And what lies between the products takes the time of its
arithmetic, not that of a hundred calls.

N slots are decoded; R = N rows, or 2N in dual numbers: values in rows 0..N-1, their derivatives along g in
rows N..2N-1 (see dual.py). A row's result does not depend on the other rows. NaN stays NaN. Matrices lie by
rows, but keys by columns, so that both products of attention add up whole vectors. native.py has the same
structs. Weights may be bfloat16; all else is float32.

At the end of what needs matrix registers: products of float32 matrices, for training passes (matmul.py).
*/

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef __AVX512F__
#error "the 16 sums of a tile need 32 registers of 16 floats: elsewhere torch is as fast"
#endif

/* A tile has 4 rows and 4 outputs; its 16 sums stay in registers. A panel's rows of W stay in L1 or L2.
PAGE: positions of a page of the cache, see cache.py. */
enum { LANES = 16, TILE = 4, PANEL = 8, PAGE = 64 };

typedef int64_t size;
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif

typedef struct {
    size outs, ins, rank;
    const void *weight;         /* (outs + rank, ins): W, below it the right factor of g */
    const void *g;              /* (outs, ins): g where it has no factors, else NULL */
    const float *left;          /* (rank, outs): the left factor of g; NULL without factors */
    const float *bias, *d_bias; /* (outs), or NULL */
} product;

typedef struct {
    const float *scale, *d_scale; /* NULL: no such norm */
    float eps;
} norm;

typedef struct {
    norm before_attention, before_mlp, of_queries, of_keys;
    product qkv, output, gate_up, down;
    float *keys;   /* of the first page: (kv_heads, width, PAGE) */
    float *values; /* likewise: (kv_heads, PAGE, v_stride), of which width are used */
    size window;   /* positions seen; 0: all */
    float scaling;
} layer;

typedef struct {
    size num_layers, hidden, heads, kv_heads, width, inner, is_dual;
    const layer *layers;
    norm last;
    product head;
} model;

/* For weights in bfloat16; all NULL for float32. */
typedef struct {
    float *panels;    /* (threads, PANEL, widest input) */
    uint16_t *packed; /* (R to whole tiles, widest input, 2): see `pack`; NULL without matrix registers */
} halves;

typedef struct {
    size rows;                       /* N */
    size slot_pages;                 /* pages that a slot may have */
    size page_stride, part_stride;   /* floats from page to page, and from values to their derivatives */
    size v_stride;                   /* a multiple of LANES */
    const size *pages;               /* (N, slot_pages): each slot's, in order */
    const float *cos, *sin;          /* (N, width) */
    const size *lengths;             /* (N): tokens in the cache before this one */
    float *x;                        /* (R, hidden): embeddings; overwritten */
    float *logits;                   /* (R, outs of the head) */
    float *normed, *wide, *mixed;    /* (R, hidden), (R, widest of qkv and gate_up), (R, widest input) */
    float *thin;                     /* (N, rank of the product) */
    halves room;
    float *scores, *head_rows;       /* (threads, 2 heads / kv_heads, slot_pages PAGE or v_stride) */
} place;

static inline size least(size a, size b) { return a < b ? a : b; }

static inline vec load(const float *p) { return *(const vec *)p; }

/* Lane 4 r + o: the sum of the lanes of a[4 r + o]. */
static inline vec sum_lanes(const vec *a)
{
    vec b[8], c[4], d[2];
    for (int i = 0; i < 8; i++)
        b[i] = PICK(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
             + PICK(a[2 * i], a[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        c[i] = PICK(b[2 * i], b[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
             + PICK(b[2 * i], b[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        d[i] = PICK(c[2 * i], c[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29)
             + PICK(c[2 * i], c[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return PICK(d[0], d[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
         + PICK(d[0], d[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* y[r y_stride + o] (+)= w[o] . x[r] for num_rows rows and num_outs outputs, TILE of each at most, of strides
ins. Meanwhile `ahead` is fetched, stride / LANES floats for each float of a w. */
static inline __attribute__((always_inline)) void tile(
    size num_rows, size num_outs, const float *w, const float *x, size ins, const float *ahead, size stride,
    float *y, size y_stride, int add)
{
    vec sums[TILE * TILE] = {{0}};
    size i = 0;
    for (; i + LANES <= ins; i += LANES) {
        __builtin_prefetch(ahead + i * stride / LANES, 0, 2);
        vec ws[TILE], xs[TILE];
        for (size o = 0; o < num_outs; o++)
            ws[o] = load(w + o * ins + i);
        for (size r = 0; r < num_rows; r++)
            xs[r] = load(x + r * ins + i);
#pragma GCC unroll 4
        for (size r = 0; r < num_rows; r++)
#pragma GCC unroll 4
            for (size o = 0; o < num_outs; o++)
                sums[TILE * r + o] += xs[r] * ws[o];
    }
    vec result = sum_lanes(sums);
    for (size r = 0; r < num_rows; r++)
        for (size o = 0; o < num_outs; o++) {
            float sum = result[TILE * r + o];
            for (size k = i; k < ins; k++)
                sum += x[r * ins + k] * w[o * ins + k];
            y[r * y_stride + o] = add ? y[r * y_stride + o] + sum : sum;
        }
}

/* bfloat16 is the upper half of float32. */
static void widen(const uint16_t *halves, float *floats, size count)
{
    for (size i = 0; i < count; i++) {
        union { uint32_t bits; float value; } wide = {(uint32_t)halves[i] << 16};
        floats[i] = wide.value;
    }
}

/* y (+)= x W^T: rows `first`, ... of w (outs of ins, float32 or bfloat16), x (rows, ins), y (rows, outs) with
y_stride floats from row to row. Meanwhile as many rows of w after these are fetched. */
static void multiply(
    const void *weight, size first, size outs, size ins, const float *x, size rows, float *y, size y_stride,
    int add, float *panel)
{
    const float *w = (const float *)weight + first * ins, *ahead = w + outs * ins;
    size num_floats = outs * ins;
    if (panel) {
        const uint16_t *halves = (const uint16_t *)weight + first * ins;
        widen(halves, panel, outs * ins);
        w = panel, ahead = (const float *)(halves + outs * ins), num_floats /= 2;
    }
    size num_tiles = (rows + TILE - 1) / TILE * ((outs + TILE - 1) / TILE), share = num_floats / num_tiles;
    size stride = LANES * share / ins;
    for (size r = 0; r < rows; r += TILE)
        for (size o = 0; o < outs; o += TILE, ahead += share) {
            const float *ws = w + o * ins, *xs = x + r * ins;
            float *ys = y + r * y_stride + o;
            if (outs - o < TILE)
                for (size k = 0; k < outs - o; k++)
                    for (size i = 0; i < least(TILE, rows - r); i++) {
                        float *target = ys + i * y_stride + k;
                        tile(1, 1, ws + k * ins, xs + i * ins, ins, ahead, stride, target, y_stride, add);
                    }
            else if (rows - r >= TILE)
                tile(TILE, TILE, ws, xs, ins, ahead, stride, ys, y_stride, add);
            else if (rows - r == 3)
                tile(3, TILE, ws, xs, ins, ahead, stride, ys, y_stride, add);
            else if (rows - r == 2)
                tile(2, TILE, ws, xs, ins, ahead, stride, ys, y_stride, add);
            else
                tile(1, TILE, ws, xs, ins, ahead, stride, ys, y_stride, add);
        }
}

/* dp = p (ds - sum of p ds), where ds was in its place. */
static void change_of_softmax(const float *p, float *dp, size count)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size i = 0; i < count; i++)
        sum += p[i] * dp[i];
#pragma omp simd
    for (size i = 0; i < count; i++)
        dp[i] = p[i] * (dp[i] - sum);
}

/* `num_vecs` times LANES columns of y (+)= p v, in num_rows rows; meanwhile `lines` times LANES floats of
`ahead` are fetched for each row of v. */
static inline __attribute__((always_inline)) void mix_columns(
    size num_vecs, size num_rows, const float *p, size p_stride, const float *v, size v_stride, size length,
    const float *ahead, size lines, float *y, size y_stride, int add)
{
    vec sums[TILE][TILE] = {{{0}}};
    for (size l = 0; l < length; l++) {
        for (size k = 0; k < lines; k++, ahead += LANES)
            __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 4
        for (size c = 0; c < num_vecs; c++) {
            vec part = load(v + l * v_stride + c * LANES);
#pragma GCC unroll 4
            for (size r = 0; r < num_rows; r++)
                sums[r][c] += p[r * p_stride + l] * part;
        }
    }
    for (size r = 0; r < num_rows; r++)
        for (size c = 0; c < num_vecs; c++) {
            float *target = y + r * y_stride + c * LANES;
            if (add)
                sums[r][c] += load(target);
            *(vec *)target = sums[r][c];
        }
}

static inline __attribute__((always_inline)) void mix_rows(
    size num_rows, const float *p, size p_stride, const float *v, size v_stride, size length, size columns,
    const float *ahead, size lines, float *y, size y_stride, int add)
{
    size c = 0;
    for (; c + TILE * LANES <= columns; c += TILE * LANES, ahead += length * lines * LANES)
        mix_columns(TILE, num_rows, p, p_stride, v + c, v_stride, length, ahead, lines, y + c, y_stride, add);
    for (; c + LANES <= columns; c += LANES)
        mix_columns(1, num_rows, p, p_stride, v + c, v_stride, length, ahead, 0, y + c, y_stride, add);
    for (; c < columns; c++)
        for (size r = 0; r < num_rows; r++) {
            float sum = add ? y[r * y_stride + c] : 0;
            for (size l = 0; l < length; l++)
                sum += p[r * p_stride + l] * v[l * v_stride + c];
            y[r * y_stride + c] = sum;
        }
}

/* y (+)= p v: p (rows, length), v (length, columns), y (rows, columns). Meanwhile as much of `ahead` is
fetched as v has, at least where there are TILE columns of vectors. */
static void mix(
    const float *p, size p_stride, size rows, const float *v, size v_stride, size length, size columns,
    const float *ahead, float *y, size y_stride, int add)
{
    size passes = (rows + TILE - 1) / TILE, lines = (TILE + passes - 1) / passes;
    size share = lines * LANES * length * (columns / (TILE * LANES));
    for (; rows >= TILE; rows -= TILE, p += TILE * p_stride, y += TILE * y_stride, ahead += share)
        mix_rows(TILE, p, p_stride, v, v_stride, length, columns, ahead, lines, y, y_stride, add);
    if (rows == 3)
        mix_rows(3, p, p_stride, v, v_stride, length, columns, ahead, lines, y, y_stride, add);
    else if (rows == 2)
        mix_rows(2, p, p_stride, v, v_stride, length, columns, ahead, lines, y, y_stride, add);
    else if (rows == 1)
        mix_rows(1, p, p_stride, v, v_stride, length, columns, ahead, lines, y, y_stride, add);
}

static void add_bias(const float *bias, size outs, float *y, size y_stride, size rows)
{
    for (size r = 0; r < rows; r++)
        for (size o = 0; o < outs; o++)
            y[r * y_stride + o] += bias[o];
}

/* What multiplies bfloat16 in registers of 16 rows of 64 bytes (AMX): W as it lies, and x as the sum of two
bfloat16, so that hardly more is rounded than the weights. */
enum { SIDE = 16, DEPTH = 32, PIECE = SIDE * DEPTH };

#ifdef __AMX_BF16__
/* Whether the system lets this process use them. */
int ads_has_tiles(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

static void begin_tiles(void)
{
    struct { uint8_t palette, unused[15]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (int i = 0; i < 8; i++)
        shape.bytes[i] = 2 * DEPTH, shape.rows[i] = SIDE;
    __asm__ volatile("" : : "r"(&shape) : "memory"); /* gcc 12 takes _tile_loadconfig to read 8 bytes */
    _tile_loadconfig(&shape);
}

static void end_tiles(void) { _tile_release(); }

/* The upper half of a float's bits, and that of what it leaves of the float. */
static inline void split(float x, uint16_t *upper, uint16_t *rest)
{
    union { float value; uint32_t bits; } whole = {x}, head = whole;
    head.bits &= 0xffff0000;
    whole.value -= head.value;
    *upper = head.bits >> 16, *rest = whole.bits >> 16;
}

/* x (rows, ins) as pieces of DEPTH inputs of SIDE rows, first the upper halves and then the rests, each
(DEPTH / 2, SIDE, 2). By all threads. */
static void pack(const float *x, size rows, size ins, uint16_t *packed)
{
    size pieces = ins / DEPTH;
#pragma omp for schedule(static) collapse(2)
    for (size block = 0; block < (rows + SIDE - 1) / SIDE; block++)
        for (size piece = 0; piece < pieces; piece++) {
            uint16_t *upper = packed + (block * pieces + piece) * 2 * PIECE;
            for (size r = 0; r < SIDE; r++)
                for (size i = 0; i < DEPTH; i++) {
                    size row = block * SIDE + r, to = i / 2 * 2 * SIDE + 2 * r + i % 2;
                    split(row < rows ? x[row * ins + piece * DEPTH + i] : 0, upper + to, upper + PIECE + to);
                }
        }
}

/* y[r][o] (+)= sums[o][r] for SIDE outputs. */
static void put(const float *sums, size rows, float *y, size y_stride, int add)
{
    const __m512i steps = _mm512_mullo_epi32(
        _mm512_set1_epi32(SIDE), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (size r = 0; r < rows; r++) {
        vec found = (vec)_mm512_i32gather_ps(steps, sums + r, sizeof(float));
        vec *target = (vec *)(y + r * y_stride);
        if (add)
            found += *target;
        *target = found;
    }
}

/* y (+)= x W^T for SIDE or 2 SIDE outputs, x packed. Meanwhile as many rows of w after these are fetched. */
static void multiply_tiles(
    const uint16_t *w, size outs, size ins, const uint16_t *packed, size rows, float *y, size y_stride,
    int add)
{
    float sums[4][SIDE * SIDE];
    size pieces = ins / DEPTH, stride = ins * sizeof *w;
    for (size first = 0; first < rows; first += 2 * SIDE, packed += 4 * pieces * PIECE) {
        int is_wide = rows - first > SIDE;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (size piece = 0; piece < pieces; piece++) {
            const uint16_t *ws = w + piece * DEPTH, *xs = packed + piece * 2 * PIECE;
            for (size o = 0; o < (first ? 0 : outs); o++)
                __builtin_prefetch(ws + (outs + o) * ins, 0, 2);
            _tile_loadd(4, ws, stride);
            if (outs > SIDE)
                _tile_loadd(5, ws + SIDE * ins, stride);
            for (int part = 0; part < 2; part++, xs += PIECE) {
                _tile_loadd(6, xs, 2 * DEPTH);
                _tile_dpbf16ps(0, 4, 6);
                if (outs > SIDE)
                    _tile_dpbf16ps(1, 5, 6);
                if (is_wide) {
                    _tile_loadd(7, xs + 2 * pieces * PIECE, 2 * DEPTH);
                    _tile_dpbf16ps(2, 4, 7);
                    if (outs > SIDE)
                        _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
        _tile_stored(0, sums[0], 4 * SIDE);
        _tile_stored(1, sums[1], 4 * SIDE);
        _tile_stored(2, sums[2], 4 * SIDE);
        _tile_stored(3, sums[3], 4 * SIDE);
        for (size k = 0; k < 4; k++) {
            size row = first + k / 2 * SIDE, o = k % 2 * SIDE;
            if (row < rows && o < outs)
                put(sums[k], least(SIDE, rows - row), y + row * y_stride + o, y_stride, add);
        }
    }
}

/* Products of float32 matrices in the same registers. A float is the sum of three bfloat16, its upper bits,
the next and the last; of the nine products of parts the six above 2^-24 are added up. The result is as close
as in float32 arithmetic; six steps of these registers take a third of its time, with packing two thirds. */
enum { PARTS = 3, SQUARE = SIDE * SIDE, BLOCK = 2 * SIDE, STRIP = PARTS * BLOCK * SIDE };
enum { FLUSH_TO_ZERO = 0x8040 }; /* results and operands, in the control register */
enum { MOST_DEPTH = 640, MOST_ROWS = 4096, GROUP = 6 }; /* of panels that stay in L2 and L3 */

/* An operand (rows, depth): stride floats from row to row, or where it lies transposed from column to
column. */
typedef struct {
    const float *at;
    size rows, depth, stride;
    int is_transposed;
} operand;

/* Which of 16 lanes are below count. */
static inline __mmask16 below(size count) { return count < LANES ? (1 << (count > 0 ? count : 0)) - 1 : -1; }

/* The transpose of 16 rows of 16 numbers: blocks off the diagonal change places, of 8, 4, 2 and 1. */
static inline __attribute__((always_inline)) void transpose(__m512i *rows)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
    for (int step = 8; step; step /= 2) {
        __m512i own = _mm512_set1_epi32(step), other = _mm512_set1_epi32(LANES - step);
        __mmask16 is_high = _mm512_test_epi32_mask(lane, own);
        __m512i low = _mm512_mask_add_epi32(lane, is_high, lane, other);
        __m512i high = _mm512_add_epi32(low, own);
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++)
            if (!(i & step)) {
                __m512i a = rows[i], b = rows[i + step];
                rows[i] = _mm512_permutex2var_epi32(a, low, b);
                rows[i + step] = _mm512_permutex2var_epi32(a, high, b);
            }
    }
}

/* SIDE rows and DEPTH columns of an operand, zero beyond its end, as PARTS squares of pairs of bfloat16:
column k lies beside k + SIDE. Of a left factor a square has rows (row, k), of a right one (k, row). */
static inline __attribute__((always_inline)) void pack_square(
    const operand *m, size row, size k, int is_left, int32_t *packed)
{
    const __m512i upper = _mm512_set1_epi32(0xffff0000);
    __m512i near[SIDE], far[SIDE];
    size lines = m->is_transposed ? m->depth - k : m->rows - row;
    size count = m->is_transposed ? m->rows - row : m->depth - k;
    const float *at = m->is_transposed ? m->at + k * m->stride + row : m->at + row * m->stride + k;
    size apart = m->is_transposed ? SIDE * m->stride : SIDE;
    __mmask16 of_near = below(count), of_far = m->is_transposed ? of_near : below(count - SIDE);
    size last_far = m->is_transposed ? lines - SIDE : lines;
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++, at += m->stride) {
        near[i] = _mm512_maskz_loadu_epi32(i < lines ? of_near : 0, at);
        far[i] = _mm512_maskz_loadu_epi32(i < last_far ? of_far : 0, at + apart);
    }
    if (m->is_transposed == is_left) {
        transpose(near);
        transpose(far);
    }
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) {
        __m512 a = (__m512)near[i], b = (__m512)far[i];
#pragma GCC unroll 3
        for (int part = 0; part < PARTS; part++) {
            __m512i a_head = (__m512i)a & upper, b_head = (__m512i)b & upper;
            _mm512_store_si512(packed + part * 2 * SQUARE + i * SIDE, b_head | _mm512_srli_epi32(a_head, 16));
            a -= (__m512)a_head, b -= (__m512)b_head;
        }
    }
}

/* `panels` times BLOCK rows from `first`, columns from, ..., to - 1: each panel a strip for every DEPTH of
columns, panel_size numbers from one to the next. */
static void pack_panels(
    const operand *m, size first, size panels, size from, size to, int is_left, int32_t *packed,
    size panel_size)
{
    size steps = (to - from + DEPTH - 1) / DEPTH;
    operand part = *m;
    part.depth = to;
    for (size i = 0; i < steps * panels; i++) { /* as the operand lies in memory */
        size panel = m->is_transposed ? i % panels : i / steps;
        size step = m->is_transposed ? i / panels : i % steps;
        size row = first + panel * BLOCK, k = from + step * DEPTH;
        int32_t *strip = packed + panel * panel_size + step * STRIP;
        pack_square(&part, row, k, is_left, strip);
        pack_square(&part, row + SIDE, k, is_left, strip + SQUARE);
    }
}

#define LEFT(part) \
    _tile_loadd(4, a + (part) * 2 * SQUARE, 2 * DEPTH); \
    _tile_loadd(5, a + ((part) * 2 + 1) * SQUARE, 2 * DEPTH)
#define RIGHT(part) \
    _tile_loadd(6, b + (part) * 2 * SQUARE, 2 * DEPTH); \
    _tile_loadd(7, b + ((part) * 2 + 1) * SQUARE, 2 * DEPTH)
#define MULTIPLY \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7)
#define FETCH(at, count, where) \
    for (size line = 0; line < (count); line++) \
        __builtin_prefetch((at) + line * SIDE, 0, where)

/* y (+)= a b of one panel each: BLOCK rows and columns of y. Meanwhile the next strips come to L1, and as
many lines of `ahead` to L2 as a GROUPth of the next panel has. */
static void multiply_panels(
    const int32_t *a, const int32_t *b, size steps, const int32_t *ahead, float *y, size y_stride, int add)
{
    enum { LINES = STRIP / SIDE, THIRD = LINES / 3 };
    size stride = y_stride * sizeof *y;
    float *below_y = y + SIDE * y_stride;
    if (add) {
        _tile_loadd(0, y, stride);
        _tile_loadd(1, y + SIDE, stride);
        _tile_loadd(2, below_y, stride);
        _tile_loadd(3, below_y + SIDE, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size step = 0; step < steps; step++, a += STRIP, b += STRIP, ahead += STRIP / GROUP) {
        FETCH(ahead, LINES / GROUP, 2);
        LEFT(2);
        RIGHT(0);
        MULTIPLY;
        FETCH(a + STRIP, THIRD, 3);
        LEFT(1);
        MULTIPLY;
        FETCH(b + STRIP, THIRD, 3);
        RIGHT(1);
        MULTIPLY;
        FETCH(a + STRIP + THIRD * SIDE, THIRD, 3);
        LEFT(0);
        MULTIPLY;
        FETCH(b + STRIP + THIRD * SIDE, THIRD, 3);
        RIGHT(0);
        MULTIPLY;
        FETCH(a + STRIP + 2 * THIRD * SIDE, THIRD, 3);
        RIGHT(2);
        MULTIPLY;
        FETCH(b + STRIP + 2 * THIRD * SIDE, THIRD, 3);
    }
    _tile_stored(0, y, stride);
    _tile_stored(1, y + SIDE, stride);
    _tile_stored(2, below_y, stride);
    _tile_stored(3, below_y + SIDE, stride);
}

/* The same where y may end before the block does. */
static void multiply_block(
    const int32_t *a, const int32_t *b, size steps, const int32_t *ahead, float *y, size y_stride, size rows,
    size columns, int add)
{
    if (rows >= BLOCK && columns >= BLOCK) {
        multiply_panels(a, b, steps, ahead, y, y_stride, add);
        return;
    }
    float whole[BLOCK * BLOCK];
    size bytes = least(columns, BLOCK) * sizeof *y;
    for (size r = 0; add && r < least(rows, BLOCK); r++)
        memcpy(whole + r * BLOCK, y + r * y_stride, bytes);
    multiply_panels(a, b, steps, ahead, whole, BLOCK, add);
    for (size r = 0; r < least(rows, BLOCK); r++)
        memcpy(y + r * y_stride, whole + r * BLOCK, bytes);
}

static size depth_at_once(size depth)
{
    size parts = (depth + MOST_DEPTH - 1) / MOST_DEPTH;
    return (depth + parts * DEPTH - 1) / (parts * DEPTH) * DEPTH;
}

/* Of the room, in numbers of 32 bits, that ads_matmul needs. */
size ads_matmul_room(size rows, size depth, int num_threads)
{
    size panels = (least(rows, MOST_ROWS) + BLOCK - 1) / BLOCK + 1 + num_threads * GROUP;
    return panels * depth_at_once(depth) / DEPTH * STRIP;
}

/* y = a b^T, all of a packed by all threads, of b each thread its own share, a GROUP of panels at a time. A
number of y depends on its row of a and its row of b alone. room: begins at a multiple of 64 bytes. */
void ads_matmul(const operand *a, const operand *b, float *y, int32_t *room, int num_threads)
{
    size depth = depth_at_once(a->depth), panel_size = depth / DEPTH * STRIP;
    size shared = ((least(a->rows, MOST_ROWS) + BLOCK - 1) / BLOCK + 1) * panel_size;
    size columns = b->rows, b_panels = (columns + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(num_threads)
    {
        size thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int32_t *own = room + shared + thread * GROUP * panel_size;
        unsigned state = _mm_getcsr();
        _mm_setcsr(state | FLUSH_TO_ZERO); /* as the registers do: parts below 1e-38 take 10 times as long */
        begin_tiles();
        for (size k = 0; k < a->depth; k += depth)
            for (size first = 0; first < a->rows; first += MOST_ROWS) {
                size to = least(k + depth, a->depth), steps = (to - k + DEPTH - 1) / DEPTH;
                size a_panels = (least(a->rows - first, MOST_ROWS) + BLOCK - 1) / BLOCK;
#pragma omp for schedule(static)
                for (size i = 0; i < a_panels; i++)
                    pack_panels(a, first + i * BLOCK, 1, k, to, 1, room + i * panel_size, panel_size);
                size last = b_panels * (thread + 1) / threads, count;
                for (size j = b_panels * thread / threads; j < last; j += count) {
                    count = least(GROUP, last - j);
                    pack_panels(b, j * BLOCK, count, k, to, 0, own, panel_size);
                    for (size i = 0; i < a_panels * count; i++) {
                        size row = first + i / count * BLOCK, column = (j + i % count) * BLOCK;
                        const int32_t *left = room + i / count * panel_size;
                        const int32_t *ahead = left + panel_size + i % count * (steps * STRIP / GROUP);
                        multiply_block(left, own + i % count * panel_size, steps, ahead,
                                       y + row * columns + column, columns, a->rows - row, columns - column,
                                       k > 0);
                    }
                }
#pragma omp barrier
            }
        end_tiles();
        _mm_setcsr(state);
    }
}
#else
int ads_has_tiles(void) { return 0; }
static void begin_tiles(void) {}
static void end_tiles(void) {}
static void pack(const float *x, size rows, size ins, uint16_t *packed) {}
static void multiply_tiles(
    const uint16_t *w, size outs, size ins, const uint16_t *packed, size rows, float *y, size y_stride,
    int add)
{
}
typedef struct operand operand;
size ads_matmul_room(size rows, size depth, int num_threads) { return 0; }
void ads_matmul(const operand *a, const operand *b, float *y, int32_t *room, int num_threads) {}
#endif

/* y (+)= x W^T for outputs first, ..., first + count - 1; y has place for these. packed: NULL, or x. */
static void some_outputs(
    const void *w, size first, size count, size ins, const float *x, const uint16_t *packed, size rows,
    float *y, size y_stride, int add, float *panel)
{
    size tiled = packed ? count / SIDE * SIDE : 0;
    if (tiled)
        multiply_tiles((const uint16_t *)w + first * ins, tiled, ins, packed, rows, y, y_stride, add);
    for (size next = tiled; next < count; next += PANEL) {
        size outs = least(PANEL, count - next);
        multiply(w, first + next, outs, ins, x, rows, y + next, y_stride, add, panel);
    }
}

/* y (+)= W x + b by all threads; of derivatives W dx + dW x + db. */
static void apply(
    const product *p, int is_dual, size rows, const float *x, float *y, int add, float *thin,
    const halves *room)
{
    size outs = p->outs, ins = p->ins, rank = p->rank, all_rows = is_dual ? 2 * rows : rows;
    float *dy = y + rows * outs;
    float *panel = room->panels ? room->panels + omp_get_thread_num() * PANEL * ins : NULL;
    uint16_t *packed = ins % DEPTH ? NULL : room->packed;
    size block = packed ? 2 * SIDE : PANEL;
    if (packed)
        pack(x, all_rows, ins, packed);
#pragma omp for schedule(static) nowait
    for (size first = 0; first < outs; first += block) {
        size count = least(block, outs - first);
        some_outputs(p->weight, first, count, ins, x, packed, all_rows, y + first, outs, add, panel);
        if (p->g)
            some_outputs(p->g, first, count, ins, x, packed, rows, dy + first, outs, 1, panel);
        if (p->bias)
            add_bias(p->bias + first, count, y + first, outs, rows);
        if (p->d_bias)
            add_bias(p->d_bias + first, count, dy + first, outs, rows);
    }
#pragma omp for schedule(static)
    for (size first = 0; first < rank; first += block) {
        size count = least(block, rank - first);
        some_outputs(p->weight, outs + first, count, ins, x, packed, rows, thin + first, rank, 0, panel);
    }
    if (rank) {
#pragma omp for schedule(static)
        for (size first = 0; first < outs; first += TILE * LANES) {
            size count = least(TILE * LANES, outs - first);
            const float *left = p->left + first;
            mix(thin, rank, rows, left, outs, rank, count, left, dy + first, outs, 1);
        }
    }
}

/* y = x / sqrt(mean x^2 + eps) scale; y may be x, and dy dx. dx is NULL outside dual numbers. */
static void normalise(const norm *n, size width, const float *x, const float *dx, float *y, float *dy)
{
    float squares = 0, products = 0;
#pragma omp simd reduction(+ : squares)
    for (size i = 0; i < width; i++)
        squares += x[i] * x[i];
    float root = 1 / sqrtf(squares / width + n->eps);
    if (dx) {
#pragma omp simd reduction(+ : products)
        for (size i = 0; i < width; i++)
            products += x[i] * dx[i];
        float slope = root * root * root * products / width;
#pragma omp simd
        for (size i = 0; i < width; i++)
            dy[i] = (dx[i] * root - x[i] * slope) * n->scale[i] + x[i] * root * n->d_scale[i];
    }
#pragma omp simd
    for (size i = 0; i < width; i++)
        y[i] = x[i] * root * n->scale[i];
}

static void normalise_rows(const norm *n, const model *m, const place *at)
{
    size width = m->hidden, next = at->rows * width;
#pragma omp for schedule(static)
    for (size row = 0; row < at->rows; row++) {
        float *x = at->x + row * width, *y = at->normed + row * width;
        normalise(n, width, x, m->is_dual ? x + next : NULL, y, y + next);
    }
}

/* exp to 2e-7: 2^n times a Taylor series about 0. Outside of -87..88 the result of the nearest of these. */
static inline float exponential(float x)
{
    x = x < -87 ? -87 : x;
    x = x > 88 ? 88 : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    float series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720)))));
    /* NaN gives any power here, and stays NaN in the series */
    union { uint32_t bits; float value; } power = {((uint32_t)(int32_t)n + 127) << 23};
    return series * power.value;
}

static void softmax(float *scores, size count)
{
    float highest = scores[0], sum = 0;
#pragma omp simd reduction(max : highest)
    for (size i = 0; i < count; i++)
        highest = scores[i] > highest ? scores[i] : highest;
#pragma omp simd reduction(+ : sum)
    for (size i = 0; i < count; i++)
        sum += scores[i] = exponential(scores[i] - highest);
    for (size i = 0; i < count; i++)
        scores[i] /= sum;
}

/* Rotary position embedding (Su et al., 2021) of a head, and a factor. */
static void rotate(float *x, size width, const float *cos, const float *sin, float factor)
{
    size half = width / 2;
    for (size d = 0; d < half; d++) {
        float a = x[d], b = x[d + half];
        x[d] = (a * cos[d] - b * sin[d]) * factor;
        x[d + half] = (b * cos[d + half] + a * sin[d + half]) * factor;
    }
}

/* Turn the queries and keys of a slot, and put its key and value into the cache. */
static void enter(const model *m, const layer *l, const place *at, size row)
{
    size heads = m->heads, kv_heads = m->kv_heads, width = m->width, stride = l->qkv.outs;
    const float *cos = at->cos + row * width, *sin = at->sin + row * width;
    for (size head = 0; head < heads + kv_heads; head++) {
        const norm *n = head < heads ? &l->of_queries : &l->of_keys;
        float *x = at->wide + row * stride + head * width, *dx = x + at->rows * stride;
        if (n->scale)
            normalise(n, width, x, m->is_dual ? dx : NULL, x, dx);
        float factor = head < heads ? l->scaling : 1;
        rotate(x, width, cos, sin, factor);
        if (m->is_dual)
            rotate(dx, width, cos, sin, factor);
    }
    for (size half = 0; half <= m->is_dual; half++)
        for (size head = 0; head < kv_heads; head++) {
            size position = at->lengths[row], offset = position % PAGE;
            size page = at->pages[row * at->slot_pages + position / PAGE];
            size start = page * at->page_stride + half * at->part_stride;
            const float *key = at->wide + (row + half * at->rows) * stride + (heads + head) * width;
            for (size d = 0; d < width; d++)
                l->keys[start + (head * width + d) * PAGE + offset] = key[d];
            memcpy(l->values + start + (head * PAGE + offset) * at->v_stride, key + kv_heads * width,
                   width * sizeof(float));
        }
}

/* Attention of the query heads of a slot that share a head of keys, page by page; what comes next is fetched
meanwhile. p: scores, then probabilities. */
static void attend(const model *m, const layer *l, const place *at, size row, size head)
{
    size width = m->width, group = m->heads / m->kv_heads, p_stride = at->slot_pages * PAGE;
    size v_stride = at->v_stride, count = m->is_dual ? 2 * group : group, thread = omp_get_thread_num();
    float *p = at->scores + thread * 2 * group * p_stride, *dp = p + group * p_stride;
    float *head_rows = at->head_rows + thread * 2 * group * v_stride; /* first queries, then results */
    size length = at->lengths[row] + 1, first = l->window && length > l->window ? length - l->window : 0;
    const size *pages = at->pages + row * at->slot_pages;
    const float *keys = l->keys + head * width * PAGE, *values = l->values + head * PAGE * v_stride;
    for (size g = 0; g < count; g++) { /* values of all heads of the group, then derivatives */
        size r = row + g / group * at->rows, h = head * group + g % group;
        memcpy(head_rows + g * v_stride, at->wide + r * l->qkv.outs + h * width, width * sizeof(float));
    }
    for (size next, from = first / LANES * LANES; from < length; from = next) {
        next = least((from / PAGE + 1) * PAGE, length);
        size columns = (next - from + LANES - 1) / LANES * LANES, page = from / PAGE;
        const float *k = keys + pages[page] * at->page_stride + from % PAGE, *dk = k + at->part_stride;
        const float *then = next < length ? keys + pages[page + 1] * at->page_stride
                                          : values + pages[first / PAGE] * at->page_stride;
        const float *ahead = m->is_dual ? dk : then;
        mix(head_rows, v_stride, count, k, PAGE, width, columns, ahead, p + from, p_stride, 0);
        if (m->is_dual)
            mix(head_rows, v_stride, group, dk, PAGE, width, columns, then, dp + from, p_stride, 1);
    }
    for (size g = 0; g < group; g++) {
        softmax(p + g * p_stride + first, length - first);
        if (m->is_dual)
            change_of_softmax(p + g * p_stride + first, dp + g * p_stride + first, length - first);
    }
    for (size next, from = first; from < length; from = next) {
        next = least((from / PAGE + 1) * PAGE, length);
        const float *v = values + pages[from / PAGE] * at->page_stride + from % PAGE * v_stride;
        const float *dv = v + at->part_stride;
        const float *then = next < length ? values + pages[next / PAGE] * at->page_stride : v;
        const float *ahead = m->is_dual ? dv : then;
        int add = from > first;
        mix(p + from, p_stride, count, v, v_stride, next - from, v_stride, ahead, head_rows, v_stride, add);
        if (m->is_dual)
            mix(p + from, p_stride, group, dv, v_stride, next - from, v_stride, then,
                head_rows + group * v_stride, v_stride, 1);
    }
    for (size g = 0; g < count; g++) {
        size r = row + g / group * at->rows, h = head * group + g % group;
        memcpy(at->mixed + (r * m->heads + h) * width, head_rows + g * v_stride, width * sizeof(float));
    }
}

/* silu(gate) up of a slot. */
static void gate(const model *m, const place *at, size row)
{
    size inner = m->inner;
    const float *gates = at->wide + row * 2 * inner, *ups = gates + inner;
    const float *d_gates = gates + at->rows * 2 * inner, *d_ups = d_gates + inner;
    float *y = at->mixed + row * inner, *dy = y + at->rows * inner;
#pragma omp simd
    for (size i = 0; i < inner; i++) {
        float sigmoid = 1 / (1 + exponential(-gates[i])), active = gates[i] * sigmoid;
        y[i] = active * ups[i];
        if (m->is_dual)
            dy[i] = sigmoid * (1 + gates[i] - active) * d_gates[i] * ups[i] + active * d_ups[i];
    }
}

/* Logits of the next token of each slot. */
void ads_step(const model *m, const place *at, int num_threads)
{
#pragma omp parallel num_threads(num_threads)
    {
        if (at->room.packed)
            begin_tiles();
        for (size i = 0; i < m->num_layers; i++) {
            const layer *l = m->layers + i;
            normalise_rows(&l->before_attention, m, at);
            apply(&l->qkv, m->is_dual, at->rows, at->normed, at->wide, 0, at->thin, &at->room);
#pragma omp for schedule(static)
            for (size row = 0; row < at->rows; row++)
                enter(m, l, at, row);
#pragma omp for schedule(dynamic) collapse(2)
            for (size row = 0; row < at->rows; row++)
                for (size head = 0; head < m->kv_heads; head++)
                    attend(m, l, at, row, head);
            apply(&l->output, m->is_dual, at->rows, at->mixed, at->x, 1, at->thin, &at->room);
            normalise_rows(&l->before_mlp, m, at);
            apply(&l->gate_up, m->is_dual, at->rows, at->normed, at->wide, 0, at->thin, &at->room);
#pragma omp for schedule(static)
            for (size row = 0; row < at->rows; row++)
                gate(m, at, row);
            apply(&l->down, m->is_dual, at->rows, at->mixed, at->x, 1, at->thin, &at->room);
        }
        normalise_rows(&m->last, m, at);
        apply(&m->head, m->is_dual, at->rows, at->normed, at->logits, 0, at->thin, &at->room);
        if (at->room.packed)
            end_tiles();
    }
}

/* y = p v by one thread: p (rows, depth), v (depth, columns). A row is added up in one order, whatever the
number of rows, as a BLAS does not promise. */
void ads_mix(const float *p, size rows, const float *v, size depth, size columns, float *y)
{
    mix(p, depth, rows, v, columns, depth, columns, v, y, columns, 0);
}

/* One product alone, for bench/step.py. */
void ads_product(
    const product *p, int is_dual, size rows, const float *x, float *y, float *thin, const halves *room,
    int num_threads)
{
#pragma omp parallel num_threads(num_threads)
    {
        if (room->packed)
            begin_tiles();
        apply(p, is_dual, rows, x, y, 0, thin, room);
        if (room->packed)
            end_tiles();
    }
}
