// A whole stack of transformer blocks for one token, in one launch.
//
// At one token a step costs what reading the weights costs, if reading never stops. Between kernels it does: each waits
// for the row that the one before it makes. Here the programs stay for the whole stack, one to a multiprocessor, and
// every warp has a ring of weights in shared memory that the copy engine keeps filling, in the order in which the warp
// will need them, through all maps of all layers. What programs hand to each other goes through level 2 cache, word by
// word: the two lowest bits of every float32 say which use of its place it belongs to, so a reader knows by the word
// itself that it is there, and nothing else is waited for. Layers take turns at two sets of places, so that these stay
// in the cache. That is safe if every program has a unit of every gated map: a program that writes in a layer has read
// all of the layer before, of which no program wrote its part before it had read all of the layer before that.
//
// While a row is waited for, what memory gives stands in long queues. So whatever else a layer needs, its norms' scales
// and its keys and values, is ordered long before.
//
// Sums are taken in float32 in a fixed order. Compiled by NVRTC with the sizes as macros (see resident.py):
//   DIM, HIDDEN, HEADS, WIDTH (of a head), SPLITS (parts of a head's attention), VECTORS (of a patch, where layers read
//   one), MAPS and LAYERS of the stack, TAP (the layer whose output is kept besides; -1 for none), WARPS of a program,
//   STAGES of a warp's ring, IN_FLIGHT (stages of a program under way at once), TOGETHER (units of a warp whose sums
//   are taken together, a power of two), SENTINEL (whether few words are looked at first), STAMPS (whether programs
//   note when they have ended each phase of a layer), BFLOAT16 (0 for float16).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define THREADS (WARPS * 32)
#define CHUNK 1024           // inputs of a row in a stage of the ring
#define STAGE (2 * CHUNK)    // numbers of a stage: two rows
#define KV_STAGES 2
#define NORMS 2              // whose scales are under way at once
#define KEYS (4096 / WIDTH)  // of a stage of attention, whose keys take 8 KB and whose values too
#define MOST (DIM > HIDDEN ? DIM : HIDDEN)
#define ROUNDED (((MOST + 7) / 8) * 8)
#define NOTHING (-1e30f)     // the largest score of no keys

static_assert(IN_FLIGHT >= WARPS, "every warp needs a stage under way");

// A linear map, by units of two rows that one warp takes: neighbours, or a gate and its value.
struct Map {
    const u16* weight;
    int units, inputs, gated;
    int each, extra;  // units of every warp, and how many warps have one more
    int before;       // where the warps that have one more begin
};

// Units of a warp.
struct Span {
    int unit, end;
};

// A layer. What it does not have is null.
struct Layer {
    const u16 *cross_norm, *cross_keys, *cross_values;  // keys and values [HEADS, VECTORS, WIDTH]
    const u16 *attention_norm, *feed_norm;
    u16 *keys, *values;  // [HEADS, capacity, WIDTH]
    float cross_residual;
    int unused;
};

// Where a layer's words lie in the exchange.
#define AT_QUERY 0
#define AT_CROSSED (AT_QUERY + DIM)
#define AT_HEADS (AT_CROSSED + DIM)
#define AT_PARTS (AT_HEADS + 3 * DIM)
#define AT_STATS (AT_PARTS + SPLITS * DIM)
#define AT_MIDDLE (AT_STATS + 2 * SPLITS * HEADS)
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
__device__ __forceinline__ void store_word(u32* at, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(at), "r"(word) : "memory");
}
__device__ __forceinline__ void barrier_begin(u64* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barriers_begun() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool barrier_test(u64* barrier, u32 parity) {
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
__device__ __forceinline__ u32 float_to_number(float value) {
    u16 bits;
#if BFLOAT16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
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
    for (int mask = 16; mask; mask >>= 1) value += shuffle_xor(value, mask);
    return value;
}

// Add the products of eight numbers to two sums, so that no sum waits long for the one before.
__device__ __forceinline__ void dot8(uint4 words, const float* x, float& even, float& odd) {
    even = fmaf(low_number(words.x), x[0], even);
    odd = fmaf(high_number(words.x), x[1], odd);
    even = fmaf(low_number(words.y), x[2], even);
    odd = fmaf(high_number(words.y), x[3], odd);
    even = fmaf(low_number(words.z), x[4], even);
    odd = fmaf(high_number(words.z), x[5], odd);
    even = fmaf(low_number(words.w), x[6], even);
    odd = fmaf(high_number(words.w), x[7], odd);
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
    return make_uint4(float_to_number(from[0]) | float_to_number(from[1]) << 16,
                      float_to_number(from[2]) | float_to_number(from[3]) << 16,
                      float_to_number(from[4]) | float_to_number(from[5]) << 16,
                      float_to_number(from[6]) | float_to_number(from[7]) << 16);
}

__device__ __forceinline__ float rounded(float value) { return low_number(float_to_number(value)); }

// Shared memory of a program.
struct Shared {
    u16 ring[WARPS * STAGES * STAGE];
    u16 keys[KV_STAGES * KEYS * WIDTH];
    u16 values[KV_STAGES * KEYS * WIDTH];
    u16 norms[NORMS * DIM];
    float row[ROUNDED];    // what maps multiply: of every eight numbers the first four, and from ROUNDED / 2 the others
    float residual[DIM];
    alignas(16) float heads[3 * WIDTH];  // the new token's query, key and value of a head
    float merged[WARPS * WIDTH];
    float merged_stats[WARPS * 2];
    float squares[WARPS];
    u64 full[WARPS * STAGES];
    u64 kv_full[KV_STAGES];
    u64 norm_full[NORMS];
    Map maps[MAPS];
    Layer layers[LAYERS];
    alignas(16) float angles[WIDTH];   // the position's cosines and sines, in turn
};

static_assert(STAGES >= 2, "with one stage a warp would wait for what it has not ordered");
static_assert(sizeof(Shared) <= 232448 - 1024, "a multiprocessor has no room for this");

// For the host.
extern "C" __device__ const int shared_bytes = sizeof(Shared);

// The phases of a layer, by what has been done at their ends.
enum Phase { STREAM, CROSS_QUERIES, CROSS_READ, CROSSED, CROSSED_STREAM, HEADS_MADE, ATTENDED, ATTENTION, MIDDLE_MADE, MIDDLE,
             HIDDEN_MADE, HIDDEN_TAKEN, END_MADE, PHASES };
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

struct Program {
    Shared& s;
    u32* exchange;
    const u16* input;
    u16 *output, *tap, *tap_row;
    u32 epoch;  // of this layer's words
    u32 launches;
    u64 once, kept;
    int thread, warp, lane, cta, ctas;
    int position, slot, held, capacity;
    float eps;
    // The warp's ring: what it loads next, and the stage that it reads next.
    int load_map, load_units, load_inputs, load_left, load_stage;
    const u16* load_from;
    i64 load_other, load_jump;  // to the other row, and from a row's end to the next unit
    int free;                   // stages that wait to be filled
    int flying, flying_stage;   // stages under way, and the oldest of them
    u32 flying_parity;
    int stage;
    u32 parity;
    // The same for keys and values, of the program as a whole.
    int kv_layer, kv_item, kv_block, kv_load_stage;
    int kv_stage;
    u32 kv_parity;
    // Norms by their place in the stack: the next to load and the next to read.
    int load_norm, norms_begun, norm;

    u64 waited;  // for weights, in cycles, by the first thread

    __device__ Program(Shared& shared) : s(shared) {}

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

    // Neighbouring units go to one warp and to one program, so that few writes bring their words; where there are fewer
    // units than warps, to as many programs as there are.
    __device__ __forceinline__ Span span_of(const Map& map) {
        int place = (map.each ? cta * WARPS + warp : warp * ctas + cta) - map.before;
        if (place < 0) place += WARPS * ctas;
        Span span;
        span.unit = place * map.each + min(place, map.extra);
        span.end = span.unit + map.each + (place < map.extra);
        return span;
    }

    // Go on to the next map of which this warp has a unit.
    __device__ __forceinline__ void next_map() {
        load_left = 0;
        while (++load_map < MAPS) {
            const Map& map = s.maps[load_map];
            Span span = span_of(map);
            if (span.unit >= span.end) continue;
            int rows = map.gated ? 1 : 2;  // from a unit to the next
            load_units = span.end - span.unit;
            load_left = load_inputs = map.inputs;
            load_from = map.weight + (i64)span.unit * rows * map.inputs;
            load_other = map.gated ? (i64)map.units * map.inputs : map.inputs;
            load_jump = (rows - 1) * map.inputs;
            return;
        }
    }

    // Begin to load a stage; for one lane.
    __device__ __forceinline__ void load_next() {
        int count = min(CHUNK, load_left), at = warp * STAGES + load_stage;
        u64* barrier = s.full + at;
        u16* to = s.ring + at * STAGE;
        barrier_expect(barrier, 4 * count);
        if (count == CHUNK && load_other == CHUNK) {
            bulk_copy(to, load_from, 4 * CHUNK, barrier, once);
        } else {
            bulk_copy(to, load_from, 2 * count, barrier, once);
            bulk_copy(to + CHUNK, load_from + load_other, 2 * count, barrier, once);
        }
        load_stage = load_stage + 1 == STAGES ? 0 : load_stage + 1;
        load_from += count;
        load_left -= count;
        if (load_left > 0) return;
        load_from += load_jump;
        load_left = load_inputs;
        if (--load_units == 0) next_map();
    }

    // Order what this warp may order now; wherever it waits. So many stages at once keep memory busy; more would only
    // stand in the queues in which the exchange's words stand too.
    __device__ __forceinline__ void order() {
        if (lane != 0) return;
        if (free == 0 || load_left == 0) return;
        while (flying > 0 && barrier_test(s.full + warp * STAGES + flying_stage, flying_parity)) {
            flying--;
            if (++flying_stage == STAGES) {
                flying_stage = 0;
                flying_parity ^= 1;
            }
        }
        if (flying >= IN_FLIGHT / WARPS + (warp < IN_FLIGHT % WARPS)) return;
        load_next();
        flying++;
        free--;
    }

    __device__ __forceinline__ void await_stage() {
#if STAMPS
        u64 begun = clock64();
#endif
        while (!barrier_test(s.full + warp * STAGES + stage, parity)) order();
#if STAMPS
        waited += clock64() - begun;
#endif
    }

    __device__ __forceinline__ void stage_read() {
        __syncwarp();
        free++;
        order();
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }

    // Go on to the next block of keys that this program reads.
    __device__ __forceinline__ void kv_seek() {
        while (kv_layer < LAYERS && (kv_item >= HEADS * SPLITS || kv_block >= part_of(kv_item, held).blocks)) {
            kv_block = 0;
            kv_item += ctas;
            if (kv_item >= HEADS * SPLITS) {
                kv_item = cta;
                kv_layer++;
                if (cta >= HEADS * SPLITS) kv_layer = LAYERS;
            }
        }
    }

    __device__ __forceinline__ void kv_load_next() {
        if (kv_layer >= LAYERS) return;
        Part part = part_of(kv_item, held);
        int begin = part.begin + kv_block * KEYS;
        int count = min(KEYS, part.end - begin) * WIDTH;
        i64 from = ((i64)(kv_item / SPLITS) * capacity + begin) * WIDTH;
        u64* barrier = s.kv_full + kv_load_stage;
        barrier_expect(barrier, 4 * count);
        bulk_copy(s.keys + kv_load_stage * KEYS * WIDTH, s.layers[kv_layer].keys + from, 2 * count, barrier, kept);
        bulk_copy(s.values + kv_load_stage * KEYS * WIDTH, s.layers[kv_layer].values + from, 2 * count, barrier, kept);
        kv_load_stage = kv_load_stage + 1 == KV_STAGES ? 0 : kv_load_stage + 1;
        kv_block++;
        kv_seek();
    }

    // Begin to load the scales of a norm; for one thread.
    __device__ __forceinline__ void load_next_norm() {
        // A layer has two or three.
        const u16* from = nullptr;
        while (from == nullptr) {
            if (load_norm >= 3 * LAYERS) return;
            const Layer& layer = s.layers[load_norm / 3];
            int which = load_norm++ % 3;
            from = which == 0 ? layer.cross_norm : which == 1 ? layer.attention_norm : layer.feed_norm;
        }
        int at = norms_begun++ % NORMS;
        barrier_expect(s.norm_full + at, 2 * DIM);
        bulk_copy(s.norms + at * DIM, from, 2 * DIM, s.norm_full + at, kept);
    }

    // Four numbers of the row that the next map multiplies.
    __device__ __forceinline__ void put(int quarter, float4 v) {
        ((float4*)(s.row + (quarter & 1) * (ROUNDED / 2)))[quarter >> 1] = v;
    }

    // Wait for some words and give them to a function, four at a time: take(turn, quarter, float4).
    template <int COUNT, class Take>
    __device__ __forceinline__ void gather(const u32* from, u32 epoch, Take take) {
        constexpr int all = (COUNT / 4 + THREADS - 1) / THREADS;
        constexpr int batch = all < 8 ? all : 8;
        for (int base = 0; base < all; base += batch) {
            uint4 v[batch];
#pragma unroll
            for (int i = 0; i < batch; i++) v[i] = make_uint4(0, 0, 0, 0);
            bool waits = true;
            // A few words first, where there are many: reading all of them again and again keeps others from theirs.
            if (SENTINEL && base == 0)
                while (!is_there(load_words(from + 4 * min(thread & ~31, COUNT / 4 - 1)), epoch)) order();
            while (waits) {
                waits = false;
                order();
#pragma unroll
                for (int i = 0; i < batch; i++) {
                    int quarter = thread + (base + i) * THREADS;
                    if (quarter < COUNT / 4 && !is_there(v[i], epoch)) v[i] = load_words(from + 4 * quarter);
                }
#pragma unroll
                for (int i = 0; i < batch; i++) {
                    int quarter = thread + (base + i) * THREADS;
                    waits |= quarter < COUNT / 4 && !is_there(v[i], epoch);
                }
            }
#pragma unroll
            for (int i = 0; i < batch; i++) {
                int quarter = thread + (base + i) * THREADS;
                if (quarter < COUNT / 4) take(i, quarter, opened4(v[i]));
            }
        }
    }

    // Take the residual stream, from the exchange or where there is none from the input, times a norm's scales; returns
    // what the results must be multiplied by.
    __device__ __forceinline__ float take_normalised(const u32* from, u32 epoch) {
        constexpr int all = (DIM / 4 + THREADS - 1) / THREADS;
        uint2 scales[all];
        barrier_wait(s.norm_full + norm % NORMS, norm / NORMS % 2);
#pragma unroll
        for (int i = 0; i < all; i++) {
            int quarter = thread + i * THREADS;
            if (quarter < DIM / 4) scales[i] = ((const uint2*)(s.norms + norm % NORMS * DIM))[quarter];
        }
        norm++;
        float squares = 0.0f;
        static_assert(all <= 8, "a turn counts from the first word");
        auto take = [&](int turn, int quarter, float4 v) {
            uint2 scale = scales[turn];
            ((float4*)s.residual)[quarter] = v;
            squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            put(quarter, make_float4(v.x * low_number(scale.x), v.y * high_number(scale.x), v.z * low_number(scale.y),
                                     v.w * high_number(scale.y)));
        };
        if (from == nullptr) {
#pragma unroll
            for (int i = 0; i < all; i++) {
                int quarter = thread + i * THREADS;
                if (quarter < DIM / 4) {
                    uint2 x = ((const uint2*)input)[quarter];
                    take(i, quarter, make_float4(low_number(x.x), high_number(x.x), low_number(x.y), high_number(x.y)));
                }
            }
        } else {
            gather<DIM>(from, epoch, take);
        }
        squares = warp_sum(squares);
        if (lane == 0) s.squares[warp] = squares;
        __syncthreads();
        if (thread == THREADS - 1) load_next_norm();
        float total = 0.0f;
        for (int i = 0; i < WARPS; i++) total += s.squares[i];
        return rsqrtf(total * (1.0f / DIM) + eps);
    }

    // This warp's units of a map of the row: give(unit, first, second) with both rows' sums, in eight lanes that differ
    // in `lane % 8`. The row stays in registers, and the sums of several units are taken across the warp together.
    template <class Give>
    __device__ __forceinline__ void multiply(int index, Give give) {
        constexpr int turns = (DIM + 255) / 256, chunk_turns = CHUNK / 256;
        const Span span = span_of(s.maps[index]);
        float x[turns][8];
#pragma unroll
        for (int i = 0; i < turns; i++) {
            int at = lane + 32 * i;
            float4 a = at < DIM / 8 ? ((const float4*)s.row)[at] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float4 b = at < DIM / 8 ? ((const float4*)(s.row + ROUNDED / 2))[at] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            x[i][0] = a.x, x[i][1] = a.y, x[i][2] = a.z, x[i][3] = a.w;
            x[i][4] = b.x, x[i][5] = b.y, x[i][6] = b.z, x[i][7] = b.w;
        }
        for (int unit = span.unit; unit < span.end; unit += TOGETHER) {
            float one[TOGETHER], two[TOGETHER];
#pragma unroll
            for (int u = 0; u < TOGETHER; u++) {
                one[u] = two[u] = 0.0f;
                if (unit + u >= span.end) continue;
                float sums[4] = {};
#pragma unroll
                for (int chunk = 0; chunk < (DIM + CHUNK - 1) / CHUNK; chunk++) {
                    const uint4* rows = (const uint4*)(s.ring + (warp * STAGES + stage) * STAGE);
                    await_stage();
#pragma unroll
                    for (int i = 0; i < chunk_turns; i++) {
                        int turn = chunk * chunk_turns + i;
                        if (turn >= turns) continue;
                        if (DIM % 256 == 0 || lane + 32 * turn < DIM / 8) {
                            dot8(rows[lane + 32 * i], x[turn], sums[0], sums[1]);
                            dot8(rows[CHUNK / 8 + lane + 32 * i], x[turn], sums[2], sums[3]);
                        }
                    }
                    stage_read();
                }
                one[u] = sums[0] + sums[1];
                two[u] = sums[2] + sums[3];
            }
            // Half of the units' sums go to the other half of the warp, and so on; then lanes hold one unit's.
            int mine = 0, mask = 16;
#pragma unroll
            for (int kept = TOGETHER / 2; kept; kept /= 2) {
                bool upper = lane & mask;
#pragma unroll
                for (int u = 0; u < kept; u++) {
                    one[u] = (upper ? one[u + kept] : one[u]) + shuffle_xor(upper ? one[u] : one[u + kept], mask);
                    two[u] = (upper ? two[u + kept] : two[u]) + shuffle_xor(upper ? two[u] : two[u + kept], mask);
                }
                mine += upper ? kept : 0;
                mask /= 2;
            }
            for (; mask; mask /= 2) {
                one[0] += shuffle_xor(one[0], mask);
                two[0] += shuffle_xor(two[0], mask);
            }
            if (unit + mine < span.end) give(unit + mine, one[0], two[0]);
        }
        // The row may be overwritten now.
        __syncthreads();
    }

    // The same for the map of the hidden numbers, of which a warp has few units: the row is read as it is needed.
    template <class Give>
    __device__ __forceinline__ void multiply_hidden(int index, Give give) {
        const Span span = span_of(s.maps[index]);
        const float4* first = (const float4*)s.row;
        const float4* second = (const float4*)(s.row + ROUNDED / 2);
        for (int unit = span.unit; unit < span.end; unit++) {
            float sums[4] = {};
            for (int begin = 0; begin < HIDDEN; begin += CHUNK) {
                const uint4* rows = (const uint4*)(s.ring + (warp * STAGES + stage) * STAGE);
                int count = min(CHUNK, HIDDEN - begin) / 8;
                await_stage();
#pragma unroll
                for (int i = 0; i < CHUNK / 256; i++) {
                    int at = lane + 32 * i;
                    if (at < count) {
                        float4 a = first[begin / 8 + at], b = second[begin / 8 + at];
                        float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
                        dot8(rows[at], x, sums[0], sums[1]);
                        dot8(rows[CHUNK / 8 + at], x, sums[2], sums[3]);
                    }
                }
                stage_read();
            }
            give(unit, warp_sum(sums[0] + sums[1]), warp_sum(sums[2] + sums[3]));
        }
        __syncthreads();
    }

    // A map whose results, times a scale and with the residual stream added, go to the exchange.
    __device__ __forceinline__ void multiply_to(u32* to, int index, float scale, float residual) {
        multiply(index, [&](int unit, float one, float two) {
            int which = lane % 8;
            if (which < 2) {
                float value = (which == 0 ? one : two) * scale;
                if (residual != 0.0f) value += residual * s.residual[2 * unit + which];
                store_word(to + 2 * unit + which, sealed(value, epoch));
            }
        });
    }

    // The new token's part of a head: its query, key and value.
    __device__ __forceinline__ void take_head(int layer, int head) {
        const u32* from = words(layer, AT_HEADS) + head * WIDTH;
        if (thread < 3 * WIDTH / 4) {
            int which = thread / (WIDTH / 4), quarter = thread % (WIDTH / 4);
            uint4 v = make_uint4(0, 0, 0, 0);
            while (!is_there(v, epoch)) {
                order();
                v = load_words(from + which * DIM + 4 * quarter);
            }
            ((float4*)s.heads)[thread] = opened4(v);
        }
        __syncthreads();
    }

    // One part of one head's attention over the cache, which takes the new key and value.
    __device__ __forceinline__ void attend(int layer, int item) {
        constexpr int lanes = WIDTH / 8;     // that share a key
        constexpr int beside = 32 / lanes;   // keys of a warp at once
        constexpr int turns = KEYS / (WARPS * beside);
        static_assert(turns * WARPS * beside == KEYS, "every warp takes as many keys");
        int head = item / SPLITS;
        Part part = part_of(item, held);
        take_head(layer, head);
        int e = lane % lanes * 8;
        float angles[8], query[8], key[8], value[8], sums[8] = {};
        read8(s.angles + e, angles);
        read8(s.heads + e, query);
        read8(s.heads + WIDTH + e, key);
        read8(s.heads + 2 * WIDTH + e, value);
        float scale = rsqrtf((float)WIDTH);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            float a = query[j], b = query[j + 1];
            query[j] = (a * angles[j] - b * angles[j + 1]) * scale;
            query[j + 1] = (b * angles[j] + a * angles[j + 1]) * scale;
            a = key[j], b = key[j + 1];
            key[j] = rounded(a * angles[j] - b * angles[j + 1]);
            key[j + 1] = rounded(b * angles[j] + a * angles[j + 1]);
            value[j] = rounded(value[j]), value[j + 1] = rounded(value[j + 1]);
        }
        float best = NOTHING, mass = 0.0f;
        for (int block = 0; block < part.blocks; block++) {
            int begin = part.begin + block * KEYS;
            barrier_wait(s.kv_full + kv_stage, kv_parity);
            float score[turns], v[turns][8];
#pragma unroll
            for (int turn = 0; turn < turns; turn++) {
                int i = (turn * WARPS + warp) * beside + lane / lanes, place = begin + i;
                bool kept = place < part.end;
                const uint4* at = (const uint4*)(s.keys + (kv_stage * KEYS + i) * WIDTH + e);
                const uint4* at_value = (const uint4*)(s.values + (kv_stage * KEYS + i) * WIDTH + e);
                float k[8];
                if (place == slot) {
#pragma unroll
                    for (int j = 0; j < 8; j++) k[j] = key[j], v[turn][j] = value[j];
                } else {
                    uint4 a = kept ? *at : make_uint4(0, 0, 0, 0), b = kept ? *at_value : make_uint4(0, 0, 0, 0);
                    unpack(a, k);
                    unpack(b, v[turn]);
                }
                float sum = 0.0f, other = 0.0f;
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    sum = fmaf(k[j], query[j], sum);
                    other = fmaf(k[j + 1], query[j + 1], other);
                }
                sum += other;
#pragma unroll
                for (int mask = 1; mask < lanes; mask *= 2) sum += shuffle_xor(sum, mask);
                score[turn] = kept ? sum : NOTHING;
            }
            float largest = best;
#pragma unroll
            for (int turn = 0; turn < turns; turn++) largest = fmaxf(largest, score[turn]);
            float shrink = __expf(best - largest);
            best = largest;
            mass *= shrink;
#pragma unroll
            for (int j = 0; j < 8; j++) sums[j] *= shrink;
#pragma unroll
            for (int turn = 0; turn < turns; turn++) {
                float share = score[turn] > NOTHING ? __expf(score[turn] - largest) : 0.0f;
                mass += share;
#pragma unroll
                for (int j = 0; j < 8; j++) sums[j] = fmaf(share, v[turn][j], sums[j]);
            }
            if (++kv_stage == KV_STAGES) {
                kv_stage = 0;
                kv_parity ^= 1;
            }
            // The last ones are filled anew below, where the warps meet in any case.
            if (block + KV_STAGES < part.blocks) {
                __syncthreads();
                if (thread == THREADS - 1) kv_load_next();
            }
        }
        if (warp == 0 && lane < lanes && slot >= part.begin && slot < part.end) {
            i64 at = ((i64)head * capacity + slot) * WIDTH + e;
            *(uint4*)(s.layers[layer].keys + at) = packed(key);
            *(uint4*)(s.layers[layer].values + at) = packed(value);
        }
        // Together: the keys of a warp, then the warps.
        float largest = best;
#pragma unroll
        for (int mask = lanes; mask < 32; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
        float shrink = __expf(best - largest);
        mass *= shrink;
#pragma unroll
        for (int j = 0; j < 8; j++) sums[j] *= shrink;
#pragma unroll
        for (int mask = lanes; mask < 32; mask *= 2) {
            mass += shuffle_xor(mass, mask);
#pragma unroll
            for (int j = 0; j < 8; j++) sums[j] += shuffle_xor(sums[j], mask);
        }
        if (lane < lanes) {
#pragma unroll
            for (int j = 0; j < 8; j++) s.merged[warp * WIDTH + e + j] = sums[j];
        }
        if (lane == 0) s.merged_stats[2 * warp] = largest, s.merged_stats[2 * warp + 1] = mass;
        __syncthreads();
        if (thread < WIDTH) {
            float largest = NOTHING, total = 0.0f, all = 0.0f;
#pragma unroll
            for (int i = 0; i < WARPS; i++) largest = fmaxf(largest, s.merged_stats[2 * i]);
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                float share = __expf(s.merged_stats[2 * i] - largest);
                total += share * s.merged[i * WIDTH + thread];
                all += share * s.merged_stats[2 * i + 1];
            }
            store_word(words(layer, AT_PARTS) + item * WIDTH + thread, sealed(total, epoch));
            if (thread < 2)
                store_word(words(layer, AT_STATS) + 2 * item + thread, sealed(thread == 0 ? largest : all, epoch));
        }
        if (thread == THREADS - 1)
            for (int block = max(0, part.blocks - KV_STAGES); block < part.blocks; block++) kv_load_next();
        __syncthreads();
    }

    // Join the parts of all heads to the row.
    __device__ __forceinline__ void take_attention(int layer) {
        const u32* parts = words(layer, AT_PARTS);
        const u32* stats = words(layer, AT_STATS);
        for (int quarter = thread; quarter < DIM / 4; quarter += THREADS) {
            int head = 4 * quarter / WIDTH, e = 4 * quarter % WIDTH;
            uint4 v[SPLITS], t[SPLITS / 2];
#pragma unroll
            for (int i = 0; i < SPLITS; i++) v[i] = make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int i = 0; i < SPLITS / 2; i++) t[i] = make_uint4(0, 0, 0, 0);
            bool waits = true;
            while (waits) {
                waits = false;
                order();
#pragma unroll
                for (int i = 0; i < SPLITS; i++)
                    if (!is_there(v[i], epoch)) v[i] = load_words(parts + (head * SPLITS + i) * WIDTH + e);
#pragma unroll
                for (int i = 0; i < SPLITS / 2; i++)
                    if (!is_there(t[i], epoch)) t[i] = load_words(stats + 2 * head * SPLITS + 4 * i);
#pragma unroll
                for (int i = 0; i < SPLITS; i++) waits |= !is_there(v[i], epoch);
#pragma unroll
                for (int i = 0; i < SPLITS / 2; i++) waits |= !is_there(t[i], epoch);
            }
            float largest = NOTHING;
#pragma unroll
            for (int i = 0; i < SPLITS / 2; i++) largest = fmaxf(largest, fmaxf(opened(t[i].x), opened(t[i].z)));
            float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float mass = 0.0f;
#pragma unroll
            for (int i = 0; i < SPLITS; i++) {
                float best = opened(i % 2 ? t[i / 2].z : t[i / 2].x), each = opened(i % 2 ? t[i / 2].w : t[i / 2].y);
                float share = __expf(best - largest);
                float4 one = opened4(v[i]);
                mass += share * each;
                total.x += share * one.x, total.y += share * one.y;
                total.z += share * one.z, total.w += share * one.w;
            }
            float over = __fdividef(1.0f, mass);
            put(quarter, make_float4(total.x * over, total.y * over, total.z * over, total.w * over));
        }
        __syncthreads();
    }

#if VECTORS > 0
    // Every program reads the patch's vectors for all heads, as that takes less time than handing the results on.
    __device__ __forceinline__ void take_crossed(int layer) {
        constexpr int each = (HEADS + WARPS - 1) / WARPS, parts = (WIDTH + 31) / 32;
        u16 keys[each][VECTORS][parts], values[each][VECTORS][parts];
        // On their way while the queries are waited for.
#pragma unroll
        for (int turn = 0; turn < each; turn++) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
#pragma unroll
                for (int part = 0; part < parts; part++) {
                    int head = turn * WARPS + warp, e = lane + 32 * part;
                    bool kept = head < HEADS && e < WIDTH;
                    int at = (head * VECTORS + i) * WIDTH + e;
                    keys[turn][i][part] = kept ? s.layers[layer].cross_keys[at] : 0;
                    values[turn][i][part] = kept ? s.layers[layer].cross_values[at] : 0;
                }
            }
        }
        gather<DIM>(words(layer, AT_QUERY), epoch, [&](int, int quarter, float4 v) { put(quarter, v); });
        __syncthreads();
        float scale = rsqrtf((float)WIDTH);
#pragma unroll
        for (int turn = 0; turn < each; turn++) {
            int first = (turn * WARPS + warp) * WIDTH;
            float scores[VECTORS], largest = NOTHING, mass = 0.0f;
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                scores[i] = 0.0f;
#pragma unroll
                for (int part = 0; part < parts; part++) {
                    int k = first + lane + 32 * part;
                    bool kept = k < DIM && lane + 32 * part < WIDTH;
                    scores[i] = fmaf(low_number(keys[turn][i][part]), kept ? row_at(k) : 0.0f, scores[i]);
                }
                scores[i] = warp_sum(scores[i]) * scale;
                largest = fmaxf(largest, scores[i]);
            }
#pragma unroll
            for (int i = 0; i < VECTORS; i++) mass += scores[i] = __expf(scores[i] - largest);
            float over = __fdividef(1.0f, mass);
            // A head's query has been read, by the one warp that takes the head.
#pragma unroll
            for (int part = 0; part < parts; part++) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < VECTORS; i++) sum = fmaf(scores[i], low_number(values[turn][i][part]), sum);
                int k = first + lane + 32 * part;
                if (k < DIM && lane + 32 * part < WIDTH) row_at(k) = sum * over;
            }
        }
        __syncthreads();
    }

    __device__ __forceinline__ float& row_at(int k) {
        return s.row[(k >> 2 & 1) * (ROUNDED / 2) + (k >> 3) * 4 + (k & 3)];
    }
#endif

    __device__ __forceinline__ void run() {
        int map = 0;
        const u32* stream = nullptr;
        for (int layer = 0; layer < LAYERS; layer++) {
            u32 of_stream = epoch;
            epoch = epoch_of(layer);
#if VECTORS > 0
            if (s.layers[layer].cross_norm != nullptr) {
                float scale = take_normalised(stream, of_stream);
                stamp(layer, STREAM);
                multiply_to(words(layer, AT_QUERY), map++, scale, 0.0f);
                stamp(layer, CROSS_QUERIES);
                take_crossed(layer);
                stamp(layer, CROSS_READ);
                multiply_to(words(layer, AT_CROSSED), map++, 1.0f, s.layers[layer].cross_residual);
                stamp(layer, CROSSED);
                stream = words(layer, AT_CROSSED);
                of_stream = epoch;
            }
#endif
            float scale = take_normalised(stream, of_stream);
            stamp(layer, stream == words(layer, AT_CROSSED) ? CROSSED_STREAM : STREAM);
            multiply_to(words(layer, AT_HEADS), map++, scale, 0.0f);
            stamp(layer, HEADS_MADE);
            for (int item = cta; item < HEADS * SPLITS; item += ctas) attend(layer, item);
            stamp(layer, ATTENDED);
            take_attention(layer);
            stamp(layer, ATTENTION);
            multiply_to(words(layer, AT_MIDDLE), map++, 1.0f, 1.0f);
            stamp(layer, MIDDLE_MADE);
            scale = take_normalised(words(layer, AT_MIDDLE), epoch);
            stamp(layer, MIDDLE);
            u32* hidden = words(layer, AT_HIDDEN);
            multiply(map++, [&](int unit, float gate, float value) {
                gate *= scale;
                value *= scale;
                if (lane % 8 == 0) store_word(hidden + unit, sealed(__fdividef(value * gate, 1.0f + __expf(-gate)), epoch));
            });
            stamp(layer, HIDDEN_MADE);
            gather<HIDDEN>(hidden, epoch, [&](int, int quarter, float4 v) { put(quarter, v); });
            __syncthreads();
            stamp(layer, HIDDEN_TAKEN);
            if (layer + 1 < LAYERS) {
                u32* to = words(layer, AT_END);
                multiply_hidden(map++, [&](int unit, float one, float two) {
                    if (lane < 2) {
                        float value = (lane == 0 ? one : two) + s.residual[2 * unit + lane];
                        store_word(to + 2 * unit + lane, sealed(value, epoch));
                        if (layer == TAP) tap[2 * unit + lane] = tap_row[2 * unit + lane] = (u16)float_to_number(value);
                    }
                });
            } else {
                multiply_hidden(map++, [&](int unit, float one, float two) {
                    if (lane < 2) {
                        float value = (lane == 0 ? one : two) + s.residual[2 * unit + lane];
                        output[2 * unit + lane] = (u16)float_to_number(value);
                    }
                });
            }
            stamp(layer, END_MADE);
            stream = words(layer, AT_END);
        }
    }
};

// maps [MAPS], layers [LAYERS] and exchange [2 * LAYER_WORDS] lie in global memory; state [2] holds how many
// launches there have been and how many programs of this one have ended; input and output are [DIM]; rotary are the
// cosines and sines [positions, WIDTH / 2, 2]. The output of layer TAP goes to tap [DIM] and to a row of taps.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
resident_stack(const Map* maps, const Layer* layers, u32* exchange, u32* state, const u16* input, u16* output,
               const i64* position, const float* rotary, u16* tap, u16* taps, const i64* tap_row, int capacity,
               float eps) {
    Shared& s = *(Shared*)shared_memory;
    Program p(s);
    p.thread = threadIdx.x;
    p.warp = threadIdx.x / 32;
    p.lane = threadIdx.x % 32;
    p.cta = blockIdx.x;
    p.ctas = gridDim.x;
    for (int i = p.thread; i < MAPS; i += THREADS) s.maps[i] = maps[i];
    for (int i = p.thread; i < LAYERS; i += THREADS) s.layers[i] = layers[i];
    if (p.thread < WIDTH) s.angles[p.thread] = rotary[*position * WIDTH + p.thread];
    if (p.thread == 0) {
        for (int i = 0; i < WARPS * STAGES; i++) barrier_begin(s.full + i);
        for (int i = 0; i < KV_STAGES; i++) barrier_begin(s.kv_full + i);
        for (int i = 0; i < NORMS; i++) barrier_begin(s.norm_full + i);
        barriers_begun();
    }
    p.exchange = exchange;
    p.input = input;
    p.output = output;
    p.tap = tap;
    p.tap_row = TAP < 0 ? tap : taps + *tap_row * DIM;
    p.launches = *(volatile u32*)state;
    p.epoch = 0;
    p.once = once_policy();
    p.kept = kept_policy();
    p.capacity = capacity;
    p.position = (int)*position;
    p.slot = p.position % capacity;
    p.held = min(p.position + 1, capacity);
    p.eps = eps;
    p.load_stage = p.load_left = p.stage = p.flying = p.flying_stage = 0;
    p.free = STAGES;
    p.flying_parity = 0;
    p.load_map = -1;
    p.parity = p.kv_parity = 0;
    p.kv_layer = p.kv_block = p.kv_load_stage = p.kv_stage = 0;
    p.kv_item = p.cta;
    p.load_norm = p.norms_begun = p.norm = 0;
    p.waited = 0;
    __syncthreads();
    if (p.thread == THREADS - 1) {
        for (int i = 0; i < NORMS; i++) p.load_next_norm();
        if (p.cta >= HEADS * SPLITS) p.kv_layer = LAYERS;
        p.kv_seek();
        for (int i = 0; i < KV_STAGES; i++) p.kv_load_next();
    }
    if (p.lane == 0) p.next_map();
    for (int i = 0; i < STAGES; i++) p.order();
    p.run();
    if (p.thread == 0) {
        u32 ended = atomicAdd(state + 1, 1u);
        if (ended == p.ctas - 1) {
            state[1] = 0;
            *(volatile u32*)state += 1;
        }
    }
}
