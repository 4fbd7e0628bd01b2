// From the order of a checkpoint to the tiles of common.cuh: a block makes a tile.

struct RepackArgs {
    const u8* weight;        // [rows, row_bytes], a multiple of 16
    const u8* scales;        // MXFP4: [rows, scale_row]; affine: bf16 scales, [rows, scale_row]
    const u8* biases;        // affine: the same for biases
    u8* tiles;
    u32 rows, row_bytes, scale_row, rounds;
};

extern "C" __global__ void __launch_bounds__(128) repack(const __grid_constant__ RepackArgs args) {
    let_next_start();
    wait_for_previous();
    u32 round = blockIdx.x % args.rounds, group = blockIdx.x / args.rounds;
    u8* tile = args.tiles + u64(blockIdx.x) * TILE_BYTES;
    // 8 bytes of elements a thread, and one byte of scales.
    u32 row = threadIdx.x / 16, byte = threadIdx.x % 16 * 8, from = round * 128 + byte;
    bool inside = group * 8 + row < args.rows;
    const u8* w = args.weight + u64(group * 8 + row) * args.row_bytes + from;
    uint2 codes = make_uint2(0, 0);
    if (inside && from < args.row_bytes) codes = *(const uint2*)w;
    *(uint2*)(tile + tile_place(row, byte)) = codes;
    if (threadIdx.x >= 64) return;
    row = threadIdx.x / 8;
    byte = threadIdx.x & 7;
    inside = group * 8 + row < args.rows;
    u32 value = 0;
    if (args.biases) {
        // Scale and bias in turn.
        u32 place = round * 4 + byte / 4 * 2 + (byte & 1);
        const u8* source = byte & 2 ? args.biases : args.scales;
        if (inside && place < args.scale_row) value = source[u64(group * 8 + row) * args.scale_row + place];
    } else if (inside && round * 8 + byte < args.scale_row) {
        value = args.scales[u64(group * 8 + row) * args.scale_row + round * 8 + byte];
    }
    tile[TILE_SCALES + threadIdx.x] = u8(value);
}
