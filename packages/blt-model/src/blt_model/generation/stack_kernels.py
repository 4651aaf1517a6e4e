"""One Triton kernel that takes one token of one row through a whole stack of transformer blocks.

Its programs stay on the GPU from the first block to the last and hand results on through a small buffer. So a block
costs no launches, and weights, which depend on nothing, are loaded while results are still on their way:

- Every map's rows are shared out among all programs. A program goes through its rows of all maps of all blocks in
  units of `group` rows by a part of the inputs (see `stack_plans`), of which `window` are under way at any time.
- A result is a word of 32 bits: a float32 whose lowest four bits tell the epoch, which is counted on from block to
  block and from launch to launch. A program reads words again until none is of an older epoch than it wants; there are
  no other barriers. A word is written once an epoch, and never before all who need the old one have read it: what they
  made of it was needed to make the new one.

All programs must be resident at once. Sums are taken in float32 and in a fixed order. This module needs triton.

What most functions take as `place` are this block's and the next one's pointers, the program, the numbers below
`group`, and 1 if there is a next block, else 0; as `numbers_of` the normalisations' eps, the scale of scores, and times
which the state is added after a folded cross-attention.

Legend: P the plan, D width of the stack, F inner width of its SwiGLU, H heads, E head width, S parts of a head's
attention, C places of a cache.
"""

# Tuples grow in loops that Triton unrolls.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from blt_model.generation.kernels import numbers


@triton.jit
def _fetch(words, count):
    """Have words brought to the level 2 cache, a multiple of four of them from an address that 16 divides."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [words.to(tl.int64), count * 4],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _anew(value, P: tl.constexpr):
    """The same int32, which the compiler takes for another: what is made of it is not kept from block to block.

    There would be more of such offsets and masks than registers.
    """
    if P.native:
        value = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1)
    return value


@triton.jit
def _publish(words, at, values, epoch, kept, P: tl.constexpr):
    """Hand on float32 values as words of an epoch."""
    bits = (values.to(tl.int32, bitcast=True) & -16) | (epoch & 15)
    if P.native:
        # A store of Triton's would first move the few values to other threads.
        tl.inline_asm_elementwise(
            """{
            .reg .pred kept;
            setp.ne.s32 kept, $3, 0;
            @kept st.relaxed.gpu.global.b32 [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r,r",
            [(words + at).to(tl.int64), bits, kept.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(words + at, bits, mask=kept)


@triton.jit
def _value(bits):
    """What a word of any epoch holds."""
    return (bits & -16).to(tl.float32, bitcast=True)


@triton.jit
def _read_parts(words, which: tl.constexpr, P: tl.constexpr):
    """The words of a vector's parts, as they are in memory now."""
    count: tl.constexpr = len(P.parts[which])
    found = ()
    for part in tl.static_range(count):
        at = P.parts[which][part][0] * P.span + tl.arange(0, P.parts[which][part][1] * P.span)
        found = found + (tl.load(words + at, volatile=True),)  # noqa: RUF005
    return found


@triton.jit
def _are_late(found, epoch, which: tl.constexpr, P: tl.constexpr):
    """Not nought if any word of a vector's parts is of an older epoch."""
    count: tl.constexpr = len(P.parts[which])
    span: tl.constexpr = P.span
    late = tl.zeros([span], dtype=tl.int32)
    for part in tl.static_range(count):
        each = (found[part] - epoch) & 8
        if P.parts[which][part][1] > 1:
            each = tl.max(tl.reshape(each, [P.span, P.parts[which][part][1]]), 1)
        late = late | each
    return tl.max(late, 0)


@triton.jit
def _receive(words, epoch, which: tl.constexpr, P: tl.constexpr):
    """A vector as float32, in parts, once all of it is there."""
    count: tl.constexpr = len(P.parts[which])
    found = _read_parts(words, which, P)
    while _are_late(found, epoch, which, P) != 0:
        found = _read_parts(words, which, P)
    values = ()
    for part in tl.static_range(count):
        values = values + (_value(found[part]),)  # noqa: RUF005
    return values


@triton.jit
def _scales(norm, which: tl.constexpr, P: tl.constexpr):
    """The scales of a normalisation, in parts."""
    count: tl.constexpr = len(P.parts[which])
    scales = ()
    for part in tl.static_range(count):
        at = P.parts[which][part][0] * P.span + tl.arange(0, P.parts[which][part][1] * P.span)
        scales = scales + (tl.load(norm + at),)  # noqa: RUF005
    return scales


@triton.jit
def _rate(values, eps, which: tl.constexpr, P: tl.constexpr):
    """1 / the root of the mean square of a vector [D]."""
    count: tl.constexpr = len(P.parts[which])
    squares = 0.0
    for part in tl.static_range(count):
        squares += tl.sum(values[part] * values[part], 0)
    return 1.0 / tl.sqrt(squares / P.dim + eps)


@triton.jit
def _scaled(values, scales, which: tl.constexpr, P: tl.constexpr):
    """A vector's parts times others."""
    count: tl.constexpr = len(P.parts[which])
    scaled = ()
    for part in tl.static_range(count):
        scaled = scaled + (values[part] * scales[part].to(tl.float32),)  # noqa: RUF005
    return scaled


@triton.jit
def _paired(values, chunks: tl.constexpr, P: tl.constexpr):
    """What the lower and the upper numbers of a map's words are multiplied with, [chunks, 1, words] each."""
    if P.span == P.chunk:
        lower = tl.reshape(values, [chunks, P.span])
        upper = lower
    else:
        lower, upper = tl.split(tl.reshape(values, [chunks, P.chunk, 2]))
    return lower[:, None, :], upper[:, None, :]


@triton.jit
def _begin(unit: tl.constexpr, place, P: tl.constexpr):
    """Begin to load a unit [chunks, group, chunk]; beyond the last of this block one of the next, if there is more."""
    units: tl.constexpr = len(P.units)
    matrix: tl.constexpr = P.units[unit % units].matrix
    words: tl.constexpr = P.units[unit % units].words
    first: tl.constexpr = P.units[unit % units].chunk
    chunks: tl.constexpr = P.units[unit % units].chunks
    exact: tl.constexpr = P.units[unit % units].exact and unit < units
    within: tl.constexpr = P.units[unit % units].group * P.group
    start = place[2] * P.units[unit % units].step
    if unit < units:
        base = place[0][matrix]
        end = tl.minimum(P.units[unit % units].each, P.units[unit % units].outputs - start)
    else:
        base = place[1][matrix]
        end = tl.minimum(P.units[unit % units].each, P.units[unit % units].outputs - start) * place[4]
    base += (start + P.units[unit % units].shift + within) * words + first * P.chunk
    # As a matrix, whose rows Triton deals out to the warps: then a warp has all of some rows, and a sum stays in it.
    index = tl.arange(0, chunks * P.group)
    row, chunk = index % P.group, index // P.group
    at = (row * words + chunk * P.chunk)[:, None] + tl.arange(0, P.chunk)[None, :]
    if exact:
        tile = tl.load(base + at)
    else:
        kept = within + row < end
        if (first + chunks) * P.chunk > words:
            kept = kept & (first + chunk < words // P.chunk)
        tile = tl.load(base + at, mask=kept[:, None], other=0)
    return tl.reshape(tile, [chunks, P.group, P.chunk])


@triton.jit
def _fetch_rows(unit: tl.constexpr, place, P: tl.constexpr):
    """Have a unit's rows brought to the level 2 cache, if it is the first of its rows."""
    units: tl.constexpr = len(P.units)
    if P.units[unit % units].chunk == 0:
        matrix: tl.constexpr = P.units[unit % units].matrix
        words: tl.constexpr = P.units[unit % units].words
        within: tl.constexpr = P.units[unit % units].group * P.group
        start = place[2] * P.units[unit % units].step
        rows = tl.minimum(P.units[unit % units].each, P.units[unit % units].outputs - start) - within
        rows = tl.minimum(rows, P.group)
        if unit < units:
            base = place[0][matrix]
        else:
            base = place[1][matrix]
            rows = rows * place[4]
        if rows > 0:
            _fetch(base + (start + within + P.units[unit % units].shift) * words, rows * words)


@triton.jit
def _products(start: tl.constexpr, which: tl.constexpr, groups: tl.constexpr, values, window, place, P: tl.constexpr):
    """Products [group] of a vector with groups of rows, which units from start on hold, and the window after them."""
    count: tl.constexpr = len(P.parts[which])
    totals = ()
    for part in tl.static_range(count):
        lower, upper = _paired(values[part], P.parts[which][part][1], P)
        sums = ()
        for group in tl.static_range(groups):
            tile = window[0]
            if P.ahead > 0:
                _fetch_rows(start + part * groups + group + P.window + P.ahead, place, P)
            following = _begin(start + part * groups + group + P.window, place, P)
            window = window[1:] + (following,)  # noqa: RUF005
            low, high = numbers(tile, P.kind)
            # Two sums of products, not one of their sums: then some multiplications are one operation with additions.
            total = tl.sum(low * lower, 0)
            if P.span != P.chunk:
                total += tl.sum(high * upper, 0)
            if part > 0:
                total += totals[group]
            if part == count - 1:
                total = tl.sum(total, 1)
            sums = sums + (total,)  # noqa: RUF005
        totals = sums
    return totals, window


@triton.jit
def _rows(group: tl.constexpr, place, each: tl.constexpr, outputs: tl.constexpr, P: tl.constexpr):
    """A program's rows [group] of a map in one of its groups, and which of them there are."""
    within = group * P.group + place[3]
    row = place[2] * each + within
    return row, (within < each) & (row < outputs)


@triton.jit
def _publish_own(words, own, epoch, place, P: tl.constexpr):
    """Hand on a program's rows of the state."""
    for group in tl.static_range(tl.constexpr(P.own_groups)):
        row, kept = _rows(group, place, P.own_rows, P.dim, P)
        _publish(words, row, own[group], epoch, kept, P)


@triton.jit
def _read_patch(own, window, words, epoch, output_map, place, numbers_of, P: tl.constexpr):
    """A folded cross-attention before a block: a program's rows of the state after it, and the window."""
    groups: tl.constexpr = P.pairs // P.group
    tiles = ()
    for index in tl.static_range(tl.constexpr(P.own_groups * groups)):
        row, kept = _rows(index // groups, place, P.own_rows, P.dim, P)
        at = row[:, None] * P.pairs + index % groups * P.group + tl.arange(0, P.group)[None, :]
        tiles = tiles + (tl.load(output_map + at, mask=kept[:, None], other=0.0),)  # noqa: RUF005
    values = _receive(words + P.state_at, epoch, 0, P)
    rate = _rate(values, numbers_of[0], 0, P)
    scores, window = _products(P.starts[0], 0, groups, values, window, place, P)
    shares = ()
    for group in tl.static_range(groups):
        grouped = tl.reshape(scores[group] * rate, [P.group // P.vectors, P.vectors])
        weights = tl.exp(grouped - tl.max(grouped, 1)[:, None])
        weights /= tl.sum(weights, 1)[:, None]
        shares = shares + (tl.reshape(weights, [P.group]),)  # noqa: RUF005
    mixed = ()
    for index in tl.static_range(tl.constexpr(P.own_groups)):
        total = numbers_of[2] * own[index]
        for group in tl.static_range(groups):
            total += tl.sum(tiles[index * groups + group].to(tl.float32) * shares[group][None, :], 1)
        mixed = mixed + (total,)  # noqa: RUF005
    _publish_own(words + P.mixed_at, mixed, epoch, place, P)
    return mixed, window


@triton.jit
def _project(window, source, words, epoch, place, numbers_of, P: tl.constexpr):
    """Normalisation and the map to queries, keys and values, and the window after it."""
    scales = _scales(place[0][5], 0, P)
    values = _receive(source, epoch, 0, P)
    rate = _rate(values, numbers_of[0], 0, P)
    scaled = _scaled(values, scales, 0, P)
    sums, window = _products(P.starts[1], 0, P.head_groups, scaled, window, place, P)
    for group in tl.static_range(tl.constexpr(P.head_groups)):
        row, kept = _rows(group, place, P.head_rows, 3 * P.dim, P)
        _publish(words + P.heads_at, row, sums[group] * rate, epoch, kept, P)
    return window


@triton.jit
def _read_head(words, e, P: tl.constexpr):
    """A head's query, its neighbours in their pairs, the same of its key, and its value, [E] each."""
    other = e ^ 1
    return (
        tl.load(words + e, volatile=True),
        tl.load(words + other, volatile=True),
        tl.load(words + P.dim + e, volatile=True),
        tl.load(words + P.dim + other, volatile=True),
        tl.load(words + 2 * P.dim + e, volatile=True),
    )


@triton.jit
def _is_head_late(found, epoch):
    """Not nought if any of the words is of an older epoch."""
    late = (found[0] - epoch) | (found[1] - epoch) | (found[2] - epoch) | (found[3] - epoch) | (found[4] - epoch)
    return tl.max(late & 8, 0)


@triton.jit
def _turned(here, other, e, cosine, sine, P: tl.constexpr):
    """A rotated head of [E], rounded as it is stored: neighbouring pairs turn by the position's angles."""
    turned = _value(here) * cosine + tl.where(e % 2 == 0, -_value(other), _value(other)) * sine
    return turned.to(P.kind)


@triton.jit
def _attend(words, epoch, keys, values, rotary, position, capacity, index, scale, P: tl.constexpr):
    """One part of one head: from words [3, H, E] and a layer's cache [H, C, E] to words [S, H, E] and [S, H, 2]."""
    head, split = index // P.splits, index % P.splits
    slot = position % capacity
    held = tl.minimum(position + 1, capacity)
    length = tl.cdiv(tl.cdiv(held, P.splits), P.block) * P.block
    begin = split * length
    end = tl.minimum(begin + length, held)
    e = tl.arange(0, P.width)
    keys += head * tl.cast(capacity, tl.int64) * P.width
    values += head * tl.cast(capacity, tl.int64) * P.width
    places = begin + tl.arange(0, P.block)
    at = places[:, None] * P.width + e[None, :]
    # The first block is under way while the query is awaited.
    key_tile = tl.load(keys + at, mask=(places < end)[:, None], other=0.0)
    value_tile = tl.load(values + at, mask=(places < end)[:, None], other=0.0)
    cosine = tl.load(rotary + position * P.width + (e // 2) * 2)
    sine = tl.load(rotary + position * P.width + (e // 2) * 2 + 1)
    source = words + P.heads_at + head * P.width
    found = _read_head(source, e, P)
    while _is_head_late(found, epoch) != 0:
        found = _read_head(source, e, P)
    query = _turned(found[0], found[1], e, cosine, sine, P).to(tl.float32) * scale
    key = _turned(found[2], found[3], e, cosine, sine, P)
    value = _value(found[4]).to(P.kind)
    best = -float("inf")
    mass = 0.0
    width: tl.constexpr = P.width
    total = tl.zeros([width], dtype=tl.float32)
    for first in range(begin, end, P.block):
        places = first + tl.arange(0, P.block)
        is_new = (places == slot)[:, None]
        tile = tl.where(is_new, key[None, :], key_tile).to(tl.float32)
        scores = tl.sum(tile * query[None, :], 1)
        scores = tl.where(places < end, scores, -float("inf"))
        largest = tl.maximum(best, tl.max(scores, 0))
        weights = tl.exp(scores - largest)
        shrink = tl.exp(best - largest)
        tile = tl.where(is_new, value[None, :], value_tile).to(tl.float32)
        total = total * shrink + tl.sum(tile * weights[:, None], 0)
        mass = mass * shrink + tl.sum(weights, 0)
        best = largest
        at += P.block * P.width
        following = (places + P.block < end)[:, None]
        key_tile = tl.load(keys + at, mask=following, other=0.0)
        value_tile = tl.load(values + at, mask=following, other=0.0)
    part = split * P.heads + head
    _publish(words + P.parts_at, part * P.width + e, total, epoch, e < P.width, P)
    two = tl.arange(0, 2)
    _publish(words + P.masses_at, part * 2 + two, tl.where(two == 0, best, mass), epoch, two < 2, P)
    if (slot >= begin) & (slot < end):
        tl.store(keys + slot * P.width + e, key)
        tl.store(values + slot * P.width + e, value)


@triton.jit
def _read_attention(words, epoch, P: tl.constexpr):
    """The words that `_attend` publishes, [S * room, E] and [S * room, 2]; heads that are none are never late."""
    index = tl.arange(0, P.splits * P.room)
    head = index % P.room
    at = index // P.room * P.heads + head
    part = words + P.parts_at + at[:, None] * P.width + tl.arange(0, P.width)[None, :]
    mass = words + P.masses_at + at[:, None] * 2 + tl.arange(0, 2)[None, :]
    if P.room == P.heads:
        found = tl.load(part, volatile=True), tl.load(mass, volatile=True)
    else:
        inside = (head < P.heads)[:, None]
        found = (
            tl.load(part, mask=inside, other=epoch, volatile=True),
            tl.load(mass, mask=inside, other=epoch, volatile=True),
        )
    return found


@triton.jit
def _is_late(bits, epoch):
    """Not nought if any of the words is of an older epoch."""
    return tl.max(tl.reshape((bits - epoch) & 8, [bits.numel]), 0)


@triton.jit
def _joined(words, epoch, P: tl.constexpr):
    """Attention's output [room * E], once all of it is there; nought beyond the last head."""
    found = _read_attention(words, epoch, P)
    while (_is_late(found[0], epoch) | _is_late(found[1], epoch)) != 0:
        found = _read_attention(words, epoch, P)
    best, mass = tl.split(tl.reshape(_value(found[1]), [P.splits, P.room, 2]))
    share = tl.exp(best - tl.max(best, 0)[None, :])
    total = tl.sum(share * mass, 0)[None, :]
    inside = (tl.arange(0, P.room) < P.heads)[None, :]
    share = tl.where(inside, share / tl.where(inside, total, 1.0), 0.0)
    parts = tl.reshape(_value(found[0]), [P.splits, P.room, P.width])
    return tl.reshape(tl.sum(parts * share[:, :, None], 0), [P.room * P.width])


@triton.jit
def _put_out(own, window, words, epoch, place, P: tl.constexpr):
    """The map after attention: a program's rows of the state after it, and the window."""
    joined = (_joined(words, epoch, P),)
    sums, window = _products(P.starts[2], 2, P.own_groups, joined, window, place, P)
    added = ()
    for group in tl.static_range(tl.constexpr(P.own_groups)):
        added = added + (own[group] + sums[group],)  # noqa: RUF005
    _publish_own(words + P.middle_at, added, epoch, place, P)
    return added, window


@triton.jit
def _widen(window, words, epoch, place, numbers_of, P: tl.constexpr):
    """Normalisation and SwiGLU, and the window after it."""
    scales = _scales(place[0][6], 0, P)
    values = _receive(words + P.middle_at, epoch, 0, P)
    rate = _rate(values, numbers_of[0], 0, P)
    scaled = _scaled(values, scales, 0, P)
    sums, window = _products(P.starts[3], 0, 2 * P.wide_groups, scaled, window, place, P)
    for group in tl.static_range(tl.constexpr(P.wide_groups)):
        gate, value = sums[2 * group] * rate, sums[2 * group + 1] * rate
        row, kept = _rows(group, place, P.wide_rows, P.hidden, P)
        _publish(words + P.hidden_at, row, value * gate / (1.0 + tl.exp(-gate)), epoch, kept, P)
    return window


@triton.jit
def _narrow(own, window, words, epoch, place, P: tl.constexpr):
    """The map after SwiGLU: a program's rows of the state after it, and the window."""
    values = _receive(words + P.hidden_at, epoch, 1, P)
    sums, window = _products(P.starts[4], 1, P.own_groups, values, window, place, P)
    added = ()
    for group in tl.static_range(tl.constexpr(P.own_groups)):
        added = added + (own[group] + sums[group],)  # noqa: RUF005
    return added, window


@triton.jit
def _pointers(table, score_words, layer, P: tl.constexpr):
    """A block's maps as words, as units name them, and its two norms."""
    table += layer * 6
    word = tl.pointer_type(tl.int32)
    number = tl.pointer_type(P.kind)
    return (
        score_words + layer * P.pairs * P.words,
        tl.multiple_of(tl.load(table + 1).to(word), 16),
        tl.multiple_of(tl.load(table + 3).to(word), 16),
        tl.multiple_of(tl.load(table + 4).to(word), 16),
        tl.multiple_of(tl.load(table + 5).to(word), 16),
        tl.multiple_of(tl.load(table).to(number), 16),
        tl.multiple_of(tl.load(table + 2).to(number), 16),
    )


@triton.jit
def run_stack(
    x,
    out,
    words,
    state,
    table,
    keys,
    values,
    rotary,
    positions,
    score_words,
    output_map,
    first_program,
    layers,
    capacity,
    layer_stride,
    eps,
    scale,
    residual,
    P: tl.constexpr,
):
    """All blocks of one program."""
    program = tl.program_id(0) + first_program
    epoch = tl.load(state) + 1
    position = tl.load(positions).to(tl.int32)
    numbers_of = eps, scale, residual
    now = _pointers(table, score_words, 0, P)
    place = now, now, program, tl.arange(0, P.group), 1
    window = ()
    for unit in tl.static_range(tl.constexpr(P.window)):
        window = window + (_begin(unit, place, P),)  # noqa: RUF005
    own = ()
    for group in tl.static_range(tl.constexpr(P.own_groups)):
        row, kept = _rows(group, place, P.own_rows, P.dim, P)
        own = own + (tl.load(x + row, mask=kept, other=0.0).to(tl.float32),)  # noqa: RUF005
    _publish_own(words + P.state_at, own, epoch, place, P)
    for layer in range(layers):
        more = tl.where(layer + 1 < layers, 1, 0)
        later = _pointers(table, score_words, layer + more, P)
        place = now, later, _anew(program, P), _anew(tl.arange(0, P.group), P), more
        source = words + P.state_at
        if P.pairs > 0:
            source = words + P.mixed_at
            layer_map = output_map + layer * P.dim * P.pairs
            own, window = _read_patch(own, window, words, epoch, layer_map, place, numbers_of, P)
        window = _project(window, source, words, epoch, place, numbers_of, P)
        stored = layer * tl.cast(layer_stride, tl.int64)
        for index in range(program, P.heads * P.splits, P.programs):
            _attend(words, epoch, keys + stored, values + stored, rotary, position, capacity, index, scale, P)
        own, window = _put_out(own, window, words, epoch, place, P)
        window = _widen(window, words, epoch, place, numbers_of, P)
        own, window = _narrow(own, window, words, epoch, place, P)
        now = later
        epoch += 1
        if more == 1:
            _publish_own(words + P.state_at, own, epoch, place, P)
    for group in tl.static_range(tl.constexpr(P.own_groups)):
        row, kept = _rows(group, place, P.own_rows, P.dim, P)
        tl.store(out + row, own[group].to(out.dtype.element_ty), mask=kept)
    # What this program has received last depends on every other's having read the state.
    if program == 0:
        tl.store(state, epoch - 1)
