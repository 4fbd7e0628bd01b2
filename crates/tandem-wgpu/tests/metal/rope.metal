// language: metal2.4
#include <metal_stdlib>
#include <simd/simd.h>

using metal::uint;

struct _mslBufferSizes {
    uint size2;
    uint size3;
    uint size4;
    uint size5;
};

struct Args {
    uint base;
    uint n_heads;
    uint head_width;
    uint pairs;
    uint half_layout;
    float scaling;
    uint x_pitch;
    uint x_offset;
    uint x_stride;
    uint y_pitch;
    uint y_offset;
    uint y_stride;
};
struct type_2 {
    float inner[256];
};
typedef float type_4[1];
typedef uint type_5[1];
constant uint WG = 256u;
constant uint LANES = 32u;
constant uint GROUPS = 8u;

float lane_sum(
    float v,
    uint li_1
) {
    float unnamed = metal::simd_sum(v);
    return unnamed;
}

float lane_max(
    float v_1,
    uint li_2
) {
    float unnamed_1 = metal::simd_max(v_1);
    return unnamed_1;
}

uint naga_mod(uint lhs, uint rhs) {
    return lhs % metal::select(rhs, 1u, rhs == 0u);
}

uint naga_div(uint lhs, uint rhs) {
    return lhs / metal::select(rhs, 1u, rhs == 0u);
}

float group_sum(
    float v_2,
    uint li_3,
    threadgroup type_2& across
) {
    float sum = 0.0;
    uint i = 0u;
    float _e2 = lane_sum(v_2, li_3);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    if (naga_mod(li_3, LANES) == 0u) {
        across.inner[naga_div(li_3, LANES)] = _e2;
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    uint2 loop_bound = uint2(4294967295u);
    bool loop_init = true;
    while(true) {
        if (metal::all(loop_bound == uint2(0u))) { break; }
        loop_bound -= uint2(loop_bound.y == 0u, 1u);
        if (!loop_init) {
            uint _e25 = i;
            i = _e25 + 1u;
        }
        loop_init = false;
        uint _e15 = i;
        if (_e15 < GROUPS) {
        } else {
            break;
        }
        {
            float _e18 = sum;
            uint _e20 = i;
            float _e22 = across.inner[_e20];
            sum = _e18 + _e22;
        }
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    float _e27 = sum;
    return _e27;
}

uint multiply_high(
    uint a,
    uint b
) {
    uint a0_ = a & 65535u;
    uint a1_ = a >> 16u;
    uint b0_ = b & 65535u;
    uint b1_ = b >> 16u;
    uint middle = (a1_ * b0_) + ((a0_ * b0_) >> 16u);
    uint low_1 = (a0_ * b1_) + (middle & 65535u);
    return ((a1_ * b1_) + (middle >> 16u)) + (low_1 >> 16u);
}

metal::float2 cos_sin(
    uint position,
    uint high,
    uint low
) {
    uint _e4 = multiply_high(position, low);
    uint turn = (position * high) + _e4;
    uint quarter = (turn + 536870912u) >> 30u;
    int rest = as_type<int>(turn - (quarter << 30u));
    float t = static_cast<float>(rest) * 0.0000000014629181;
    float t2_ = t * t;
    float sine = metal::fma(t * t2_, metal::fma(t2_, metal::fma(t2_, metal::fma(t2_, 0.0000027557319, -0.0001984127), 0.008333333), -0.16666667), t);
    float cosine = metal::fma(t2_, metal::fma(t2_, metal::fma(t2_, metal::fma(t2_, 0.000024801588, -0.0013888889), 0.041666668), -0.5), 1.0);
    switch(quarter & 3u) {
        case 0u: {
            return metal::float2(cosine, sine);
        }
        case 1u: {
            return metal::float2(-(sine), cosine);
        }
        case 2u: {
            return metal::float2(-(cosine), -(sine));
        }
        default: {
            return metal::float2(sine, -(cosine));
        }
    }
}

struct main_Input {
};
[[max_total_threads_per_threadgroup(256)]] kernel void main_(
  metal::uint3 wid [[threadgroup_position_in_grid]]
, uint li [[thread_index_in_threadgroup]]
, constant Args& a_1 [[user(fake0)]]
, device type_4 const& x [[user(fake0)]]
, device type_5 const& turns [[user(fake0)]]
, device type_5 const& batch [[user(fake0)]]
, device type_4& y [[user(fake0)]]
, constant _mslBufferSizes& _buffer_sizes [[user(fake0)]]
) {
    uint e0_ = {};
    uint e1_ = {};
    uint _e4 = a_1.head_width;
    uint _e7 = a_1.pairs;
    uint per_head = _e4 - _e7;
    uint _e12 = a_1.base;
    uint i_1 = ((wid.x + _e12) * WG) + li;
    uint _e19 = a_1.n_heads;
    if (i_1 >= (_e19 * per_head)) {
        return;
    }
    uint head = naga_div(i_1, per_head);
    uint pair = naga_mod(i_1, per_head);
    uint _e27 = a_1.x_pitch;
    uint _e31 = a_1.x_offset;
    uint _e35 = a_1.x_stride;
    uint source = ((wid.y * _e27) + _e31) + (head * _e35);
    uint _e41 = a_1.y_pitch;
    uint _e45 = a_1.y_offset;
    uint _e49 = a_1.y_stride;
    uint to = ((wid.y * _e41) + _e45) + (head * _e49);
    uint _e54 = a_1.pairs;
    if (pair >= _e54) {
        uint _e60 = a_1.pairs;
        uint _e67 = a_1.pairs;
        float _e70 = x[(source + pair) + _e67];
        y[(to + pair) + _e60] = _e70;
        return;
    }
    uint _e74 = batch[0];
    uint _e78 = batch[_e74 + wid.y];
    uint _e83 = turns[2u * pair];
    uint _e90 = turns[(2u * pair) + 1u];
    metal::float2 _e91 = cos_sin(_e78, _e83, _e90);
    float _e94 = a_1.scaling;
    metal::float2 cs = _e91 * _e94;
    e0_ = 2u * pair;
    uint _e99 = e0_;
    e1_ = _e99 + 1u;
    uint _e105 = a_1.half_layout;
    if (_e105 != 0u) {
        e0_ = pair;
        uint _e110 = a_1.pairs;
        e1_ = pair + _e110;
    }
    uint _e113 = e0_;
    float v0_ = x[source + _e113];
    uint _e118 = e1_;
    float v1_ = x[source + _e118];
    uint _e123 = e0_;
    y[to + _e123] = (v0_ * cs.x) - (v1_ * cs.y);
    uint _e132 = e1_;
    y[to + _e132] = (v1_ * cs.x) + (v0_ * cs.y);
    return;
}
