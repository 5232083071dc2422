// What differs between AMD (clang, hipcc, hipRTC), NVIDIA (nvcc, NVRTC) and the CPU double of the tests.
//
// Rule 1: a "warp" is 32 lanes everywhere.  On AMD parts with 64-wide waves a wave holds two of them; exchanges
//         by lane ^ mask with mask < 32 never leave their half.
// Rule 2: no vendor header is needed, so that a plain clang, hipRTC and NVRTC compile the same text.  Halves
//         travel as unsigned short.
// Rule 3: block sizes are constants of the kernel, so nothing asks the hardware for its block dimensions.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct u32x4 {
    u32 x, y, z, w;
};

#if defined(FOMOE_GPU_ON_CPU)
#include "fibers.h"  // tests/gpu_shim

#elif defined(__HIP__) || defined(__HIPCC_RTC__) || defined(__HIP_PLATFORM_AMD__)
#ifndef __global__
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#endif
#define DEVICE static __device__ inline __attribute__((always_inline))
#define DEVICE_MEMBER __device__ inline __attribute__((always_inline))
#define KERNEL(threads, name)                                                                      \
    extern "C" __global__ __attribute__((amdgpu_flat_work_group_size(threads, threads))) void name
#define RESIDENT_KERNEL(threads, blocks, name) KERNEL(threads, name)
#define EXPORT_KERNEL(name)
DEVICE int thread_index() { return __builtin_amdgcn_workitem_id_x(); }
DEVICE int block_x() { return __builtin_amdgcn_workgroup_id_x(); }
DEVICE int block_y() { return __builtin_amdgcn_workgroup_id_y(); }
DEVICE int block_z() { return __builtin_amdgcn_workgroup_id_z(); }
DEVICE void sync_block() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
DEVICE void fence_system() { __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, ""); }
// The counter's value before one is added to it; the counter lies in the block's shared memory.
DEVICE int take_place(int *counter) {
    return __hip_atomic_fetch_add(counter, 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}
DEVICE void pause_thread() { __builtin_amdgcn_s_sleep(8); }
DEVICE float from_half(u16 h) { return (float)__builtin_bit_cast(_Float16, h); }
DEVICE u16 to_half(float f) { return __builtin_bit_cast(u16, (_Float16)f); }
DEVICE float as_float(u32 v) { return __builtin_bit_cast(float, v); }
DEVICE u32 as_bits(float v) { return __builtin_bit_cast(u32, v); }
template <int MASK> DEVICE u32 exchange(u32 v) { return __builtin_amdgcn_ds_swizzle(v, 0x1f | (MASK << 10)); }
template <int LANE> DEVICE u32 broadcast(u32 v) { return __builtin_amdgcn_ds_swizzle(v, LANE << 5); }
// 16 bytes at a 16-byte boundary of device memory, and narrower ones.  Pointers that come from a table in memory are
// generic; saying "global" keeps the compiler from flat loads, which also wait for the LDS.
typedef u32 u32_vector __attribute__((ext_vector_type(4)));
#define GLOBAL_MEMORY __attribute__((address_space(1)))
DEVICE u32x4 load16(const void *p) {
    u32_vector v = *(const GLOBAL_MEMORY u32_vector *)p;
    return {v.x, v.y, v.z, v.w};
}
DEVICE u32x4 load16_once(const void *p) { return load16(p); }
DEVICE u32 load4(const void *p) { return *(const GLOBAL_MEMORY u32 *)p; }
DEVICE u16 load2(const void *p) { return *(const GLOBAL_MEMORY u16 *)p; }
DEVICE u8 load1(const void *p) { return *(const GLOBAL_MEMORY u8 *)p; }
// Past every cache, so that the host's stores are seen, and it sees these.
DEVICE u8 system_load1(const void *p) { return *(const volatile GLOBAL_MEMORY u8 *)p; }
DEVICE u16 system_load2(const void *p) { return *(const volatile GLOBAL_MEMORY u16 *)p; }
DEVICE u32 system_load4(const void *p) { return *(const volatile GLOBAL_MEMORY u32 *)p; }
DEVICE u64 system_load8(const void *p) { return *(const volatile GLOBAL_MEMORY u64 *)p; }
DEVICE u32x4 system_load16(const void *p) {
    u32_vector v = *(const volatile GLOBAL_MEMORY u32_vector *)p;
    return {v.x, v.y, v.z, v.w};
}
DEVICE void system_store4(void *p, u32 v) { *(volatile GLOBAL_MEMORY u32 *)p = v; }
DEVICE void system_store8(void *p, u64 v) { *(volatile GLOBAL_MEMORY u64 *)p = v; }
DEVICE u32 funnel_right(u32 low, u32 high, int bits) { return __builtin_amdgcn_alignbit(high, low, bits); }
// The bytes of an eight-byte table that the nibbles of `words` (0 to 7 each) name: of low nibbles and of high ones.
DEVICE void look_up(u32 words, u32 first, u32 last, u32 &of_low, u32 &of_high) {
    of_low = __builtin_amdgcn_perm(last, first, words & 0x0f0f0f0fu);
    of_high = __builtin_amdgcn_perm(last, first, (words >> 4) & 0x0f0f0f0fu);
}
DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float power_of_2(float x) { return __builtin_exp2f(x); }
DEVICE float logarithm_2(float x) { return __builtin_log2f(x); }
DEVICE float square_root(float x) { return __builtin_sqrtf(x); }
DEVICE float nearest(float x) { return __builtin_rintf(x); }
DEVICE float magnitude(float x) { return __builtin_fabsf(x); }
DEVICE float larger(float a, float b) { return __builtin_fmaxf(a, b); }
DEVICE int dot4(int a, int b, int c) {
#if defined(__GFX11__) || defined(__GFX12__)
    return __builtin_amdgcn_sudot4(true, a, true, b, c, false);
#elif defined(__gfx906__) || defined(__gfx908__) || defined(__gfx90a__) || defined(__gfx940__) ||   \
    defined(__gfx941__) || defined(__gfx942__) || defined(__gfx950__) || defined(__gfx1011__) ||    \
    defined(__gfx1012__) || defined(__gfx1030__) || defined(__gfx1031__) || defined(__gfx1032__) || \
    defined(__gfx1033__) || defined(__gfx1034__) || defined(__gfx1035__) || defined(__gfx1036__)
    return __builtin_amdgcn_sdot4(a, b, c, false);
#else
    for (int i = 0; i < 4; ++i) c += (int)(i8)(a >> (8 * i)) * (int)(i8)(b >> (8 * i));
    return c;
#endif
}

#elif defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define GLOBAL_MEMORY
#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define KERNEL(threads, name) extern "C" __global__ void __launch_bounds__(threads) name
// As KERNEL, with few enough registers that so many blocks fit a multiprocessor.
#define RESIDENT_KERNEL(threads, blocks, name) extern "C" __global__ void __launch_bounds__(threads, blocks) name
#define EXPORT_KERNEL(name)
DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void fence_system() { __threadfence_system(); }
DEVICE int take_place(int *counter) { return atomicAdd(counter, 1); }
DEVICE void pause_thread() { __nanosleep(200); }
DEVICE float from_half(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
DEVICE u16 to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
DEVICE float as_float(u32 v) { return __uint_as_float(v); }
DEVICE u32 as_bits(float v) { return __float_as_uint(v); }
template <int MASK> DEVICE u32 exchange(u32 v) { return __shfl_xor_sync(0xffffffffu, v, MASK, 32); }
template <int LANE> DEVICE u32 broadcast(u32 v) { return __shfl_sync(0xffffffffu, v, LANE, 32); }
DEVICE u32x4 load16(const void *p) {
    uint4 v = __ldg((const uint4 *)p);
    return {v.x, v.y, v.z, v.w};
}
// For weights, which no other warp will want: they leave the first cache to the activations.
DEVICE u32x4 load16_once(const void *p) {
    u32x4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
    return v;
}
DEVICE u32 load4(const void *p) { return __ldg((const u32 *)p); }
DEVICE u16 load2(const void *p) { return __ldg((const u16 *)p); }
DEVICE u8 load1(const void *p) { return __ldg((const u8 *)p); }
// What an earlier kernel of the same graph has written: never through the read-only path, whose loads a compiler may
// move up past start_kernel().
DEVICE u32x4 fresh16(const void *p) {
    u32x4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
DEVICE u32 fresh4(const void *p) {
    u32 v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
// Past the caches of a multiprocessor, so that the host's stores are seen, and it sees these.
DEVICE u8 system_load1(const void *p) { return *(const volatile u8 *)p; }
DEVICE u16 system_load2(const void *p) { return *(const volatile u16 *)p; }
DEVICE u32 system_load4(const void *p) { return *(const volatile u32 *)p; }
DEVICE u64 system_load8(const void *p) { return *(const volatile u64 *)p; }
DEVICE u32x4 system_load16(const void *p) {
    u32x4 v;
    asm volatile("ld.volatile.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
DEVICE void system_store4(void *p, u32 v) { *(volatile u32 *)p = v; }
DEVICE void system_store8(void *p, u64 v) { *(volatile u64 *)p = v; }
DEVICE u32 funnel_right(u32 low, u32 high, int bits) { return __funnelshift_r(low, high, bits); }
DEVICE void look_up(u32 words, u32 first, u32 last, u32 &of_low, u32 &of_high) {
    const u32 left = __byte_perm(first, last, words), right = __byte_perm(first, last, words >> 16);
    of_low = __byte_perm(left, right, 0x6420), of_high = __byte_perm(left, right, 0x7531);
}
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float power_of_2(float x) { return exp2f(x); }
DEVICE float logarithm_2(float x) { return log2f(x); }
DEVICE float square_root(float x) { return sqrtf(x); }
DEVICE float nearest(float x) { return rintf(x); }
DEVICE float magnitude(float x) { return fabsf(x); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE int dot4(int a, int b, int c) { return __dp4a(a, b, c); }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define CAN_MULTIPLY_BYTES 1
// sums += a b of 16 rows and 8 columns, 32 (16) signed bytes each; which lane holds what: PTX ISA, "Matrix Fragments
// for mma.m16n8k32" ("... m16n8k16").  A lane has rows lane / 4 (upper) and 8 more (lower) of a, column lane / 4 of b.
DEVICE void multiply_bytes_32(u32 upper, u32 lower, u32 upper_16, u32 lower_16, u32 b, u32 b_16, int (&sums)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(upper), "r"(lower), "r"(upper_16), "r"(lower_16), "r"(b), "r"(b_16));
}
DEVICE void multiply_bytes_16(u32 upper, u32 lower, u32 b, int (&sums)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(upper), "r"(lower), "r"(b));
}
#endif

#else
#error "kernels are compiled by hipRTC, clang -x hip, NVRTC or nvcc"
#endif

#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
DEVICE u32x4 fresh16(const void *p) { return load16(p); }
DEVICE u32 fresh4(const void *p) { return load4(p); }
#endif

// How weights are read: what was there when the kernel began, or what others write while it runs.
struct settled {
    static const int unrolled_pairs = 2;  // mat_vec.h: steps of two rows at once
    static DEVICE_MEMBER u32x4 word16(const void *p) { return load16(p); }
    static DEVICE_MEMBER u32x4 word16_once(const void *p) { return load16_once(p); }
    static DEVICE_MEMBER u32 word4(const void *p) { return load4(p); }
    static DEVICE_MEMBER u16 word2(const void *p) { return load2(p); }
    static DEVICE_MEMBER u8 word1(const void *p) { return load1(p); }
};
struct arriving {
    static const int unrolled_pairs = 1;  // loads that keep their order keep their registers, too
    static DEVICE_MEMBER u32x4 word16(const void *p) { return system_load16(p); }
    static DEVICE_MEMBER u32x4 word16_once(const void *p) { return system_load16(p); }
    static DEVICE_MEMBER u32 word4(const void *p) { return system_load4(p); }
    static DEVICE_MEMBER u16 word2(const void *p) { return system_load2(p); }
    static DEVICE_MEMBER u8 word1(const void *p) { return system_load1(p); }
};

// The first statement of every kernel, but for what reads nothing that the kernel before writes.  A chained launch
// (NVIDIA from sm_90 on: programmatic dependent launch) may be started while the kernel before it still runs: wait
// until that one has finished and its writes are seen, then let the next be started, so that no more than one waits.
// Kernels further back have finished by then.
DEVICE void start_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Ask for bytes that no kernel writes into the last cache; before start_kernel(), which is when there is time for it.
DEVICE void prefetch(const u8 *begin, u64 bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const u64 first = ((u64)begin + 15) & ~15ull, end = ((u64)begin + bytes) & ~15ull;
    if (first < end)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first), "r"((u32)(end - first)) : "memory");
#else
    (void)begin, (void)bytes;
#endif
}

// A word of device memory that every replay of a graph changes.  A plain load of a replayed graph may find the last
// replay's value in a cache (seen on AMD, where uniform loads go through the scalar cache), so only now() reads it.
struct replayed {
    u32 word;
};
DEVICE u32 now(const replayed *p) { return system_load4(p); }

// Where the memory of a token's session begins: states holds an address a token, or is null, and places are addresses.
DEVICE u64 state_base(const replayed *states, int token) { return states ? system_load8(states + 2 * (u64)token) : 0; }
template <class T> DEVICE T *in_state(u64 base, T *place) { return (T *)(GLOBAL_MEMORY T *)(base + (u64)place); }

DEVICE int lane_index() { return thread_index() & 31; }
DEVICE int warp_index() { return thread_index() >> 5; }
DEVICE float infinity() { return as_float(0x7f800000u); }
DEVICE float not_a_number() { return as_float(0x7fc00000u); }

// Butterflies: every lane ends with the same bits, and they do not depend on which lane asks.
template <int LANE> DEVICE float from_lane(float v) { return as_float(broadcast<LANE>(as_bits(v))); }
template <int MASK> DEVICE float exchange_float(float v) { return as_float(exchange<MASK>(as_bits(v))); }
#ifndef FOMOE_GPU_ON_CPU  // which has these in few steps, with the same bits
DEVICE float warp_sum(float v) {
    v += exchange_float<16>(v);
    v += exchange_float<8>(v);
    v += exchange_float<4>(v);
    v += exchange_float<2>(v);
    return v + exchange_float<1>(v);
}
// Sums of several values at once, with the bits of warp_sum: of 4, lane i has that of v[i / 8], of 8 of v[i / 4].  The
// first steps halve what a lane still has to add up, so there are 6 and 9 exchanges, not 20 and 40.
template <int MASK> DEVICE float sum_halves(float lower, float upper) {
    const bool is_upper = thread_index() & MASK;
    return (is_upper ? upper : lower) + exchange_float<MASK>(is_upper ? lower : upper);
}
DEVICE float warp_sum_of_4(const float (&v)[4]) {
    float sum = sum_halves<8>(sum_halves<16>(v[0], v[2]), sum_halves<16>(v[1], v[3]));
    sum += exchange_float<4>(sum);
    sum += exchange_float<2>(sum);
    return sum + exchange_float<1>(sum);
}
DEVICE float warp_sum_of_8(const float (&v)[8]) {
    float four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = sum_halves<16>(v[i], v[4 + i]);
    float sum = sum_halves<4>(sum_halves<8>(four[0], four[2]), sum_halves<8>(four[1], four[3]));
    sum += exchange_float<2>(sum);
    return sum + exchange_float<1>(sum);
}
DEVICE int dot16(const u32x4 &a, const u32x4 &b, int sum) {
    sum = dot4((int)a.x, (int)b.x, sum);
    sum = dot4((int)a.y, (int)b.y, sum);
    sum = dot4((int)a.z, (int)b.z, sum);
    return dot4((int)a.w, (int)b.w, sum);
}
#endif
DEVICE float warp_max(float v) {
    v = larger(v, exchange_float<16>(v));
    v = larger(v, exchange_float<8>(v));
    v = larger(v, exchange_float<4>(v));
    v = larger(v, exchange_float<2>(v));
    return larger(v, exchange_float<1>(v));
}
DEVICE int warp_sum_int(int v) {
    v += (int)exchange<16>((u32)v);
    v += (int)exchange<8>((u32)v);
    v += (int)exchange<4>((u32)v);
    v += (int)exchange<2>((u32)v);
    return v + (int)exchange<1>((u32)v);
}

// exp(x) from 2^x alone (clang without device libraries has no expf): x * log2(e) is carried in two floats, so
// that the result is good to 2 ulp over the whole range.
DEVICE float exponential(float x) {
    const float log2e = 1.44269502f, log2e_low = 1.92596299e-8f, ln2 = 0.693147182f;
    const float t = x * log2e;
    if (!(magnitude(t) < 150.f)) return t < 0.f ? 0.f : t * infinity();  // 0, infinity, NaN
    const float rest = fused(x, log2e_low, fused(x, log2e, -t));
    return power_of_2(t) * fused(rest, ln2, 1.f);
}
DEVICE float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }
DEVICE float silu(float x) { return x / (1.f + exponential(-x)); }
// log1p(exp(x)), x itself above 20 as ggml has it.
DEVICE float softplus(float x) {
    if (x > 20.f) return x;
    const float e = exponential(x), u = 1.f + e;
    // Kahan's log1p: log(u) corrected by the rounding of 1 + e.
    return u == 1.f ? e : logarithm_2(u) * 0.693147182f * (e / (u - 1.f));
}
