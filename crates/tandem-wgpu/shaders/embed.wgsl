// y[r] = row tokens[r] of the table, of which this binding holds rows first_part .. first_part + rows. A thread decodes a unit.
#include common
#include format
@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> s: array<u32>;
@group(0) @binding(2) var<storage, read> batch: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(${WG})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) li: u32) {
    let unit = (wid.x + a.base) * WG + li;
    let token = i32(batch[${BATCH_TOKENS}u + wid.y]) - i32(a.first_part);
    if (unit >= a.units || token < 0 || token >= i32(a.rows)) { return; }
    let q = w[u32(token) * a.weight_pitch + unit];
    let sb = u32(token) * a.scale_pitch;
    let out = wid.y * a.y_pitch + unit * UNIT;
#for part PARTS
    {
#if SCALED
#if SMALL_GROUPS
        let g = unit * ${PARTS}u + ${part}u;
#else
        let g = unit / ${UNITS_PER_GROUP}u;
#end
#include scale_word s=s base=sb g=g name=c_word
#include scale word=c_word g=g name=c
#end
#for i PART_VECTORS
#if SHIFTED
        let f_${i} = fma(decode_${part*PART_VECTORS+i}(q), vec4(c), vec4(c_shift));
#else
#if SCALED
        let f_${i} = decode_${part*PART_VECTORS+i}(q) * POST * c;
#else
        let f_${i} = decode_${part*PART_VECTORS+i}(q);
#end
#end
        for (var j = 0u; j < 4u; j++) {
            let k = ${part*PART_VECTORS*4+i*4}u + j;
            if (unit * UNIT + k < a.cols) { y[out + k] = f_${i}[j] * a.post; }
        }
#end
    }
#end
}
