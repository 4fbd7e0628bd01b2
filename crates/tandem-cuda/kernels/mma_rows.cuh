// Sixteen matrix rows times up to 8 NT tokens on the tensor cores, for one warp and a range of columns.
//
// A warp reads packed weights straight from memory into the registers that mma wants: lane (g, t) holds rows g and g + 8
// and, of each step of columns, the t-th quarter. The columns of one mma are in no particular order; the tokens' packed
// bf16 rows (packed_place) are in the same one. The same code runs for 1 to 64 tokens, so a token's result does not
// depend on its batch.

// Where lane (g, t)'s column of x starts, if it has one.
#define NO_COLUMN 0xffffffffu

// MXFP4 carries 2^-64 until the end, which keeps every scale from 2^-31 to 2^65 within bf16's exponents.
#define MXFP4_FACTOR 1.8446744073709552e19f

// Eight e2m1 codes times a scale, as bf16 pairs (i, i + 4).
DI void decode_mxfp4(u32 w, u32 scale, u32 (&p)[4]) {
    p[0] = mul_bf16x2((w << 12 & 0x80008000u) | (w << 6 & 0x01c001c0u), scale);
    p[1] = mul_bf16x2((w << 8 & 0x80008000u) | (w << 2 & 0x01c001c0u), scale);
    p[2] = mul_bf16x2((w << 4 & 0x80008000u) | (w >> 2 & 0x01c001c0u), scale);
    p[3] = mul_bf16x2((w & 0x80008000u) | (w >> 6 & 0x01c001c0u), scale);
}

// Bytes of two words, less 128, as bf16 pairs (i of the first, i of the second). 128 + low seven bits is exact in bf16.
DI void decode_bytes(u32 first, u32 second, u32 (&p)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        // The odd bytes are masked out.
        u32 pair = __byte_perm(first, second, i | (i + 4) << 8);
        p[i] = sub_bf16x2((pair & 0x007f007fu) | 0x43004300u, (pair & 0x00800080u) ^ 0x43804380u);
    }
}

template <int NT>
DI void mxfp4_rows(float (&acc)[NT][4], const u8* w0, const u8* w1, const u8* s0, const u8* s1, u32 begin, u32 end,
                   const u16* x, const u32 (&column)[NT], u32 t, bool waited) {
    for (u32 k = begin; k < end; k += 512) {
        uint4 a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 kk = k + i * 128 + t * 32;
            a[i] = b[i] = make_uint4(0, 0, 0, 0);
            if (kk < end) {
                a[i] = load_stream(w0 + kk / 2);
                b[i] = load_stream(w1 + kk / 2);
            }
        }
        uint4 sa = *(const uint4*)(s0 + k / 32), sb = *(const uint4*)(s1 + k / 32);
        if (!waited) wait_for_previous();
        waited = true;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 kk = k + i * 128 + t * 32;
            u32 scale0 = ((word(sa, i) >> (8 * t) & 255) + 62 << 7) * 0x10001u;
            u32 scale1 = ((word(sb, i) >> (8 * t) & 255) + 62 << 7) * 0x10001u;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 p[4], q[4];
                decode_mxfp4(word(a[i], j), scale0, p);
                decode_mxfp4(word(b[i], j), scale1, q);
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    uint4 v = make_uint4(0, 0, 0, 0);
                    if (column[n] != NO_COLUMN && kk < end) v = *(const uint4*)(x + column[n] + kk + j * 8);
                    mma(acc[n], p[0], q[0], p[1], q[1], v.x, v.y);
                    mma(acc[n], p[2], q[2], p[3], q[3], v.z, v.w);
                }
            }
        }
    }
    if (!waited) wait_for_previous();
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) acc[n][r] *= MXFP4_FACTOR;
}

// Affine codes of 8 bits in groups of 64 with bf16 scales and biases: scale * (q - 128) . x + (bias + 128 scale) * sum x,
// the sum from an mma with ones.
template <int NT>
DI void affine8_rows(float (&acc)[NT][4], const u8* w0, const u8* w1, const u8* s0, const u8* s1, u32 begin, u32 end,
                     const u16* x, const u32 (&column)[NT], u32 t, bool waited) {
    const u32 ones = 0x3f803f80u;
    for (u32 k = begin; k < end; k += 256) {
        uint4 a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 kk = k + i * 64 + t * 16;
            a[i] = b[i] = make_uint4(0, 0, 0, 0);
            if (kk < end) {
                a[i] = load_stream(w0 + kk);
                b[i] = load_stream(w1 + kk);
            }
        }
        uint4 pa = *(const uint4*)(s0 + k / 16), pb = *(const uint4*)(s1 + k / 16);
        if (!waited) wait_for_previous();
        waited = true;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 kk = k + i * 64 + t * 16;
            float scale0 = __uint_as_float(word(pa, i) << 16), scale1 = __uint_as_float(word(pb, i) << 16);
            float bias0 = __uint_as_float(word(pa, i) & 0xffff0000u) + 128.0f * scale0;
            float bias1 = __uint_as_float(word(pb, i) & 0xffff0000u) + 128.0f * scale1;
            u32 p[2][4], q[2][4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                decode_bytes(word(a[i], 2 * j), word(a[i], 2 * j + 1), p[j]);
                decode_bytes(word(b[i], 2 * j), word(b[i], 2 * j + 1), q[j]);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
                float products[4] = {}, sums[4] = {};
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    uint4 v = make_uint4(0, 0, 0, 0);
                    if (column[n] != NO_COLUMN && kk < end) v = *(const uint4*)(x + column[n] + kk + j * 8);
                    mma(products, p[j][0], q[j][0], p[j][1], q[j][1], v.x, v.y);
                    mma(products, p[j][2], q[j][2], p[j][3], q[j][3], v.z, v.w);
                    mma(sums, ones, ones, ones, ones, v.x, v.y);
                    mma(sums, ones, ones, ones, ones, v.z, v.w);
                }
                acc[n][0] += scale0 * products[0] + bias0 * sums[0];
                acc[n][1] += scale0 * products[1] + bias0 * sums[1];
                acc[n][2] += scale1 * products[2] + bias1 * sums[2];
                acc[n][3] += scale1 * products[3] + bias1 * sums[3];
            }
        }
    }
    if (!waited) wait_for_previous();
}

// Columns of one of `split` warps that share a row tile: whole units, the last possibly short.
DI void warp_columns(const Matrix& m, u32 split, u32 which, u32& begin, u32& end) {
    u32 unit = m.format == MXFP4 ? 512 : 256;
    u32 units = (m.cols + unit - 1) / unit;
    u32 each = (units + split - 1) / split;
    begin = min(which * each * unit, m.cols);
    end = min(begin + each * unit, m.cols);
}

// One warp's share of rows `row0 + g` of `m0` and `row1 + g` of `m1`, two matrices of one format and width (rows past the
// end repeat the last one). `waited` is false in the first call of a kernel, before the previous kernel is known to be done.
template <int NT>
DI void tile_rows(float (&acc)[NT][4], const Matrix& m0, u32 row0, const Matrix& m1, u32 row1, u32 part, u32 split,
                  u32 which, const u16* x, const u32 (&column)[NT], bool waited) {
    u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    u32 r0 = min(row0 + g, m0.rows - 1), r1 = min(row1 + g, m1.rows - 1);
    const u8* w0 = m0.weight + part * m0.weight_part + u64(r0) * m0.row_bytes;
    const u8* w1 = m1.weight + part * m1.weight_part + u64(r1) * m1.row_bytes;
    const u8* s0 = m0.scales + part * m0.scale_part + u64(r0) * m0.scale_pitch;
    const u8* s1 = m1.scales + part * m1.scale_part + u64(r1) * m1.scale_pitch;
    u32 begin, end;
    warp_columns(m0, split, which, begin, end);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) acc[n][r] = 0.0f;
    if (m0.format == MXFP4) {
        mxfp4_rows<NT>(acc, w0, w1, s0, s1, begin, end, x, column, t, waited);
    } else {
        affine8_rows<NT>(acc, w0, w1, s0, s1, begin, end, x, column, t, waited);
    }
}

// Adds up the shares of the `split` warps of each row tile of a block of 8 warps, in order, and hands each sum to
// `store(row tile, n, row in 0..16, column in 0..8, value)`.
template <int NT, class Store>
DI void add_shares(const float (&acc)[NT][4], u32 split, float (*shares)[NT][4][32], Store store) {
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (split == 1) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) store(warp, n, (lane >> 2) + 8 * (r >> 1), 2 * (lane & 3) + (r & 1), acc[n][r]);
        return;
    }
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) shares[warp][n][r][lane] = acc[n][r];
    __syncthreads();
    u32 tiles = 8 / split;
    for (u32 i = threadIdx.x; i < tiles * NT * 4 * 32; i += 256) {
        u32 l = i & 31, r = i >> 5 & 3, n = (i >> 7) % NT, tile = (i >> 7) / NT;
        float sum = 0.0f;
        for (u32 s = 0; s < split; s++) sum += shares[tile * split + s][n][r][l];
        store(tile, n, (l >> 2) + 8 * (r >> 1), 2 * (l & 3) + (r & 1), sum);
    }
    __syncthreads();
}
