// The prelude's CPU branch: a block runs on one thread, every GPU thread of it a fiber that passes the processor on
// where a GPU would wait for others (lane exchanges, barriers).  A rendezvous completes when every fiber that has not
// returned is there.  x86-64 only.  Loads check the alignment a GPU would insist on.
#pragma once
#include <immintrin.h>
#include <sched.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>

#define GLOBAL_MEMORY
#define DEVICE static inline
#define DEVICE_MEMBER inline
#define KERNEL(threads, name)                                  \
    constexpr int name##__threads = threads;                   \
    extern "C" __attribute__((visibility("hidden"))) void name
#define RESIDENT_KERNEL(threads, blocks, name) KERNEL(threads, name)
#define __shared__ static thread_local

// Set by the double of the device: where system_* and fresh_* calls find what plain ones do not see.
extern "C" {
__attribute__((visibility("default"))) char *(*fibers_reach)(const void *) = nullptr;
// How often a kernel has looked for something that was not there yet.
__attribute__((visibility("default"))) long fibers_pauses = 0;
}

namespace fibers {

inline char *reach(const void *p) { return fibers_reach ? fibers_reach(p) : (char *)p; }

const int MOST_THREADS = 1024, LANES = 32;
const uintptr_t STACK_BYTES = 32 << 10, STACKS = MOST_THREADS * STACK_BYTES, PLACE = 2 * STACKS;

struct fiber {
    void *stack_pointer;
    const unsigned long *waits_for; // runs on when this is no longer `seen`
    unsigned long seen;
    bool is_done;
};

// At the beginning of PLACE bytes that are aligned so; the stacks are the second half.  So what a fiber's index is, and
// where its block, says the stack pointer: thread-local variables of a library cost a call each.
struct block {
    fiber fibers[MOST_THREADS];
    void *scheduler;
    int x, y, z, threads;
    unsigned long warp_generation[MOST_THREADS / LANES], generation;
    int warp_arrived[MOST_THREADS / LANES], warp_live[MOST_THREADS / LANES], arrived, live;
    uint32_t exchanged[2][MOST_THREADS];
    void (*body)(void *);
    void *argument;
    block *next;
};

static block *now() { return (block *)((uintptr_t)__builtin_frame_address(0) & ~(PLACE - 1)); }
static int index() { return (int)(((uintptr_t)__builtin_frame_address(0) & (STACKS - 1)) / STACK_BYTES); }

extern "C" void fibers_switch(void **save, void *load) __attribute__((visibility("hidden")));
asm(".text\n"
    ".hidden fibers_switch\n"
    ".type fibers_switch,@function\n"
    "fibers_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");

static bool can_run(const fiber &f) { return !f.is_done && *f.waits_for != f.seen; }

// Who goes on when fiber i cannot: another of its warp, or of the warps behind it; at the end the scheduler.
static void *next_of(block *b, int i) {
    const int first = i & -LANES;
    for (int k = i + 1; k < i + LANES; k++) {
        const int other = first | (k & (LANES - 1));
        if (other < b->threads && can_run(b->fibers[other])) return b->fibers[other].stack_pointer;
    }
    for (int k = first + LANES, tried = 0; tried < b->threads; k++, tried++) {
        if (k >= b->threads) k = 0;
        if (can_run(b->fibers[k])) return b->fibers[k].stack_pointer;
    }
    if (!b->live) return b->scheduler;
    fprintf(stderr, "threads of a block wait for each other at different places\n");
    abort();
}

static void warp_met(block *b, int warp) {
    if (b->warp_arrived[warp] < b->warp_live[warp]) return;
    b->warp_arrived[warp] = 0;
    b->warp_generation[warp]++;
}
static void block_met(block *b) {
    if (b->arrived < b->live) return;
    b->arrived = 0;
    b->generation++;
}
static void wait_for(block *b, int i, const unsigned long *generation, unsigned long seen) {
    if (*generation != seen) return;
    b->fibers[i].waits_for = generation, b->fibers[i].seen = seen;
    fibers_switch(&b->fibers[i].stack_pointer, next_of(b, i));
}
static __attribute__((noinline)) void sync_all() {
    block *b = now();
    const unsigned long generation = b->generation;
    b->arrived++;
    block_met(b);
    wait_for(b, index(), &b->generation, generation);
}
// What all lanes have brought.  Two boards in turn: a lane can be one exchange ahead of its neighbours, not two.
static __attribute__((noinline)) const uint32_t *meet(uint32_t v) {
    block *b = now();
    const int lane = index(), warp = lane / LANES;
    const unsigned long generation = b->warp_generation[warp];
    uint32_t *board = b->exchanged[generation & 1];
    board[lane] = v;
    b->warp_arrived[warp]++;
    warp_met(b, warp);
    wait_for(b, lane, &b->warp_generation[warp], generation);
    return board + warp * LANES;
}

static void enter() {
    block *b = now();
    const int i = index(), warp = i / LANES;
    b->body(b->argument);
    b->fibers[i].is_done = true;
    b->live--;
    if (--b->warp_live[warp]) warp_met(b, warp);
    if (b->live) block_met(b);
    fibers_switch(&b->fibers[i].stack_pointer, next_of(b, i));
}

static void run_block(block *b, int x, int y, int z) {
    static const unsigned long begun = 1;
    b->x = x, b->y = y, b->z = z;
    b->arrived = 0, b->live = b->threads;
    memset(b->warp_arrived, 0, sizeof b->warp_arrived);
    memset(b->warp_live, 0, sizeof b->warp_live);
    for (int i = 0; i < b->threads; i++) {
        b->warp_live[i / LANES]++;
        // not all at one place of a page: a cache would hold few of them
        void **sp = (void **)((char *)b + STACKS + (i + 1) * STACK_BYTES - i % LANES * 64);
        *--sp = 0; // where `enter` would return to
        *--sp = (void *)enter;
        for (int k = 0; k < 6; k++) *--sp = 0;
        b->fibers[i] = {sp, &begun, 0, false};
    }
    fibers_switch(&b->scheduler, b->fibers[0].stack_pointer);
}

// Blocks' places are kept for later ones, of whichever thread.
static std::mutex lock;
static block *unused;

static block *take_place_for_a_block() {
    std::lock_guard<std::mutex> held(lock);
    if (block *b = unused) {
        unused = b->next;
        return b;
    }
    void *room = mmap(nullptr, 2 * PLACE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) abort();
    return (block *)(((uintptr_t)room + PLACE - 1) & ~(PLACE - 1));
}
static void give_back(block *b) {
    std::lock_guard<std::mutex> held(lock);
    b->next = unused;
    unused = b;
}

// What the double of the device needs to know of a kernel: threads of a block, sizes of arguments, how to run it.
template <class T> constexpr char code_of() {
    return std::is_pointer<T>::value ? 'p' : std::is_same<T, float>::value ? 'f' : sizeof(T) == 8 ? 'q' : 'i';
}
template <class... A> struct signature {
    static const char *text() {
        static const char codes[] = {code_of<A>()..., 0};
        return codes;
    }
};
template <class... A> const char *signature_of(void (*)(A...)) { return signature<A...>::text(); }

template <class... A> struct call {
    void (*kernel)(A...);
    void **arguments;
    template <size_t... I> void go(std::index_sequence<I...>) { kernel(*(A *)arguments[I]...); }
    static void enter(void *self) { ((call *)self)->go(std::index_sequence_for<A...>{}); }
};
template <class... A> void launch(void (*kernel)(A...), void **arguments, int gx, int gy, int gz, int threads) {
    call<A...> c{kernel, arguments};
    block *b = take_place_for_a_block();
    b->threads = threads, b->body = call<A...>::enter, b->argument = &c;
    for (int z = 0; z < gz; z++)
        for (int y = 0; y < gy; y++)
            for (int x = 0; x < gx; x++) run_block(b, x, y, z);
    give_back(b);
}

inline void check_alignment(const void *p, uintptr_t bytes) {
    if ((uintptr_t)p % bytes == 0) return;
    fprintf(stderr, "load of %d bytes at %p is not aligned\n", (int)bytes, p);
    abort();
}
template <class T> T load(const void *p) {
    check_alignment(p, sizeof(T));
    T v;
    memcpy(&v, p, sizeof v);
    return v;
}

} // namespace fibers

#define EXPORT_KERNEL(name)                                                                                           \
    extern "C" __attribute__((visibility("default"))) int name##__block_threads() { return name##__threads; }         \
    extern "C" __attribute__((visibility("default"))) const char *name##__signature() {                               \
        return fibers::signature_of(name);                                                                            \
    }                                                                                                                 \
    extern "C" __attribute__((visibility("default"))) void name##__launch(void **arguments, int gx, int gy, int gz) { \
        fibers::launch(name, arguments, gx, gy, gz, name##__threads);                                                 \
    }

DEVICE int thread_index() { return fibers::index(); }
DEVICE int block_x() { return fibers::now()->x; }
DEVICE int block_y() { return fibers::now()->y; }
DEVICE int block_z() { return fibers::now()->z; }
DEVICE void sync_block() { fibers::sync_all(); }
DEVICE void fence_system() { __sync_synchronize(); }
DEVICE int take_place(int *counter) { return (*counter)++; }
// The processor is another's after a few looks: where all are busy it comes back after a while, and a block of an
// exchange looks thousands of times.
DEVICE void pause_thread() {
    if (__atomic_fetch_add(&fibers_pauses, 1, __ATOMIC_RELAXED) % 64 == 63) sched_yield();
}
DEVICE float from_half(u16 h) { return _cvtsh_ss(h); }
DEVICE u16 to_half(float f) { return _cvtss_sh(f, 0); }
DEVICE float as_float(u32 v) {
    float f;
    memcpy(&f, &v, 4);
    return f;
}
DEVICE u32 as_bits(float f) {
    u32 v;
    memcpy(&v, &f, 4);
    return v;
}
template <int MASK> DEVICE u32 exchange(u32 v) {
    const u32 *board = fibers::meet(v);
    return board[(fibers::index() & (fibers::LANES - 1)) ^ MASK];
}
template <int LANE> DEVICE u32 broadcast(u32 v) { return fibers::meet(v)[LANE]; }
DEVICE u32x4 load16(const void *p) {
    fibers::check_alignment(p, 16);
    u32x4 v;
    memcpy(&v, p, 16);
    return v;
}
DEVICE u32x4 load16_once(const void *p) { return load16(p); }
DEVICE u32 load4(const void *p) { return fibers::load<u32>(p); }
DEVICE u16 load2(const void *p) { return fibers::load<u16>(p); }
DEVICE u8 load1(const void *p) { return *(const u8 *)p; }
template <class T> DEVICE T system_load(const void *p) {
    fibers::check_alignment(p, sizeof(T));
    return *(const volatile T *)fibers::reach(p);
}
DEVICE u8 system_load1(const void *p) { return system_load<u8>(p); }
DEVICE u16 system_load2(const void *p) { return system_load<u16>(p); }
DEVICE u32 system_load4(const void *p) { return system_load<u32>(p); }
DEVICE u64 system_load8(const void *p) { return system_load<u64>(p); }
DEVICE u32x4 system_load16(const void *p) {
    fibers::check_alignment(p, 16);
    u32x4 v;
    memcpy(&v, fibers::reach(p), 16);
    return v;
}
DEVICE void system_store4(void *p, u32 v) { *(volatile u32 *)fibers::reach(p) = v; }
DEVICE void system_store8(void *p, u64 v) { *(volatile u64 *)fibers::reach(p) = v; }
DEVICE u32 funnel_right(u32 low, u32 high, int bits) { return (u32)((((u64)high << 32) | low) >> bits); }
DEVICE void look_up(u32 words, u32 first, u32 last, u32 &of_low, u32 &of_high) {
    const u64 table = (u64)last << 32 | first;
    of_low = of_high = 0;
    for (int i = 0; i < 32; i += 8) {
        of_low |= (u32)((table >> (words >> i & 7) * 8) & 0xff) << i;
        of_high |= (u32)((table >> (words >> (i + 4) & 7) * 8) & 0xff) << i;
    }
}
DEVICE float fused(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float power_of_2(float x) { return std::exp2(x); }
DEVICE float logarithm_2(float x) { return std::log2(x); }
DEVICE float square_root(float x) { return std::sqrt(x); }
DEVICE float nearest(float x) { return std::nearbyint(x); }
DEVICE float magnitude(float x) { return std::fabs(x); }
DEVICE float larger(float a, float b) { return std::fmax(a, b); }
DEVICE int dot4(int a, int b, int c) {
    const __m128i products =
        _mm_madd_epi16(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(a)), _mm_cvtepi8_epi16(_mm_cvtsi32_si128(b)));
    return c + _mm_cvtsi128_si32(products) + _mm_extract_epi32(products, 1);
}
DEVICE int dot16(const u32x4 &a, const u32x4 &b, int sum) {
    const __m256i left = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)&a));
    const __m256i right = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)&b));
    const __m256i pairs = _mm256_madd_epi16(left, right);
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return sum + _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}
// What five exchanges make of it, the furthest lanes first.
DEVICE float warp_sum(float v) {
    const float *lane = (const float *)fibers::meet(as_bits(v));
    const __m256 first = _mm256_add_ps(_mm256_loadu_ps(lane), _mm256_loadu_ps(lane + 16));
    const __m256 second = _mm256_add_ps(_mm256_loadu_ps(lane + 8), _mm256_loadu_ps(lane + 24));
    const __m256 eight = _mm256_add_ps(first, second);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(two) + _mm_cvtss_f32(_mm_shuffle_ps(two, two, 1));
}
template <int COUNT> DEVICE float warp_sum_of(const float (&v)[COUNT]) {
    float sums[COUNT];
    for (int i = 0; i < COUNT; i++) sums[i] = warp_sum(v[i]);
    return sums[(fibers::index() & (fibers::LANES - 1)) / (fibers::LANES / COUNT)];
}
DEVICE float warp_sum_of_4(const float (&v)[4]) { return warp_sum_of(v); }
DEVICE float warp_sum_of_8(const float (&v)[8]) { return warp_sum_of(v); }
