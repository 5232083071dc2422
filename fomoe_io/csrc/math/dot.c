#define _GNU_SOURCE
#include "dot.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "instructions.h"

/* Up to MXFP4 (39), in ggml since 2025.  ggml does not say how many types it has, and asking for one beyond its tables
 * is not checked there; NVFP4 (40) also needs scales of its own that the engine does not apply. */
enum { TYPES = 40 };

static fomoe_type types[TYPES];
static const char *name = "none";

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

int fomoe_use_ggml(const char *base_path, const char *cpu_path, char *message, size_t message_bytes) {
    void *base = dlopen(base_path, RTLD_NOW | RTLD_GLOBAL);
    void *cpu = base ? dlopen(cpu_path, RTLD_NOW | RTLD_LOCAL) : NULL;
    if (!cpu) {
        snprintf(message, message_bytes, "%s", dlerror());
        return -1;
    }
    void (*cpu_init)(void) = (void (*)(void))dlsym(cpu, "ggml_cpu_init");
    const ggml_cpu_traits *(*cpu_traits)(int) = (const ggml_cpu_traits *(*)(int))dlsym(cpu, "ggml_get_type_traits_cpu");
    const ggml_traits *(*traits)(int) = (const ggml_traits *(*)(int))dlsym(base, "ggml_get_type_traits");
    int64_t (*block_elements)(int) = (int64_t (*)(int))dlsym(base, "ggml_blck_size");
    size_t (*type_bytes)(int) = (size_t (*)(int))dlsym(base, "ggml_type_size");
    if (!cpu_init || !cpu_traits || !traits || !block_elements || !type_bytes) {
        snprintf(message, message_bytes, "%s lacks a function of ggml's interface", cpu_path);
        return -1;
    }
    cpu_init();
    memset(types, 0, sizeof types);
    for (int t = 0; t < TYPES; t++) {
        const ggml_traits *general = traits(t);
        const ggml_cpu_traits *kernel = cpu_traits(t);
        if (!general || general->block_elements <= 0 || block_elements(t) != general->block_elements) continue;
        if (type_bytes(t) != general->type_bytes) {
            snprintf(message, message_bytes, "%s: another layout of ggml_type_traits than expected", base_path);
            return -1;
        }
        types[t] = (fomoe_type){.type = t,
                                .activation_type = kernel->vec_dot_type,
                                .block_elements = general->block_elements,
                                .block_bytes = general->type_bytes,
                                .dot = kernel->vec_dot,
                                .from_float = kernel->from_float,
                                .to_float = t == 0 ? copy_floats : general->to_float};
    }
    name = "ggml";
    return 0;
}

void fomoe_use_portable(void) {
    memset(types, 0, sizeof types);
    for (const fomoe_type *t = fomoe_chosen_instructions()->types; t->block_elements; t++) types[t->type] = *t;
    name = "portable";
}

const char *fomoe_kernels_name(void) { return name; }

const fomoe_type *fomoe_type_of(int32_t type) {
    if (type < 0 || type >= TYPES || types[type].block_elements == 0) return NULL;
    return &types[type];
}

size_t fomoe_row_bytes(int32_t type, int64_t elements) {
    const fomoe_type *t = fomoe_type_of(type);
    if (!t) return elements * sizeof(float); /* float32 and int32 rows before kernels are chosen */
    return (elements + t->block_elements - 1) / t->block_elements * t->block_bytes;
}
