#define _GNU_SOURCE
#include "dot.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "instructions.h"

/* Up to MXFP4 (39), in ggml since 2025.  ggml does not say how many types it has, and asking for one beyond its tables
 * is not checked there; NVFP4 (40) also needs scales of its own that the engine does not apply. */
enum { TYPES = 40 };

struct fomoe_kernels {
    fomoe_type types[TYPES]; /* those without elements in a block have no kernel */
};

/* As in ggml-cpu.h and ggml.h; the structs are part of ggml's public interface. */
typedef struct {
    fomoe_from_float from_float;
    fomoe_vec_dot vec_dot;
    int vec_dot_type;
    int64_t rows;
} ggml_cpu_traits;

typedef struct {
    const char *type_name;
    int64_t block_elements;
    int64_t block_elements_interleaved;
    size_t type_bytes;
    _Bool is_quantized;
    fomoe_to_float to_float;
    fomoe_from_float from_float_reference;
} ggml_traits;

static void copy_floats(const void *x, float *y, int64_t n) { memcpy(y, x, n * sizeof *y); }

/* The functions of ggml that are needed, found by name. */
typedef struct {
    void (*cpu_init)(void);
    const ggml_cpu_traits *(*cpu_traits)(int);
    const ggml_traits *(*traits)(int);
    int64_t (*block_elements)(int);
    size_t (*type_bytes)(int);
} ggml_calls;

/* The libraries stay loaded: a second call finds the same ones. */
static int find_calls(const char *base_path, const char *cpu_path, ggml_calls *g, char *message, size_t message_bytes) {
    void *base = dlopen(base_path, RTLD_NOW | RTLD_GLOBAL);
    void *cpu = base ? dlopen(cpu_path, RTLD_NOW | RTLD_LOCAL) : NULL;
    if (!cpu) {
        snprintf(message, message_bytes, "%s", dlerror());
        return -1;
    }
    g->cpu_init = (void (*)(void))dlsym(cpu, "ggml_cpu_init");
    g->cpu_traits = (const ggml_cpu_traits *(*)(int))dlsym(cpu, "ggml_get_type_traits_cpu");
    g->traits = (const ggml_traits *(*)(int))dlsym(base, "ggml_get_type_traits");
    g->block_elements = (int64_t (*)(int))dlsym(base, "ggml_blck_size");
    g->type_bytes = (size_t (*)(int))dlsym(base, "ggml_type_size");
    if (g->cpu_init && g->cpu_traits && g->traits && g->block_elements && g->type_bytes) return 0;
    snprintf(message, message_bytes, "%s lacks a function of ggml's interface", cpu_path);
    return -1;
}

fomoe_kernels *fomoe_kernels_of_ggml(const char *base_path, const char *cpu_path, char *message, size_t message_bytes) {
    ggml_calls g;
    if (find_calls(base_path, cpu_path, &g, message, message_bytes)) return NULL;
    fomoe_kernels *kernels = calloc(1, sizeof *kernels);
    if (!kernels) {
        snprintf(message, message_bytes, "no memory");
        return NULL;
    }
    g.cpu_init();
    for (int t = 0; t < TYPES; t++) {
        const ggml_traits *general = g.traits(t);
        const ggml_cpu_traits *kernel = g.cpu_traits(t);
        if (!general || general->block_elements <= 0 || g.block_elements(t) != general->block_elements) continue;
        if (g.type_bytes(t) != general->type_bytes) {
            snprintf(message, message_bytes, "%s: another layout of ggml_type_traits than expected", base_path);
            fomoe_kernels_free(kernels);
            return NULL;
        }
        kernels->types[t] = (fomoe_type){.type = t,
                                         .activation_type = kernel->vec_dot_type,
                                         .block_elements = general->block_elements,
                                         .block_bytes = general->type_bytes,
                                         .dot = kernel->vec_dot,
                                         .from_float = kernel->from_float,
                                         .to_float = t == 0 ? copy_floats : general->to_float};
    }
    return kernels;
}

fomoe_kernels *fomoe_kernels_portable(void) {
    fomoe_kernels *kernels = calloc(1, sizeof *kernels);
    if (!kernels) return NULL;
    for (const fomoe_type *t = fomoe_chosen_instructions()->types; t->block_elements; t++) kernels->types[t->type] = *t;
    return kernels;
}

void fomoe_kernels_free(fomoe_kernels *kernels) { free(kernels); }

const fomoe_type *fomoe_type_of(const fomoe_kernels *kernels, int32_t type) {
    if (type < 0 || type >= TYPES || kernels->types[type].block_elements == 0) return NULL;
    return &kernels->types[type];
}

size_t fomoe_row_bytes(const fomoe_kernels *kernels, int32_t type, int64_t elements) {
    const fomoe_type *t = fomoe_type_of(kernels, type);
    if (!t) return elements * sizeof(float);
    return (elements + t->block_elements - 1) / t->block_elements * t->block_bytes;
}
