// A whole stack of transformer blocks for one token, in one launch.
//
// At one token a step costs what reading the weights costs, if reading never stops. Between kernels it does: each waits
// for the row that the one before it makes. Here the programs stay for the whole stack, one to a multiprocessor, and
// each has a ring of slots in shared memory that the copy engine keeps filling with the program's rows of weights, in
// the order in which they are needed, through all maps of all layers. What programs hand to each other goes through
// level 2 cache, word by word: the two lowest bits of every float32 say which use of its place it belongs to, so a
// reader knows by the word itself that it is there, and nothing else is waited for. Layers take turns at two sets of
// places, so that these stay in the cache. That is safe if every program has a unit of every gated map: a program that
// writes in a layer has read all of the layer before, of which no program wrote its part before it had read all of the
// layer before that.
//
// A further warp, the supplier, orders all that the others read, as whoever orders waits at the copy engine: weights by
// whole slots, since an order costs the engine as much as hundreds of bytes, and few slots at once, as whatever is
// ordered beyond what keeps memory busy stands in queues, and with it the words that programs hand on; and, long before
// they are needed, the norms' scales and the keys and values.
//
// A warp has little to overlap its instructions with, so each costs what it takes. What can be done before a row has
// come is done before, up to reading the weights that it will be multiplied with. And all maps go through the same
// loops, told apart by their kind: code that is not in the multiprocessor's cache of instructions costs most.
//
// Products are taken by the matrix units, which at one token have little to do: a lane's eight weights of a row are a
// column of its own, multiplied by the eight inputs at the same places, so that of each result only the diagonal is of
// use. Inputs, of float32, are split into two numbers of half precision, whose sum differs from them by 2^-17 of them
// for bfloat16.
//
// A patch's vectors are read by many bytes. So each head's key of a vector comes multiplied by the head's query weights,
// and its value by the head's output weights: a score is one product with the normalised byte, and what the byte takes
// from the patch one sum over vectors and heads. Every program does that for the whole row, as it takes less time than
// handing anything on.
//
// Sums are taken in float32 in a fixed order. Compiled by NVRTC with the sizes as macros (see resident.py):
//   DIM, HIDDEN, HEADS, WIDTH (of a head), SPLITS (parts of a head's attention), SCORES (heads that read a patch times
//   its vectors; 0 where no layer reads one), VECTORS (of a patch), MAPS and LAYERS of the stack, TAP (the layer whose
//   output is kept besides; -1 for none), WARPS of a program, SLOTS of a program's ring and SLOT (bytes of each),
//   IN_FLIGHT (slots under way at once; 0 for all), STAMPS (whether programs note when they have ended each phase of a
//   layer), BFLOAT16 (0 for float16).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define THREADS (WARPS * 32)  // that multiply; the supplier's come after them
#define AHEAD 4              // turns of 256 inputs whose weights are read before they are multiplied
#define TURNS(inputs) (((inputs) + 255) / 256)
#define FIRST(inputs) ((TURNS(inputs) - 1) % AHEAD + 1)   // turns that are multiplied first: the last of the row
#define HAVE_TWO(inputs) (SLOT / (4 * (inputs)) > WARPS)  // whether a slot may have two units of a warp
#define KV_STAGES 2
#define NORMS (SCORES > 0 ? 2 : 1)  // whose scales are under way at once: two where one soon follows another
#define KEYS (4096 / WIDTH)  // of a stage of attention, whose keys take 8 KB and whose values too
#define MOST (DIM > HIDDEN ? DIM : HIDDEN)
#define NOTHING (-1e30f)     // the largest score of no keys
#define PLACES ((SCORES + 31) / 32 * 32)  // numbers of a row that gives what a patch's vectors add to an output

// What a map makes, in a layer's order. Those of even numbers multiply a normalised row. Scores and answers are what a
// byte takes from a patch.
enum Kind { SCORE, ANSWER, HEAD, MIDDLE, GATE, END };

// A linear map, by units of two rows that one warp takes: neighbours, or a gate and its value.
struct Map {
    const u16* weight;
    int units, inputs, kind;
    int each, extra;  // units of every program, and how many programs have one more
    int before;       // where the programs that have one more begin
    int most;         // units of a slot
    int shared;       // whether every program has all units
};

// Units of a program.
struct Span {
    int unit, end;
};

// A layer. What it does not have is null.
struct Layer {
    const u16 *cross_norm, *attention_norm, *feed_norm;
    u16 *keys, *values;  // [HEADS, capacity, WIDTH]
    float cross_residual;
    int unused;
};

// Where a layer's words lie in the exchange.
#define AT_HEADS 0
#define AT_PARTS (AT_HEADS + 3 * DIM)
#define AT_STATS (AT_PARTS + SPLITS * DIM)
#define AT_ATTENDED (AT_STATS + 2 * SPLITS * HEADS)
#define AT_MIDDLE (AT_ATTENDED + DIM)
#define AT_HIDDEN (AT_MIDDLE + DIM)
#define AT_END (AT_HIDDEN + HIDDEN)
#define LAYER_WORDS (AT_END + DIM)

#ifndef EMULATED
__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

__device__ __forceinline__ uint4 load_words(const u32* at) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ u32 load_word(const u32* at) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ uint2 load_two(const u32* at) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ void store_word(u32* at, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(at), "r"(word) : "memory");
}
__device__ __forceinline__ void rest() { __nanosleep(40); }
// A launch may begin before the kernel that it follows has ended, and lets the next one begin before it has.
__device__ __forceinline__ void await_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void begin_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory"); }
__device__ __forceinline__ void barrier_begin(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barriers_begun() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ bool barrier_test(const u64* barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n" : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    return done;
}
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra again;\n"
        "}\n" :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}
// What is read once in a step goes from level 2 cache first; keys and values may stay for the next step.
__device__ __forceinline__ u64 once_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ u64 kept_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void bulk_copy(void* to, const void* from, u32 bytes, u64* barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy) : "memory");
}
__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ float as_float(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 as_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float half16_to_float(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
    return value;
}
__device__ __forceinline__ u32 pair_of(float low, float high) {
    u32 bits;
#if BFLOAT16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#endif
    return bits;
}
// c += a b, of 16 by 16 and 16 by 8 numbers, spread over the warp.
__device__ __forceinline__ void multiply_tile(float* c, uint4 a, u32 b, u32 other_b) {
#if BFLOAT16
#define TILE "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
#define TILE "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif
    asm(TILE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b), "r"(other_b));
}
extern __shared__ __align__(128) unsigned char shared_memory[];
#endif

// The two numbers of a word of weights, keys or values.
__device__ __forceinline__ float low_number(u32 word) {
#if BFLOAT16
    return as_float(word << 16);
#else
    return half16_to_float(word & 0xffffu);
#endif
}
__device__ __forceinline__ float high_number(u32 word) {
#if BFLOAT16
    return as_float(word & 0xffff0000u);
#else
    return half16_to_float(word >> 16);
#endif
}

__device__ __forceinline__ u32 sealed(float value, u32 epoch) { return ((as_bits(value) + 2u) & ~3u) | epoch; }
__device__ __forceinline__ float opened(u32 word) { return as_float(word & ~3u); }
__device__ __forceinline__ bool is_there(uint4 v, u32 epoch) {
    return (((v.x ^ epoch) | (v.y ^ epoch) | (v.z ^ epoch) | (v.w ^ epoch)) & 3u) == 0;
}
__device__ __forceinline__ float4 opened4(uint4 v) {
    return make_float4(opened(v.x), opened(v.y), opened(v.z), opened(v.w));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) value += shuffle_xor(value, mask);
    return value;
}

__device__ __forceinline__ void unpack(uint4 words, float* to) {
    to[0] = low_number(words.x), to[1] = high_number(words.x), to[2] = low_number(words.y), to[3] = high_number(words.y);
    to[4] = low_number(words.z), to[5] = high_number(words.z), to[6] = low_number(words.w), to[7] = high_number(words.w);
}

__device__ __forceinline__ void read8(const float* from, float* to) {
    float4 a = ((const float4*)from)[0], b = ((const float4*)from)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

__device__ __forceinline__ uint4 packed(const float* from) {
    return make_uint4(pair_of(from[0], from[1]), pair_of(from[2], from[3]), pair_of(from[4], from[5]),
                      pair_of(from[6], from[7]));
}

// Four inputs as the matrix units take them: of two and two the nearest numbers, and what these leave.
__device__ __forceinline__ uint4 split(float4 v) {
    u32 first = pair_of(v.x, v.y), second = pair_of(v.z, v.w);
    return make_uint4(first, pair_of(v.x - low_number(first), v.y - high_number(first)), second,
                      pair_of(v.z - low_number(second), v.w - high_number(second)));
}

// A row that a map multiplies: of every eight inputs the first four, and the others in the second half.
template <int COUNT>
struct Row {
    uint4 halves[2][COUNT / 8];
};

// What a program has of a part of a head's attention.
struct Attention {
    alignas(16) float heads[3 * WIDTH];  // the new token's query, key and value
    float merged[WARPS * WIDTH];
    float merged_stats[WARPS * 2];
};

// Shared memory of a program.
struct Shared {
    alignas(128) u16 ring[SLOTS * SLOT / 2];
    u16 keys[KV_STAGES * KEYS * WIDTH];
    u16 values[KV_STAGES * KEYS * WIDTH];
    u16 norms[NORMS * DIM];
    // Maps multiply these by turns, so that a warp can go on to the next while others are at the last.
    Row<DIM> normalised;
    // Attention has the room of the second while there is no row in it.
    union {
        Row<MOST> row;
        Attention attention;
    };
    float residual[DIM];
    alignas(16) float squares[THREADS];  // of the stream, by the threads that took it
#if SCORES > 0
    float scores[PLACES];
    alignas(16) float shares[WARPS * PLACES];
#endif
    u64 full[SLOTS], empty[SLOTS];
    u64 kv_full[KV_STAGES], kv_empty[KV_STAGES];
    u64 norm_full[NORMS], norm_empty[NORMS];
    Map maps[MAPS];
    Layer layers[LAYERS];
    alignas(16) float angles[WIDTH];   // the position's cosines and sines, in turn
};

static_assert(SLOTS >= 2 && SLOT >= 4 * MOST, "there is room for too few rows of weights");
static_assert(sizeof(Shared) <= 232448 - 1024, "a multiprocessor has no room for this");

// For the host.
extern "C" __device__ const int shared_bytes = sizeof(Shared);

// The phases of a layer, by what has been done at their ends.
enum Phase { STREAM, SCORES_MADE, PATCH_READ, HEADS_MADE, ATTENDED, ATTENTION, MIDDLE_MADE, MIDDLE_TAKEN, HIDDEN_MADE,
             HIDDEN_TAKEN, END_MADE, PHASES };
#if STAMPS
#define MOST_PROGRAMS 256
// Of every program: nanoseconds by a clock that all have, and in cycles the time and the wait for weights until then.
extern "C" __device__ u64 stamps[LAYERS * PHASES * MOST_PROGRAMS * 3] = {};
#endif

// What of the keys one part of a head's attention reads.
struct Part {
    int begin, end, blocks;
};
__device__ __forceinline__ Part part_of(int item, int held) {
    int each = (held + SPLITS - 1) / SPLITS;
    int length = (each + KEYS - 1) / KEYS * KEYS;
    Part part;
    part.begin = item % SPLITS * length;
    part.end = min(part.begin + length, held);
    part.blocks = part.end > part.begin ? (part.end - part.begin + KEYS - 1) / KEYS : 0;
    return part;
}

// Where a thread is, and the token.
struct Place {
    int thread, warp, lane, cta, ctas;
    int position, written, held, capacity;  // written: the place in the cache that takes the token

    // A program's units are neighbours, so that they lie in one piece, and few writes bring their words.
    __device__ __forceinline__ Span span_of(const Map& map) const {
        int place = map.shared ? 0 : cta - map.before;
        if (place < 0) place += ctas;
        Span span;
        span.unit = place * map.each + min(place, map.extra);
        span.end = span.unit + map.each + (place < map.extra);
        return span;
    }
};

// The order in which stages of a ring are used.
struct Turn {
    int stage = 0;
    u32 parity = 0;

    template <int COUNT>
    __device__ __forceinline__ void next() {
        if (++stage == COUNT) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// The thread that orders what the others read.
struct Supplier : Place {
    Shared& s;
    u64 once, kept;
    // Weights: the next units to order, and the slot that they go to.
    int map, unit, end;
    Turn slot;
    int flying;    // slots that are under way, or were when last looked at
    Turn arrives;  // the first of them
    int layer, item, block;  // of keys
    Turn keys;
    int norm;  // by its place in the stack, of three a layer
    Turn norms;

    __device__ Supplier(Shared& shared, const Place& place) : Place(place), s(shared) {}

    __device__ __forceinline__ void next_map() {
        if (++map == MAPS) return;
        Span span = span_of(s.maps[map]);
        unit = span.unit;
        end = span.end;
    }

    __device__ __forceinline__ void order_slot() {
        if (IN_FLIGHT > 0) {
            if (flying == IN_FLIGHT) {
                barrier_wait(s.full + arrives.stage, arrives.parity);
                arrives.next<SLOTS>();
            } else {
                flying++;
            }
        }
        const Map& of = s.maps[map];
        int count = min(of.most, end - unit), row = 2 * count * of.inputs;
        const u16* from = of.weight + (i64)unit * (of.kind == GATE ? 1 : 2) * of.inputs;
        u16* to = s.ring + slot.stage * (SLOT / 2);
        barrier_expect(s.full + slot.stage, 2 * row);
        bulk_copy(to, from, of.kind == GATE ? row : 2 * row, s.full + slot.stage, of.shared ? kept : once);
        if (of.kind == GATE)
            bulk_copy(to + row / 2, from + (i64)of.units * of.inputs, row, s.full + slot.stage, once);
        slot.next<SLOTS>();
        unit += count;
        while (map < MAPS && unit >= end) next_map();
    }

    // Go on to the next block of keys that this program reads.
    __device__ __forceinline__ void seek_keys() {
#pragma unroll 1
        while (layer < LAYERS && (item >= HEADS * SPLITS || block >= part_of(item, held).blocks)) {
            block = 0;
            item += ctas;
            if (item >= HEADS * SPLITS) {
                item = cta;
                layer = cta < HEADS * SPLITS ? layer + 1 : LAYERS;
            }
        }
    }

    __device__ __forceinline__ void order_keys() {
        Part part = part_of(item, held);
        int begin = part.begin + block * KEYS, at = keys.stage;
        int count = min(KEYS, part.end - begin) * WIDTH;
        i64 first = ((i64)(item / SPLITS) * capacity + begin) * WIDTH;
        barrier_expect(s.kv_full + at, 4 * count);
        bulk_copy(s.keys + at * KEYS * WIDTH, s.layers[layer].keys + first, 2 * count, s.kv_full + at, kept);
        bulk_copy(s.values + at * KEYS * WIDTH, s.layers[layer].values + first, 2 * count, s.kv_full + at, kept);
        keys.next<KV_STAGES>();
        block++;
        seek_keys();
    }

    __device__ __forceinline__ const u16* scales_of(int norm) {
        const Layer& of = s.layers[norm / 3];
        return norm % 3 == 0 ? of.cross_norm : norm % 3 == 1 ? of.attention_norm : of.feed_norm;
    }

    __device__ __forceinline__ void order_norm() {
        // The first of a layer may be missing.
        if (scales_of(norm) == nullptr) norm++;
        barrier_expect(s.norm_full + norms.stage, 2 * DIM);
        bulk_copy(s.norms + norms.stage * DIM, scales_of(norm++), 2 * DIM, s.norm_full + norms.stage, kept);
        norms.next<NORMS>();
    }

    // What may be ordered before the kernel that this one follows has ended: weights, but for those of a patch.
    __device__ __forceinline__ void begin() {
        once = once_policy();
        kept = kept_policy();
        item = block = norm = flying = 0;
        map = -1;
        unit = end = 0;
        while (map < MAPS && unit >= end) next_map();
#pragma unroll 1
        for (int i = 0; i < (IN_FLIGHT > 0 ? IN_FLIGHT : SLOTS) && map < MAPS && !s.maps[map].shared; i++) order_slot();
    }

    // Wait for what was begun, where nothing follows: its room must not be given back before it has come.
    __device__ __forceinline__ void drain() {
        Turn at;
#pragma unroll 1
        while (at.stage != slot.stage || at.parity != slot.parity) {
            barrier_wait(s.full + at.stage, at.parity);
            at.next<SLOTS>();
        }
    }

    __device__ __forceinline__ void run(const Place& place) {
        (Place&)*this = place;
        layer = LAYERS;
        if (cta < HEADS * SPLITS) {
            item = cta;
            layer = 0;
            seek_keys();
        }
        // Stages are empty at first, as if they had been read before.
#pragma unroll 1
        while (map < MAPS || layer < LAYERS || norm < 3 * LAYERS) {
            if (norm < 3 * LAYERS && barrier_test(s.norm_empty + norms.stage, norms.parity ^ 1)) order_norm();
            if (layer < LAYERS && barrier_test(s.kv_empty + keys.stage, keys.parity ^ 1)) order_keys();
            if (map < MAPS && barrier_test(s.empty + slot.stage, slot.parity ^ 1)) order_slot();
            else rest();
        }
    }
};

// What the warps that multiply do.
struct Program : Place {
    Shared& s;
    u32* exchange;
    const u16* input;
    u16 *output, *tap, *tap_row;
    u32 epoch;  // of this layer's words
    u32 launches;
    float eps;
    Turn slot, block, norm;  // to read next
    // The map that is prepared: its units here, those of a slot, where its words go, and the stream's share in them.
    Span span;
    int most;
    bool is_score, is_end, is_gate, begun;  // begun: its first units
    float of_residual;
    u32* to;
    // The units that are begun, in words of 16 bytes: from one to the next, to its other row, and where the first lies.
    int step, other;
    const uint4* first;
    bool has_two;
    uint4 rows[2][AHEAD][2];
    u64 waited;  // for weights, in cycles, by the first thread

    __device__ Program(Shared& shared, const Place& place) : Place(place), s(shared) {}

    __device__ __forceinline__ void stamp(int layer, Phase phase) {
#if STAMPS
        if (thread != 0) return;
        u64* at = stamps + ((layer * PHASES + phase) * MOST_PROGRAMS + cta) * 3;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(at[0]));
        at[1] = clock64();
        at[2] = waited;
#endif
    }

    // How often a layer's places have been used before, modulo 3, plus 1.
    __device__ __forceinline__ u32 epoch_of(int layer) {
        u32 each = (LAYERS + 1 - layer % 2) / 2;
        return (launches % 3 * each + layer / 2) % 3 + 1;
    }

    __device__ __forceinline__ u32* words(int layer, int at) { return exchange + layer % 2 * LAYER_WORDS + at; }

    __device__ __forceinline__ void await_slot() {
#if STAMPS
        u64 begun = clock64();
#endif
        barrier_wait(s.full + slot.stage, slot.parity);
#if STAMPS
        waited += clock64() - begun;
#endif
    }

    __device__ __forceinline__ void slot_read() {
        __syncwarp();
        if (lane == 0) barrier_arrive(s.empty + slot.stage);
        slot.next<SLOTS>();
    }

    // Where a map's results go.
    __device__ __forceinline__ u32* target_of(int layer, int kind) {
        int at = kind == HEAD ? AT_HEADS : kind == MIDDLE ? AT_MIDDLE : kind == GATE ? AT_HIDDEN : AT_END;
        return words(layer, at);
    }

    // Wait for some words and give them to a function, four at a time: take(turn, quarter, float4).
    template <int COUNT, class Take>
    __device__ __forceinline__ void gather(const u32* from, u32 epoch, Take take) {
        constexpr int all = (COUNT / 4 + THREADS - 1) / THREADS, batch = all < 8 ? all : 8;
        const uint4 nothing = make_uint4(epoch + 1, epoch + 1, epoch + 1, epoch + 1);
        for (int base = 0; base < all; base += batch) {
            uint4 v[batch];
            bool waits = true;
#pragma unroll
            for (int i = 0; i < batch; i++) {
                int quarter = thread + (base + i) * THREADS;
                v[i] = quarter < COUNT / 4 ? nothing : make_uint4(epoch, epoch, epoch, epoch);
            }
            while (waits) {
                waits = false;
#pragma unroll
                for (int i = 0; i < batch; i++)
                    if (!is_there(v[i], epoch)) v[i] = load_words(from + 4 * (thread + (base + i) * THREADS));
#pragma unroll
                for (int i = 0; i < batch; i++) waits |= !is_there(v[i], epoch);
            }
#pragma unroll
            for (int i = 0; i < batch; i++) take(i, thread + (base + i) * THREADS, opened4(v[i]));
        }
    }

    // Take the residual stream, from the exchange or where there is none from the stack's input, times a norm's scales.
    __device__ __forceinline__ void take_normalised(const u32* from, u32 epoch) {
        constexpr int turns = (DIM / 4 + THREADS - 1) / THREADS;
        static_assert(turns <= 8, "a turn counts from the first word");
        uint2 scales[turns];
        barrier_wait(s.norm_full + norm.stage, norm.parity);
#pragma unroll
        for (int i = 0; i < turns; i++)
            scales[i] = ((const uint2*)(s.norms + norm.stage * DIM))[min(thread + i * THREADS, DIM / 4 - 1)];
        float squares = 0.0f;
        auto take = [&](int turn, int quarter, float4 x) {
            if (quarter >= DIM / 4) return;
            // Whatever of the stream was here has been added to, if the words in its place have come.
            ((float4*)s.residual)[quarter] = x;
            squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
            uint2 scale = scales[turn];
            s.normalised.halves[quarter & 1][quarter >> 1] =
                split(make_float4(x.x * low_number(scale.x), x.y * high_number(scale.x), x.z * low_number(scale.y),
                                  x.w * high_number(scale.y)));
        };
        if (from == nullptr) {
#pragma unroll
            for (int i = 0; i < turns; i++) {
                int quarter = thread + i * THREADS;
                uint2 x = ((const uint2*)input)[min(quarter, DIM / 4 - 1)];
                take(i, quarter, make_float4(low_number(x.x), high_number(x.x), low_number(x.y), high_number(x.y)));
            }
        } else {
            gather<DIM>(from, epoch, take);
        }
        s.squares[thread] = squares;
        normalised();
    }

    // All threads have normalised their parts of the row.
    __device__ __forceinline__ void normalised() {
        meet();
        if (thread == 0) barrier_arrive(s.norm_empty + norm.stage);
        norm.next<NORMS>();
    }

    // Take the hidden numbers.
    __device__ __forceinline__ void take_hidden(const u32* from) {
        gather<HIDDEN>(from, epoch, [&](int, int quarter, float4 x) {
            if (quarter < HIDDEN / 4) s.row.halves[quarter & 1][quarter >> 1] = split(x);
        });
        meet();
    }

    // By what the products of a normalised row must be multiplied.
    __device__ __forceinline__ float norm_factor() const {
        constexpr int each = THREADS / 32;
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < each / 4; i++) {
            float4 v = ((const float4*)s.squares)[lane * (each / 4) + i];
            squares += v.x + v.y + v.z + v.w;
        }
        return rsqrtf(warp_sum(squares) * (1.0f / DIM) + eps);
    }

#if SCORES > 0
    // From the scores of a patch's vectors, what each of them counts for each head: as a column of the matrix that the
    // matrix units take, the nearest numbers in even lanes' columns, and what these leave in odd ones'.
    __device__ __forceinline__ void take_scores(uint4* inputs) {
        float* shares = s.shares + warp * PLACES;
#pragma unroll
        for (int i = 0; i < PLACES / 32; i++) {
            int at = 32 * i + lane, first = at - at % VECTORS;
            float largest = NOTHING, mass = 0.0f, share = 0.0f;
            if (at < SCORES) {
#pragma unroll
                for (int j = 0; j < VECTORS; j++) largest = fmaxf(largest, s.scores[first + j]);
#pragma unroll
                for (int j = 0; j < VECTORS; j++) mass += __expf(s.scores[first + j] - largest);
                share = __fdividef(__expf(s.scores[at] - largest), mass);
            }
            shares[at] = share;
        }
        __syncwarp();
        const bool leaves = lane & 4;
#pragma unroll
        for (int i = 0; i < PLACES / 32; i++) {
            const float4* four = (const float4*)shares + 8 * i + lane % 4 * 2;
            uint4 one = split(four[0]), two = split(four[1]);
            inputs[i] = leaves ? make_uint4(one.y, one.w, two.y, two.w) : make_uint4(one.x, one.z, two.x, two.z);
        }
    }

    // Add what the patch gives to two neighbours of the stream, which then await the attention's norm; their squares.
    __device__ __forceinline__ float add_answers(int at, float one, float two, float of_residual) {
        float2& x = ((float2*)s.residual)[at / 2];
        one += of_residual * x.x;
        two += of_residual * x.y;
        x = make_float2(one, two);
        u32 scales = ((const u32*)(s.norms + norm.stage * DIM))[at / 2];
        float low = one * low_number(scales), high = two * high_number(scales);
        u32 nearest = pair_of(low, high);
        uint2* to = (uint2*)(s.normalised.halves[at / 4 & 1] + at / 8);
        to[at / 2 & 1] = make_uint2(nearest, pair_of(low - low_number(nearest), high - high_number(nearest)));
        return one * one + two * two;
    }

    // Read the patch, once the scores are there, for all of the row: by sixteens of outputs, of which a warp takes four
    // at a time, so that every lane has the sums of two outputs.
    __device__ __forceinline__ void take_answers(float of_residual) {
        uint4 inputs[PLACES / 32];
        float squares = 0.0f;
        meet();
        take_scores(inputs);
        barrier_wait(s.norm_full + norm.stage, norm.parity);
        int sixteen = 4 * warp;
        // Neighbours' banks differ if of two rows odd lanes read the second first.
        const int pair = lane / 4, odd = pair & 1;
        const int first = (2 * pair + odd) * (PLACES / 8) + lane % 4, other = (odd ? -PLACES : PLACES) / 8;
#pragma unroll 1
        for (int unit = 0; unit < span.end; unit += most) {
            int sixteens = (min(most, span.end - unit) + 7) / 8, outputs = 2 * min(most, span.end - unit);
            await_slot();
            const uint4* from = (const uint4*)(s.ring + slot.stage * (SLOT / 2)) + first;
#pragma unroll 1
            for (; sixteen < sixteens; sixteen += 4 * WARPS) {
                float one = 0.0f, two = 0.0f;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    // Beyond the last the sums mean nothing, and are not used.
                    float sums[4] = {};
                    const uint4* rows = from + (sixteen + i) * 2 * PLACES;
#pragma unroll
                    for (int j = 0; j < PLACES / 32; j++) {
                        uint4 a = rows[4 * j], b = rows[4 * j + other];
                        multiply_tile(sums, make_uint4(a.x, b.x, a.y, b.y), inputs[j].x, inputs[j].y);
                        multiply_tile(sums, make_uint4(a.z, b.z, a.w, b.w), inputs[j].z, inputs[j].w);
                    }
                    bool mine = lane % 4 == i;
                    one = mine ? sums[0] + sums[1] : one;
                    two = mine ? sums[2] + sums[3] : two;
                }
                int at = 16 * (sixteen + lane % 4) + 2 * pair;
                if (at < outputs)
                    squares += add_answers(2 * unit + at, odd ? two : one, odd ? one : two, of_residual);
            }
            // The next slot's go on with the next warp.
            sixteen -= (sixteens + 3) / 4 * 4;
            slot_read();
        }
        s.squares[thread] = squares;
    }
#endif

    // Read some turns of a unit's two rows. Only a row's last turn may be less than whole.
    template <int COUNT, bool WHOLE>
    __device__ __forceinline__ void read_rows(uint4 (*rows)[2], const uint4* one, const uint4* two, int left) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            bool inside = WHOLE || i < COUNT - 1 || lane + 32 * i < left;
            rows[i][0] = inside ? one[32 * i] : make_uint4(0, 0, 0, 0);
            rows[i][1] = inside ? two[32 * i] : make_uint4(0, 0, 0, 0);
        }
    }

    // Multiply what was read of some units by its inputs, and add to the sums.
    template <int UNITS, int COUNT, bool WHOLE>
    __device__ __forceinline__ void multiply_rows(float (*sums)[4][4], const uint4* x, const uint4* other_x,
                                                  int left) const {
        uint4 inputs[COUNT][2];
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            bool inside = WHOLE || i < COUNT - 1 || lane + 32 * i < left;
            inputs[i][0] = inside ? x[32 * i] : make_uint4(0, 0, 0, 0);
            inputs[i][1] = inside ? other_x[32 * i] : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                multiply_tile(sums[u][0], inputs[i][0], rows[u][i][0].x, rows[u][i][0].y);
                multiply_tile(sums[u][1], inputs[i][0], rows[u][i][1].x, rows[u][i][1].y);
                multiply_tile(sums[u][2], inputs[i][1], rows[u][i][0].z, rows[u][i][0].w);
                multiply_tile(sums[u][3], inputs[i][1], rows[u][i][1].z, rows[u][i][1].w);
            }
        }
    }

    // Begin with units of the present slot, one at a place and maybe one WARPS places on: where they lie, and their
    // last turns.
    __device__ __forceinline__ void begin_units(int place, int count) {
        first = (const uint4*)(s.ring + slot.stage * (SLOT / 2)) + lane + place * step;
        has_two = place + WARPS < count;
        if (is_end) read_last<HIDDEN>();
        else read_last<DIM>();
    }
    template <int INPUTS>
    __device__ __forceinline__ void read_last() {
        constexpr int before = 32 * (TURNS(INPUTS) - FIRST(INPUTS)), left = INPUTS / 8 - before;
        const uint4* at = first + before;
        read_rows<FIRST(INPUTS), INPUTS % 256 == 0>(rows[0], at, at + other, left);
        if (!HAVE_TWO(INPUTS) || !has_two) return;
        at += WARPS * step;
        read_rows<FIRST(INPUTS), INPUTS % 256 == 0>(rows[1], at, at + other, left);
    }

    // All products of units that were begun: the sums of each one's two rows.
    template <int UNITS, int INPUTS>
    __device__ __forceinline__ void multiply_units(float (*results)[2], const uint4* x, const uint4* other_x) {
        constexpr int before = 32 * (TURNS(INPUTS) - FIRST(INPUTS));
        float sums[UNITS][4][4] = {};
        multiply_rows<UNITS, FIRST(INPUTS), INPUTS % 256 == 0>(sums, x + before, other_x + before, INPUTS / 8 - before);
#pragma unroll 1
        for (int at = 0; at < before; at += 32 * AHEAD) {
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                const uint4* from = first + u * WARPS * step + at;
                read_rows<AHEAD, true>(rows[u], from, from + other, 0);
            }
            multiply_rows<UNITS, AHEAD, true>(sums, x + at, other_x + at, 0);
        }
        // The diagonal is in lanes that are multiples of 9, and of 9 and 4 more.
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float *a = sums[u][i], *b = sums[u][i + 2];
                results[u][i] = lane & 4 ? a[1] + a[3] + (b[1] + b[3]) : a[0] + a[2] + (b[0] + b[2]);
            }
        }
#pragma unroll
        for (int u = 0; u < 2 * UNITS; u++) results[u / 2][u % 2] += shuffle_xor(results[u / 2][u % 2], 4);
#pragma unroll
        for (int u = 0; u < 2 * UNITS; u++) results[u / 2][u % 2] += shuffle_xor(results[u / 2][u % 2], 9);
#pragma unroll
        for (int u = 0; u < 2 * UNITS; u++) results[u / 2][u % 2] += shuffle_xor(results[u / 2][u % 2], 18);
    }
    template <int INPUTS>
    __device__ __forceinline__ void multiply_begun(float (*results)[2], const uint4* x, const uint4* other_x) {
        if (HAVE_TWO(INPUTS) && has_two) {
            multiply_units<2, INPUTS>(results, x, other_x);
        } else {
            multiply_units<1, INPUTS>(results, x, other_x);
            results[1][0] = results[1][1] = 0.0f;
        }
    }

    // Before its row is there: what this program has of a map, and its first slot.
    __device__ __forceinline__ void prepare(const Map& map, int layer) {
        const int kind = map.kind, length = map.inputs / 8;
        span = span_of(map);
        most = map.most;
        is_score = kind == SCORE;
        is_end = kind == END;
        is_gate = kind == GATE;
        of_residual = kind == MIDDLE || kind == END ? 1.0f : 0.0f;
        to = target_of(layer, kind);
        step = is_gate ? length : 2 * length;
        int count = min(most, span.end - span.unit);
        other = is_gate ? count * length : length;
        begun = kind != ANSWER && count > 0 && barrier_test(s.full + slot.stage, slot.parity);
        if (begun && warp < count) begin_units(warp, count);
    }

    // Multiply this program's units of a map, which was prepared, by the row that was taken last.
    __device__ __forceinline__ void multiply(bool normalises, int layer) {
        const uint4* x = (normalises ? s.normalised.halves[0] : s.row.halves[0]) + lane;
        const uint4* other_x = x + (normalises ? DIM : MOST) / 8;
        // Lanes that hold results give one each: 0 and 4 of the first unit, 9 and 13 of the second.
        const bool gives = lane == 0 || lane == 4 || lane == 9 || lane == 13, second = lane >= 8, odd = lane & 4;
        float scale = normalises ? 0.0f : 1.0f;
        int place = warp;
#pragma unroll 1
        for (int unit = span.unit; unit < span.end; unit += most) {
            int count = min(most, span.end - unit);
            // All warps take part in all slots, also where they have no unit: whoever is a round ahead or behind could
            // not tell one filling of a slot from another.
            if (!begun) {
                await_slot();
                if (is_gate) other = count * (DIM / 8);
            }
            // Units go round the warps.
#pragma unroll 1
            for (; place < count; place += 2 * WARPS) {
                if (!begun) begin_units(place, count);
                begun = false;
                float results[2][2];
                if (is_end) multiply_begun<HIDDEN>(results, x, other_x);
                else multiply_begun<DIM>(results, x, other_x);
                if (scale == 0.0f) scale = norm_factor();
                float one = second ? results[1][0] : results[0][0], two = second ? results[1][1] : results[0][1];
                if (gives && (!second || has_two))
                    give(unit + place + (second ? WARPS : 0), odd, (odd ? two : one) * scale, two * scale, layer);
            }
            // The next slot's units go on with the next warp.
            place = warp - (unit + count - span.unit) & WARPS - 1;
            slot_read();
            begun = false;
        }
    }

    // Hand a result of a unit on: of one of its rows, or of a gate and its value.
    __device__ __forceinline__ void give(int unit, bool odd, float value, float other_value, int layer) {
        if (is_gate) {
            if (!odd) store_word(to + unit, sealed(__fdividef(other_value * value, 1.0f + __expf(-value)), epoch));
            return;
        }
        int at = 2 * unit + odd;
#if SCORES > 0
        if (is_score) {
            s.scores[at] = value;
            return;
        }
#endif
        if (of_residual != 0.0f) value += of_residual * s.residual[at];
        if (is_end && layer == LAYERS - 1) {
            output[at] = (u16)pair_of(value, 0.0f);
            return;
        }
        store_word(to + at, sealed(value, epoch));
        if (is_end && layer == TAP) tap[at] = tap_row[at] = (u16)pair_of(value, 0.0f);
    }

    // The new token's part of a head: its query, key and value.
    __device__ __forceinline__ void take_head(int layer, int head) {
        const u32* from = words(layer, AT_HEADS) + head * WIDTH;
        if (thread < 3 * WIDTH / 4) {
            int which = thread / (WIDTH / 4), quarter = thread % (WIDTH / 4);
            uint4 v = make_uint4(0, 0, 0, 0);
            while (!is_there(v, epoch)) v = load_words(from + which * DIM + 4 * quarter);
            ((float4*)s.attention.heads)[thread] = opened4(v);
        }
        meet();
    }

    // Turn pairs of eight numbers of a head by the position's angles.
    __device__ __forceinline__ void turn_pairs(float* x, const float* angles) const {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            float a = x[j], b = x[j + 1];
            x[j] = a * angles[j] - b * angles[j + 1];
            x[j + 1] = b * angles[j] + a * angles[j + 1];
        }
    }

    // A key's score, in all lanes that share the key.
    __device__ __forceinline__ float score_of(uint4 words, const float* query, bool kept) const {
        float key[8], even = 0.0f, odd = 0.0f;
        unpack(words, key);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            even = fmaf(key[j], query[j], even);
            odd = fmaf(key[j + 1], query[j + 1], odd);
        }
        even += odd;
#pragma unroll
        for (int mask = 1; mask < WIDTH / 8; mask *= 2) even += shuffle_xor(even, mask);
        return kept ? even : NOTHING;
    }

    // Add the values of some keys to the sums, which are relative to the best score so far.
    template <int COUNT>
    __device__ __forceinline__ void add_keys(const float* scores, const uint4* values, float* sums, float& best,
                                             float& mass) const {
        float largest = best;
#pragma unroll
        for (int i = 0; i < COUNT; i++) largest = fmaxf(largest, scores[i]);
        float shrink = __expf(best - largest);
        best = largest;
        mass *= shrink;
#pragma unroll
        for (int j = 0; j < 8; j++) sums[j] *= shrink;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            float share = scores[i] > NOTHING ? __expf(scores[i] - largest) : 0.0f, value[8];
            unpack(values[i], value);
            mass += share;
#pragma unroll
            for (int j = 0; j < 8; j++) sums[j] = fmaf(share, value[j], sums[j]);
        }
    }

    // What a lane has of a part of a head's attention: sums of eight numbers of the values, relative to the best score.
    struct Sums {
        float values[8] = {}, best = NOTHING, mass = 0.0f;
    };

    // The new token's own key and value, which the cache takes: for one warp.
    __device__ __forceinline__ void attend_own(int layer, int head, const float* query, const float* angles, Sums& sums) {
        constexpr int lanes = WIDTH / 8;
        int e = lane % lanes * 8;
        float key[8], value[8];
        read8(s.attention.heads + WIDTH + e, key);
        read8(s.attention.heads + 2 * WIDTH + e, value);
        turn_pairs(key, angles);
        uint4 packed_key = packed(key), packed_value = packed(value);
        float score[1] = {score_of(packed_key, query, lane < lanes)};
        add_keys<1>(score, &packed_value, sums.values, sums.best, sums.mass);
        if (lane < lanes) {
            i64 at = ((i64)head * capacity + written) * WIDTH + e;
            *(uint4*)(s.layers[layer].keys + at) = packed_key;
            *(uint4*)(s.layers[layer].values + at) = packed_value;
        }
    }

    // The keys of all stages at once, so that their sums wait for each other less.
    __device__ __forceinline__ void attend_stages(int begin, const Part& part, const float* query, Sums& sums) {
        constexpr int lanes = WIDTH / 8;     // that share a key
        constexpr int beside = 32 / lanes;   // keys of a warp at once
        constexpr int turns = KEYS / (WARPS * beside);
        static_assert(turns * WARPS * beside == KEYS, "every warp takes as many keys");
        float scores[KV_STAGES * turns];
        uint4 values[KV_STAGES * turns];
#pragma unroll
        for (int i = 0; i < KV_STAGES; i++) {
            int first = begin + i * KEYS;
            bool filled = first < part.end;
            if (filled) barrier_wait(s.kv_full + block.stage, block.parity);
            uint4 keys[turns];
#pragma unroll
            for (int turn = 0; turn < turns; turn++) {
                int k = (turn * WARPS + warp) * beside + lane / lanes;
                int at = (block.stage * KEYS + k) * WIDTH + lane % lanes * 8;
                bool kept = first + k < part.end && first + k != written;
                keys[turn] = kept ? *(const uint4*)(s.keys + at) : make_uint4(0, 0, 0, 0);
                values[i * turns + turn] = kept ? *(const uint4*)(s.values + at) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int turn = 0; turn < turns; turn++) {
                int k = (turn * WARPS + warp) * beside + lane / lanes;
                scores[i * turns + turn] = score_of(keys[turn], query, first + k < part.end && first + k != written);
            }
            if (!filled) continue;
            __syncwarp();
            if (lane == 0) barrier_arrive(s.kv_empty + block.stage);
            block.next<KV_STAGES>();
        }
        add_keys<KV_STAGES * turns>(scores, values, sums.values, sums.best, sums.mass);
    }

    // Join the sums of a warp's lanes, and leave them for the other warps.
    __device__ __forceinline__ void join_lanes(Sums& sums) {
        constexpr int lanes = WIDTH / 8;
        float largest = sums.best;
#pragma unroll
        for (int mask = lanes; mask < 32; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
        float shrink = __expf(sums.best - largest);
        sums.mass *= shrink;
#pragma unroll
        for (int j = 0; j < 8; j++) sums.values[j] *= shrink;
#pragma unroll
        for (int mask = lanes; mask < 32; mask *= 2) {
            sums.mass += shuffle_xor(sums.mass, mask);
#pragma unroll
            for (int j = 0; j < 8; j++) sums.values[j] += shuffle_xor(sums.values[j], mask);
        }
        if (lane < lanes) {
#pragma unroll
            for (int j = 0; j < 8; j++) s.attention.merged[warp * WIDTH + lane % lanes * 8 + j] = sums.values[j];
        }
        if (lane == 0) s.attention.merged_stats[2 * warp] = largest, s.attention.merged_stats[2 * warp + 1] = sums.mass;
    }

    // Join what the warps have left to a number of the part, and hand it on with how much the part counts. Whoever has a
    // head's last part joins it to the others, as all programs need all heads: what they read at once is in the way of
    // the weights, and of itself.
    __device__ __forceinline__ void join_warps(int layer, int item) {
        float largest = NOTHING, total = 0.0f, all = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) largest = fmaxf(largest, s.attention.merged_stats[2 * i]);
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            float share = __expf(s.attention.merged_stats[2 * i] - largest);
            total += share * s.attention.merged[i * WIDTH + thread];
            all += share * s.attention.merged_stats[2 * i + 1];
        }
        if (item % SPLITS == SPLITS - 1) {
            float value = join_parts(layer, item - (SPLITS - 1), largest, total, all);
            store_word(words(layer, AT_ATTENDED) + item / SPLITS * WIDTH + thread, sealed(value, epoch));
            return;
        }
        store_word(words(layer, AT_PARTS) + item * WIDTH + thread, sealed(total, epoch));
        if (thread < 2)
            store_word(words(layer, AT_STATS) + 2 * item + thread, sealed(thread == 0 ? largest : all, epoch));
    }

    // A number of a head, from the last of its parts and the others, of which an item is the first. Programs take items in
    // their order, so that none waits for one that comes after its own.
    __device__ __forceinline__ float join_parts(int layer, int item, float best, float total, float mass) {
        const u32* parts = words(layer, AT_PARTS) + item * WIDTH + thread;
        const u32* stats = words(layer, AT_STATS) + 2 * item;
        u32 part[SPLITS - 1];
        uint2 stat[SPLITS - 1];
#pragma unroll
        for (int i = 0; i < SPLITS - 1; i++) part[i] = 0, stat[i] = make_uint2(0, 0);
        bool waits = true;
        while (waits) {
            waits = false;
#pragma unroll
            for (int i = 0; i < SPLITS - 1; i++) {
                if ((part[i] ^ epoch) & 3u) part[i] = load_word(parts + i * WIDTH);
                if (((stat[i].x ^ epoch) | (stat[i].y ^ epoch)) & 3u) stat[i] = load_two(stats + 2 * i);
            }
#pragma unroll
            for (int i = 0; i < SPLITS - 1; i++)
                waits |= ((part[i] ^ epoch) | (stat[i].x ^ epoch) | (stat[i].y ^ epoch)) & 3u;
        }
        float largest = best;
#pragma unroll
        for (int i = 0; i < SPLITS - 1; i++) largest = fmaxf(largest, opened(stat[i].x));
        float share = __expf(best - largest);
        total *= share, mass *= share;
#pragma unroll
        for (int i = 0; i < SPLITS - 1; i++) {
            share = __expf(opened(stat[i].x) - largest);
            total += share * opened(part[i]), mass += share * opened(stat[i].y);
        }
        return __fdividef(total, mass);
    }

    // One part of one head's attention over the cache, which takes the new key and value.
    __device__ __forceinline__ void attend(int layer, int item) {
        int head = item / SPLITS, e = lane % (WIDTH / 8) * 8;
        Part part = part_of(item, held);
        take_head(layer, head);
        float angles[8], query[8];
        Sums sums;
        read8(s.angles + e, angles);
        read8(s.attention.heads + e, query);
        turn_pairs(query, angles);
#pragma unroll
        for (int j = 0; j < 8; j++) query[j] *= rsqrtf((float)WIDTH);
        if (warp == 0 && written >= part.begin && written < part.end) attend_own(layer, head, query, angles, sums);
        for (int begin = part.begin; begin < part.end; begin += KV_STAGES * KEYS) attend_stages(begin, part, query, sums);
        join_lanes(sums);
        meet();
        if (thread < WIDTH) join_warps(layer, item);
        meet();
    }

    // Take what attention has made of all heads.
    __device__ __forceinline__ void take_attention(int layer) {
        gather<DIM>(words(layer, AT_ATTENDED), epoch, [&](int, int quarter, float4 x) {
            if (quarter < DIM / 4) s.row.halves[quarter & 1][quarter >> 1] = split(x);
        });
        meet();
    }

    __device__ __forceinline__ void run() {
        const u32* stream = nullptr;
        u32 of_stream = 0;
        int layer = -1, last = END;
#pragma unroll 1
        for (int index = 0; index < MAPS; index++) {
            const Map& map = s.maps[index];
            const int kind = map.kind;
            if (last == END) {
                epoch = epoch_of(++layer);
                if (layer == LAYERS - 1) begin_next_kernel();
            }
            prepare(map, layer);
#if SCORES > 0
            if (kind == ANSWER) {
                take_answers(s.layers[layer].cross_residual);
                stamp(layer, PATCH_READ);
                last = kind;
                continue;
            }
#endif
            const bool takes_middle = kind == GATE, normalises = kind % 2 == 0;
            if (last == ANSWER) normalised();
            else if (normalises)
                take_normalised(takes_middle ? words(layer, AT_MIDDLE) : stream, takes_middle ? epoch : of_stream);
            if (kind == END) take_hidden(words(layer, AT_HIDDEN));
            if (kind == MIDDLE) {
                for (int item = cta; item < HEADS * SPLITS; item += ctas) attend(layer, item);
                stamp(layer, ATTENDED);
                take_attention(layer);
            }
            if (last != ANSWER)
                stamp(layer, kind == MIDDLE ? ATTENTION : kind == GATE ? MIDDLE_TAKEN : kind == END ? HIDDEN_TAKEN
                             : STREAM);
            multiply(normalises, layer);
            stamp(layer, kind == SCORE ? SCORES_MADE : kind == HEAD ? HEADS_MADE : kind == MIDDLE ? MIDDLE_MADE
                         : kind == GATE ? HIDDEN_MADE : END_MADE);
            if (kind == END) {
                stream = words(layer, AT_END);
                of_stream = epoch;
            }
            last = kind;
        }
    }
};

// maps [MAPS], layers [LAYERS] and exchange [2 * LAYER_WORDS] lie in global memory; state [2] holds how many
// launches there have been and how many programs of this one have ended; input and output are [DIM]; rotary are the
// cosines and sines [positions, WIDTH / 2, 2]. The output of layer TAP goes to tap [DIM] and to a row of taps. Where
// skipped [1] is not null and not nought, nothing is done.
extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
resident_stack(const Map* maps, const Layer* layers, u32* exchange, u32* state, const u16* input, u16* output,
               const i64* position, const float* rotary, u16* tap, u16* taps, const i64* tap_row,
               const i64* skipped, int capacity, float eps) {
    Shared& s = *(Shared*)shared_memory;
    Place place;
    place.thread = threadIdx.x;
    place.warp = threadIdx.x / 32;
    place.lane = threadIdx.x % 32;
    place.cta = blockIdx.x;
    place.ctas = gridDim.x;
#pragma unroll 1
    for (int i = place.thread; i < MAPS; i += THREADS + 32) s.maps[i] = maps[i];
#pragma unroll 1
    for (int i = place.thread; i < LAYERS; i += THREADS + 32) s.layers[i] = layers[i];
    if (place.thread == 0) {
#pragma unroll 1
        for (int i = 0; i < SLOTS; i++) barrier_begin(s.full + i, 1), barrier_begin(s.empty + i, WARPS);
#pragma unroll 1
        for (int i = 0; i < KV_STAGES; i++) barrier_begin(s.kv_full + i, 1), barrier_begin(s.kv_empty + i, WARPS);
#pragma unroll 1
        for (int i = 0; i < NORMS; i++) barrier_begin(s.norm_full + i, 1), barrier_begin(s.norm_empty + i, 1);
        barriers_begun();
    }
    __syncthreads();
    Supplier supplier(s, place);
    if (place.warp == WARPS && place.lane == 0) supplier.begin();
    await_kernel();
    if (skipped != nullptr && *(const volatile i64*)skipped != 0) {
        if (place.warp == WARPS && place.lane == 0) supplier.drain();
        return;
    }
    const u32 launches = *(volatile u32*)state;
    place.capacity = capacity;
    place.position = (int)*position;
    place.written = place.position % capacity;
    place.held = min(place.position + 1, capacity);
    if (place.thread < WIDTH) s.angles[place.thread] = rotary[place.position * WIDTH + place.thread];
    __syncthreads();
    if (place.warp == WARPS) {
        if (place.lane == 0) supplier.run(place);
        return;
    }
    Program p(s, place);
    p.exchange = exchange;
    p.input = input;
    p.output = output;
    p.tap = tap;
    p.tap_row = TAP < 0 ? tap : taps + *tap_row * DIM;
    p.launches = launches;
    p.epoch = 0;
    p.eps = eps;
    p.waited = 0;
    p.run();
    if (place.thread == 0) {
        u32 ended = atomicAdd(state + 1, 1u);
        if (ended == place.ctas - 1) {
            state[1] = 0;
            *(volatile u32*)state += 1;
        }
    }
}
