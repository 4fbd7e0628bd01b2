// The token after each row of logits, sampled as tandem-engine's sampler.rs does it, with its random numbers. A row is a
// block. Weights of tokens are whole numbers, so that sums do not depend on their order: 2^44 is the likeliest token's.

// How a row is sampled.
struct Sampling {
    float inverse_temperature;   // 0: the likeliest token
    u32 top_k;                   // 0: all
    float top_p;
    float least;                 // of a logit over the temperature, relative to the largest: the logarithm of min_p
    double unit;                 // the random number
    u64 unused;
};

// In front of a batch whose tokens are sampled.
struct SamplingHeader {
    u32* to;                     // [n], memory of the host
    u64 unused[3];
    DI const Sampling& sampling(u32 row) const { return ((const Sampling*)(this + 1))[row]; }
};

struct SampleArgs {
    const float* logits;         // [n, vocab]
    const SamplingHeader* header;
    u32* sampled;                // [n]: token ids, for the next step
    u32 vocab, unused;
};

#define INFINITE __uint_as_float(0x7f800000u)

// Sums, or maxima, over a block of 1024 threads, which all get them.
template <int N, class F>
DI void block_combine(u64 (&v)[N], u64 (*scratch)[32], F combine) {
#pragma unroll
    for (int round = 0; round < 2; round++) {
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int d = 16; d > 0; d >>= 1) v[i] = combine(v[i], __shfl_xor_sync(FULL, v[i], d));
        if (round == 1) return;
        // What it held before has been read.
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; i++)
            if ((threadIdx.x & 31) == 0) scratch[i][threadIdx.x >> 5] = v[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = scratch[i][threadIdx.x & 31];
    }
}

template <int N>
DI void block_add(u64 (&v)[N], u64 (*scratch)[32]) {
    block_combine(v, scratch, [](u64 a, u64 b) { return a + b; });
}

template <int N>
DI void block_max(u64 (&v)[N], u64 (*scratch)[32]) {
    block_combine(v, scratch, [](u64 a, u64 b) { return a > b ? a : b; });
}

// The largest key such that it and all larger ones weigh at least `limit`, which all keys together do. `token(i, key,
// weight)` says whether token i counts. Keys have `prefix` above bit `shift + 2`. Two bits a pass, until one token is left.
template <class Token>
DI u64 find_key(u32 vocab, int shift, u64 prefix, u64 limit, Token token, u64 (*scratch)[32]) {
    for (;; shift -= 2) {
        // Weights of the quarters, then their numbers of tokens in half words.
        u64 v[6] = {};
        for (u32 i = threadIdx.x; i < vocab; i += 1024) {
            u64 key, weight;
            if (!token(i, key, weight) || key >> shift >> 2 != prefix) continue;
            u32 quarter = u32(key >> shift) & 3;
#pragma unroll
            for (u32 q = 0; q < 4; q++) v[q] += quarter == q ? weight : 0;
            v[4] += quarter < 2 ? 1ull << (32 * quarter) : 0;
            v[5] += quarter < 2 ? 0 : 1ull << (32 * (quarter - 2));
        }
        block_add(v, scratch);
        u32 quarter = 3;
#pragma unroll
        for (u32 q = 3; q > 0; q--)
            if (quarter == q && limit > v[q]) {
                limit -= v[q];
                quarter = q - 1;
            }
        prefix = prefix << 2 | quarter;
        u32 count = u32((quarter < 2 ? v[4] : v[5]) >> (32 * (quarter & 1)));
        if (shift == 0) return prefix;
        if (count <= 1) break;
    }
    u64 found[1] = {0};
    for (u32 i = threadIdx.x; i < vocab; i += 1024) {
        u64 key, weight;
        if (token(i, key, weight) && key >> shift == prefix) found[0] = key;
    }
    block_max(found, scratch);
    return found[0];
}

extern "C" __global__ void __launch_bounds__(1024) sample(const __grid_constant__ SampleArgs args) {
    __shared__ u64 scratch[6][32];
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.x, vocab = args.vocab;
    const float* logits = args.logits + u64(row) * vocab;
    Sampling sampling = args.header->sampling(row);
    auto answer = [&](u32 word) {
        if (threadIdx.x != 0) return;
        args.sampled[row] = word;
        *(volatile u32*)(args.header->to + row) = word;
    };

    // The largest logit with the lowest id, and the lowest id of one that is no number.
    u64 best[2] = {0, 0};
    for (u32 i = threadIdx.x; i < vocab; i += 1024) {
        float logit = __ldcg(logits + i);
        u64 place = ~i;
        if (logit != logit) {
            best[1] = best[1] > place ? best[1] : place;
        } else {
            u64 key = u64(ordered(logit)) << 32 | place;
            best[0] = best[0] > key ? best[0] : key;
        }
    }
    block_max(best, scratch);
    if (best[1]) return answer(SAMPLED | ~u32(best[1]));
    u32 likeliest = ~u32(best[0]);
    float largest = vocab ? __ldcg(logits + likeliest) : -INFINITE;
    if (largest == -INFINITE) return answer(NO_TOKEN);
    if (sampling.inverse_temperature == 0.0f || largest == INFINITE) return answer(likeliest);

    // Logits over the temperature, relative to the largest; false for tokens without odds.
    auto odds = [&](u32 i, float& scaled, u64& key) {
        float logit = __ldcg(logits + i);
        scaled = logit == largest ? 0.0f : __fmul_rn(__fsub_rn(logit, largest), sampling.inverse_temperature);
        // None is above 0: the smaller the magnitude, the likelier. Then the lower id.
        key = u64(0x7fffffffu - (__float_as_uint(scaled) & 0x7fffffffu)) << 32 | u32(~i);
        return scaled > -INFINITE;
    };
    auto weight_of = [](float scaled) { return u64(expf(scaled) * 17592186044416.0f); };
    u64 floor = 0;
    auto weighed = [&](u32 i, u64& key, u64& weight) {
        float scaled;
        bool counts = odds(i, scaled, key) && key >= floor;
        weight = weight_of(scaled);
        return counts;
    };
    auto total = [&](float least) {
        u64 v[2] = {0, 0};
        for (u32 i = threadIdx.x; i < vocab; i += 1024) {
            float scaled;
            u64 key;
            if (odds(i, scaled, key) && key >= floor && scaled >= least) {
                v[0] += weight_of(scaled);
                v[1] += 1;
            }
        }
        block_add(v, scratch);
        return make_ulonglong2(v[0], v[1]);
    };
    bool by_likelihood = false;
    if (sampling.top_k && sampling.top_k < total(-INFINITE).y) {
        auto counted = [&](u32 i, u64& key, u64& weight) {
            float scaled;
            weight = 1;
            return odds(i, scaled, key);
        };
        floor = find_key(vocab, 62, 0, sampling.top_k, counted, scratch);
        by_likelihood = true;
    }
    if (sampling.top_p < 1.0f) {
        u64 limit = u64(ceil(double(sampling.top_p) * double(total(-INFINITE).x)));
        floor = find_key(vocab, 62, 0, limit ? limit : 1, weighed, scratch);
        by_likelihood = true;
    }
    u64 all = total(sampling.least).x, limit = u64(sampling.unit * double(all)) + 1;
    if (limit > all) limit = all;
    if (by_likelihood) {
        // What min_p leaves out comes last.
        return answer(~u32(find_key(vocab, 62, 0, limit, weighed, scratch)));
    }
    auto by_id = [&](u32 i, u64& key, u64& weight) {
        float scaled;
        bool counts = odds(i, scaled, key) && scaled >= sampling.least;
        weight = weight_of(scaled);
        key = u32(~i);
        return counts;
    };
    int shift = vocab > 1 ? (31 - __clz(vocab - 1)) & ~1 : 0;
    answer(~u32(find_key(vocab, shift, 0xffffffffu >> shift >> 2, limit, by_id, scratch)));
}
