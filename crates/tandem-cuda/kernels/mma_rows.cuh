// Sixteen matrix rows times up to 8 NT tokens on the tensor cores, for one warp and a range of columns.
//
// A warp reads packed weights as they are into the registers that mma wants: lane (g, t) holds rows g and g + 8 and, of
// each step of columns, the t-th quarter; tiles lie in memory so that these are whole lines. The columns of one mma are in
// no particular order; the tokens' packed bf16 rows (packed_place) are in the same one. The same code runs for 1 to 64
// tokens, so a token's result does not depend on its batch.

// Where lane (g, t)'s column of x starts, if it has one.
#define NO_COLUMN 0xffffffffu

// MXFP4 carries 2^-64 until the end, which keeps every scale from 2^-31 to 2^65 within bf16's exponents.
#define MXFP4_FACTOR 1.8446744073709552e19f

// What remains to be multiplied into a product of a tiled format's decoded weights.
template <u32 FORMAT>
constexpr float TILED_FACTOR = 0.0f;
template <>
constexpr float TILED_FACTOR<MXFP4> = MXFP4_FACTOR;
template <>
constexpr float TILED_FACTOR<AFFINE_BF16> = 1.0f;

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

// Weights pass through a ring in shared memory that a warp has to itself: copies run ahead without holding registers, and
// no other warp is waited for.
// What one warp loads in one round: a tile of each of its two groups of 8 rows, and a single token's columns.
struct Round {
    uint4 a[2][32], b[2][32];
    uint2 scales0[8], scales1[8];
    uint4 x[32];
};
static_assert(sizeof(Round) == ROUND_BYTES, "the launches make room for the ring");

// A warp's weights: the tiles of two groups of rows, of which lane (g, t) has row g and, of each half, the t-th quarter.
template <u32 FORMAT>
struct RowLoader {
    // Columns that a lane takes at once, of a half tile, and of a round.
    static_assert(FORMAT == MXFP4 || FORMAT == AFFINE_BF16, "RowLoader lacks this format");
    static constexpr u32 LANE = FORMAT == MXFP4 ? 32 : 16, STEP = 4 * LANE, ROUND = 2 * STEP;
    const u8 *w0, *w1;
    u32 end, cols, t, lane;

    DI void start(Round& round, u32 r) const {
        if (r >= end) return;
        const u8 *a = w0 + r * TILE_BYTES, *b = w1 + r * TILE_BYTES;
        copy16(&round.a[0][lane], a + lane * 16);
        copy16(&round.a[1][lane], a + 512 + lane * 16);
        copy16(&round.b[0][lane], b + lane * 16);
        copy16(&round.b[1][lane], b + 512 + lane * 16);
        // Four lanes for the scales of each group.
        if (lane < 8) copy16((u8*)round.scales0 + lane * 16, (lane < 4 ? a : b) + TILE_SCALES + (lane & 3) * 16);
    }

    // The columns of a single token, shared by all lanes.
    DI void start_x(Round& round, const u16* x, u32 r) const {
        if (lane >= ROUND / 8) return;
        u32 k = r * ROUND + lane * 8;
        if (r < end && k < cols) {
            copy16(&round.x[lane], x + k);
        } else {
            round.x[lane] = make_uint4(0, 0, 0, 0);
        }
    }
};

// ONE: a single token, whose x is given without columns; every column of the mma computes it.
template <u32 FORMAT, int NT, bool ONE>
DI void packed_rows(float (&acc)[NT][4], const RowLoader<FORMAT>& rows, Round* ring, u32 begin, const u16* x,
                    const u32 (&column)[NT], bool waited) {
    using Loader = RowLoader<FORMAT>;
    const u32 ones = 0x3f803f80u;
    u32 end = rows.end, cols = rows.cols, t = rows.t, lane = rows.lane;
#pragma unroll
    for (u32 r = 0; r < RING - 1; r++) rows.start(ring[r], begin + r);
    if (!waited) wait_for_previous();
    // Weights are constant, so their loads may overtake the previous kernel; tokens are its results.
#pragma unroll
    for (u32 r = 0; r < RING - 1; r++) {
        if (ONE) rows.start_x(ring[r], x, begin + r);
        commit_copies();
    }
    u32 place = 0;
    for (u32 r = begin; r < end; r++) {
        wait_copies<RING - 2>();
        // Scales and a single token are shared by lanes; and all are done with the round that the next copies replace.
        __syncwarp();
        const Round& round = ring[place];
        uint4 a[2] = {round.a[0][lane], round.a[1][lane]}, b[2] = {round.b[0][lane], round.b[1][lane]};
        uint2 sa = round.scales0[lane >> 2], sb = round.scales1[lane >> 2];
        Round& next = ring[place == 0 ? RING - 1 : place - 1];
        rows.start(next, r + RING - 1);
        if (ONE) rows.start_x(next, x, r + RING - 1);
        commit_copies();
        place = place == RING - 1 ? 0 : place + 1;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 kk = r * Loader::ROUND + i * Loader::STEP + t * Loader::LANE;
            u32 raw0 = i ? sa.y : sa.x, raw1 = i ? sb.y : sb.x;
            if constexpr (FORMAT == MXFP4) {
                u32 scale0 = ((raw0 >> (8 * t) & 255) + 62 << 7) * 0x10001u;
                u32 scale1 = ((raw1 >> (8 * t) & 255) + 62 << 7) * 0x10001u;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    u32 p[4], q[4];
                    decode_mxfp4(word(a[i], j), scale0, p);
                    decode_mxfp4(word(b[i], j), scale1, q);
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        uint4 v = make_uint4(0, 0, 0, 0);
                        if (ONE) {
                            v = round.x[(i * Loader::STEP + t * Loader::LANE) / 8 + j];
                        } else if (column[n] != NO_COLUMN && kk < cols) {
                            v = *(const uint4*)(x + column[n] + kk + j * 8);
                        }
                        mma(acc[n], p[0], q[0], p[1], q[1], v.x, v.y);
                        mma(acc[n], p[2], q[2], p[3], q[3], v.z, v.w);
                    }
                }
            } else {
                static_assert(FORMAT == AFFINE_BF16, "packed_rows lacks this format");
                // Codes of 8 bits in groups of 64 with bf16 scales and biases: scale * (q - 128) . x +
                // (bias + 128 scale) * sum x, the sum from an mma with ones.
                float scale0 = __uint_as_float(raw0 << 16), scale1 = __uint_as_float(raw1 << 16);
                float bias0 = __uint_as_float(raw0 & 0xffff0000u) + 128.0f * scale0;
                float bias1 = __uint_as_float(raw1 & 0xffff0000u) + 128.0f * scale1;
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
                        if (ONE) {
                            v = round.x[(i * Loader::STEP + t * Loader::LANE) / 8 + j];
                        } else if (column[n] != NO_COLUMN && kk < cols) {
                            v = *(const uint4*)(x + column[n] + kk + j * 8);
                        }
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
    }
    if constexpr (FORMAT == MXFP4) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) acc[n][r] *= MXFP4_FACTOR;
    }
    wait_copies<0>();
    // All are done with the ring.
    __syncwarp();
}

// One warp's share of rows `row0 + g` of `m0` and `row1 + g` of `m1`, two matrices of one format and width; row0 and row1
// are multiples of 8, and groups past the end repeat the last one. `split` warps share the columns in whole rounds.
// `waited` is false in the first call of a kernel, before the previous kernel is known to be done.
template <int NT, bool ONE>
DI void tile_rows(float (&acc)[NT][4], const Matrix& m0, u32 row0, const Matrix& m1, u32 row1, u32 part, u32 split,
                  u32 which, const u16* x, const u32 (&column)[NT], bool waited) {
    u32 lane = threadIdx.x & 31, t = lane & 3;
    const u8* w0 = tile_of(m0, part, min(row0, m0.rows - 1), 0);
    const u8* w1 = tile_of(m1, part, min(row1, m1.rows - 1), 0);
    u32 rounds = m0.row_bytes / TILE_BYTES, each = (rounds + split - 1) / split;
    u32 begin = min(which * each, rounds), end = min(begin + each, rounds);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) acc[n][r] = 0.0f;
    Round* ring = (Round*)dynamic_memory + (threadIdx.x >> 5) * RING;
    FOR_TILED_FORMAT(m0.format, packed_rows<FORMAT, NT, ONE>(acc, RowLoader<FORMAT>{w0, w1, end, m0.cols, t, lane}, ring,
                                                             begin, x, column, waited));
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
