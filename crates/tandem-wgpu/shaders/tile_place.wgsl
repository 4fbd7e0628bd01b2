// The tile of a workgroup: its first row, the matrix of a stack, and its rows of x; PLANNED leaves slots to be waited for.
#if PAIR
    let first_row = (wid.x + a.base) * 64u;
#else
    let first_row = (wid.x + a.base) * 128u;
#end
#if PLANNED
    // plan: number of tiles; then expert, first slot and number of slots of each; then the slots, from a.plan_order on.
    if (wid.y >= plan[0]) { return; }
    let id = i32(plan[1u + wid.y * 3u]) - i32(a.first_part);
    if ((id < 0) | (id >= i32(a.n_parts))) { return; }
    let part = u32(id);
    let first_token = 0u;
    let n_tokens = plan[3u + wid.y * 3u];
    let order = a.plan_order + plan[2u + wid.y * 3u];
    if (li < TOKENS) { slots[li] = plan[order + min(li, n_tokens - 1u)]; }
#else
    let part = wid.z;
    let first_token = wid.y * TOKENS;
    let n_tokens = a.n_tokens;
#end
