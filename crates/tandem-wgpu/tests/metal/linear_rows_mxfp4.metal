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
    float post;
    float pre;
    uint x_width;
};
struct type_2 {
    float inner[256];
};
typedef metal::uint4 type_5[1];
typedef uint type_6[1];
typedef metal::float4 type_7[1];
typedef float type_8[1];
struct type_9 {
    metal::float4 inner[576];
};
struct type_10 {
    float inner[96];
};
constant uint WG = 256u;
constant uint LANES = 32u;
constant uint GROUPS = 8u;
constant uint UNIT = 32u;
constant uint VECTORS = 8u;
constant uint GROUP_SIZE = 32u;
constant uint SEGMENT = 32u;

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
    float sum_1 = 0.0;
    uint i_1 = 0u;
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
            uint _e25 = i_1;
            i_1 = _e25 + 1u;
        }
        loop_init = false;
        uint _e15 = i_1;
        if (_e15 < GROUPS) {
        } else {
            break;
        }
        {
            float _e18 = sum_1;
            uint _e20 = i_1;
            float _e22 = across.inner[_e20];
            sum_1 = _e18 + _e22;
        }
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    float _e27 = sum_1;
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
, threadgroup type_10& sums
, constant _mslBufferSizes& _buffer_sizes [[user(fake0)]]
) {
    if (li == 0u) {
        xs = {};
        sums = {};
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    uint first = 0u;
    float y_0_0_ = {};
    float y_1_0_ = {};
    float y_2_0_ = {};
    float y_3_0_ = {};
    float d_0_0_ = {};
    float d_1_0_ = {};
    float d_2_0_ = {};
    float d_3_0_ = {};
    bool local = {};
    bool local_1 = {};
    bool local_2 = {};
    bool local_3 = {};
    float sum = 0.0;
    uint i = 0u;
    bool local_4 = {};
    uint _e5 = a.base;
    uint first_row = (wid.x + _e5) * 16u;
    uint row0_ = first_row + (naga_div(li, 64u) * 4u);
    uint token0_ = wid.y * 1u;
    uint part = wid.z;
    uint _e22 = a.n_tokens;
    uint _e28 = a.x_pitch;
    uint _e32 = a.x_offset;
    uint _e36 = a.x_stride;
    uint x_row_0_ = ((metal::min(token0_ + 0u, _e22 - 1u) * _e28) + _e32) + (part * _e36);
    uint _e41 = a.weight_part;
    uint _e47 = a.rows;
    uint _e53 = a.weight_pitch;
    uint y_w0_ = (part * _e41) + (metal::min(row0_ + 0u, _e47 - 1u) * _e53);
    uint _e58 = a.scale_part;
    uint _e64 = a.rows;
    uint _e70 = a.scale_pitch;
    uint y_s0_ = (part * _e58) + (metal::min(row0_ + 0u, _e64 - 1u) * _e70);
    uint _e75 = a.weight_part;
    uint _e81 = a.rows;
    uint _e87 = a.weight_pitch;
    uint y_w1_ = (part * _e75) + (metal::min(row0_ + 1u, _e81 - 1u) * _e87);
    uint _e92 = a.scale_part;
    uint _e98 = a.rows;
    uint _e104 = a.scale_pitch;
    uint y_s1_ = (part * _e92) + (metal::min(row0_ + 1u, _e98 - 1u) * _e104);
    uint _e109 = a.weight_part;
    uint _e115 = a.rows;
    uint _e121 = a.weight_pitch;
    uint y_w2_ = (part * _e109) + (metal::min(row0_ + 2u, _e115 - 1u) * _e121);
    uint _e126 = a.scale_part;
    uint _e132 = a.rows;
    uint _e138 = a.scale_pitch;
    uint y_s2_ = (part * _e126) + (metal::min(row0_ + 2u, _e132 - 1u) * _e138);
    uint _e143 = a.weight_part;
    uint _e149 = a.rows;
    uint _e155 = a.weight_pitch;
    uint y_w3_ = (part * _e143) + (metal::min(row0_ + 3u, _e149 - 1u) * _e155);
    uint _e160 = a.scale_part;
    uint _e166 = a.rows;
    uint _e172 = a.scale_pitch;
    uint y_s3_ = (part * _e160) + (metal::min(row0_ + 3u, _e166 - 1u) * _e172);
    uint lane = naga_mod(li, LANES);
    uint split = naga_mod(naga_div(li, LANES), 2u);
    uint team = naga_div(li, 64u);
    uint2 loop_bound_1 = uint2(4294967295u);
    bool loop_init_1 = true;
    while(true) {
        if (metal::all(loop_bound_1 == uint2(0u))) { break; }
        loop_bound_1 -= uint2(loop_bound_1.y == 0u, 1u);
        if (!loop_init_1) {
            uint _e1075 = first;
            first = _e1075 + 64u;
        }
        loop_init_1 = false;
        uint _e185 = first;
        uint _e188 = a.units;
        if (_e185 < _e188) {
        } else {
            break;
        }
        {
            uint _e193 = a.units;
            uint _e194 = first;
            uint n = metal::min(64u, _e193 - _e194);
            uint at_0_ = ((split * SEGMENT) + 0u) + lane;
            uint _e202 = first;
            uint _e206 = a.units;
            uint unit_0_ = metal::min(_e202 + at_0_, _e206 - 1u);
            metal::uint4 y_0_q0_ = w_2[y_w0_ + unit_0_];
            metal::uint4 y_0_q1_ = w_2[y_w1_ + unit_0_];
            metal::uint4 y_0_q2_ = w_2[y_w2_ + unit_0_];
            metal::uint4 y_0_q3_ = w_2[y_w3_ + unit_0_];
            uint y_0_group = naga_div(unit_0_, 1u);
            uint y_0_k0_ = s[y_s0_ + (y_0_group >> 2u)];
            uint y_0_k1_ = s[y_s1_ + (y_0_group >> 2u)];
            uint y_0_k2_ = s[y_s2_ + (y_0_group >> 2u)];
            uint y_0_k3_ = s[y_s3_ + (y_0_group >> 2u)];
            metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
            {
                uint _e255 = first;
                uint _e263 = a.units;
                metal::float4 x_0_0_ = x[(x_row_0_ >> 2u) + metal::min(((_e255 * VECTORS) + li) + 0u, (_e263 * VECTORS) - 1u)];
                uint _e275 = first;
                uint _e283 = a.units;
                metal::float4 x_1_0_ = x[(x_row_0_ >> 2u) + metal::min(((_e275 * VECTORS) + li) + 256u, (_e283 * VECTORS) - 1u)];
                {
                    uint v_3 = li + 0u;
                    if (v_3 < 512u) {
                        xs.inner[(0u + v_3) + (v_3 >> 3u)] = (v_3 < (n * VECTORS)) ? x_0_0_ : metal::float4(0.0);
                    }
                }
                {
                    uint v_4 = li + 256u;
                    if (v_4 < 512u) {
                        xs.inner[(0u + v_4) + (v_4 >> 3u)] = (v_4 < (n * VECTORS)) ? x_1_0_ : metal::float4(0.0);
                    }
                }
            }
            metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
            {
                y_0_0_ = 0.0;
                y_1_0_ = 0.0;
                y_2_0_ = 0.0;
                y_3_0_ = 0.0;
                {
                    uint y_0_x = (at_0_ * VECTORS) + ((at_0_ * VECTORS) >> 3u);
                    {
                        uint g = naga_div(unit_0_, 1u);
                        float c0_ = as_type<float>(((y_0_k0_ >> ((g & 3u) * 8u)) & 255u) << 23u);
                        float c1_ = as_type<float>(((y_0_k1_ >> ((g & 3u) * 8u)) & 255u) << 23u);
                        float c2_ = as_type<float>(((y_0_k2_ >> ((g & 3u) * 8u)) & 255u) << 23u);
                        float c3_ = as_type<float>(((y_0_k3_ >> ((g & 3u) * 8u)) & 255u) << 23u);
                        d_0_0_ = 0.0;
                        d_1_0_ = 0.0;
                        d_2_0_ = 0.0;
                        d_3_0_ = 0.0;
                        metal::float4 x_0_0_1 = xs.inner[0u + y_0_x];
                        metal::float4 _e396 = decode_0_(y_0_q0_);
                        float _e399 = d_0_0_;
                        d_0_0_ = metal::fma(_e396.x, x_0_0_1.x, _e399);
                        float _e403 = d_0_0_;
                        d_0_0_ = metal::fma(_e396.y, x_0_0_1.y, _e403);
                        float _e407 = d_0_0_;
                        d_0_0_ = metal::fma(_e396.z, x_0_0_1.z, _e407);
                        float _e411 = d_0_0_;
                        d_0_0_ = metal::fma(_e396.w, x_0_0_1.w, _e411);
                        metal::float4 _e413 = decode_0_(y_0_q1_);
                        float _e416 = d_1_0_;
                        d_1_0_ = metal::fma(_e413.x, x_0_0_1.x, _e416);
                        float _e420 = d_1_0_;
                        d_1_0_ = metal::fma(_e413.y, x_0_0_1.y, _e420);
                        float _e424 = d_1_0_;
                        d_1_0_ = metal::fma(_e413.z, x_0_0_1.z, _e424);
                        float _e428 = d_1_0_;
                        d_1_0_ = metal::fma(_e413.w, x_0_0_1.w, _e428);
                        metal::float4 _e430 = decode_0_(y_0_q2_);
                        float _e433 = d_2_0_;
                        d_2_0_ = metal::fma(_e430.x, x_0_0_1.x, _e433);
                        float _e437 = d_2_0_;
                        d_2_0_ = metal::fma(_e430.y, x_0_0_1.y, _e437);
                        float _e441 = d_2_0_;
                        d_2_0_ = metal::fma(_e430.z, x_0_0_1.z, _e441);
                        float _e445 = d_2_0_;
                        d_2_0_ = metal::fma(_e430.w, x_0_0_1.w, _e445);
                        metal::float4 _e447 = decode_0_(y_0_q3_);
                        float _e450 = d_3_0_;
                        d_3_0_ = metal::fma(_e447.x, x_0_0_1.x, _e450);
                        float _e454 = d_3_0_;
                        d_3_0_ = metal::fma(_e447.y, x_0_0_1.y, _e454);
                        float _e458 = d_3_0_;
                        d_3_0_ = metal::fma(_e447.z, x_0_0_1.z, _e458);
                        float _e462 = d_3_0_;
                        d_3_0_ = metal::fma(_e447.w, x_0_0_1.w, _e462);
                        metal::float4 x_1_0_1 = xs.inner[1u + y_0_x];
                        metal::float4 _e469 = decode_1_(y_0_q0_);
                        float _e472 = d_0_0_;
                        d_0_0_ = metal::fma(_e469.x, x_1_0_1.x, _e472);
                        float _e476 = d_0_0_;
                        d_0_0_ = metal::fma(_e469.y, x_1_0_1.y, _e476);
                        float _e480 = d_0_0_;
                        d_0_0_ = metal::fma(_e469.z, x_1_0_1.z, _e480);
                        float _e484 = d_0_0_;
                        d_0_0_ = metal::fma(_e469.w, x_1_0_1.w, _e484);
                        metal::float4 _e486 = decode_1_(y_0_q1_);
                        float _e489 = d_1_0_;
                        d_1_0_ = metal::fma(_e486.x, x_1_0_1.x, _e489);
                        float _e493 = d_1_0_;
                        d_1_0_ = metal::fma(_e486.y, x_1_0_1.y, _e493);
                        float _e497 = d_1_0_;
                        d_1_0_ = metal::fma(_e486.z, x_1_0_1.z, _e497);
                        float _e501 = d_1_0_;
                        d_1_0_ = metal::fma(_e486.w, x_1_0_1.w, _e501);
                        metal::float4 _e503 = decode_1_(y_0_q2_);
                        float _e506 = d_2_0_;
                        d_2_0_ = metal::fma(_e503.x, x_1_0_1.x, _e506);
                        float _e510 = d_2_0_;
                        d_2_0_ = metal::fma(_e503.y, x_1_0_1.y, _e510);
                        float _e514 = d_2_0_;
                        d_2_0_ = metal::fma(_e503.z, x_1_0_1.z, _e514);
                        float _e518 = d_2_0_;
                        d_2_0_ = metal::fma(_e503.w, x_1_0_1.w, _e518);
                        metal::float4 _e520 = decode_1_(y_0_q3_);
                        float _e523 = d_3_0_;
                        d_3_0_ = metal::fma(_e520.x, x_1_0_1.x, _e523);
                        float _e527 = d_3_0_;
                        d_3_0_ = metal::fma(_e520.y, x_1_0_1.y, _e527);
                        float _e531 = d_3_0_;
                        d_3_0_ = metal::fma(_e520.z, x_1_0_1.z, _e531);
                        float _e535 = d_3_0_;
                        d_3_0_ = metal::fma(_e520.w, x_1_0_1.w, _e535);
                        metal::float4 x_2_0_ = xs.inner[2u + y_0_x];
                        metal::float4 _e542 = decode_2_(y_0_q0_);
                        float _e545 = d_0_0_;
                        d_0_0_ = metal::fma(_e542.x, x_2_0_.x, _e545);
                        float _e549 = d_0_0_;
                        d_0_0_ = metal::fma(_e542.y, x_2_0_.y, _e549);
                        float _e553 = d_0_0_;
                        d_0_0_ = metal::fma(_e542.z, x_2_0_.z, _e553);
                        float _e557 = d_0_0_;
                        d_0_0_ = metal::fma(_e542.w, x_2_0_.w, _e557);
                        metal::float4 _e559 = decode_2_(y_0_q1_);
                        float _e562 = d_1_0_;
                        d_1_0_ = metal::fma(_e559.x, x_2_0_.x, _e562);
                        float _e566 = d_1_0_;
                        d_1_0_ = metal::fma(_e559.y, x_2_0_.y, _e566);
                        float _e570 = d_1_0_;
                        d_1_0_ = metal::fma(_e559.z, x_2_0_.z, _e570);
                        float _e574 = d_1_0_;
                        d_1_0_ = metal::fma(_e559.w, x_2_0_.w, _e574);
                        metal::float4 _e576 = decode_2_(y_0_q2_);
                        float _e579 = d_2_0_;
                        d_2_0_ = metal::fma(_e576.x, x_2_0_.x, _e579);
                        float _e583 = d_2_0_;
                        d_2_0_ = metal::fma(_e576.y, x_2_0_.y, _e583);
                        float _e587 = d_2_0_;
                        d_2_0_ = metal::fma(_e576.z, x_2_0_.z, _e587);
                        float _e591 = d_2_0_;
                        d_2_0_ = metal::fma(_e576.w, x_2_0_.w, _e591);
                        metal::float4 _e593 = decode_2_(y_0_q3_);
                        float _e596 = d_3_0_;
                        d_3_0_ = metal::fma(_e593.x, x_2_0_.x, _e596);
                        float _e600 = d_3_0_;
                        d_3_0_ = metal::fma(_e593.y, x_2_0_.y, _e600);
                        float _e604 = d_3_0_;
                        d_3_0_ = metal::fma(_e593.z, x_2_0_.z, _e604);
                        float _e608 = d_3_0_;
                        d_3_0_ = metal::fma(_e593.w, x_2_0_.w, _e608);
                        metal::float4 x_3_0_ = xs.inner[3u + y_0_x];
                        metal::float4 _e615 = decode_3_(y_0_q0_);
                        float _e618 = d_0_0_;
                        d_0_0_ = metal::fma(_e615.x, x_3_0_.x, _e618);
                        float _e622 = d_0_0_;
                        d_0_0_ = metal::fma(_e615.y, x_3_0_.y, _e622);
                        float _e626 = d_0_0_;
                        d_0_0_ = metal::fma(_e615.z, x_3_0_.z, _e626);
                        float _e630 = d_0_0_;
                        d_0_0_ = metal::fma(_e615.w, x_3_0_.w, _e630);
                        metal::float4 _e632 = decode_3_(y_0_q1_);
                        float _e635 = d_1_0_;
                        d_1_0_ = metal::fma(_e632.x, x_3_0_.x, _e635);
                        float _e639 = d_1_0_;
                        d_1_0_ = metal::fma(_e632.y, x_3_0_.y, _e639);
                        float _e643 = d_1_0_;
                        d_1_0_ = metal::fma(_e632.z, x_3_0_.z, _e643);
                        float _e647 = d_1_0_;
                        d_1_0_ = metal::fma(_e632.w, x_3_0_.w, _e647);
                        metal::float4 _e649 = decode_3_(y_0_q2_);
                        float _e652 = d_2_0_;
                        d_2_0_ = metal::fma(_e649.x, x_3_0_.x, _e652);
                        float _e656 = d_2_0_;
                        d_2_0_ = metal::fma(_e649.y, x_3_0_.y, _e656);
                        float _e660 = d_2_0_;
                        d_2_0_ = metal::fma(_e649.z, x_3_0_.z, _e660);
                        float _e664 = d_2_0_;
                        d_2_0_ = metal::fma(_e649.w, x_3_0_.w, _e664);
                        metal::float4 _e666 = decode_3_(y_0_q3_);
                        float _e669 = d_3_0_;
                        d_3_0_ = metal::fma(_e666.x, x_3_0_.x, _e669);
                        float _e673 = d_3_0_;
                        d_3_0_ = metal::fma(_e666.y, x_3_0_.y, _e673);
                        float _e677 = d_3_0_;
                        d_3_0_ = metal::fma(_e666.z, x_3_0_.z, _e677);
                        float _e681 = d_3_0_;
                        d_3_0_ = metal::fma(_e666.w, x_3_0_.w, _e681);
                        metal::float4 x_4_0_ = xs.inner[4u + y_0_x];
                        metal::float4 _e688 = decode_4_(y_0_q0_);
                        float _e691 = d_0_0_;
                        d_0_0_ = metal::fma(_e688.x, x_4_0_.x, _e691);
                        float _e695 = d_0_0_;
                        d_0_0_ = metal::fma(_e688.y, x_4_0_.y, _e695);
                        float _e699 = d_0_0_;
                        d_0_0_ = metal::fma(_e688.z, x_4_0_.z, _e699);
                        float _e703 = d_0_0_;
                        d_0_0_ = metal::fma(_e688.w, x_4_0_.w, _e703);
                        metal::float4 _e705 = decode_4_(y_0_q1_);
                        float _e708 = d_1_0_;
                        d_1_0_ = metal::fma(_e705.x, x_4_0_.x, _e708);
                        float _e712 = d_1_0_;
                        d_1_0_ = metal::fma(_e705.y, x_4_0_.y, _e712);
                        float _e716 = d_1_0_;
                        d_1_0_ = metal::fma(_e705.z, x_4_0_.z, _e716);
                        float _e720 = d_1_0_;
                        d_1_0_ = metal::fma(_e705.w, x_4_0_.w, _e720);
                        metal::float4 _e722 = decode_4_(y_0_q2_);
                        float _e725 = d_2_0_;
                        d_2_0_ = metal::fma(_e722.x, x_4_0_.x, _e725);
                        float _e729 = d_2_0_;
                        d_2_0_ = metal::fma(_e722.y, x_4_0_.y, _e729);
                        float _e733 = d_2_0_;
                        d_2_0_ = metal::fma(_e722.z, x_4_0_.z, _e733);
                        float _e737 = d_2_0_;
                        d_2_0_ = metal::fma(_e722.w, x_4_0_.w, _e737);
                        metal::float4 _e739 = decode_4_(y_0_q3_);
                        float _e742 = d_3_0_;
                        d_3_0_ = metal::fma(_e739.x, x_4_0_.x, _e742);
                        float _e746 = d_3_0_;
                        d_3_0_ = metal::fma(_e739.y, x_4_0_.y, _e746);
                        float _e750 = d_3_0_;
                        d_3_0_ = metal::fma(_e739.z, x_4_0_.z, _e750);
                        float _e754 = d_3_0_;
                        d_3_0_ = metal::fma(_e739.w, x_4_0_.w, _e754);
                        metal::float4 x_5_0_ = xs.inner[5u + y_0_x];
                        metal::float4 _e761 = decode_5_(y_0_q0_);
                        float _e764 = d_0_0_;
                        d_0_0_ = metal::fma(_e761.x, x_5_0_.x, _e764);
                        float _e768 = d_0_0_;
                        d_0_0_ = metal::fma(_e761.y, x_5_0_.y, _e768);
                        float _e772 = d_0_0_;
                        d_0_0_ = metal::fma(_e761.z, x_5_0_.z, _e772);
                        float _e776 = d_0_0_;
                        d_0_0_ = metal::fma(_e761.w, x_5_0_.w, _e776);
                        metal::float4 _e778 = decode_5_(y_0_q1_);
                        float _e781 = d_1_0_;
                        d_1_0_ = metal::fma(_e778.x, x_5_0_.x, _e781);
                        float _e785 = d_1_0_;
                        d_1_0_ = metal::fma(_e778.y, x_5_0_.y, _e785);
                        float _e789 = d_1_0_;
                        d_1_0_ = metal::fma(_e778.z, x_5_0_.z, _e789);
                        float _e793 = d_1_0_;
                        d_1_0_ = metal::fma(_e778.w, x_5_0_.w, _e793);
                        metal::float4 _e795 = decode_5_(y_0_q2_);
                        float _e798 = d_2_0_;
                        d_2_0_ = metal::fma(_e795.x, x_5_0_.x, _e798);
                        float _e802 = d_2_0_;
                        d_2_0_ = metal::fma(_e795.y, x_5_0_.y, _e802);
                        float _e806 = d_2_0_;
                        d_2_0_ = metal::fma(_e795.z, x_5_0_.z, _e806);
                        float _e810 = d_2_0_;
                        d_2_0_ = metal::fma(_e795.w, x_5_0_.w, _e810);
                        metal::float4 _e812 = decode_5_(y_0_q3_);
                        float _e815 = d_3_0_;
                        d_3_0_ = metal::fma(_e812.x, x_5_0_.x, _e815);
                        float _e819 = d_3_0_;
                        d_3_0_ = metal::fma(_e812.y, x_5_0_.y, _e819);
                        float _e823 = d_3_0_;
                        d_3_0_ = metal::fma(_e812.z, x_5_0_.z, _e823);
                        float _e827 = d_3_0_;
                        d_3_0_ = metal::fma(_e812.w, x_5_0_.w, _e827);
                        metal::float4 x_6_0_ = xs.inner[6u + y_0_x];
                        metal::float4 _e834 = decode_6_(y_0_q0_);
                        float _e837 = d_0_0_;
                        d_0_0_ = metal::fma(_e834.x, x_6_0_.x, _e837);
                        float _e841 = d_0_0_;
                        d_0_0_ = metal::fma(_e834.y, x_6_0_.y, _e841);
                        float _e845 = d_0_0_;
                        d_0_0_ = metal::fma(_e834.z, x_6_0_.z, _e845);
                        float _e849 = d_0_0_;
                        d_0_0_ = metal::fma(_e834.w, x_6_0_.w, _e849);
                        metal::float4 _e851 = decode_6_(y_0_q1_);
                        float _e854 = d_1_0_;
                        d_1_0_ = metal::fma(_e851.x, x_6_0_.x, _e854);
                        float _e858 = d_1_0_;
                        d_1_0_ = metal::fma(_e851.y, x_6_0_.y, _e858);
                        float _e862 = d_1_0_;
                        d_1_0_ = metal::fma(_e851.z, x_6_0_.z, _e862);
                        float _e866 = d_1_0_;
                        d_1_0_ = metal::fma(_e851.w, x_6_0_.w, _e866);
                        metal::float4 _e868 = decode_6_(y_0_q2_);
                        float _e871 = d_2_0_;
                        d_2_0_ = metal::fma(_e868.x, x_6_0_.x, _e871);
                        float _e875 = d_2_0_;
                        d_2_0_ = metal::fma(_e868.y, x_6_0_.y, _e875);
                        float _e879 = d_2_0_;
                        d_2_0_ = metal::fma(_e868.z, x_6_0_.z, _e879);
                        float _e883 = d_2_0_;
                        d_2_0_ = metal::fma(_e868.w, x_6_0_.w, _e883);
                        metal::float4 _e885 = decode_6_(y_0_q3_);
                        float _e888 = d_3_0_;
                        d_3_0_ = metal::fma(_e885.x, x_6_0_.x, _e888);
                        float _e892 = d_3_0_;
                        d_3_0_ = metal::fma(_e885.y, x_6_0_.y, _e892);
                        float _e896 = d_3_0_;
                        d_3_0_ = metal::fma(_e885.z, x_6_0_.z, _e896);
                        float _e900 = d_3_0_;
                        d_3_0_ = metal::fma(_e885.w, x_6_0_.w, _e900);
                        metal::float4 x_7_0_ = xs.inner[7u + y_0_x];
                        metal::float4 _e907 = decode_7_(y_0_q0_);
                        float _e910 = d_0_0_;
                        d_0_0_ = metal::fma(_e907.x, x_7_0_.x, _e910);
                        float _e914 = d_0_0_;
                        d_0_0_ = metal::fma(_e907.y, x_7_0_.y, _e914);
                        float _e918 = d_0_0_;
                        d_0_0_ = metal::fma(_e907.z, x_7_0_.z, _e918);
                        float _e922 = d_0_0_;
                        d_0_0_ = metal::fma(_e907.w, x_7_0_.w, _e922);
                        metal::float4 _e924 = decode_7_(y_0_q1_);
                        float _e927 = d_1_0_;
                        d_1_0_ = metal::fma(_e924.x, x_7_0_.x, _e927);
                        float _e931 = d_1_0_;
                        d_1_0_ = metal::fma(_e924.y, x_7_0_.y, _e931);
                        float _e935 = d_1_0_;
                        d_1_0_ = metal::fma(_e924.z, x_7_0_.z, _e935);
                        float _e939 = d_1_0_;
                        d_1_0_ = metal::fma(_e924.w, x_7_0_.w, _e939);
                        metal::float4 _e941 = decode_7_(y_0_q2_);
                        float _e944 = d_2_0_;
                        d_2_0_ = metal::fma(_e941.x, x_7_0_.x, _e944);
                        float _e948 = d_2_0_;
                        d_2_0_ = metal::fma(_e941.y, x_7_0_.y, _e948);
                        float _e952 = d_2_0_;
                        d_2_0_ = metal::fma(_e941.z, x_7_0_.z, _e952);
                        float _e956 = d_2_0_;
                        d_2_0_ = metal::fma(_e941.w, x_7_0_.w, _e956);
                        metal::float4 _e958 = decode_7_(y_0_q3_);
                        float _e961 = d_3_0_;
                        d_3_0_ = metal::fma(_e958.x, x_7_0_.x, _e961);
                        float _e965 = d_3_0_;
                        d_3_0_ = metal::fma(_e958.y, x_7_0_.y, _e965);
                        float _e969 = d_3_0_;
                        d_3_0_ = metal::fma(_e958.z, x_7_0_.z, _e969);
                        float _e973 = d_3_0_;
                        d_3_0_ = metal::fma(_e958.w, x_7_0_.w, _e973);
                        float _e975 = d_0_0_;
                        float _e978 = y_0_0_;
                        y_0_0_ = metal::fma(c0_, _e975 * 16384.0, _e978);
                        float _e980 = d_1_0_;
                        float _e983 = y_1_0_;
                        y_1_0_ = metal::fma(c1_, _e980 * 16384.0, _e983);
                        float _e985 = d_2_0_;
                        float _e988 = y_2_0_;
                        y_2_0_ = metal::fma(c2_, _e985 * 16384.0, _e988);
                        float _e990 = d_3_0_;
                        float _e993 = y_3_0_;
                        y_3_0_ = metal::fma(c3_, _e990 * 16384.0, _e993);
                    }
                }
                uint _e995 = first;
                uint segment = naga_div(_e995, SEGMENT) + split;
                float _e999 = y_0_0_;
                float _e1000 = lane_sum(_e999, li);
                if (lane == 0u) {
                    local = segment < 6u;
                } else {
                    local = false;
                }
                bool _e1008 = local;
                if (_e1008) {
                    sums.inner[(((segment * 4u) + team) * 4u) + 0u] = _e1000;
                }
                float _e1018 = y_1_0_;
                float _e1019 = lane_sum(_e1018, li);
                if (lane == 0u) {
                    local_1 = segment < 6u;
                } else {
                    local_1 = false;
                }
                bool _e1027 = local_1;
                if (_e1027) {
                    sums.inner[(((segment * 4u) + team) * 4u) + 1u] = _e1019;
                }
                float _e1037 = y_2_0_;
                float _e1038 = lane_sum(_e1037, li);
                if (lane == 0u) {
                    local_2 = segment < 6u;
                } else {
                    local_2 = false;
                }
                bool _e1046 = local_2;
                if (_e1046) {
                    sums.inner[(((segment * 4u) + team) * 4u) + 2u] = _e1038;
                }
                float _e1056 = y_3_0_;
                float _e1057 = lane_sum(_e1056, li);
                if (lane == 0u) {
                    local_3 = segment < 6u;
                } else {
                    local_3 = false;
                }
                bool _e1065 = local_3;
                if (_e1065) {
                    sums.inner[(((segment * 4u) + team) * 4u) + 3u] = _e1057;
                }
            }
        }
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    if (li < 16u) {
        uint row = first_row + naga_div(li, 1u);
        uint token = token0_ + naga_mod(li, 1u);
        uint2 loop_bound_2 = uint2(4294967295u);
        bool loop_init_2 = true;
        while(true) {
            if (metal::all(loop_bound_2 == uint2(0u))) { break; }
            loop_bound_2 -= uint2(loop_bound_2.y == 0u, 1u);
            if (!loop_init_2) {
                uint _e1103 = i;
                i = _e1103 + 1u;
            }
            loop_init_2 = false;
            uint _e1090 = i;
            if (_e1090 < 6u) {
            } else {
                break;
            }
            {
                float _e1093 = sum;
                uint _e1095 = i;
                float _e1100 = sums.inner[(_e1095 * 16u) + li];
                sum = _e1093 + _e1100;
            }
        }
        uint _e1107 = a.rows;
        if (row < _e1107) {
            uint _e1113 = a.n_tokens;
            local_4 = token < _e1113;
        } else {
            local_4 = false;
        }
        bool _e1116 = local_4;
        if (_e1116) {
            uint _e1120 = a.y_pitch;
            uint _e1124 = a.y_offset;
            uint _e1128 = a.y_stride;
            float _e1133 = sum;
            float _e1136 = a.post;
            y[(((token * _e1120) + _e1124) + (part * _e1128)) + row] = _e1133 * _e1136;
            return;
        } else {
            return;
        }
    } else {
        return;
    }
}
