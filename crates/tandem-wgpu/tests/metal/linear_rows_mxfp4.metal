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
    uint rows;
    uint cols;
    uint units;
    uint weight_pitch;
    uint weight_part;
    uint scale_pitch;
    uint scale_part;
    uint x_pitch;
    uint x_offset;
    uint x_stride;
    uint y_pitch;
    uint y_offset;
    uint y_stride;
    uint n_tokens;
    uint first_part;
    uint n_parts;
    uint top_k;
    uint plan_order;
};
struct type_2 {
    float inner[256];
};
typedef metal::uint4 type_5[1];
typedef uint type_6[1];
typedef metal::float4 type_7[1];
typedef float type_8[1];
struct type_9 {
    metal::float4 inner[1153];
};
constant uint WG = 256u;
constant uint LANES = 32u;
constant uint GROUPS = 8u;
constant uint UNIT = 32u;
constant uint VECTORS = 8u;
constant uint GROUP_SIZE = 32u;

float lane_sum(
    float v_1,
    uint li_1
) {
    float unnamed = metal::simd_sum(v_1);
    return unnamed;
}

float lane_max(
    float v_2,
    uint li_2
) {
    float unnamed_1 = metal::simd_max(v_2);
    return unnamed_1;
}

uint naga_mod(uint lhs, uint rhs) {
    return lhs % metal::select(rhs, 1u, rhs == 0u);
}

uint naga_div(uint lhs, uint rhs) {
    return lhs / metal::select(rhs, 1u, rhs == 0u);
}

float group_sum(
    float v_3,
    uint li_3,
    threadgroup type_2& across
) {
    float sum = 0.0;
    uint i = 0u;
    float _e2 = lane_sum(v_3, li_3);
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

metal::float4 low4_(
    uint w
) {
    return metal::float4(float2(as_type<half2>((w & 2382401024u))), float2(as_type<half2>(((w << 3u) & 2382401024u))));
}

metal::float4 high4_(
    uint w_1
) {
    return metal::float4(float2(as_type<half2>((((w_1 << 6u) & 234884608u) | ((w_1 << 1u) & 2147516416u)))), float2(as_type<half2>((((w_1 << 9u) & 234884608u) | ((w_1 << 2u) & 2147516416u)))));
}

metal::float4 decode_0_(
    metal::uint4 q
) {
    metal::float4 _e2 = low4_(q.x);
    return _e2;
}

metal::float4 decode_1_(
    metal::uint4 q_1
) {
    metal::float4 _e2 = high4_(q_1.x);
    return _e2;
}

metal::float4 decode_2_(
    metal::uint4 q_2
) {
    metal::float4 _e2 = low4_(q_2.y);
    return _e2;
}

metal::float4 decode_3_(
    metal::uint4 q_3
) {
    metal::float4 _e2 = high4_(q_3.y);
    return _e2;
}

metal::float4 decode_4_(
    metal::uint4 q_4
) {
    metal::float4 _e2 = low4_(q_4.z);
    return _e2;
}

metal::float4 decode_5_(
    metal::uint4 q_5
) {
    metal::float4 _e2 = high4_(q_5.z);
    return _e2;
}

metal::float4 decode_6_(
    metal::uint4 q_6
) {
    metal::float4 _e2 = low4_(q_6.w);
    return _e2;
}

metal::float4 decode_7_(
    metal::uint4 q_7
) {
    metal::float4 _e2 = high4_(q_7.w);
    return _e2;
}

struct main_Input {
};
[[max_total_threads_per_threadgroup(256)]] kernel void main_(
  metal::uint3 wid [[threadgroup_position_in_grid]]
, uint li [[thread_index_in_threadgroup]]
, constant Args& a [[user(fake0)]]
, device type_5 const& w_2 [[user(fake0)]]
, device type_6 const& s [[user(fake0)]]
, device type_7 const& x [[user(fake0)]]
, device type_8& y [[user(fake0)]]
, threadgroup type_9& xs
, constant _mslBufferSizes& _buffer_sizes [[user(fake0)]]
) {
    if (li == 0u) {
        xs = {};
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    float y_0_0_ = 0.0;
    float y_1_0_ = 0.0;
    float y_2_0_ = 0.0;
    float y_3_0_ = 0.0;
    uint first = 0u;
    uint v = {};
    uint u = {};
    metal::float4 x_sum_0_ = {};
    float d_0_0_ = {};
    float d_1_0_ = {};
    float d_2_0_ = {};
    float d_3_0_ = {};
    bool local = {};
    bool local_1 = {};
    bool local_2 = {};
    bool local_3 = {};
    bool local_4 = {};
    bool local_5 = {};
    bool local_6 = {};
    bool local_7 = {};
    uint lane = naga_mod(li, LANES);
    uint _e7 = a.base;
    uint row0_ = (((wid.x + _e7) * GROUPS) + naga_div(li, LANES)) * 4u;
    uint token0_ = wid.y * 1u;
    uint part = wid.z;
    uint _e24 = a.n_tokens;
    uint _e30 = a.x_pitch;
    uint _e34 = a.x_offset;
    uint _e38 = a.x_stride;
    uint x_row_0_ = ((metal::min(token0_ + 0u, _e24 - 1u) * _e30) + _e34) + (part * _e38);
    uint _e43 = a.weight_part;
    uint _e49 = a.rows;
    uint _e55 = a.weight_pitch;
    uint y_w0_ = (part * _e43) + (metal::min(row0_ + 0u, _e49 - 1u) * _e55);
    uint _e60 = a.scale_part;
    uint _e66 = a.rows;
    uint _e72 = a.scale_pitch;
    uint y_s0_ = (part * _e60) + (metal::min(row0_ + 0u, _e66 - 1u) * _e72);
    uint _e79 = a.weight_part;
    uint _e85 = a.rows;
    uint _e91 = a.weight_pitch;
    uint y_w1_ = (part * _e79) + (metal::min(row0_ + 1u, _e85 - 1u) * _e91);
    uint _e96 = a.scale_part;
    uint _e102 = a.rows;
    uint _e108 = a.scale_pitch;
    uint y_s1_ = (part * _e96) + (metal::min(row0_ + 1u, _e102 - 1u) * _e108);
    uint _e115 = a.weight_part;
    uint _e121 = a.rows;
    uint _e127 = a.weight_pitch;
    uint y_w2_ = (part * _e115) + (metal::min(row0_ + 2u, _e121 - 1u) * _e127);
    uint _e132 = a.scale_part;
    uint _e138 = a.rows;
    uint _e144 = a.scale_pitch;
    uint y_s2_ = (part * _e132) + (metal::min(row0_ + 2u, _e138 - 1u) * _e144);
    uint _e151 = a.weight_part;
    uint _e157 = a.rows;
    uint _e163 = a.weight_pitch;
    uint y_w3_ = (part * _e151) + (metal::min(row0_ + 3u, _e157 - 1u) * _e163);
    uint _e168 = a.scale_part;
    uint _e174 = a.rows;
    uint _e180 = a.scale_pitch;
    uint y_s3_ = (part * _e168) + (metal::min(row0_ + 3u, _e174 - 1u) * _e180);
    uint2 loop_bound_1 = uint2(4294967295u);
    bool loop_init_1 = true;
    while(true) {
        if (metal::all(loop_bound_1 == uint2(0u))) { break; }
        loop_bound_1 -= uint2(loop_bound_1.y == 0u, 1u);
        if (!loop_init_1) {
            uint _e956 = first;
            first = _e956 + 128u;
        }
        loop_init_1 = false;
        uint _e187 = first;
        uint _e190 = a.units;
        if (_e187 < _e190) {
        } else {
            break;
        }
        {
            uint _e195 = a.units;
            uint _e196 = first;
            uint n = metal::min(128u, _e195 - _e196);
            metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
            v = li;
            uint2 loop_bound_2 = uint2(4294967295u);
            bool loop_init_2 = true;
            while(true) {
                if (metal::all(loop_bound_2 == uint2(0u))) { break; }
                loop_bound_2 -= uint2(loop_bound_2.y == 0u, 1u);
                if (!loop_init_2) {
                    uint _e226 = v;
                    v = _e226 + WG;
                }
                loop_init_2 = false;
                uint _e200 = v;
                if (_e200 < (n * VECTORS)) {
                } else {
                    break;
                }
                {
                    uint _e204 = first;
                    uint _e207 = v;
                    uint k = ((_e204 * VECTORS) + _e207) * 4u;
                    uint _e212 = v;
                    uint _e215 = v;
                    metal::float4 _e225 = x[(x_row_0_ + k) >> 2u];
                    xs.inner[(0u + _e212) + (_e215 >> 3u)] = _e225;
                }
            }
            metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
            u = lane;
            uint2 loop_bound_3 = uint2(4294967295u);
            bool loop_init_3 = true;
            while(true) {
                if (metal::all(loop_bound_3 == uint2(0u))) { break; }
                loop_bound_3 -= uint2(loop_bound_3.y == 0u, 1u);
                if (!loop_init_3) {
                    uint _e953 = u;
                    u = _e953 + LANES;
                }
                loop_init_3 = false;
                uint _e230 = u;
                if (_e230 < n) {
                } else {
                    break;
                }
                {
                    uint _e233 = first;
                    uint _e235 = u;
                    metal::uint4 y_q0_ = w_2[(y_w0_ + _e233) + _e235];
                    uint _e240 = first;
                    uint _e242 = u;
                    metal::uint4 y_q1_ = w_2[(y_w1_ + _e240) + _e242];
                    uint _e247 = first;
                    uint _e249 = u;
                    metal::uint4 y_q2_ = w_2[(y_w2_ + _e247) + _e249];
                    uint _e254 = first;
                    uint _e256 = u;
                    metal::uint4 y_q3_ = w_2[(y_w3_ + _e254) + _e256];
                    uint _e260 = u;
                    uint _e263 = u;
                    uint y_x = (_e260 * VECTORS) + ((_e263 * VECTORS) >> 3u);
                    {
                        uint _e269 = first;
                        uint _e270 = u;
                        uint g = naga_div(_e269 + _e270, 1u);
                        uint _e279 = s[y_s0_ + (g >> 2u)];
                        float c0_ = as_type<float>(((_e279 >> ((g & 3u) * 8u)) & 255u) << 23u);
                        uint _e295 = s[y_s1_ + (g >> 2u)];
                        float c1_ = as_type<float>(((_e295 >> ((g & 3u) * 8u)) & 255u) << 23u);
                        uint _e311 = s[y_s2_ + (g >> 2u)];
                        float c2_ = as_type<float>(((_e311 >> ((g & 3u) * 8u)) & 255u) << 23u);
                        uint _e327 = s[y_s3_ + (g >> 2u)];
                        float c3_ = as_type<float>(((_e327 >> ((g & 3u) * 8u)) & 255u) << 23u);
                        x_sum_0_ = metal::float4(0.0);
                        d_0_0_ = 0.0;
                        d_1_0_ = 0.0;
                        d_2_0_ = 0.0;
                        d_3_0_ = 0.0;
                        metal::float4 x_0_0_ = xs.inner[0u + y_x];
                        metal::float4 _e354 = decode_0_(y_q0_);
                        float _e357 = d_0_0_;
                        d_0_0_ = metal::fma(_e354.x, x_0_0_.x, _e357);
                        float _e361 = d_0_0_;
                        d_0_0_ = metal::fma(_e354.y, x_0_0_.y, _e361);
                        float _e365 = d_0_0_;
                        d_0_0_ = metal::fma(_e354.z, x_0_0_.z, _e365);
                        float _e369 = d_0_0_;
                        d_0_0_ = metal::fma(_e354.w, x_0_0_.w, _e369);
                        metal::float4 _e371 = decode_0_(y_q1_);
                        float _e374 = d_1_0_;
                        d_1_0_ = metal::fma(_e371.x, x_0_0_.x, _e374);
                        float _e378 = d_1_0_;
                        d_1_0_ = metal::fma(_e371.y, x_0_0_.y, _e378);
                        float _e382 = d_1_0_;
                        d_1_0_ = metal::fma(_e371.z, x_0_0_.z, _e382);
                        float _e386 = d_1_0_;
                        d_1_0_ = metal::fma(_e371.w, x_0_0_.w, _e386);
                        metal::float4 _e388 = decode_0_(y_q2_);
                        float _e391 = d_2_0_;
                        d_2_0_ = metal::fma(_e388.x, x_0_0_.x, _e391);
                        float _e395 = d_2_0_;
                        d_2_0_ = metal::fma(_e388.y, x_0_0_.y, _e395);
                        float _e399 = d_2_0_;
                        d_2_0_ = metal::fma(_e388.z, x_0_0_.z, _e399);
                        float _e403 = d_2_0_;
                        d_2_0_ = metal::fma(_e388.w, x_0_0_.w, _e403);
                        metal::float4 _e405 = decode_0_(y_q3_);
                        float _e408 = d_3_0_;
                        d_3_0_ = metal::fma(_e405.x, x_0_0_.x, _e408);
                        float _e412 = d_3_0_;
                        d_3_0_ = metal::fma(_e405.y, x_0_0_.y, _e412);
                        float _e416 = d_3_0_;
                        d_3_0_ = metal::fma(_e405.z, x_0_0_.z, _e416);
                        float _e420 = d_3_0_;
                        d_3_0_ = metal::fma(_e405.w, x_0_0_.w, _e420);
                        metal::float4 x_1_0_ = xs.inner[1u + y_x];
                        metal::float4 _e427 = decode_1_(y_q0_);
                        float _e430 = d_0_0_;
                        d_0_0_ = metal::fma(_e427.x, x_1_0_.x, _e430);
                        float _e434 = d_0_0_;
                        d_0_0_ = metal::fma(_e427.y, x_1_0_.y, _e434);
                        float _e438 = d_0_0_;
                        d_0_0_ = metal::fma(_e427.z, x_1_0_.z, _e438);
                        float _e442 = d_0_0_;
                        d_0_0_ = metal::fma(_e427.w, x_1_0_.w, _e442);
                        metal::float4 _e444 = decode_1_(y_q1_);
                        float _e447 = d_1_0_;
                        d_1_0_ = metal::fma(_e444.x, x_1_0_.x, _e447);
                        float _e451 = d_1_0_;
                        d_1_0_ = metal::fma(_e444.y, x_1_0_.y, _e451);
                        float _e455 = d_1_0_;
                        d_1_0_ = metal::fma(_e444.z, x_1_0_.z, _e455);
                        float _e459 = d_1_0_;
                        d_1_0_ = metal::fma(_e444.w, x_1_0_.w, _e459);
                        metal::float4 _e461 = decode_1_(y_q2_);
                        float _e464 = d_2_0_;
                        d_2_0_ = metal::fma(_e461.x, x_1_0_.x, _e464);
                        float _e468 = d_2_0_;
                        d_2_0_ = metal::fma(_e461.y, x_1_0_.y, _e468);
                        float _e472 = d_2_0_;
                        d_2_0_ = metal::fma(_e461.z, x_1_0_.z, _e472);
                        float _e476 = d_2_0_;
                        d_2_0_ = metal::fma(_e461.w, x_1_0_.w, _e476);
                        metal::float4 _e478 = decode_1_(y_q3_);
                        float _e481 = d_3_0_;
                        d_3_0_ = metal::fma(_e478.x, x_1_0_.x, _e481);
                        float _e485 = d_3_0_;
                        d_3_0_ = metal::fma(_e478.y, x_1_0_.y, _e485);
                        float _e489 = d_3_0_;
                        d_3_0_ = metal::fma(_e478.z, x_1_0_.z, _e489);
                        float _e493 = d_3_0_;
                        d_3_0_ = metal::fma(_e478.w, x_1_0_.w, _e493);
                        metal::float4 x_2_0_ = xs.inner[2u + y_x];
                        metal::float4 _e500 = decode_2_(y_q0_);
                        float _e503 = d_0_0_;
                        d_0_0_ = metal::fma(_e500.x, x_2_0_.x, _e503);
                        float _e507 = d_0_0_;
                        d_0_0_ = metal::fma(_e500.y, x_2_0_.y, _e507);
                        float _e511 = d_0_0_;
                        d_0_0_ = metal::fma(_e500.z, x_2_0_.z, _e511);
                        float _e515 = d_0_0_;
                        d_0_0_ = metal::fma(_e500.w, x_2_0_.w, _e515);
                        metal::float4 _e517 = decode_2_(y_q1_);
                        float _e520 = d_1_0_;
                        d_1_0_ = metal::fma(_e517.x, x_2_0_.x, _e520);
                        float _e524 = d_1_0_;
                        d_1_0_ = metal::fma(_e517.y, x_2_0_.y, _e524);
                        float _e528 = d_1_0_;
                        d_1_0_ = metal::fma(_e517.z, x_2_0_.z, _e528);
                        float _e532 = d_1_0_;
                        d_1_0_ = metal::fma(_e517.w, x_2_0_.w, _e532);
                        metal::float4 _e534 = decode_2_(y_q2_);
                        float _e537 = d_2_0_;
                        d_2_0_ = metal::fma(_e534.x, x_2_0_.x, _e537);
                        float _e541 = d_2_0_;
                        d_2_0_ = metal::fma(_e534.y, x_2_0_.y, _e541);
                        float _e545 = d_2_0_;
                        d_2_0_ = metal::fma(_e534.z, x_2_0_.z, _e545);
                        float _e549 = d_2_0_;
                        d_2_0_ = metal::fma(_e534.w, x_2_0_.w, _e549);
                        metal::float4 _e551 = decode_2_(y_q3_);
                        float _e554 = d_3_0_;
                        d_3_0_ = metal::fma(_e551.x, x_2_0_.x, _e554);
                        float _e558 = d_3_0_;
                        d_3_0_ = metal::fma(_e551.y, x_2_0_.y, _e558);
                        float _e562 = d_3_0_;
                        d_3_0_ = metal::fma(_e551.z, x_2_0_.z, _e562);
                        float _e566 = d_3_0_;
                        d_3_0_ = metal::fma(_e551.w, x_2_0_.w, _e566);
                        metal::float4 x_3_0_ = xs.inner[3u + y_x];
                        metal::float4 _e573 = decode_3_(y_q0_);
                        float _e576 = d_0_0_;
                        d_0_0_ = metal::fma(_e573.x, x_3_0_.x, _e576);
                        float _e580 = d_0_0_;
                        d_0_0_ = metal::fma(_e573.y, x_3_0_.y, _e580);
                        float _e584 = d_0_0_;
                        d_0_0_ = metal::fma(_e573.z, x_3_0_.z, _e584);
                        float _e588 = d_0_0_;
                        d_0_0_ = metal::fma(_e573.w, x_3_0_.w, _e588);
                        metal::float4 _e590 = decode_3_(y_q1_);
                        float _e593 = d_1_0_;
                        d_1_0_ = metal::fma(_e590.x, x_3_0_.x, _e593);
                        float _e597 = d_1_0_;
                        d_1_0_ = metal::fma(_e590.y, x_3_0_.y, _e597);
                        float _e601 = d_1_0_;
                        d_1_0_ = metal::fma(_e590.z, x_3_0_.z, _e601);
                        float _e605 = d_1_0_;
                        d_1_0_ = metal::fma(_e590.w, x_3_0_.w, _e605);
                        metal::float4 _e607 = decode_3_(y_q2_);
                        float _e610 = d_2_0_;
                        d_2_0_ = metal::fma(_e607.x, x_3_0_.x, _e610);
                        float _e614 = d_2_0_;
                        d_2_0_ = metal::fma(_e607.y, x_3_0_.y, _e614);
                        float _e618 = d_2_0_;
                        d_2_0_ = metal::fma(_e607.z, x_3_0_.z, _e618);
                        float _e622 = d_2_0_;
                        d_2_0_ = metal::fma(_e607.w, x_3_0_.w, _e622);
                        metal::float4 _e624 = decode_3_(y_q3_);
                        float _e627 = d_3_0_;
                        d_3_0_ = metal::fma(_e624.x, x_3_0_.x, _e627);
                        float _e631 = d_3_0_;
                        d_3_0_ = metal::fma(_e624.y, x_3_0_.y, _e631);
                        float _e635 = d_3_0_;
                        d_3_0_ = metal::fma(_e624.z, x_3_0_.z, _e635);
                        float _e639 = d_3_0_;
                        d_3_0_ = metal::fma(_e624.w, x_3_0_.w, _e639);
                        metal::float4 x_4_0_ = xs.inner[4u + y_x];
                        metal::float4 _e646 = decode_4_(y_q0_);
                        float _e649 = d_0_0_;
                        d_0_0_ = metal::fma(_e646.x, x_4_0_.x, _e649);
                        float _e653 = d_0_0_;
                        d_0_0_ = metal::fma(_e646.y, x_4_0_.y, _e653);
                        float _e657 = d_0_0_;
                        d_0_0_ = metal::fma(_e646.z, x_4_0_.z, _e657);
                        float _e661 = d_0_0_;
                        d_0_0_ = metal::fma(_e646.w, x_4_0_.w, _e661);
                        metal::float4 _e663 = decode_4_(y_q1_);
                        float _e666 = d_1_0_;
                        d_1_0_ = metal::fma(_e663.x, x_4_0_.x, _e666);
                        float _e670 = d_1_0_;
                        d_1_0_ = metal::fma(_e663.y, x_4_0_.y, _e670);
                        float _e674 = d_1_0_;
                        d_1_0_ = metal::fma(_e663.z, x_4_0_.z, _e674);
                        float _e678 = d_1_0_;
                        d_1_0_ = metal::fma(_e663.w, x_4_0_.w, _e678);
                        metal::float4 _e680 = decode_4_(y_q2_);
                        float _e683 = d_2_0_;
                        d_2_0_ = metal::fma(_e680.x, x_4_0_.x, _e683);
                        float _e687 = d_2_0_;
                        d_2_0_ = metal::fma(_e680.y, x_4_0_.y, _e687);
                        float _e691 = d_2_0_;
                        d_2_0_ = metal::fma(_e680.z, x_4_0_.z, _e691);
                        float _e695 = d_2_0_;
                        d_2_0_ = metal::fma(_e680.w, x_4_0_.w, _e695);
                        metal::float4 _e697 = decode_4_(y_q3_);
                        float _e700 = d_3_0_;
                        d_3_0_ = metal::fma(_e697.x, x_4_0_.x, _e700);
                        float _e704 = d_3_0_;
                        d_3_0_ = metal::fma(_e697.y, x_4_0_.y, _e704);
                        float _e708 = d_3_0_;
                        d_3_0_ = metal::fma(_e697.z, x_4_0_.z, _e708);
                        float _e712 = d_3_0_;
                        d_3_0_ = metal::fma(_e697.w, x_4_0_.w, _e712);
                        metal::float4 x_5_0_ = xs.inner[5u + y_x];
                        metal::float4 _e719 = decode_5_(y_q0_);
                        float _e722 = d_0_0_;
                        d_0_0_ = metal::fma(_e719.x, x_5_0_.x, _e722);
                        float _e726 = d_0_0_;
                        d_0_0_ = metal::fma(_e719.y, x_5_0_.y, _e726);
                        float _e730 = d_0_0_;
                        d_0_0_ = metal::fma(_e719.z, x_5_0_.z, _e730);
                        float _e734 = d_0_0_;
                        d_0_0_ = metal::fma(_e719.w, x_5_0_.w, _e734);
                        metal::float4 _e736 = decode_5_(y_q1_);
                        float _e739 = d_1_0_;
                        d_1_0_ = metal::fma(_e736.x, x_5_0_.x, _e739);
                        float _e743 = d_1_0_;
                        d_1_0_ = metal::fma(_e736.y, x_5_0_.y, _e743);
                        float _e747 = d_1_0_;
                        d_1_0_ = metal::fma(_e736.z, x_5_0_.z, _e747);
                        float _e751 = d_1_0_;
                        d_1_0_ = metal::fma(_e736.w, x_5_0_.w, _e751);
                        metal::float4 _e753 = decode_5_(y_q2_);
                        float _e756 = d_2_0_;
                        d_2_0_ = metal::fma(_e753.x, x_5_0_.x, _e756);
                        float _e760 = d_2_0_;
                        d_2_0_ = metal::fma(_e753.y, x_5_0_.y, _e760);
                        float _e764 = d_2_0_;
                        d_2_0_ = metal::fma(_e753.z, x_5_0_.z, _e764);
                        float _e768 = d_2_0_;
                        d_2_0_ = metal::fma(_e753.w, x_5_0_.w, _e768);
                        metal::float4 _e770 = decode_5_(y_q3_);
                        float _e773 = d_3_0_;
                        d_3_0_ = metal::fma(_e770.x, x_5_0_.x, _e773);
                        float _e777 = d_3_0_;
                        d_3_0_ = metal::fma(_e770.y, x_5_0_.y, _e777);
                        float _e781 = d_3_0_;
                        d_3_0_ = metal::fma(_e770.z, x_5_0_.z, _e781);
                        float _e785 = d_3_0_;
                        d_3_0_ = metal::fma(_e770.w, x_5_0_.w, _e785);
                        metal::float4 x_6_0_ = xs.inner[6u + y_x];
                        metal::float4 _e792 = decode_6_(y_q0_);
                        float _e795 = d_0_0_;
                        d_0_0_ = metal::fma(_e792.x, x_6_0_.x, _e795);
                        float _e799 = d_0_0_;
                        d_0_0_ = metal::fma(_e792.y, x_6_0_.y, _e799);
                        float _e803 = d_0_0_;
                        d_0_0_ = metal::fma(_e792.z, x_6_0_.z, _e803);
                        float _e807 = d_0_0_;
                        d_0_0_ = metal::fma(_e792.w, x_6_0_.w, _e807);
                        metal::float4 _e809 = decode_6_(y_q1_);
                        float _e812 = d_1_0_;
                        d_1_0_ = metal::fma(_e809.x, x_6_0_.x, _e812);
                        float _e816 = d_1_0_;
                        d_1_0_ = metal::fma(_e809.y, x_6_0_.y, _e816);
                        float _e820 = d_1_0_;
                        d_1_0_ = metal::fma(_e809.z, x_6_0_.z, _e820);
                        float _e824 = d_1_0_;
                        d_1_0_ = metal::fma(_e809.w, x_6_0_.w, _e824);
                        metal::float4 _e826 = decode_6_(y_q2_);
                        float _e829 = d_2_0_;
                        d_2_0_ = metal::fma(_e826.x, x_6_0_.x, _e829);
                        float _e833 = d_2_0_;
                        d_2_0_ = metal::fma(_e826.y, x_6_0_.y, _e833);
                        float _e837 = d_2_0_;
                        d_2_0_ = metal::fma(_e826.z, x_6_0_.z, _e837);
                        float _e841 = d_2_0_;
                        d_2_0_ = metal::fma(_e826.w, x_6_0_.w, _e841);
                        metal::float4 _e843 = decode_6_(y_q3_);
                        float _e846 = d_3_0_;
                        d_3_0_ = metal::fma(_e843.x, x_6_0_.x, _e846);
                        float _e850 = d_3_0_;
                        d_3_0_ = metal::fma(_e843.y, x_6_0_.y, _e850);
                        float _e854 = d_3_0_;
                        d_3_0_ = metal::fma(_e843.z, x_6_0_.z, _e854);
                        float _e858 = d_3_0_;
                        d_3_0_ = metal::fma(_e843.w, x_6_0_.w, _e858);
                        metal::float4 x_7_0_ = xs.inner[7u + y_x];
                        metal::float4 _e865 = decode_7_(y_q0_);
                        float _e868 = d_0_0_;
                        d_0_0_ = metal::fma(_e865.x, x_7_0_.x, _e868);
                        float _e872 = d_0_0_;
                        d_0_0_ = metal::fma(_e865.y, x_7_0_.y, _e872);
                        float _e876 = d_0_0_;
                        d_0_0_ = metal::fma(_e865.z, x_7_0_.z, _e876);
                        float _e880 = d_0_0_;
                        d_0_0_ = metal::fma(_e865.w, x_7_0_.w, _e880);
                        metal::float4 _e882 = decode_7_(y_q1_);
                        float _e885 = d_1_0_;
                        d_1_0_ = metal::fma(_e882.x, x_7_0_.x, _e885);
                        float _e889 = d_1_0_;
                        d_1_0_ = metal::fma(_e882.y, x_7_0_.y, _e889);
                        float _e893 = d_1_0_;
                        d_1_0_ = metal::fma(_e882.z, x_7_0_.z, _e893);
                        float _e897 = d_1_0_;
                        d_1_0_ = metal::fma(_e882.w, x_7_0_.w, _e897);
                        metal::float4 _e899 = decode_7_(y_q2_);
                        float _e902 = d_2_0_;
                        d_2_0_ = metal::fma(_e899.x, x_7_0_.x, _e902);
                        float _e906 = d_2_0_;
                        d_2_0_ = metal::fma(_e899.y, x_7_0_.y, _e906);
                        float _e910 = d_2_0_;
                        d_2_0_ = metal::fma(_e899.z, x_7_0_.z, _e910);
                        float _e914 = d_2_0_;
                        d_2_0_ = metal::fma(_e899.w, x_7_0_.w, _e914);
                        metal::float4 _e916 = decode_7_(y_q3_);
                        float _e919 = d_3_0_;
                        d_3_0_ = metal::fma(_e916.x, x_7_0_.x, _e919);
                        float _e923 = d_3_0_;
                        d_3_0_ = metal::fma(_e916.y, x_7_0_.y, _e923);
                        float _e927 = d_3_0_;
                        d_3_0_ = metal::fma(_e916.z, x_7_0_.z, _e927);
                        float _e931 = d_3_0_;
                        d_3_0_ = metal::fma(_e916.w, x_7_0_.w, _e931);
                        float _e933 = d_0_0_;
                        float _e936 = y_0_0_;
                        y_0_0_ = metal::fma(c0_, _e933 * 16384.0, _e936);
                        float _e938 = d_1_0_;
                        float _e941 = y_1_0_;
                        y_1_0_ = metal::fma(c1_, _e938 * 16384.0, _e941);
                        float _e943 = d_2_0_;
                        float _e946 = y_2_0_;
                        y_2_0_ = metal::fma(c2_, _e943 * 16384.0, _e946);
                        float _e948 = d_3_0_;
                        float _e951 = y_3_0_;
                        y_3_0_ = metal::fma(c3_, _e948 * 16384.0, _e951);
                    }
                }
            }
        }
    }
    float _e959 = y_0_0_;
    float _e960 = lane_sum(_e959, li);
    if (lane == 0u) {
        uint _e969 = a.rows;
        local = (row0_ + 0u) < _e969;
    } else {
        local = false;
    }
    bool _e972 = local;
    if (_e972) {
        uint _e979 = a.n_tokens;
        local_1 = (token0_ + 0u) < _e979;
    } else {
        local_1 = false;
    }
    bool _e982 = local_1;
    if (_e982) {
        uint _e988 = a.y_pitch;
        uint _e992 = a.y_offset;
        uint _e996 = a.y_stride;
        y[(((((token0_ + 0u) * _e988) + _e992) + (part * _e996)) + row0_) + 0u] = _e960;
    }
    float _e1003 = y_1_0_;
    float _e1004 = lane_sum(_e1003, li);
    if (lane == 0u) {
        uint _e1013 = a.rows;
        local_2 = (row0_ + 1u) < _e1013;
    } else {
        local_2 = false;
    }
    bool _e1016 = local_2;
    if (_e1016) {
        uint _e1023 = a.n_tokens;
        local_3 = (token0_ + 0u) < _e1023;
    } else {
        local_3 = false;
    }
    bool _e1026 = local_3;
    if (_e1026) {
        uint _e1032 = a.y_pitch;
        uint _e1036 = a.y_offset;
        uint _e1040 = a.y_stride;
        y[(((((token0_ + 0u) * _e1032) + _e1036) + (part * _e1040)) + row0_) + 1u] = _e1004;
    }
    float _e1047 = y_2_0_;
    float _e1048 = lane_sum(_e1047, li);
    if (lane == 0u) {
        uint _e1057 = a.rows;
        local_4 = (row0_ + 2u) < _e1057;
    } else {
        local_4 = false;
    }
    bool _e1060 = local_4;
    if (_e1060) {
        uint _e1067 = a.n_tokens;
        local_5 = (token0_ + 0u) < _e1067;
    } else {
        local_5 = false;
    }
    bool _e1070 = local_5;
    if (_e1070) {
        uint _e1076 = a.y_pitch;
        uint _e1080 = a.y_offset;
        uint _e1084 = a.y_stride;
        y[(((((token0_ + 0u) * _e1076) + _e1080) + (part * _e1084)) + row0_) + 2u] = _e1048;
    }
    float _e1091 = y_3_0_;
    float _e1092 = lane_sum(_e1091, li);
    if (lane == 0u) {
        uint _e1101 = a.rows;
        local_6 = (row0_ + 3u) < _e1101;
    } else {
        local_6 = false;
    }
    bool _e1104 = local_6;
    if (_e1104) {
        uint _e1111 = a.n_tokens;
        local_7 = (token0_ + 0u) < _e1111;
    } else {
        local_7 = false;
    }
    bool _e1114 = local_7;
    if (_e1114) {
        uint _e1120 = a.y_pitch;
        uint _e1124 = a.y_offset;
        uint _e1128 = a.y_stride;
        y[(((((token0_ + 0u) * _e1120) + _e1124) + (part * _e1128)) + row0_) + 3u] = _e1092;
        return;
    } else {
        return;
    }
}
