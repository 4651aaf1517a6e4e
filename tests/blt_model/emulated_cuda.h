// CUDA's threads as fibers of one CPU thread, so that a kernel can be run, slowly, where there is no GPU.
//
// Fibers run until they wait, in an order that is drawn anew for every round. Copies of the copy engine land as late as
// they may, and what they overwrite is spoilt as soon as they begin.
#pragma once
#define EMULATED
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint2 { uint32_t x, y; };
struct float2 { float x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulated {

struct Index { int x; };

// Where a group of fibers meets.
struct Meeting {
    int size, arrived = 0, turn = 0;
};

// A lane's share of two matrices.
struct Tile { uint32_t a[4], b[2]; };

struct Block {
    Meeting all, consumers;
    std::vector<std::vector<Tile>> tiles;
    std::vector<Meeting> warps;
    std::vector<std::vector<float>> lanes;
    unsigned char* memory;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Index thread, block;
    Block* shared;
    bool done = false;
};

struct Copy { void* to; const void* from; uint32_t bytes; };
struct Barrier {
    uint32_t arrivals = 0, phase = 0, arrived = 0, expected = 0;
    std::vector<Copy> copies;
};

inline ucontext_t scheduler;
inline Fiber* current;
inline Index grid;
inline std::map<void*, Barrier> barriers;
inline std::function<void()> body;
inline std::mt19937 random_numbers;

inline const char* failure;
inline long steps;  // whatever brings a waiting fiber further

inline void yield() { swapcontext(&current->context, &scheduler); }

// End the launch with a reason.
inline void require(bool holds, const char* what) {
    while (!holds) {
        failure = what;
        yield();
    }
}

inline void wait_at(Meeting& at) {
    int turn = at.turn;
    if (++at.arrived == at.size) {
        at.arrived = 0;
        at.turn++;
        steps++;
    }
    while (at.turn == turn) yield();
}

inline void enter() {
    body();
    current->done = true;
    yield();
}

// Run a kernel to its end; returns why it cannot, or null.
inline const char* launch(int blocks, int threads, size_t memory, unsigned seed, std::function<void()> kernel) {
    body = kernel;
    grid.x = blocks;
    barriers.clear();
    std::vector<std::unique_ptr<Block>> all;
    std::vector<std::unique_ptr<Fiber>> fibers;
    for (int block = 0; block < blocks; block++) {
        auto shared = std::make_unique<Block>();
        shared->all.size = threads;
        shared->consumers.size = threads - 32;
        shared->warps.resize(threads / 32);
        for (auto& warp : shared->warps) warp.size = 32;
        shared->lanes.assign(threads / 32, std::vector<float>(32));
        shared->tiles.assign(threads / 32, std::vector<Tile>(32));
        shared->memory = (unsigned char*)std::aligned_alloc(128, (memory + 127) / 128 * 128);
        std::memset(shared->memory, 0xff, memory);
        for (int thread = 0; thread < threads; thread++) {
            auto fiber = std::make_unique<Fiber>();
            fiber->stack.resize(64 << 10);
            fiber->thread.x = thread;
            fiber->block.x = block;
            fiber->shared = shared.get();
            getcontext(&fiber->context);
            fiber->context.uc_stack.ss_sp = fiber->stack.data();
            fiber->context.uc_stack.ss_size = fiber->stack.size();
            fiber->context.uc_link = &scheduler;
            makecontext(&fiber->context, (void (*)())enter, 0);
            fibers.push_back(std::move(fiber));
        }
        all.push_back(std::move(shared));
    }
    random_numbers.seed(seed);
    std::vector<Fiber*> live;
    for (auto& fiber : fibers) live.push_back(fiber.get());
    long rounds = 0, before = steps;
    failure = nullptr;
    while (!live.empty() && failure == nullptr) {
        if (steps != before) rounds = 0;
        before = steps;
        if (++rounds == 1000) failure = "all wait for each other";
        std::rotate(live.begin(), live.begin() + random_numbers() % live.size(), live.end());
        for (Fiber* fiber : live) {
            current = fiber;
            swapcontext(&scheduler, &fiber->context);
        }
        live.erase(std::remove_if(live.begin(), live.end(), [](Fiber* fiber) { return fiber->done; }), live.end());
    }
    for (auto& [at, barrier] : barriers)
        if (failure == nullptr && !barrier.copies.empty()) failure = "a copy was begun and not waited for";
    for (auto& block : all) std::free(block->memory);
    return failure;
}

}  // namespace emulated

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::current->block)
#define gridDim (emulated::grid)
#define shared_memory (emulated::current->shared->memory)

inline void __syncthreads() { emulated::wait_at(emulated::current->shared->all); }
inline void __syncwarp() { emulated::wait_at(emulated::current->shared->warps[threadIdx.x / 32]); }
inline void rest() {}
inline void meet() { emulated::wait_at(emulated::current->shared->consumers); }
inline void await_kernel() {}
inline void begin_next_kernel() {}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
    uint32_t before = *at;
    *at += value;
    return before;
}

inline float shuffle_xor(float value, int mask) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    std::vector<float>& lanes = emulated::current->shared->lanes[warp];
    lanes[lane] = value;
    __syncwarp();
    float other = lanes[lane ^ mask];
    __syncwarp();
    return other;
}


template <class Words>
inline Words load(const uint32_t* at) {
    emulated::yield();
    emulated::require((uintptr_t)at % sizeof(Words) == 0, "words are read from an address that is no multiple of theirs");
    Words v;
    std::memcpy(&v, at, sizeof v);
    return v;
}
inline uint32_t load_word(const uint32_t* at) { return load<uint32_t>(at); }
inline uint2 load_two(const uint32_t* at) { return load<uint2>(at); }
inline uint4 load_words(const uint32_t* at) { return load<uint4>(at); }
inline void store_word(uint32_t* at, uint32_t word) {
    *at = word;
    emulated::steps++;
}

inline void barrier_begin(unsigned long long* barrier, uint32_t arrivals) {
    emulated::barriers[barrier] = {arrivals};
}
inline void barriers_begun() {}
inline void barrier_arrive(unsigned long long* barrier) {
    emulated::Barrier& at = emulated::barriers.at(barrier);
    at.arrived++;
    emulated::require(at.arrived <= at.arrivals, "a stage is filled before it was read, or read twice");
    emulated::steps++;
}
inline void barrier_expect(unsigned long long* barrier, uint32_t bytes) {
    emulated::barriers.at(barrier).expected += bytes;
    barrier_arrive(barrier);
}
// Whether a phase has ended; copies that can land do, some of the times.
inline bool barrier_test(const unsigned long long* barrier, uint32_t parity) {
    emulated::Barrier& at = emulated::barriers.at((void*)barrier);
    if (at.phase != parity) return true;
    uint32_t bytes = 0;
    for (auto& copy : at.copies) bytes += copy.bytes;
    if (at.arrived < at.arrivals || bytes != at.expected || emulated::random_numbers() % 2) {
        emulated::yield();
        return at.phase != parity;
    }
    for (auto& copy : at.copies) std::memcpy(copy.to, copy.from, copy.bytes);
    at.copies.clear();
    at.arrived = at.expected = 0;
    at.phase ^= 1;
    emulated::steps++;
    return true;
}
inline void barrier_wait(unsigned long long* barrier, uint32_t parity) {
    while (!barrier_test(barrier, parity)) {
    }
}
inline unsigned long long once_policy() { return 0; }
inline unsigned long long kept_policy() { return 0; }
inline void bulk_copy(void* to, const void* from, uint32_t bytes, unsigned long long* barrier, unsigned long long) {
    bool aligned = (uintptr_t)to % 16 == 0 && (uintptr_t)from % 16 == 0 && bytes % 16 == 0;
    emulated::require(aligned && bytes > 0, "a bulk copy is not of whole sixteens of bytes");
    std::memset(to, 0xff, bytes);
    emulated::barriers.at(barrier).copies.push_back({to, from, bytes});
}

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float half16_to_float(uint32_t bits) {
    uint16_t narrow = (uint16_t)bits;
    _Float16 value;
    std::memcpy(&value, &narrow, 2);
    return (float)value;
}
inline uint32_t pair_of(float low, float high) {
#if BFLOAT16
    auto number = [](float value) {
        uint32_t bits = as_bits(value);
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
#else
    auto number = [](float value) {
        _Float16 narrow = (_Float16)value;
        uint16_t bits;
        std::memcpy(&bits, &narrow, 2);
        return (uint32_t)bits;
    };
#endif
    return number(low) | number(high) << 16;
}

// As the instruction has it: lane 4 g + t holds rows g and g + 8 of a at columns 2 t, 2 t + 1 and these and 8, the same
// of column g of b, and rows g and g + 8 of c at columns 2 t and 2 t + 1.
inline void multiply_tile(float* c, uint4 a, uint32_t b, uint32_t other_b) {
    int lane = threadIdx.x % 32;
    emulated::Tile* tiles = emulated::current->shared->tiles[threadIdx.x / 32].data();
    tiles[lane] = {{a.x, a.y, a.z, a.w}, {b, other_b}};
    __syncwarp();
    auto number = [](uint32_t word, int k) {
#if BFLOAT16
        return as_float(k % 2 ? word & 0xffff0000u : word << 16);
#else
        return half16_to_float(k % 2 ? word >> 16 : word & 0xffffu);
#endif
    };
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            int of = k % 8 / 2, upper = k / 8;
            float left = number(tiles[row % 8 * 4 + of].a[row / 8 + 2 * upper], k);
            c[i] += left * number(tiles[column * 4 + of].b[upper], k);
        }
    }
    __syncwarp();
}
