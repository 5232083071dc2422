/* A double of libhipblaslt on host memory: the products that fomoe_io asks for (A transposed, both halves or both
 * floats, float sums), done in the order of the streams of the double of libamdhip64.  Calls fail by fake_hip_fail() as HIP's do. */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
enum { OK = 0, INVALID_VALUE = 3, NOT_SUPPORTED = 7 };
enum { FLOAT32 = 0, FLOAT16 = 2, TRANSPOSE = 112, COMPUTE_FLOAT32 = 2, ALGORITHM = 0x5eed };

int fake_hip_injected(const char *call);
void fake_hip_born(int n);
int fake_hip_enqueue(void *stream, void (*run)(void *, void *), const void *payload, size_t bytes);
#define ENTER                                         \
    do {                                              \
        int injected_ = fake_hip_injected(__func__);  \
        if (injected_) return injected_;              \
    } while (0)

typedef struct {
    int type;
    uint64_t rows, columns;
    int64_t stride;
} layout;
typedef struct {
    int compute, transpose_a, transpose_b;
} desc;

static int make(void **place, const void *value, size_t bytes) {
    memcpy(*place = malloc(bytes), value, bytes);
    fake_hip_born(1);
    return OK;
}
static int destroy(void *p) {
    free(p);
    fake_hip_born(-1);
    return OK;
}

API int hipblasLtCreate(void **handle) { ENTER; return make(handle, "handle", 7); }
API int hipblasLtDestroy(void *handle) { return destroy(handle); }
API int hipblasLtMatrixLayoutCreate(void **place, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    ENTER;
    return make(place, &(layout){type, rows, columns, stride}, sizeof(layout));
}
API int hipblasLtMatrixLayoutDestroy(void *p) { return destroy(p); }
API int hipblasLtMatmulDescCreate(void **place, int compute, int scale_type) {
    ENTER;
    if (scale_type != FLOAT32) return NOT_SUPPORTED;
    return make(place, &(desc){compute, 111, 111}, sizeof(desc));
}
API int hipblasLtMatmulDescDestroy(void *p) { return destroy(p); }
API int hipblasLtMatmulDescSetAttribute(desc *d, int attribute, const void *value, size_t bytes) {
    ENTER;
    if (bytes != 4 || attribute < 0 || attribute > 1) return INVALID_VALUE;
    memcpy(attribute ? &d->transpose_b : &d->transpose_a, value, bytes);
    return OK;
}
API int hipblasLtMatmulPreferenceCreate(void **place) { ENTER; return make(place, &(uint64_t){0}, sizeof(uint64_t)); }
API int hipblasLtMatmulPreferenceDestroy(void *p) { return destroy(p); }
API int hipblasLtMatmulPreferenceSetAttribute(void *p, int attribute, const void *value, size_t bytes) {
    ENTER;
    if (attribute != 1 || bytes != 8) return INVALID_VALUE;
    memcpy(p, value, bytes);
    return OK;
}

static int is_known(const desc *m, const layout *a, const layout *b, const layout *d) {
    return m->compute == COMPUTE_FLOAT32 && m->transpose_a == TRANSPOSE && m->transpose_b == 111 &&
           (a->type == FLOAT16 || a->type == FLOAT32) && b->type == a->type && d->type == FLOAT32 &&
           a->rows == b->rows && a->columns == d->rows && b->columns == d->columns && a->stride >= (int64_t)a->rows &&
           b->stride >= (int64_t)b->rows && d->stride >= (int64_t)d->rows;
}
API int hipblasLtMatmulAlgoGetHeuristic(void *handle, const desc *m, const layout *a, const layout *b, const layout *c,
                                        const layout *d, const uint64_t *workspace, int wanted, void *results,
                                        int *found) {
    ENTER;
    *found = wanted > 0 && *workspace > 0 && is_known(m, a, b, d);
    if (*found) memcpy(results, &(uint64_t){ALGORITHM}, 8);
    return *found ? OK : NOT_SUPPORTED;
}

typedef struct {
    const void *a, *b;
    float *d;
    layout la, lb, ld;
} product;
static float element(const layout *l, const void *data, uint64_t i) {
    return l->type == FLOAT16 ? _cvtsh_ss(((const uint16_t *)data)[i]) : ((const float *)data)[i];
}
static void multiply(void *payload, void *stream) {
    product p;
    memcpy(&p, payload, sizeof p); /* a task's payload need not be aligned */
    for (uint64_t j = 0; j < p.ld.columns; ++j)
        for (uint64_t i = 0; i < p.ld.rows; ++i) {
            float sum = 0.f;
            for (uint64_t k = 0; k < p.la.rows; ++k)
                sum += element(&p.la, p.a, i * p.la.stride + k) * element(&p.lb, p.b, j * p.lb.stride + k);
            p.d[j * p.ld.stride + i] = sum;
        }
}
API int hipblasLtMatmul(void *handle, const desc *m, const float *alpha, const void *a, const layout *la, const void *b,
                        const layout *lb, const float *beta, const void *c, const layout *lc, void *d,
                        const layout *ld, const uint64_t *algorithm, void *workspace, size_t workspace_bytes,
                        void *stream) {
    ENTER;
    if (!is_known(m, la, lb, ld) || *alpha != 1.f || *beta != 0.f || *algorithm != ALGORITHM) return INVALID_VALUE;
    if (!workspace || !workspace_bytes || ((uintptr_t)workspace | (uintptr_t)a | (uintptr_t)b | (uintptr_t)d) % 256)
        return INVALID_VALUE; /* what cuBLASLt takes for granted of addresses */
    return fake_hip_enqueue(stream, multiply, &(product){a, b, d, *la, *lb, *ld}, sizeof(product));
}
