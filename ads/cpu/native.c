/* One decoding step of a model built like Llama, on a CPU: what ads/decode/llama_step.py computes in torch.

`ads_step` is the step; the functions it calls follow in its order, then the arithmetic they share. Two things
make it faster than torch. A product of few rows waits for its weights: here the next rows of W are fetched
into the cache while these are multiplied. And what lies between the products takes the time of its
arithmetic, not of a hundred calls.

Each of N slots gets one token. R = N rows are computed, or 2N in dual numbers: values in rows 0..N-1, below
them in N..2N-1 their derivatives along g, a direction in the space of the weights, named d...: for y = W x,
dy = W dx + dW x, where dW is g of that matrix. A row's result depends on no other row and on no number of
threads, to the bit. NaN stays NaN. Weights may be bfloat16; all else is float32.

Matrices lie by rows; a stride is the floats from one row to the next. (+)= adds where the argument `add` is
1. All memory is the caller's (native.py, which has the same structs). Functions run in all threads at once;
an `omp for` shares a loop out and, unless it says nowait, ends when all threads have done their part. */

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

/* LANES: floats of a vector register, and of a line of the CPU's cache. TILE: rows and outputs that are
multiplied at once. PANEL: rows of W that stay in the L1 or L2 cache meanwhile. PAGE: positions of a page, see
pages.py. */
enum { LANES = 16, TILE = 4, PANEL = 8, PAGE = 64 };

typedef int64_t size;
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

/* Linear layers of the same input, one below the other. */
typedef struct {
    size outs, ins, rank;
    const void *weight;         /* (outs + rank, ins): W, below it the right factor of g */
    const void *g;              /* (outs, ins): g where it has no factors, else NULL */
    const float *left;          /* (rank, outs): left, of g = left^T right; NULL without factors */
    const float *bias, *d_bias; /* (outs), or NULL */
} ProductStruct;

typedef struct {
    const float *scale, *d_scale; /* (width); NULL: no such norm */
    float eps;
} NormStruct;

typedef struct {
    NormStruct before_attention, before_mlp, of_queries, of_keys;
    ProductStruct qkv, output, gate_up, down;
    float *keys;   /* of the first page: (kv_heads, width, PAGE), whole vectors of positions */
    float *values; /* likewise: (kv_heads, PAGE, v_stride), of which width are used */
    size window;   /* positions seen; 0: all */
    float scaling; /* of the scores */
} LayerStruct;

typedef struct {
    size num_layers, hidden, heads, kv_heads, width, inner;
    const LayerStruct *layers;
    NormStruct last;
    ProductStruct head;
} ModelStruct;

typedef struct {
    size is_dual;
    size rows;                       /* N */
    size slot_pages;                 /* pages that a slot may have */
    size page_stride, part_stride;   /* floats from page to page, and from values to their derivatives */
    size v_stride;                   /* a multiple of LANES */
    const size *pages;               /* (N, slot_pages): each slot's, in order */
    const float *cos, *sin;          /* (N, width): of the angle of each slot's position */
    const size *lengths;             /* (N): tokens in the cache before this one */
    float *x;                        /* (R, hidden): embeddings; each layer adds to them */
    float *logits;                   /* (R, outs of the head) */
    /* Room to work in: (R, hidden), (R, widest of qkv and gate_up), (R, widest input of output and down), */
    float *normed, *wide, *mixed;
    float *thin;                     /* (N, greatest rank), */
    float *scores, *head_rows;       /* (threads, 2 heads / kv_heads, slot_pages PAGE or v_stride), */
    float *panels;                   /* for weights in bfloat16, else NULL: (threads, PANEL, widest input), */
    uint16_t *packed;                /* for AMX, else NULL: (R to whole SIDEs, widest input, 2) */
} StepStruct;

static void normalise_rows(const NormStruct *, const ModelStruct *, const StepStruct *);
static void apply(const ProductStruct *, const StepStruct *, const float *x, float *y, int add);
static void enter(const ModelStruct *, const LayerStruct *, const StepStruct *, size row);
static void attend(const ModelStruct *, const LayerStruct *, const StepStruct *, size row, size head);
static void gate(const ModelStruct *, const StepStruct *, size row);
static void begin_tiles(const StepStruct *);
static void end_tiles(const StepStruct *);

/* Logits of the token after the one that each slot is given, whose embeddings are in step->x. */
void ads_step(const ModelStruct *m, const StepStruct *step, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    {
        begin_tiles(step);
        for (size i = 0; i < m->num_layers; i++) {
            const LayerStruct *l = m->layers + i;
            normalise_rows(&l->before_attention, m, step);
            apply(&l->qkv, step, step->normed, step->wide, 0);
#pragma omp for schedule(static)
            for (size row = 0; row < step->rows; row++)
                enter(m, l, step, row);
#pragma omp for schedule(dynamic) collapse(2)
            for (size row = 0; row < step->rows; row++)
                for (size head = 0; head < m->kv_heads; head++)
                    attend(m, l, step, row, head);
            apply(&l->output, step, step->mixed, step->x, 1);
            normalise_rows(&l->before_mlp, m, step);
            apply(&l->gate_up, step, step->normed, step->wide, 0);
#pragma omp for schedule(static)
            for (size row = 0; row < step->rows; row++)
                gate(m, step, row);
            apply(&l->down, step, step->mixed, step->x, 1);
        }
        normalise_rows(&m->last, m, step);
        apply(&m->head, step, step->normed, step->logits, 0);
        end_tiles(step);
    }
}

static inline size least(size a, size b) { return a < b ? a : b; }

static inline vec load(const float *p) { return *(const vec *)p; }

/* RMS norm of one row: y = x / sqrt(mean x^2 + eps) scale, and its derivative; y may be x, and dy dx. dx is
NULL outside dual numbers. */
static void normalise(const NormStruct *n, size width, const float *x, const float *dx, float *y, float *dy) {
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

/* normed = the norm of x, by all threads. */
static void normalise_rows(const NormStruct *n, const ModelStruct *m, const StepStruct *step) {
    size width = m->hidden, next = step->rows * width;
#pragma omp for schedule(static)
    for (size row = 0; row < step->rows; row++) {
        float *x = step->x + row * width, *y = step->normed + row * width;
        normalise(n, width, x, step->is_dual ? x + next : NULL, y, y + next);
    }
}

/* Rotary position embedding (Su et al., 2021) of one head, (width) floats, times a factor. */
static void rotate(float *x, size width, const float *cos, const float *sin, float factor) {
    size half = width / 2;
    for (size d = 0; d < half; d++) {
        float a = x[d], b = x[d + half];
        x[d] = (a * cos[d] - b * sin[d]) * factor;
        x[d + half] = (b * cos[d + half] + a * sin[d + half]) * factor;
    }
}

/* What one slot does between the product with qkv and attention, in `wide`: queries and keys are normalised
where the model has norms of heads, then rotated (queries also scaled, in place of the scores); key and value
go into the cache, at the slot's next position. */
static void enter(const ModelStruct *m, const LayerStruct *l, const StepStruct *step, size row) {
    size heads = m->heads, kv_heads = m->kv_heads, width = m->width, stride = l->qkv.outs;
    const float *cos = step->cos + row * width, *sin = step->sin + row * width;
    for (size head = 0; head < heads + kv_heads; head++) {
        const NormStruct *n = head < heads ? &l->of_queries : &l->of_keys;
        float *x = step->wide + row * stride + head * width, *dx = x + step->rows * stride;
        if (n->scale)
            normalise(n, width, x, step->is_dual ? dx : NULL, x, dx);
        float factor = head < heads ? l->scaling : 1;
        rotate(x, width, cos, sin, factor);
        if (step->is_dual)
            rotate(dx, width, cos, sin, factor);
    }
    for (size half = 0; half <= step->is_dual; half++)
        for (size head = 0; head < kv_heads; head++) {
            size position = step->lengths[row], offset = position % PAGE;
            size page = step->pages[row * step->slot_pages + position / PAGE];
            size start = page * step->page_stride + half * step->part_stride;
            const float *key = step->wide + (row + half * step->rows) * stride + (heads + head) * width;
            for (size d = 0; d < width; d++)
                l->keys[start + (head * width + d) * PAGE + offset] = key[d];
            memcpy(l->values + start + (head * PAGE + offset) * step->v_stride, key + kv_heads * width,
                   width * sizeof(float));
        }
}

static void mix(const float *p, size p_stride, size rows, const float *v, size v_stride, size length, size
    columns, const float *ahead, float *y, size y_stride, int add);

/* exp to 2e-7: 2^n times a Taylor series about 0. Outside of -87..88 the result of the nearest of these. */
static inline float exponential(float x) {
    x = x < -87 ? -87 : x;
    x = x > 88 ? 88 : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    float series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720)))));
    /* NaN gives any power here, and stays NaN in the series */
    union { uint32_t bits; float value; } power = {((uint32_t)(int32_t)n + 127) << 23};
    return series * power.value;
}

/* In place. */
static void softmax(float *scores, size count) {
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

/* The derivative of softmax, where p is its result and dp holds the scores' derivatives ds: dp = p (ds - sum
of p ds). */
static void change_of_softmax(const float *p, float *dp, size count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size i = 0; i < count; i++)
        sum += p[i] * dp[i];
#pragma omp simd
    for (size i = 0; i < count; i++)
        dp[i] = p[i] * (dp[i] - sum);
}

/* Attention of those heads of queries of one slot that share the head of keys `head`, from `wide` into
`mixed`. With q the group's queries: p = softmax(q k^T), y = p v, and dp from dq k^T + q dk^T, dy = dp v + p
dv. Keys and values are read page by page, and what is read next is fetched meanwhile (`then`). The group's
rows lie together in head_rows, values of all heads and then derivatives, so that one product serves both. */
static void attend(const ModelStruct *m, const LayerStruct *l, const StepStruct *step, size row, size head) {
    size width = m->width, group = m->heads / m->kv_heads, p_stride = step->slot_pages * PAGE;
    size v_stride = step->v_stride, count = step->is_dual ? 2 * group : group, thread = omp_get_thread_num();
    float *p = step->scores + thread * 2 * group * p_stride, *dp = p + group * p_stride;
    float *head_rows = step->head_rows + thread * 2 * group * v_stride; /* first queries, then results */
    size length = step->lengths[row] + 1, first = l->window && length > l->window ? length - l->window : 0;
    const size *pages = step->pages + row * step->slot_pages;
    const float *keys = l->keys + head * width * PAGE, *values = l->values + head * PAGE * v_stride;
    for (size g = 0; g < count; g++) { /* values of all heads of the group, then derivatives */
        size r = row + g / group * step->rows, h = head * group + g % group;
        memcpy(head_rows + g * v_stride, step->wide + r * l->qkv.outs + h * width, width * sizeof(float));
    }
    for (size next, from = first / LANES * LANES; from < length; from = next) {
        next = least((from / PAGE + 1) * PAGE, length);
        size columns = (next - from + LANES - 1) / LANES * LANES, page = from / PAGE;
        const float *k = keys + pages[page] * step->page_stride + from % PAGE, *dk = k + step->part_stride;
        const float *then = next < length ? keys + pages[page + 1] * step->page_stride
                                          : values + pages[first / PAGE] * step->page_stride;
        const float *ahead = step->is_dual ? dk : then;
        mix(head_rows, v_stride, count, k, PAGE, width, columns, ahead, p + from, p_stride, 0);
        if (step->is_dual)
            mix(head_rows, v_stride, group, dk, PAGE, width, columns, then, dp + from, p_stride, 1);
    }
    for (size g = 0; g < group; g++) {
        softmax(p + g * p_stride + first, length - first);
        if (step->is_dual)
            change_of_softmax(p + g * p_stride + first, dp + g * p_stride + first, length - first);
    }
    for (size next, from = first; from < length; from = next) {
        next = least((from / PAGE + 1) * PAGE, length);
        const float *v = values + pages[from / PAGE] * step->page_stride + from % PAGE * v_stride;
        const float *dv = v + step->part_stride;
        const float *then = next < length ? values + pages[next / PAGE] * step->page_stride : v;
        const float *ahead = step->is_dual ? dv : then;
        int add = from > first;
        mix(p + from, p_stride, count, v, v_stride, next - from, v_stride, ahead, head_rows, v_stride, add);
        if (step->is_dual)
            mix(p + from, p_stride, group, dv, v_stride, next - from, v_stride, then,
                head_rows + group * v_stride, v_stride, 1);
    }
    for (size g = 0; g < count; g++) {
        size r = row + g / group * step->rows, h = head * group + g % group;
        memcpy(step->mixed + (r * m->heads + h) * width, head_rows + g * v_stride, width * sizeof(float));
    }
}

/* mixed = silu(gate) up of one slot, from `wide`: (gates, ups). */
static void gate(const ModelStruct *m, const StepStruct *step, size row) {
    size inner = m->inner;
    const float *gates = step->wide + row * 2 * inner, *ups = gates + inner;
    const float *d_gates = gates + step->rows * 2 * inner, *d_ups = d_gates + inner;
    float *y = step->mixed + row * inner, *dy = y + step->rows * inner;
#pragma omp simd
    for (size i = 0; i < inner; i++) {
        float sigmoid = 1 / (1 + exponential(-gates[i])), active = gates[i] * sigmoid;
        y[i] = active * ups[i];
        if (step->is_dual)
            dy[i] = sigmoid * (1 + gates[i] - active) * d_gates[i] * ups[i] + active * d_ups[i];
    }
}

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif

/* Of 16 vectors one, whose lane i is the sum of the lanes of a[i]: in four rounds, each halving what is left.
*/
static inline vec sum_lanes(const vec *a) {
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

/* The inner loop of a product: y[r][o] (+)= the dot product of row r of x and row o of w, both `ins` long,
for num_rows rows and num_outs outputs, at most TILE of each (constants where it is called, so that all sums
stay in registers). Each turn takes LANES inputs of every row, and fetches one line of what is needed next:
the first at `ahead`, each further one `stride` floats on. */
static inline __attribute__((always_inline)) void tile(size num_rows, size num_outs, const float *w, const
    float *x, size ins, const float *ahead, size stride, float *y, size y_stride, int add) {
    vec sums[TILE * TILE] = {{0}};
    size i = 0;
    for (; i + LANES <= ins; i += LANES, ahead += stride) {
        __builtin_prefetch(ahead, 0, 2);
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

/* bfloat16 to float32, of which it is the upper half. */
static void widen(const uint16_t *halves, float *floats, size count) {
    for (size i = 0; i < count; i++) {
        union { uint32_t bits; float value; } wide = {(uint32_t)halves[i] << 16};
        floats[i] = wide.value;
    }
}

/* y (+)= x W^T for `outs` rows of W from row `first` on, at most PANEL: x (rows, ins), y (rows, outs) with
y_stride. W is bfloat16 if there is a panel, which then gets these rows as float32. Meanwhile as many rows of
W after these are fetched, each tile its `share` of them. */
static void multiply(const void *weight, size first, size outs, size ins, const float *x, size rows, float *y,
    size y_stride, int add, float *panel) {
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
                    for (size i = 0; i < least(TILE, rows - r); i++)
                        tile(1, 1, ws + k * ins, xs + i * ins, ins, ahead, stride, ys + i * y_stride + k,
                             y_stride, add);
            else
                switch (least(TILE, rows - r)) {
                    case 1: tile(1, TILE, ws, xs, ins, ahead, stride, ys, y_stride, add); break;
                    case 2: tile(2, TILE, ws, xs, ins, ahead, stride, ys, y_stride, add); break;
                    case 3: tile(3, TILE, ws, xs, ins, ahead, stride, ys, y_stride, add); break;
                    default: tile(TILE, TILE, ws, xs, ins, ahead, stride, ys, y_stride, add);
                }
        }
}

/* The inner loop of `mix`: num_vecs vectors of columns of y (+)= p v, in num_rows rows; both at most TILE and
constants where it is called. For each row of v `lines` lines of `ahead` are fetched. */
static inline __attribute__((always_inline)) void mix_columns(size num_vecs, size num_rows, const float *p,
    size p_stride, const float *v, size v_stride, size length, const float *ahead, size lines, float *y, size
    y_stride, int add) {
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

/* All columns of y (+)= p v in num_rows rows: by TILE vectors, then single vectors, then single floats. */
static inline __attribute__((always_inline)) void mix_rows(size num_rows, const float *p, size p_stride, const
    float *v, size v_stride, size length, size columns, const float *ahead, size lines, float *y, size
    y_stride, int add) {
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

/* y (+)= p v by one thread: p (rows, length), v (length, columns), y (rows, columns), each with its stride.
Meanwhile as much of `ahead` is fetched as v has, by those columns that come in TILE vectors. */
static void mix(const float *p, size p_stride, size rows, const float *v, size v_stride, size length, size
    columns, const float *ahead, float *y, size y_stride, int add) {
    size passes = (rows + TILE - 1) / TILE, lines = (TILE + passes - 1) / passes;
    size share = lines * LANES * length * (columns / (TILE * LANES));
    for (; rows >= TILE; rows -= TILE, p += TILE * p_stride, y += TILE * y_stride, ahead += share)
        mix_rows(TILE, p, p_stride, v, v_stride, length, columns, ahead, lines, y, y_stride, add);
    switch (rows) {
        case 1: mix_rows(1, p, p_stride, v, v_stride, length, columns, ahead, lines, y, y_stride, add); break;
        case 2: mix_rows(2, p, p_stride, v, v_stride, length, columns, ahead, lines, y, y_stride, add); break;
        case 3: mix_rows(3, p, p_stride, v, v_stride, length, columns, ahead, lines, y, y_stride, add);
    }
}

/* Matrix registers (AMX): 8 of 16 rows of 64 bytes, numbered 0 to 7; one instruction adds the product of two
of them, in bfloat16, to a third, of 16 by 16 float32. W is loaded as it lies. x is split into the sum of two
bfloat16, its upper half and what that leaves, and multiplied twice, so that hardly more is rounded than the
weights. SIDE: rows of a register; DEPTH: bfloat16 of its row; PIECE: of the whole. */
enum { SIDE = 16, DEPTH = 32, PIECE = SIDE * DEPTH };

#ifdef __AMX_BF16__
/* Whether the system lets this process use them. */
int ads_has_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

static void begin_tiles(const StepStruct *step) {
    if (!step->packed)
        return;
    struct { uint8_t palette, unused[15]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (int i = 0; i < 8; i++)
        shape.bytes[i] = 2 * DEPTH, shape.rows[i] = SIDE;
    __asm__ volatile("" : : "r"(&shape) : "memory"); /* gcc 12 takes _tile_loadconfig to read 8 bytes */
    _tile_loadconfig(&shape);
}

static void end_tiles(const StepStruct *step) {
    if (step->packed)
        _tile_release();
}

/* The upper half of a float's bits, and that of what it leaves of the float. */
static inline void split(float x, uint16_t *upper, uint16_t *rest) {
    union { float value; uint32_t bits; } whole = {x}, head = whole;
    head.bits &= 0xffff0000;
    whole.value -= head.value;
    *upper = head.bits >> 16, *rest = whole.bits >> 16;
}

/* x (rows, ins) as contents of registers, by all threads: for every SIDE rows (zeros below the last) and
DEPTH inputs first the upper halves and then the rests, each (DEPTH / 2, SIDE, 2), pairs of inputs beside each
other. */
static void pack(const float *x, size rows, size ins, uint16_t *packed) {
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

/* y[r][o] (+)= sums[o][r] for SIDE outputs: a register holds outputs by rows. */
static void put(const float *sums, size rows, float *y, size y_stride, int add) {
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

/* y (+)= x W^T for SIDE or 2 SIDE outputs, x packed. Registers 0 to 3 hold sums, of two SIDEs of outputs by
two of rows; 4 and 5 weights, 6 and 7 rows of x. Meanwhile as many rows of w after these are fetched. */
static void multiply_tiles(const uint16_t *w, size outs, size ins, const uint16_t *packed, size rows, float
    *y, size y_stride, int add) {
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

#else
int ads_has_tiles(void) { return 0; }
static void begin_tiles(const StepStruct *step) {}
static void end_tiles(const StepStruct *step) {}
static void pack(const float *x, size rows, size ins, uint16_t *packed) {}
static void multiply_tiles(const uint16_t *w, size outs, size ins, const uint16_t *packed, size rows,
    float *y, size y_stride, int add) {}
#endif

/* y (+)= x W^T for outputs first, ..., first + count - 1, by one thread; y begins at the first of these.
packed: x as the matrix registers take it, which then do all outputs but the last count % SIDE; or NULL. */
static void some_outputs(const void *w, size first, size count, size ins, const float *x, const uint16_t
    *packed, size rows, float *y, size y_stride, int add, float *panel) {
    size tiled = packed ? count / SIDE * SIDE : 0;
    if (tiled)
        multiply_tiles((const uint16_t *)w + first * ins, tiled, ins, packed, rows, y, y_stride, add);
    for (size next = tiled; next < count; next += PANEL) {
        size outs = least(PANEL, count - next);
        multiply(w, first + next, outs, ins, x, rows, y + next, y_stride, add, panel);
    }
}

/* Of outputs first, ..., first + count - 1 of y (rows, outs); bias may be NULL. */
static void add_bias(const float *bias, size first, size count, float *y, size outs, size rows) {
    for (size r = 0; bias && r < rows; r++)
        for (size o = first; o < first + count; o++)
            y[r * outs + o] += bias[o];
}

/* y (+)= W x + b by all threads, (R, outs) of (R, ins); of derivatives W dx + dW x + db. With factors of g dW
x = left^T (right x): right lies below W, and left^T follows once all threads have done their part of right x.
*/
static void apply(const ProductStruct *p, const StepStruct *step, const float *x, float *y, int add) {
    size outs = p->outs, ins = p->ins, rank = p->rank, rows = step->rows;
    size all_rows = step->is_dual ? 2 * rows : rows;
    float *dy = y + rows * outs;
    float *panel = step->panels ? step->panels + omp_get_thread_num() * PANEL * ins : NULL;
    uint16_t *packed = ins % DEPTH ? NULL : step->packed;
    size block = packed ? 2 * SIDE : PANEL;
    if (packed)
        pack(x, all_rows, ins, packed);
#pragma omp for schedule(static) nowait
    for (size first = 0; first < outs; first += block) {
        size count = least(block, outs - first);
        some_outputs(p->weight, first, count, ins, x, packed, all_rows, y + first, outs, add, panel);
        if (p->g)
            some_outputs(p->g, first, count, ins, x, packed, rows, dy + first, outs, 1, panel);
        add_bias(p->bias, first, count, y, outs, rows);
        add_bias(p->d_bias, first, count, dy, outs, rows);
    }
#pragma omp for schedule(static)
    for (size first = 0; first < rank; first += block) {
        size count = least(block, rank - first);
        float *thin = step->thin + first;
        some_outputs(p->weight, outs + first, count, ins, x, packed, rows, thin, rank, 0, panel);
    }
    if (rank) {
#pragma omp for schedule(static)
        for (size first = 0; first < outs; first += TILE * LANES) {
            size count = least(TILE * LANES, outs - first);
            const float *left = p->left + first;
            mix(step->thin, rank, rows, left, outs, rank, count, left, dy + first, outs, 1);
        }
    }
}

/* y = p v by one thread, for derivatives of embeddings: p (rows, depth), v (depth, columns). A row is added
up in one order, whatever the number of rows, as a BLAS does not promise. */
void ads_mix(const float *p, const float *v, float *y, size rows, size depth, size columns) {
    mix(p, depth, rows, v, columns, depth, columns, v, y, columns, 0);
}

/* One product alone, y = W x + b: for benchmarks, and tests of rounding. */
void ads_product(const ProductStruct *p, const StepStruct *step, const float *x, float *y, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    {
        begin_tiles(step);
        apply(p, step, x, y, 0);
        end_tiles(step);
    }
}
