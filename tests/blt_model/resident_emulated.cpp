// The kernel of resident stacks on the CPU, for `test_resident`.
#include "emulated_cuda.h"
//
#include "resident.cu"

extern "C" const char* run(int programs, unsigned seed, const void* maps, const void* layers, void* exchange,
                           void* state, const void* input, void* output, const void* position, const void* rotary,
                           void* tap, void* taps, const void* tap_row, const void* skipped, int capacity, float eps) {
    return emulated::launch(programs, THREADS + 32, sizeof(Shared), seed, [=] {
        resident_stack((const Map*)maps, (const Layer*)layers, (u32*)exchange, (u32*)state, (const u16*)input,
                       (u16*)output, (const i64*)position, (const float*)rotary, (u16*)tap, (u16*)taps,
                       (const i64*)tap_row, (const i64*)skipped, capacity, eps);
    });
}
