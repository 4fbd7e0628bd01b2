// Types, loads and the decoding of every weight format; shared by all kernels, and free of CUDA's headers so that NVRTC
// needs nothing but itself. Constants in capitals that no kernel defines come from src/preamble.rs, with the formats.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DI __device__ __forceinline__
#define FULL 0xffffffffu

// Programmatic dependent launch: the next kernel may start its preamble now, and this one goes on when those before it
// have finished. Both do nothing in an ordinary launch. Every thread of every kernel waits, so that a kernel never
// finishes before its predecessors. Before compute capability 9.0 there are only ordinary launches.
#if __CUDA_ARCH__ >= 900
DI void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DI void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
DI void let_next_start() {}
DI void wait_for_previous() {}
#endif

// A matrix [rows, cols] or a stack of equal ones. A `tiled` one is kept in tiles (repack.cu) of 8 rows and 128 bytes of
// elements of each, in the order in which the row kernels read them: `weight` is [parts, row groups, row_bytes] then.
struct Matrix {
    const u8* weight;       // [parts, rows, row_bytes]
    const u8* scales;       // [parts, rows (row blocks for FP8_BLOCK), scale_pitch]; (scale, bias) pairs for affine
    const float* globals;   // [parts] NVFP4's global scales / 2688, or null
    u64 weight_part;        // bytes of one part's elements
    u64 scale_part;         // bytes of one part's scales
    u32 rows, cols;
    u32 row_bytes, scale_pitch;
    u32 format, bits, group, tiled;
};

// A tile: elements 0 .. 64 of its 8 rows, elements 64 .. 128, and 8 bytes of scales of each row. Zeros fill it up where
// the matrix ends.
static_assert(TILE_ROWS == 8 && TILE_ROW_BYTES == 128 && TILE_ROW_SCALES == 8, "the kernels know the shape of a tile");

DI const u8* tile_of(const Matrix& m, u32 part, u32 row, u32 round) {
    return m.weight + part * m.weight_part + u64(row >> 3) * m.row_bytes + round * TILE_BYTES;
}

// FOR_TILED_FORMAT(format, statement), from src/preamble.rs, runs the statement with the constant FORMAT for each format
// that is kept in tiles. What such a format needs is said where FORMAT is asked for; a format that lacks an answer does not
// compile.
template <u32 FORMAT>
constexpr u32 TILED_BITS = 0;    // of an element
template <>
constexpr u32 TILED_BITS<MXFP4> = 4;
template <>
constexpr u32 TILED_BITS<AFFINE_BF16> = 8;

// Byte of element k in its row.
DI u32 tiled_byte(const Matrix& m, u32 k) {
    u32 byte = 0;
    FOR_TILED_FORMAT(m.format, byte = k / (8 / TILED_BITS<FORMAT>));
    return byte;
}

// Place of byte `b` of row `row` in its tile.
DI u32 tile_place(u32 row, u32 b) { return (b & 64) * 8 + (row & 7) * 64 + (b & 63); }

DI float bf16_to_f32(u16 bits) { return __uint_as_float(u32(bits) << 16); }

// Two floats, rounded to nearest even; `low` in the low half.
DI u32 pack_bf16(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

// As a thread of another block may have written it in this kernel, or an earlier one in a kernel that runs still.
DI int load_fresh(const int* p) {
    int v;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

DI u16 to_bf16(float value) { return u16(pack_bf16(value, 0.0f)); }

DI float f16_to_f32(u16 bits) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
    return out;
}

DI u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// Before compute capability 9.0 these are fused multiply-adds, which give the same bits: a . b - 0, and b . -1 + a.
DI u32 mul_bf16x2(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
    u32 out;
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
#else
    return fma_bf16x2(a, b, 0x80008000u);
#endif
}

DI u32 sub_bf16x2(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
    u32 out;
    asm("sub.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
#else
    return fma_bf16x2(b, 0xbf80bf80u, a);
#endif
}

// 16 bytes that are read once: past L1.
DI uint4 load_stream(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// Brings a line of constant memory into L2 while something else is waited for.
DI void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

DI u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// d += a . b, m16n8k16 in bf16 with f32 sums. Lane (g = lane / 4, t = lane % 4) holds rows g (a0, a2) and g + 8 (a1, a3)
// of a, column g of b, and of d rows g (d0, d1) and g + 8 (d2, d3), columns 2t and 2t + 1.
DI void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Place of element `c` of a packed bf16 row: within eight, pairs are (0,4) (1,5) (2,6) (3,7), as decoding a word gives.
DI u32 packed_place(u32 c) {
    u32 j = c & 7;
    return (c & ~7u) | ((j & 3) << 1) | (j >> 2);
}

// An integer that orders as the float does; both zeros are alike.
DI u32 ordered(float value) {
    u32 bits = __float_as_uint(value + 0.0f);
    return bits ^ (u32(int(bits) >> 31) | 0x80000000u);
}

// Shared memory whose size the launch gives.
extern __shared__ __align__(16) u8 dynamic_memory[];

DI u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// Copies to shared memory that the caller waits for.
DI void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

DI void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N groups of copies are under way.
template <int N>
DI void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

DI float warp_sum(float v) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) v += __shfl_xor_sync(FULL, v, d);
    return v;
}

DI float warp_max(float v) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL, v, d));
    return v;
}

// Sum over a block of up to 1024 threads; every thread gets it. `scratch` has 32 floats.
DI float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
    __syncthreads();
    int warps = (blockDim.x + 31) >> 5;
    v = (threadIdx.x & 31) < warps ? scratch[threadIdx.x & 31] : 0.0f;
    return warp_sum(v);
}

DI float e8m0(u32 byte) { return __uint_as_float(byte == 0 ? 0x00400000u : byte << 23); }

DI float e2m1(u32 nibble) {
    float magnitude = f16_to_f32(u16((nibble & 7) << 9)) * 16384.0f;
    return nibble & 8 ? -magnitude : magnitude;
}

DI float e4m3(u32 byte) {
    float magnitude = (byte & 0x7f) == 0x7f ? __uint_as_float(0x7fc00000u) : f16_to_f32(u16((byte & 0x7f) << 7)) * 256.0f;
    return byte & 0x80 ? -magnitude : magnitude;
}

// Elements k .. k + 7 of a row of a tiled matrix (k a multiple of 8), and the row's scales in the same tile.
template <u32 FORMAT>
DI void decode8_tiled(const u8* codes, const u8* scales, u32 k, float (&out)[8]) {
    if constexpr (FORMAT == MXFP4) {
        float scale = e8m0(scales[k / 32 & 7]);
        u32 w = *(const u32*)codes;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = e2m1(w >> (4 * i) & 15) * scale;
    } else {
        static_assert(FORMAT == AFFINE_BF16, "decode8_tiled lacks this format");
        u32 pair = ((const u32*)scales)[k / 64 & 1];
        float scale = __uint_as_float(pair << 16), bias = __uint_as_float(pair & 0xffff0000u);
        uint2 w = *(const uint2*)codes;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 code = (i < 4 ? w.x : w.y) >> (8 * (i & 3)) & 255;
            out[i] = __fadd_rn(__fmul_rn(scale, float(code)), bias);
        }
    }
}

// Elements k .. k + 7 of a row (k a multiple of 8); those past `cols` are 0.
DI void decode8(const Matrix& m, u32 part, u32 row, u32 k, float (&out)[8]) {
    if (m.tiled) {
        u32 byte = tiled_byte(m, k);
        const u8* tile = tile_of(m, part, row, byte / TILE_ROW_BYTES);
        const u8* codes = tile + tile_place(row, byte & (TILE_ROW_BYTES - 1));
        const u8* scales = tile + TILE_SCALES + (row & 7) * TILE_ROW_SCALES;
        FOR_TILED_FORMAT(m.format, decode8_tiled<FORMAT>(codes, scales, k, out));
        return;
    }
    const u8* w = m.weight + part * m.weight_part + u64(row) * m.row_bytes;
    const u8* s = m.scales + part * m.scale_part;
    switch (m.format) {
    case F32:
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = k + i < m.cols ? ((const float*)w)[k + i] : 0.0f;
        return;
    case F16:
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = k + i < m.cols ? f16_to_f32(((const u16*)w)[k + i]) : 0.0f;
        return;
    case BF16:
        if ((m.row_bytes & 15) == 0) {
            uint4 v = load_stream(w + k * 2);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                out[2 * i] = __uint_as_float(word(v, i) << 16);
                out[2 * i + 1] = __uint_as_float(word(v, i) & 0xffff0000u);
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = k + i < m.cols ? bf16_to_f32(((const u16*)w)[k + i]) : 0.0f;
        return;
    case MXFP4:
    case NVFP4: {
        float scale = m.format == MXFP4 ? e8m0(s[u64(row) * m.scale_pitch + k / 32])
                                        : e4m3(s[u64(row) * m.scale_pitch + k / 16]);
        if (m.format == NVFP4 && m.globals) scale *= m.globals[part];
        u32 codes = *(const u32*)(w + k / 2);
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = e2m1(codes >> (4 * i) & 15) * scale;
        return;
    }
    case MXFP8: {
        float scale = e8m0(s[u64(row) * m.scale_pitch + k / 32]);
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = e4m3(w[k + i]) * scale;
        return;
    }
    case FP8_BLOCK: {
        float scale = ((const float*)(s + u64(row / 128) * m.scale_pitch))[k / 128];
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = k + i < m.cols ? e4m3(w[k + i]) * scale : 0.0f;
        return;
    }
    default: {
        float scale, bias;
        if (m.format == AFFINE_BF16) {
            u32 pair = ((const u32*)(s + u64(row) * m.scale_pitch))[k / m.group];
            scale = __uint_as_float(pair << 16);
            bias = __uint_as_float(pair & 0xffff0000u);
        } else {
            float2 pair = ((const float2*)(s + u64(row) * m.scale_pitch))[k / m.group];
            scale = pair.x;
            bias = pair.y;
        }
        u64 codes = 0;
        const u8* p = w + k / 8 * m.bits;
        for (u32 i = 0; i < m.bits; i++) codes |= u64(p[i]) << (8 * i);
        u32 mask = (1u << m.bits) - 1;
#pragma unroll
        // Two roundings, not a fused multiply-add: the definition of the format.
        for (int i = 0; i < 8; i++) out[i] = __fadd_rn(__fmul_rn(scale, float(u32(codes >> (i * m.bits)) & mask)), bias);
        return;
    }
    }
}
