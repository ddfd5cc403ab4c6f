"""Compiled loops: stored numbers to merged, rounded, counted ones in a single pass through the processor's cache.

The idea: a run of a few thousand elements is widened to float32, thinned, combined and rounded while it lies in the
first-level cache, by plain loops that the compiler turns into vector instructions. Every operation is the float32
operation of the simple torch implementation beside which a kernel is declared, in the same order, and none is fused
with another: the bits are the same. All loops lie in this one file, since a compiled loop that is kept on disk is
compiled anew when its own file changes, and not when another one does.

What this module does not know: methods, parameters, tensors. It is given addresses and numbers (`fused`).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from dapt_merge.compiling import Function, compiled

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
ITEM_BYTES = (2, 2, 4)

# How the inputs are combined.
AFFINE, SUM, SCALED, ELECTED = 0, 1, 2, 3
WEIGHTED, UNWEIGHTED, COUNT = 0, 1, 2
# How a task vector is thinned.
WHOLE, RANDOM, BAND, BY_RANK = 0, 1, 2, 3

RUN_ELEMENTS = 2048  # 8 KiB a buffer
_COUNTED = 1 << 16  # elements between which counts and flags are looked at, where nothing is buffered
SUMMED = 1024  # elements that `products` adds up at a time
_INFINITE = np.uint32(0x7F800000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_RANK_OCTAVES = 6  # above a typical magnitude that have buckets of their own
_SAMPLED_OF_ROW = 128
_MOST_COMPARED = 16  # elements in a bucket that are all compared with each other

_OPTIONS = {"error_model": "numpy", "boundscheck": False}
_compiled = compiled(**_OPTIONS)


def _part(function: Function) -> Function:
    """Compile as a part of what calls it: not kept by itself, and not to be called from Python, which saves time."""
    return numba.njit(function, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)  # type: ignore[no-any-return]


@intrinsic  # type: ignore[untyped-decorator]
def _bits(typing_context: Any, value: Any) -> Any:
    """A float32 as its bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _float(typing_context: Any, bits: Any) -> Any:
    """The float32 of these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


# --- widening and rounding ---------------------------------------------------------------------------------------


@_part
def _magnitude(value: Any) -> Any:
    """Return the bits of |value|, which order like the magnitudes."""
    return np.uint32(_bits(np.float32(value)) & _MAGNITUDE)


@_part
def _from_bfloat16(stored: Any) -> Any:
    return _float(np.uint32(np.uint32(stored) << np.uint32(16)))


@_part
def _widen(address: int, code: int, start: int, values: Any) -> Any:
    """Write stored elements start… as float32; False when one of them is NaN or infinite."""
    count = values.size
    if code == BFLOAT16:
        short = carray(_pointer(address + 2 * start), (count,), np.uint16)
        largest = np.uint16(0)
        for i in range(count):
            values[i] = _from_bfloat16(short[i])
            largest = max(largest, np.uint16(short[i] & np.uint16(0x7FFF)))
        return largest < np.uint16(0x7F80)
    if code == FLOAT16:
        short = carray(_pointer(address + 2 * start), (count,), np.uint16)
        largest = np.uint16(0)
        for i in range(count):
            values[i] = _float(np.uint32(np.uint32(short[i] & np.uint16(0x7FFF)) << np.uint32(13)))
            largest = max(largest, np.uint16(short[i] & np.uint16(0x7FFF)))
        for i in range(count):
            values[i] = values[i] * np.float32(2.0**112)  # from the bias of one exponent to that of the other: exact
        for i in range(count):
            values[i] = _float(
                np.uint32(_bits(values[i]) | np.uint32(np.uint32(short[i] & np.uint16(0x8000)) << np.uint32(16)))
            )
        return largest < np.uint16(0x7C00)
    wide = carray(_pointer(address + 4 * start), (count,), np.uint32)
    greatest = np.uint32(0)
    for i in range(count):
        values[i] = _float(wide[i])
        greatest = max(greatest, np.uint32(wide[i] & _MAGNITUDE))
    return greatest < _INFINITE


@_part
def _bfloat16(value: Any) -> Any:
    """Return the bits of the bfloat16 nearest to a finite float32, ties to even."""
    bits = _bits(np.float32(value))
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint32(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))


@_part
def _float16(value: Any) -> Any:
    """Return the bits of the float16 nearest to a finite float32, ties to even."""
    bits = _bits(np.float32(value))
    magnitude = np.uint32(bits & _MAGNITUDE)
    odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(magnitude + np.uint32(odd + np.uint32(0xFFF))) - np.uint32(0x38000000))
    normal = min(np.uint32(normal >> np.uint32(13)), np.uint32(0x7C00))
    # The last place of 0.5 is that of float16's subnormals: the addition rounds to it.
    subnormal = np.uint32(_bits(np.float32(abs(value) + np.float32(0.5))) - np.uint32(0x3F000000))
    near = normal if magnitude >= np.uint32(0x38800000) else subnormal
    return np.uint32(near | np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)))


@_part
def _differs(one: Any, other: Any) -> Any:
    """Say whether two 16-bit floats are different numbers; the zeros of either sign are one."""
    zeros = np.uint32(np.uint32(one | other) & np.uint32(0x7FFF)) == np.uint32(0)
    return (one != other) & (not zeros)


@_part
def _store_bfloat16(values: Any, base: Any, out: Any) -> Any:
    largest, updated, kept = np.uint32(0), np.int32(0), np.int32(0)
    for i in range(out.size):
        near = _bfloat16(values[i])
        largest = max(largest, _magnitude(values[i]))
        largest = max(largest, np.uint32(np.uint32(near & np.uint32(0x7FFF)) << np.uint32(16)))
        out[i] = np.uint16(near)
        updated += np.int32(values[i] != base[i])
        kept += np.int32(_differs(near, _bfloat16(base[i])))
    return largest < _INFINITE, updated, updated - kept


@_part
def _store_float16(values: Any, base: Any, out: Any) -> Any:
    largest, greatest, updated, kept = np.uint32(0), np.uint32(0), np.int32(0), np.int32(0)
    for i in range(out.size):
        near = _float16(values[i])
        largest = max(largest, _magnitude(values[i]))
        greatest = max(greatest, np.uint32(near & np.uint32(0x7FFF)))
        out[i] = np.uint16(near)
        updated += np.int32(values[i] != base[i])
        kept += np.int32(_differs(near, _float16(base[i])))
    return (largest < _INFINITE) & (greatest < np.uint32(0x7C00)), updated, updated - kept


@_part
def _store_float32(values: Any, out: Any) -> Any:
    largest = np.uint32(0)
    for i in range(out.size):
        largest = max(largest, _magnitude(values[i]))
        out[i] = values[i]
    return largest < _INFINITE


@_part
def _store(values: Any, base: Any, address: int, code: int, start: int) -> Any:
    """Round to nearest into the output.

    Returns (whether every value is finite there, how many differ from `base`, how many of those do not when rounded).
    """
    count = values.size
    if code == FLOAT32:
        return _store_float32(values, carray(_pointer(address + 4 * start), (count,), np.float32)), 0, 0
    short = carray(_pointer(address + 2 * start), (count,), np.uint16)
    if code == BFLOAT16:
        return _store_bfloat16(values, base, short)
    return _store_float16(values, base, short)


# --- thinning ----------------------------------------------------------------------------------------------------


@_part
def _hashed(index: Any, first_key: Any, second_key: Any) -> Any:
    """Hash a 32-bit counter, as `masks` says."""
    state = np.uint32(index + first_key)
    state = np.uint32(state ^ np.uint32(state >> np.uint32(16)))
    state = np.uint32(state * np.uint32(0x7FEB352D))
    state = np.uint32(state ^ np.uint32(state >> np.uint32(15)))
    state = np.uint32(state * np.uint32(0x846CA68B))
    state = np.uint32(state ^ np.uint32(state >> np.uint32(16)))
    state = np.uint32(state + second_key)
    state = np.uint32(state ^ np.uint32(state >> np.uint32(16)))
    state = np.uint32(state * np.uint32(0x7FEB352D))
    state = np.uint32(state ^ np.uint32(state >> np.uint32(15)))
    state = np.uint32(state * np.uint32(0x846CA68B))
    return np.uint32(state ^ np.uint32(state >> np.uint32(16)))


@_part
def _subtract(model: Any, base: Any, factor: Any, delta: Any) -> None:
    for i in range(delta.size):
        delta[i] = (model[i] - base[i]) * factor


@_part
def _subtract_and_hash(
    model: Any, base: Any, low: Any, first_key: Any, second_key: Any, highest: Any, factor: Any, delta: Any
) -> None:
    for i in range(delta.size):
        kept = _hashed(np.uint32(low + np.uint32(i)), first_key, second_key) <= highest
        delta[i] = (model[i] - base[i]) * (np.float32(1) if kept else np.float32(0)) * factor


@_part
def _subtract_and_drop(model: Any, base: Any, start: int, highest: int, keys: Any, factor: Any, delta: Any) -> None:
    """Keep the elements whose hash is at most `highest`."""
    limit, done = np.uint32(highest), 0
    while done < delta.size:  # a run may cross multiples of 2**32
        high, low = (start + done) >> 32, (start + done) & 0xFFFFFFFF
        run = slice(done, min(delta.size, done + (1 << 32) - low))
        _subtract_and_hash(
            model[run], base[run], np.uint32(low), keys[high, 0], keys[high, 1], limit, factor, delta[run]
        )
        done = run.stop


@_part
def _subtract_and_cut(model: Any, base: Any, least: Any, most: Any, factor: Any, delta: Any) -> None:
    """Keep the elements whose magnitude's bits are in [least, most]."""
    for i in range(delta.size):
        value = model[i] - base[i]
        magnitude = _magnitude(value)
        kept = (magnitude >= least) & (magnitude <= most)
        delta[i] = value * (np.float32(1) if kept else np.float32(0)) * factor


@_part
def _subtract_and_band(model: Any, base: Any, start: int, band: Any, factor: Any, delta: Any) -> None:
    """Keep what the lower cutoff keeps and the upper one does not; each is (whether it is there, bits, last tied)."""
    begin, count = 0, delta.size
    while begin < count:
        # Up to the next of the two places where ties change sides, each cutoff is one number.
        end, least, most = count, np.int64(0), np.int64(0x7FFFFFFF)
        for above in range(2):
            if band[3 * above] == 0:
                continue
            beyond = band[3 * above + 2] + 1 - start
            tied_kept = begin < beyond
            if tied_kept:
                end = min(end, beyond)
            lowest_kept = band[3 * above + 1] + (0 if tied_kept else 1)
            if above:
                most = lowest_kept - 1
            else:
                least = lowest_kept
        if most < least:
            least, most = np.int64(0x7FFFFFFF), np.int64(0)
        run = slice(begin, end)
        _subtract_and_cut(model[run], base[run], np.uint32(least), np.uint32(most), factor, delta[run])
        begin = end


@_part
def _drop_hashed(delta: Any, low: Any, first_key: Any, second_key: Any, highest: Any) -> None:
    for i in range(delta.size):
        kept = _hashed(np.uint32(low + np.uint32(i)), first_key, second_key) <= highest[i]
        delta[i] = delta[i] * (np.float32(1) if kept else np.float32(0))


@_part
def _typical_magnitude(values: Any) -> Any:
    """Return a power of two near the mean magnitude of a sample; 0 where that is 0."""
    step = values.size // _SAMPLED_OF_ROW + 1
    total = np.float32(0)
    for i in range(0, values.size, step):
        total = np.float32(total + abs(values[i]))
    mean = np.float32(total * np.float32(step) / np.float32(values.size))
    return _float(np.uint32(_bits(mean) & _INFINITE))


@_part
def _fill_buckets(values: Any, typical: Any, shift: Any, last: Any, bucket_of: Any) -> Any:
    """Write which bucket each element of a row belongs to, the larger the higher, zeros in the first; and how many.

    With the typical magnitude added, the highest bits of a number grow with it in equal steps below that magnitude and
    with its logarithm above: few share a bucket, whatever the row looks like. Only speed depends on that.
    """
    lowest = np.uint32(_bits(typical) >> shift)
    largest = np.uint32(0)
    for i in range(values.size):
        magnitude = _magnitude(values[i])
        moved = _bits(np.float32(_float(magnitude) + typical))
        bucket = np.uint32(np.uint32(moved >> shift) - lowest)
        bucket = np.uint32(min(bucket, last) + np.uint32(magnitude != np.uint32(0)))
        bucket_of[i] = bucket
        largest = max(largest, bucket)
    return np.int64(largest) + 1


@_part
def _place(values: Any, bucket_of: Any, within: Any, starts: Any, placed: Any, order: Any) -> Any:
    """Write a row's magnitudes and indices by bucket, the highest first, and by index; return the most in a bucket."""
    for back in range(starts.size):
        starts[back] = np.uint32(0)
    for i in range(values.size):
        held = starts[bucket_of[i]]
        within[i] = held
        starts[bucket_of[i]] = np.uint32(held + np.uint32(1))
    before, most = np.uint32(0), np.uint32(0)
    for back in range(starts.size):
        bucket = np.uint64(starts.size - 1 - back)  # unsigned indices are not asked whether they count from the end
        held = starts[bucket]
        starts[bucket] = before
        before = np.uint32(before + held)
        most = max(most, held)
    for i in range(values.size):
        place = np.uint32(starts[bucket_of[i]] + within[i])
        placed[place] = _magnitude(values[i])
        order[place] = np.uint32(i)
    return np.int64(most)


@_part
def _move_back(earlier: Any, later: Any, ranks: Any) -> None:
    for i in range(earlier.size):
        ranks[i] = np.uint32(ranks[i] + np.uint32(later[i] > earlier[i]))


@_part
def _move_forward(earlier: Any, later: Any, ranks: Any) -> None:
    for i in range(earlier.size):
        ranks[i] = np.uint32(ranks[i] - np.uint32(later[i] > earlier[i]))


@_part
def _insert(placed: Any, order: Any) -> Any:
    """Sort what is nearly sorted, equal ones as they come; False where that takes too long."""
    moves_left = 32 * placed.size
    for place in range(1, placed.size):
        magnitude = placed[place]
        if placed[place - 1] >= magnitude:
            continue
        index, hole = order[place], place
        while hole > 0 and placed[hole - 1] < magnitude:
            placed[hole], order[hole] = placed[hole - 1], order[hole - 1]
            hole -= 1
        placed[hole], order[hole] = magnitude, index
        moves_left -= place - hole
        if moves_left < 0:
            return False
    return True


@_part
def _sink(keys: Any, root: int, count: int) -> None:
    """Let a key sink until no key below it in the heap is larger."""
    key = keys[root]
    while 2 * root + 1 < count:
        child = 2 * root + 1
        if child + 1 < count and keys[child + 1] > keys[child]:
            child += 1
        if keys[child] <= key:
            break
        keys[root] = keys[child]
        root = child
    keys[root] = key


@_part
def _sort_row(values: Any, order: Any) -> None:
    """Sort by a heap of (magnitude, index): the numbers are all different."""
    count = values.size
    keys = np.empty(count, np.int64)
    for i in range(count):
        keys[i] = ((np.int64(_MAGNITUDE) - np.int64(_magnitude(values[i]))) << 32) | i
    for step in range(count // 2):
        _sink(keys, count // 2 - 1 - step, count)
    for step in range(count):
        last = count - 1 - step
        order[last] = np.uint32(keys[0] & 0xFFFFFFFF)
        keys[0] = keys[last]
        _sink(keys, 0, last)


@_part
def _rank_row(values: Any, shift: Any, starts: Any, scratch: Any, order: Any, ranks: Any) -> None:
    """Write a row's indices in some order, and the rank of each: the largest magnitude first, equal ones by index.

    Nearly every element has its rank once the buckets are filled. Within small buckets, all pairs are compared at a
    fixed distance, without a branch; large ones are mostly equal numbers, in which little has to be moved.
    """
    row = values.size
    bucket_of, within, placed = scratch[0], scratch[1], scratch[2]
    last = np.uint32(starts.size - 2)
    buckets = _fill_buckets(values, _typical_magnitude(values), shift, last, bucket_of)
    most = _place(values, bucket_of, within, starts[:buckets], placed, order)
    for place in range(row):
        ranks[place] = np.uint32(place)
    if most <= _MOST_COMPARED:
        for distance in range(1, most):
            _move_back(placed[: row - distance], placed[distance:], ranks)
            _move_forward(placed[: row - distance], placed[distance:], ranks[distance:])
    elif not _insert(placed, order):
        _sort_row(values, order)


@_part
def _drop_by_rank(delta: Any, start: int, row: int, limits: Any, probabilities: Any, divide: bool, keys: Any) -> None:
    """Keep each element of whole rows with the probability that its rank in its row has, and divide by that."""
    count = delta.size
    limit_of, probability_of = np.empty(count, np.uint32), np.empty(count, np.float32)
    octave_bits = 0  # an octave has a quarter to half as many buckets as a row has elements
    while (4 << octave_bits) < row and octave_bits < 18:
        octave_bits += 1
    shift, starts = np.uint32(23 - octave_bits), np.empty(_RANK_OCTAVES << octave_bits, np.uint32)
    scratch, order, ranks = np.empty((3, row), np.uint32), np.empty(row, np.uint32), np.empty(row, np.uint32)
    for first in range(0, count, row):
        _rank_row(delta[first : first + row], shift, starts, scratch, order, ranks)
        limit_row, probability_row = limit_of[first : first + row], probability_of[first : first + row]
        for place in range(row):
            limit_row[order[place]] = limits[ranks[place]]
            probability_row[order[place]] = probabilities[ranks[place]]
    done = 0
    while done < count:  # a long row may cross multiples of 2**32
        high, low = (start + done) >> 32, (start + done) & 0xFFFFFFFF
        run = slice(done, min(count, done + (1 << 32) - low))
        _drop_hashed(delta[run], np.uint32(low), keys[high, 0], keys[high, 1], limit_of[run])
        done = run.stop
    if divide:
        for i in range(count):
            delta[i] = delta[i] / probability_of[i]


# --- combining ---------------------------------------------------------------------------------------------------


@_part
def _on_chord(value: Any, fixed: Any, coefficient: Any) -> Any:
    return (value - fixed) * coefficient + fixed


@_part
def _affine_two(values: Any, fixed: Any, coefficient: Any, merged: Any) -> None:
    for i in range(merged.size):
        merged[i] = _on_chord(values[i], fixed[i], coefficient)


@_part
def _affine(inputs: Any, coefficients: Any, anchor: int, merged: Any) -> None:
    """Return θₐ + Σcᵢ(θᵢ − θₐ), the sum first, as `averaging.affine_combination`."""
    fixed = inputs[anchor]
    if len(coefficients) == 2 and coefficients[1 - anchor] != 0:
        _affine_two(inputs[1 - anchor], fixed, np.float32(coefficients[1 - anchor]), merged)
        return
    started = False
    for position in range(len(coefficients)):
        if position == anchor or coefficients[position] == 0:
            continue
        values, coefficient = inputs[position], np.float32(coefficients[position])
        if started:
            for i in range(merged.size):
                merged[i] = merged[i] + (values[i] - fixed[i]) * coefficient
        else:
            for i in range(merged.size):
                merged[i] = (values[i] - fixed[i]) * coefficient
        started = True
    if started:
        for i in range(merged.size):
            merged[i] = merged[i] + fixed[i]
    else:
        for i in range(merged.size):
            merged[i] = fixed[i]


@_part
def _sum(inputs: Any, coefficients: Any, merged: Any) -> None:
    """Return Σcᵢθᵢ in the order of the inputs."""
    first, of_first = inputs[0], np.float32(coefficients[0])
    if len(coefficients) == 1:
        for i in range(merged.size):
            merged[i] = first[i] * of_first
        return
    second, of_second = inputs[1], np.float32(coefficients[1])
    for i in range(merged.size):
        merged[i] = first[i] * of_first + second[i] * of_second
    for position in range(2, len(coefficients)):
        values, coefficient = inputs[position], np.float32(coefficients[position])
        for i in range(merged.size):
            merged[i] = merged[i] + values[i] * coefficient


@_part
def _scaled(base: Any, deltas: Any, scales: Any, merged: Any) -> None:
    """Return θ₀ + Σsᵢδᵢ, the sum first, as `task_arithmetic.add_scaled`."""
    if len(scales) == 1:
        delta, scale = deltas[0], np.float32(scales[0])
        for i in range(merged.size):
            merged[i] = delta[i] * scale + base[i]
        return
    _sum(deltas, scales, merged)
    for i in range(merged.size):
        merged[i] = merged[i] + base[i]


@_part
def _elected_two(
    base: Any, one: Any, other: Any, weights: Any, elect: int, normalize: bool, scale: Any, merged: Any
) -> None:
    """As `_elected`, for two task vectors whose votes are what they are or what they are weighted."""
    first, second = np.float32(weights[0]), np.float32(weights[1])
    against_one = np.float32(-1) if elect == UNWEIGHTED and first < 0 else np.float32(1)
    against_other = np.float32(-1) if elect == UNWEIGHTED and second < 0 else np.float32(1)
    voice_one = np.float32(1) if elect == UNWEIGHTED else first
    voice_other = np.float32(1) if elect == UNWEIGHTED else second
    for i in range(merged.size):
        votes = one[i] * voice_one + other[i] * voice_other
        sign = np.float32(1) if votes >= 0 else np.float32(-1)
        agreeing_one = one[i] * first * (against_one * sign)
        agreeing_other = other[i] * second * (against_other * sign)
        # From +0 on, as the general sum: −0 twice would keep the sign of a base that is −0.
        total = np.float32(0) + against_one * (agreeing_one if agreeing_one > 0 else np.float32(0))
        total += against_other * (agreeing_other if agreeing_other > 0 else np.float32(0))
        divisor = first if agreeing_one > 0 else np.float32(0)
        divisor += second if agreeing_other > 0 else np.float32(0)
        divides = normalize & (divisor != 0)
        merged[i] = total * sign / (divisor if divides else np.float32(1)) * scale + base[i]


@_part
def _vote(deltas: Any, weights: Any, elect: int, votes: Any) -> None:
    """Multiply each task vector with its weight, and write +1 or −1, the elected sign, into `votes`."""
    for i in range(votes.size):
        votes[i] = np.float32(0)
    for position in range(len(weights)):
        delta, weight = deltas[position], np.float32(weights[position])
        if elect == UNWEIGHTED:
            for i in range(votes.size):
                votes[i] = votes[i] + delta[i]
                delta[i] = delta[i] * weight
        elif elect == WEIGHTED:
            for i in range(votes.size):
                delta[i] = delta[i] * weight
                votes[i] = votes[i] + delta[i]
        else:
            for i in range(votes.size):
                delta[i] = delta[i] * weight
                up = np.float32(1) if delta[i] > 0 else np.float32(0)
                down = np.float32(1) if delta[i] < 0 else np.float32(0)
                votes[i] = votes[i] + (up - down)
    for i in range(votes.size):
        votes[i] = np.float32(1) if votes[i] >= 0 else np.float32(-1)


@_part
def _elected(base: Any, deltas: Any, weights: Any, elect: int, normalize: bool, scale: Any, merged: Any) -> None:
    """Return θ₀ + λ·m, as `ties.merge_elected`; `scale` is λ."""
    if len(weights) == 1:
        for i in range(merged.size):
            merged[i] = deltas[0][i] * scale + base[i]
        return
    if len(weights) == 2 and elect != COUNT:
        _elected_two(base, deltas[0], deltas[1], weights, elect, normalize, scale, merged)
        return
    votes, divisor = np.empty(merged.size, np.float32), np.empty(merged.size, np.float32)
    _vote(deltas, weights, elect, votes)
    for i in range(merged.size):
        merged[i], divisor[i] = np.float32(0), np.float32(0)
    for position in range(len(weights)):
        delta, weight = deltas[position], np.float32(weights[position])
        against = np.float32(-1) if elect == UNWEIGHTED and weight < 0 else np.float32(1)
        for i in range(merged.size):
            agreeing = delta[i] * (against * votes[i])
            agrees = agreeing > 0
            merged[i] = merged[i] + against * (agreeing if agrees else np.float32(0))
            divisor[i] = divisor[i] + (weight if agrees else np.float32(0))
    if normalize:
        for i in range(merged.size):
            merged[i] = merged[i] * votes[i] / (np.float32(1) if divisor[i] == 0 else divisor[i])
    else:
        for i in range(merged.size):
            merged[i] = merged[i] * votes[i]
    for i in range(merged.size):
        merged[i] = merged[i] * scale + base[i]


@_part
def _put_bfloat16(value: Any, base: Any, out: Any, i: int) -> Any:
    """Round to nearest into `out`; `base` is what the update starts from.

    Returns (the magnitude of the rounded value, 1 if the value differs from the base, 1 if it still does when it is
    rounded). Where the inputs are finite, a value that is not shows in the rounded one.
    """
    stored = _bfloat16(value)
    out[i] = np.uint16(stored)
    near = np.uint32(stored << np.uint32(16))
    return np.uint32(near & _MAGNITUDE), np.int32(value != base), np.int32(_float(near) != base)


@_part
def _affine_of_bfloat16(values: Any, fixed: Any, from_fixed: bool, coefficient: Any, out: Any) -> Any:
    """Go from `fixed` towards `values`; the update starts from the one or the other."""
    largest, updated, kept = np.uint32(0), np.int32(0), np.int32(0)
    for i in range(out.size):
        value, anchor = _from_bfloat16(values[i]), _from_bfloat16(fixed[i])
        merged = _on_chord(value, anchor, coefficient)
        reached, moved, still = _put_bfloat16(merged, anchor if from_fixed else value, out, i)
        inputs = max(_magnitude(value), _magnitude(anchor))
        largest = max(largest, max(reached, inputs))
        updated += moved
        kept += still
    return largest < _INFINITE, updated, updated - kept


@_part
def _sum_of_bfloat16(base: Any, model: Any, of_base: Any, of_model: Any, out: Any) -> Any:
    largest, updated, kept = np.uint32(0), np.int32(0), np.int32(0)
    for i in range(out.size):
        one, other = _from_bfloat16(base[i]), _from_bfloat16(model[i])
        reached, moved, still = _put_bfloat16(one * of_base + other * of_model, one, out, i)
        inputs = max(_magnitude(one), _magnitude(other))
        largest = max(largest, max(reached, inputs))
        updated += moved
        kept += still
    return largest < _INFINITE, updated, updated - kept


@_compiled
def merge_two_of_bfloat16(
    addresses: Any, begin: int, count: int, out_address: int, kind: int, coefficients: Any, anchor: int
) -> Any:
    """Do what `merge_inputs` does for two inputs, neither with the coefficient 0, where all is stored as bfloat16.

    One loop goes from the reading to the writing. Memory then sets the pace, which two loops over a buffer do not quite
    reach.
    """
    updated = lost = 0
    for start in range(begin, begin + count, _COUNTED):
        size = min(_COUNTED, begin + count - start)
        base = carray(_pointer(addresses[0] + 2 * start), (size,), np.uint16)
        model = carray(_pointer(addresses[1] + 2 * start), (size,), np.uint16)
        out = carray(_pointer(out_address + 2 * (start - begin)), (size,), np.uint16)
        one, other = np.float32(coefficients[0]), np.float32(coefficients[1])
        if kind == SUM:
            finite, moved, moved_back = _sum_of_bfloat16(base, model, one, other, out)
        elif anchor == 0:
            finite, moved, moved_back = _affine_of_bfloat16(model, base, True, other, out)
        else:
            finite, moved, moved_back = _affine_of_bfloat16(base, model, False, one, out)
        if not finite:
            return False, 0, 0
        updated += moved
        lost += moved_back
    return True, updated, lost


@_compiled
def merge_inputs(
    addresses: Any,
    codes: Any,
    begin: int,
    count: int,
    out_address: int,
    out_code: int,
    run: int,
    kind: int,
    coefficients: Any,
    anchor: int,
) -> Any:
    """Merge `count` elements of inputs that are summed as they are, `run` at a time, into the output.

    Args:
        addresses: of the inputs' first elements; the first input is what an update starts from.
        codes: what the inputs are stored in.
        begin: index of the first element to merge.
        count: number of elements.
        out_address: of the output's first element.
        out_code: what it is stored in.
        run: elements handled at a time.
        kind: AFFINE (Σcᵢθᵢ for cᵢ that add to 1, from the input `anchor`) or SUM (Σcᵢθᵢ).
        coefficients: float64, one per input.
        anchor: see `kind`.

    Returns:
        (whether all inputs and results are finite, elements that the merge moves away from the first input, and those
        of them that rounding to a 16-bit output moves back)
    """
    size = min(run, count)
    inputs, merged = np.empty((len(addresses), size), np.float32), np.empty(size, np.float32)
    updated = lost = 0
    for start in range(begin, begin + count, run):
        if begin + count - start < size:
            # Buffers of exactly the size of a run have no gaps, which vector instructions need.
            size = begin + count - start
            inputs, merged = np.empty((len(addresses), size), np.float32), np.empty(size, np.float32)
        finite = True
        for position in range(len(addresses)):
            finite &= _widen(addresses[position], codes[position], start, inputs[position])
        if not finite:
            return False, 0, 0
        if kind == AFFINE:
            _affine(inputs, coefficients, anchor, merged)
        else:
            _sum(inputs, coefficients, merged)
        finite, moved, moved_back = _store(merged, inputs[0], out_address, out_code, start - begin)
        if not finite:
            return False, 0, 0
        updated += moved
        lost += moved_back
    return True, updated, lost


@_compiled
def merge_task_vectors(
    addresses: Any,
    codes: Any,
    begin: int,
    count: int,
    out_address: int,
    out_code: int,
    run: int,
    kind: int,
    scales: Any,
    voters: Any,
    thinning: Any,
    bands: Any,
    keys: Any,
    row: int,
    limits: Any,
    probabilities: Any,
    factors: Any,
    elect: int,
    normalize: bool,
    scale: float,
) -> Any:
    """Merge `count` elements of the base, the first input, and task vectors into the output; see `merge_inputs`.

    Args:
        addresses, codes, begin, count, out_address, out_code: as for `merge_inputs`.
        run: elements handled at a time; whole rows where ranks are asked for.
        kind: SCALED (θ₀ + Σsᵢδᵢ) or ELECTED.
        scales: float64, one per voter: sᵢ, or the weights of the votes.
        voters: which inputs take part as task vectors.
        thinning: one row per voter: how it is thinned, the highest hash that is kept (RANDOM), whether it is then
            divided by its probability (BY_RANK).
        bands: one row per voter: (is there a cutoff, bits, last tied) of the lower and of the upper one (BAND).
        keys: uint32 [voter, element index // 2**32, 2].
        row: elements of a row (BY_RANK).
        limits: uint32 [voter, row]: the highest hash that is kept, by rank. None where nothing is thinned by rank: the
            loops for that are then not compiled.
        probabilities: float32 [voter, row], by rank; or None.
        factors: float32, one per voter: what is left of it is multiplied with this.
        elect: WEIGHTED, UNWEIGHTED or COUNT (ELECTED).
        normalize: divide by the weights that agree (ELECTED).
        scale: λ (ELECTED).

    Returns:
        As `merge_inputs`.
    """
    size = min(run, count)
    inputs, merged = np.empty((len(addresses), size), np.float32), np.empty(size, np.float32)
    deltas = np.empty((len(voters), size), np.float32)
    updated = lost = 0
    for start in range(begin, begin + count, run):
        if begin + count - start < size:
            size = begin + count - start
            inputs, merged = np.empty((len(addresses), size), np.float32), np.empty(size, np.float32)
            deltas = np.empty((len(voters), size), np.float32)
        finite = True
        for position in range(len(addresses)):
            finite &= _widen(addresses[position], codes[position], start, inputs[position])
        if not finite:
            return False, 0, 0
        base = inputs[0]
        for position in range(len(voters)):
            delta, model, factor = deltas[position], inputs[voters[position]], factors[position]
            if thinning[position, 0] == RANDOM:
                highest = thinning[position, 1]
                _subtract_and_drop(model, base, start, highest, keys[position], factor, delta)
            elif thinning[position, 0] == BAND:
                _subtract_and_band(model, base, start, bands[position], factor, delta)
            elif limits is None or thinning[position, 0] == WHOLE:
                _subtract(model, base, factor, delta)
            else:
                _subtract(model, base, np.float32(1), delta)
                divide = thinning[position, 2] != 0
                _drop_by_rank(delta, start, row, limits[position], probabilities[position], divide, keys[position])
                for i in range(size):
                    delta[i] = delta[i] * factor
        if kind == SCALED:
            _scaled(base, deltas, scales, merged)
        else:
            _elected(base, deltas, scales, elect, normalize, np.float32(scale), merged)
        finite, moved, moved_back = _store(merged, base, out_address, out_code, start - begin)
        if not finite:
            return False, 0, 0
        updated += moved
        lost += moved_back
    return True, updated, lost


# --- selecting and measuring -------------------------------------------------------------------------------------


@_part
def _magnitudes(base: Any, model: Any, bits: Any) -> None:
    for i in range(bits.size):
        bits[i] = _magnitude(model[i] - base[i])


@_part
def _read_magnitudes(
    base_address: int, base_code: int, model_address: int, model_code: int, start: int, values: Any, bits: Any
) -> None:
    """Write the magnitudes of a run of a task vector as bit patterns; `values` is float32 [2, run], to work in."""
    _widen(base_address, base_code, start, values[0])
    _widen(model_address, model_code, start, values[1])
    _magnitudes(values[0], values[1], bits)


@_part
def _count_at_least(bits: Any, border: Any) -> Any:
    found = np.int32(0)
    for i in range(bits.size):
        found += np.int32(bits[i] >= border)
    return found


@_part
def _count_equal(bits: Any, value: Any) -> Any:
    found = np.int32(0)
    for i in range(bits.size):
        found += np.int32(bits[i] == value)
    return found


@_compiled
def sample(
    base_address: int, base_code: int, model_address: int, model_code: int, count: int, step: int, clump: int
) -> Any:
    """Return the magnitudes of the first `clump` of every `step` elements of a task vector."""
    size = count // step * clump + min(clump, count % step)
    found = np.empty(size, np.uint32)
    filled = 0
    for start in range(0, count, step):
        run = min(clump, count - start)
        place = (base_address, base_code, model_address, model_code)
        _read_magnitudes(*place, start, np.empty((2, run), np.float32), found[filled : filled + run])
        filled += run
    return found


@_compiled
def count_from(
    base_address: int, base_code: int, model_address: int, model_code: int, count: int, borders: Any, counts: Any
) -> None:
    """Add to `counts` how many magnitudes of a task vector are at least each of the borders."""
    size = min(RUN_ELEMENTS, count)
    values, bits = np.empty((2, size), np.float32), np.empty(size, np.uint32)
    for start in range(0, count, RUN_ELEMENTS):
        if count - start < size:
            size = count - start
            values, bits = np.empty((2, size), np.float32), np.empty(size, np.uint32)
        _read_magnitudes(base_address, base_code, model_address, model_code, start, values, bits)
        for place in range(borders.size):
            counts[place] += _count_at_least(bits, borders[place])


@_compiled
def collect(
    base_address: int,
    base_code: int,
    model_address: int,
    model_code: int,
    count: int,
    least: Any,
    most: Any,
    found: Any,
    filled: Any,
) -> Any:
    """Write the magnitudes of a task vector in [least, most] into `found` from `filled` on, and return where they end.

    There is room for all of them and one more.
    """
    size = min(RUN_ELEMENTS, count)
    values, bits = np.empty((2, size), np.float32), np.empty(size, np.uint32)
    for start in range(0, count, RUN_ELEMENTS):
        if count - start < size:
            size = count - start
            values, bits = np.empty((2, size), np.float32), np.empty(size, np.uint32)
        _read_magnitudes(base_address, base_code, model_address, model_code, start, values, bits)
        for i in range(size):
            # Written whether it belongs or not, and only kept by moving on: no branch that cannot be foretold.
            found[filled] = bits[i]
            filled += np.int64((bits[i] >= least) & (bits[i] <= most))
    return filled


@_compiled
def index_of(
    base_address: int, base_code: int, model_address: int, model_code: int, count: int, value: Any, tie: Any
) -> Any:
    """Return the index of the tie-th magnitude (from 1) that is exactly `value`, or −1; and the ties still to find."""
    size = min(RUN_ELEMENTS, count)
    values, bits = np.empty((2, size), np.float32), np.empty(size, np.uint32)
    for start in range(0, count, RUN_ELEMENTS):
        if count - start < size:
            size = count - start
            values, bits = np.empty((2, size), np.float32), np.empty(size, np.uint32)
        _read_magnitudes(base_address, base_code, model_address, model_code, start, values, bits)
        equal = _count_equal(bits, value)
        if equal < tie:
            tie -= equal
            continue
        for i in range(size):
            tie -= int(bits[i] == value)
            if tie == 0:
                return start + i, 0
    return -1, tie


@_part
def _multiply_and_add(one: Any, other: Any, mixed: Any, ones: Any, others: Any) -> None:
    for start in range(0, SUMMED, 16):
        for lane in range(16):
            first, second = np.float64(one[start + lane]), np.float64(other[start + lane])
            mixed[lane] += first * second
            ones[lane] += first * first
            others[lane] += second * second


@_compiled
def products(base_address: int, base_code: int, model_address: int, model_code: int, count: int, sums: Any) -> Any:
    """Write Σθ₀θ₁, Σθ₀² and Σθ₁² of every run of `SUMMED` elements into `sums`, float64 [3, runs].

    Sixteen lanes are summed apart and then added pairwise: a fixed order. Returns whether all elements are finite.
    """
    values = np.empty((2, SUMMED), np.float32)
    lanes = np.empty((3, 16), np.float64)
    finite = True
    for run in range(sums.shape[1]):
        start = SUMMED * run
        size = min(SUMMED, count - start)
        for i in range(size, SUMMED):
            values[0, i], values[1, i] = np.float32(0), np.float32(0)
        finite &= _widen(base_address, base_code, start, values[0][:size])
        finite &= _widen(model_address, model_code, start, values[1][:size])
        for kind in range(3):
            for lane in range(16):
                lanes[kind, lane] = 0.0
        _multiply_and_add(values[0], values[1], lanes[0], lanes[1], lanes[2])
        for kind in range(3):
            for half in (8, 4, 2, 1):
                for lane in range(half):
                    lanes[kind, lane] += lanes[kind, lane + half]
            sums[kind, run] = lanes[kind, 0]
    return finite
