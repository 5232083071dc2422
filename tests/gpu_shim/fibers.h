// The prelude's CPU branch: a block runs on one thread, every GPU thread of it a fiber that yields where a GPU would
// wait for others (lane exchanges, barriers).  A rendezvous completes when every fiber that has not returned is there.
// x86-64 only.  Loads check the alignment a GPU would insist on.
#pragma once
#include <immintrin.h>
#include <sched.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
}

namespace fibers {

inline char *reach(const void *p) { return fibers_reach ? fibers_reach(p) : (char *)p; }

const int MOST_THREADS = 1024;
const size_t STACK_BYTES = 64 << 10;

struct fiber {
    void *stack_pointer;
    char *stack;
    int index;
    bool is_done;
};

struct block {
    fiber fibers[MOST_THREADS];
    fiber *current;
    void *scheduler;
    int x, y, z;
    unsigned long warp_generation[MOST_THREADS / 32], generation;
    int warp_arrived[MOST_THREADS / 32], warp_live[MOST_THREADS / 32], arrived, live;
    uint32_t exchanged[2][MOST_THREADS];
    void (*body)(void *);
    void *argument;
};

static thread_local block now;

extern "C" void fibers_switch(void **save, void *load) __attribute__((visibility("hidden")));
asm(".text\n"
    ".hidden fibers_switch\n"
    ".type fibers_switch,@function\n"
    "fibers_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");

static __attribute__((noinline)) void yield() { fibers_switch(&now.current->stack_pointer, now.scheduler); }

static void warp_met(int warp) {
    if (now.warp_arrived[warp] < now.warp_live[warp]) return;
    now.warp_arrived[warp] = 0;
    now.warp_generation[warp]++;
}
static void block_met() {
    if (now.arrived < now.live) return;
    now.arrived = 0;
    now.generation++;
}
static __attribute__((noinline)) void sync_warp() {
    const int warp = now.current->index >> 5;
    const unsigned long generation = now.warp_generation[warp];
    now.warp_arrived[warp]++;
    warp_met(warp);
    while (now.warp_generation[warp] == generation) yield();
}
static __attribute__((noinline)) void sync_all() {
    const unsigned long generation = now.generation;
    now.arrived++;
    block_met();
    while (now.generation == generation) yield();
}
// Two boards in turn: a lane can be one exchange ahead of its neighbours, not two.
static __attribute__((noinline)) uint32_t exchange(uint32_t v, int mask) {
    const int lane = now.current->index, board = now.warp_generation[lane >> 5] & 1;
    now.exchanged[board][lane] = v;
    sync_warp();
    return now.exchanged[board][lane ^ mask];
}

static void enter() {
    now.body(now.argument);
    fiber *f = now.current;
    const int warp = f->index >> 5;
    f->is_done = true;
    now.live--;
    if (--now.warp_live[warp]) warp_met(warp);
    if (now.live) block_met();
    yield();
}

static void run_block(int x, int y, int z, int threads, void (*body)(void *), void *argument) {
    now.x = x, now.y = y, now.z = z, now.body = body, now.argument = argument;
    now.arrived = 0, now.live = threads;
    memset(now.warp_arrived, 0, sizeof now.warp_arrived);
    memset(now.warp_live, 0, sizeof now.warp_live);
    for (int i = 0; i < threads; i++) {
        fiber &f = now.fibers[i];
        if (!f.stack) f.stack = (char *)aligned_alloc(64, STACK_BYTES);
        f.index = i, f.is_done = false;
        now.warp_live[i >> 5]++;
        void **sp = (void **)(f.stack + STACK_BYTES);
        *--sp = 0;  // where `enter` would return to
        *--sp = (void *)enter;
        for (int k = 0; k < 6; k++) *--sp = 0;
        f.stack_pointer = sp;
    }
    for (int left = threads; left;) {
        left = 0;
        for (int i = 0; i < threads; i++) {
            if (now.fibers[i].is_done) continue;
            now.current = &now.fibers[i];
            fibers_switch(&now.scheduler, now.fibers[i].stack_pointer);
            left += !now.fibers[i].is_done;
        }
    }
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
    for (int z = 0; z < gz; z++)
        for (int y = 0; y < gy; y++)
            for (int x = 0; x < gx; x++) run_block(x, y, z, threads, call<A...>::enter, &c);
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

}  // namespace fibers

#define EXPORT_KERNEL(name)                                                                                           \
    extern "C" __attribute__((visibility("default"))) int name##__block_threads() { return name##__threads; }         \
    extern "C" __attribute__((visibility("default"))) const char *name##__signature() {                               \
        return fibers::signature_of(name);                                                                            \
    }                                                                                                                 \
    extern "C" __attribute__((visibility("default"))) void name##__launch(void **arguments, int gx, int gy, int gz) { \
        fibers::launch(name, arguments, gx, gy, gz, name##__threads);                                                 \
    }

DEVICE int thread_index() { return fibers::now.current->index; }
DEVICE int block_x() { return fibers::now.x; }
DEVICE int block_y() { return fibers::now.y; }
DEVICE int block_z() { return fibers::now.z; }
DEVICE void sync_block() { fibers::sync_all(); }
DEVICE void fence_system() { __sync_synchronize(); }
DEVICE int take_place(int *counter) { return (*counter)++; }
DEVICE void pause_thread() { sched_yield(); }
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
template <int MASK> DEVICE u32 exchange(u32 v) { return fibers::exchange(v, MASK); }
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
    for (int i = 0; i < 4; ++i) c += (int)(i8)(a >> (8 * i)) * (int)(i8)(b >> (8 * i));
    return c;
}
