"""2:4 in registers: the selection, and the product on sparse tensor cores.

Pallas has neither, so both go through `inline_mgpu`. Of each four neighbours in a row,
two values are stored, and two bits for the position of either (`pack_2_4`).

For 64 rows and 64 columns, the sparse wgmma takes one 32-bit word of positions from
each of 128 threads. Rows r and r + 8 belong to a quad of four threads:

    columns    0 .. 15    16 .. 31    32 .. 47    48 .. 63
    row r      thread 0   thread 1    thread 2    thread 3    lower 16 bits
    row r + 8  thread 0   thread 1    thread 2    thread 3    upper 16 bits
               instruction 1 (k32)    instruction 2 (k32)
               selector 0             selector 1

Sources: PTX ISA, "Matrix fragments for sparse wgmma.mma_async.m64nNk32"; CUTLASS,
`ELayout_64x32`. The order was verified on an H200.

An accumulator of wgmma is spread otherwise: of each 8 columns, thread t of the quad has
columns 2 t and 2 t + 1. Two rounds of shuffles transpose the quad, after which thread t
has just the 16 columns of its word in both rows. So each thread selects, packs and
stores its own groups of four, and asks no other thread:

    sums (64 x 64) --2 rounds of shuffles--> 16 columns of 2 rows a thread
      --select--> values (64 x 32), words (128), S-STE's sums (64 x 8)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, mma_utils
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.mosaic.gpu.wgmma import wgmma_fence
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from ..._mosaic.base import plgpu
from ..packed import GROUP, KEPT

# Threads of a warpgroup.
THREADS = 128
# Rows and columns whose positions 128 threads hold in one word each.
ROWS = 64
WORD_COLUMNS = 64
# Values that are stored of these columns: two of each four.
STORED = WORD_COLUMNS * KEPT // GROUP
# Columns whose positions one thread holds.
CHUNK = 16
# Columns of the sparse matrix that one instruction contracts.
SPARSE_DEPTH = 32
# A word with positions 0 and 1 in every group, for what lies past the end: the two
# positions of a group must differ.
FIRST_TWO = 0x44444444
LAYOUT = plgpu.Layout.WGMMA
# Shapes and layouts of what `select` returns.
SELECTED_VALUES = (ROWS, STORED), plgpu.Layout.WGMMA_UPCAST_4X
SELECTED_WORDS = (THREADS,), plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
SELECTED_SUMS = (ROWS, 8), LAYOUT


def words_of(indices: jax.Array, columns: int) -> jax.Array:
    """Return Packed24's indices as the sparse tensor cores take them.

    indices: uint8 (rows, bytes), four positions a byte.
    columns: a multiple of 128 to which the columns are filled up. The rows are filled
        up to a multiple of 128 too.

    Returns int32 (row blocks of 64, column blocks of 64, 128 threads).
    """
    rows, size = indices.shape
    missing = -rows % (2 * ROWS), columns // 8 - size
    fill = np.uint8(FIRST_TWO & 0xFF)
    padded = jnp.pad(indices, [(0, n) for n in missing], constant_values=fill)
    halves = padded.reshape(-1, 4, 2, 8, columns // WORD_COLUMNS, 4, 2)
    # (row block, column block, warp, row, thread of the quad, half, byte)
    ordered = halves.transpose(0, 4, 1, 3, 5, 2, 6).reshape(-1, 4)
    words = lax.bitcast_convert_type(ordered, jnp.int32)
    return words.reshape(padded.shape[0] // ROWS, columns // WORD_COLUMNS, THREADS)


def indices_of(words: jax.Array) -> jax.Array:
    """Return the indices, uint8 (rows, bytes), of words: the inverse of `words_of`."""
    blocks, columns = words.shape[:2]
    ordered = lax.bitcast_convert_type(words, jnp.uint8)
    halves = ordered.reshape(blocks, columns, 4, 8, 4, 2, 2)
    return halves.transpose(0, 2, 5, 3, 1, 4, 6).reshape(blocks * ROWS, columns * 8)


def select(x, shrink: bool = False):
    """Select the two largest of each four neighbours in the rows of x.

    x: (64, 64) numbers >= 0 in 16 bits. Of equal ones the first are kept.
    shrink: whether the group's second smallest number is subtracted from both.

    Returns the values (64, 32) and a word of positions for each thread, int32 (128,).
    With `shrink`, also S-STE's sums of x S and S S over the 16 columns of a thread,
    float32 (64, 8).
    """
    returns = [_struct(x.dtype, *SELECTED_VALUES), _struct(jnp.int32, *SELECTED_WORDS)]
    if shrink:
        returns.append(_struct(jnp.float32, *SELECTED_SUMS))
    inline = plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=tuple(returns))
    return inline(partial(select_two_of_four, shrink=shrink))(x)


def _struct(dtype, shape, layout):
    return plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)


def select_two_of_four(ctx, x, *, shrink: bool):
    """Emit `select` in Mosaic GPU's dialects, for the registers of one thread."""
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    pairs = [mgpu.bitcast(r, i32) for r in x.registers.flat]
    # Registers come by block of 8 columns, and in it by row r or r + 8.
    mine = _transpose_in_quad([pairs[i::2] for i in range(2)])
    element = x.mlir_dtype
    stored, halves, sums = [], [], []
    for row in mine:
        values, positions, of_row = _select_chunk(row, element, shrink)
        eight = ir.VectorType.get((8,), element)
        four = ir.VectorType.get((4,), i32)
        stored.append(mgpu.bitcast(vector.from_elements(four, values), eight))
        halves.append(positions)
        if shrink:
            two = ir.VectorType.get((2,), ir.F32Type.get())
            sums.append(vector.from_elements(two, of_row))
    word = arith.ori(halves[0], arith.shli(halves[1], _i32(16)))
    one = vector.from_elements(ir.VectorType.get((1,), i32), [word])
    found = [
        _array(stored, *SELECTED_VALUES),
        _array([one], *SELECTED_WORDS, is_signed=True),
    ]
    if shrink:
        found.append(_array(sums, *SELECTED_SUMS))
    return tuple(found)


def _array(registers, shape, layout, is_signed=None):
    layout = layout.to_mgpu()
    registers = np.array(registers, dtype=object).reshape(layout.registers_shape(shape))
    return fragmented_array.FragmentedArray(
        _registers=registers, _layout=layout, _is_signed=is_signed
    )


def _i32(x: int):
    return arith.constant(ir.IntegerType.get_signless(32), x)


def _thread():
    return arith.remui(mgpu.thread_idx(), _i32(THREADS))


def _transpose_in_quad(rows):
    """Exchange registers in a quad, so that thread t gets columns 16 t to 16 t + 15.

    rows: for each of two rows, a register for each of 8 blocks of 8 columns. It holds
        columns 2 t and 2 t + 1 of the block.

    Returns 8 registers for each row. Number i holds columns 16 t + 2 i and its right
    neighbour.
    """
    chunks = [[row[2 * c], row[2 * c + 1]] for row in rows for c in range(4)]
    chunks = [[chunks[c][n], chunks[4 + c][n]] for c in range(4) for n in range(2)]
    # items[c] is for thread c: its first block in rows r and r + 8, then its second.
    items = [chunks[2 * c] + chunks[2 * c + 1] for c in range(4)]
    for bit in (1, 2):
        odd = arith.cmpi(
            arith.CmpIPredicate.ne, arith.andi(_thread(), _i32(bit)), _i32(0)
        )
        for c in range(4):
            if c & bit:
                continue
            for n, (low, high) in enumerate(zip(items[c], items[c | bit], strict=True)):
                got = mgpu.shfl_bfly(arith.select(odd, low, high), bit)
                items[c][n] = arith.select(odd, got, low)
                items[c | bit][n] = arith.select(odd, high, got)
    # items[c] now comes from thread c: block 2 t in rows r and r + 8, then 2 t + 1.
    return [
        [item[2 * block + row] for block in range(2) for item in items]
        for row in range(2)
    ]


def _select_chunk(pairs, element, shrink: bool) -> Any:
    """Select in 16 columns of a row, given as 8 pairs.

    Returns 4 registers of values, 16 bits of positions, and S-STE's two sums.
    """
    values, positions = [], _i32(0)
    zero = arith.constant(ir.F32Type.get(), 0.0)
    overlap = energy = zero
    for group in range(4):
        first, second, third = _largest_three(*pairs[2 * group : 2 * group + 2])
        # The value with the lower position, which has the higher mark, comes first.
        mark = _i32(3)
        swap = arith.cmpi(
            arith.CmpIPredicate.ult, arith.andi(first, mark), arith.andi(second, mark)
        )
        low = arith.select(swap, second, first)
        high = arith.select(swap, first, second)
        marks = arith.ori(
            arith.andi(low, mark), arith.shli(arith.andi(high, mark), _i32(2))
        )
        here = arith.shli(arith.xori(marks, _i32(15)), _i32(4 * group))
        positions = arith.ori(positions, here)
        if shrink:
            smallest = _to_float(third, element)
            wide = [_to_float(key, element) for key in (low, high)]
            shrunk = [arith.subf(x, smallest) for x in wide]
            values.append(_pack(shrunk, element))
            for x, s in zip(wide, _unpack(values[-1], element), strict=True):
                overlap = arith.addf(overlap, arith.mulf(x, s))
                energy = arith.addf(energy, arith.mulf(s, s))
        else:
            upper = arith.andi(arith.shli(high, _i32(14)), _i32(-0x10000))
            values.append(arith.ori(arith.shrui(low, _i32(2)), upper))
    return values, positions, (overlap, energy)


def _largest_three(first_pair, second_pair):
    """Return the keys of the three largest of four numbers, the largest first.

    A key is an integer that orders as its number does: the number's 16 bits, and below
    them a mark, 3 less its position, so that of equal numbers the first is larger.
    """
    keys = []
    for n, pair in enumerate((first_pair, second_pair)):
        bits = _i32(0x3FFFC)
        lower = arith.andi(arith.shli(pair, _i32(2)), bits)
        upper = arith.andi(arith.shrui(pair, _i32(14)), bits)
        keys.append(arith.ori(lower, _i32(3 - 2 * n)))
        keys.append(arith.ori(upper, _i32(2 - 2 * n)))
    a, b, c, d = keys
    higher = arith.maxui(a, b), arith.maxui(c, d)
    lower = arith.minui(a, b), arith.minui(c, d)
    first, of_higher = arith.maxui(*higher), arith.minui(*higher)
    of_lower = arith.maxui(*lower)
    return first, arith.maxui(of_higher, of_lower), arith.minui(of_higher, of_lower)


def _to_float(key, element):
    """Return the number of a key in float32."""
    i16 = ir.IntegerType.get_signless(16)
    bits = arith.trunci(i16, arith.shrui(key, _i32(2)))
    return arith.extf(ir.F32Type.get(), arith.bitcast(element, bits))


def _pack(pair, element):
    """Round two float32 to 16 bits, and put them in one register."""
    narrow = [arith.truncf(element, x) for x in pair]
    two = ir.VectorType.get((2,), element)
    i32 = ir.IntegerType.get_signless(32)
    return mgpu.bitcast(vector.from_elements(two, narrow), i32)


def _unpack(register, element):
    """Return the two numbers of a register in float32."""
    two = mgpu.bitcast(register, ir.VectorType.get((2,), element))
    return [
        arith.extf(
            ir.F32Type.get(),
            vector.extract(two, dynamic_position=[], static_position=[i]),
        )
        for i in range(2)
    ]


def sparse_dot(acc, values, words, right, transposed: bool, swizzle: int = 128):
    """Return acc + S right for 64 rows of S, once the sparse tensor cores are done.

    acc: float32 (64, n) in registers.
    values: the values of S, (64, 64), tiled in shared memory.
    words: the positions of S, int32 (2, 128), in shared memory.
    right: (128, n), or (n, 128) if transposed, tiled in shared memory.
    """
    transforms = (
        plgpu.TilingTransform((8, swizzle // jnp.dtype(values.dtype).itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )
    inline = plgpu.inline_mgpu(
        arg_types=(
            LAYOUT,
            plgpu.RefType(transforms),
            plgpu.RefType(),
            plgpu.RefType(transforms),
        ),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=LAYOUT),
    )
    fn = partial(sparse_wgmma, transposed=transposed, swizzle=swizzle)
    return inline(fn)(acc, values, words, right)


def sparse_wgmma(ctx, acc, values, words, right, *, transposed: bool, swizzle: int):
    """Emit `sparse_dot` in Mosaic GPU's dialects: four wgmma.sp and one wait."""
    del ctx
    n = acc.shape[1]
    if transposed:
        right = mgpu.memref_transpose(right, (1, 0, 3, 2))
    a = _descriptor(values, (ROWS, WORD_COLUMNS), False, swizzle)
    b = _descriptor(right, (WORD_COLUMNS, n), True, swizzle)
    word = ir.MemRefType(words.type).shape[0]
    kind = str(ir.MemRefType(values.type).element_type)
    index = ir.IndexType.get()
    at = arith.index_cast(index, _thread())
    loaded = [memref.load(words, [arith.constant(index, i), at]) for i in range(word)]
    # All words pass through an instruction that cannot be moved, before the fence.
    # Without this, a word is loaded between two wgmmas, and ptxas puts a
    # warpgroup.arrive there.
    i32 = ir.IntegerType.get_signless(32)
    loaded = [
        llvm.inline_asm(
            i32,
            [w],
            "mov.b32 $0, $1;",
            "=r,r",
            asm_dialect=0,
            has_side_effects=True,
        )
        for w in loaded
    ]
    wide = acc.to_layout(fragmented_array.WGMMA_LAYOUT_ACC_32BIT)
    wide = wgmma_fence(wide)
    registers = list(wide.registers.flat)
    for step in range(2 * word):
        # An instruction takes 16 of the 64 stored columns, which are one tile, and 32
        # of the 128 rows of `right`, which are two tiles of 64.
        a_at = _advance(a, step // 4, step % 4)
        b_at = _advance(b, step // 2, 2 * (step % 2))
        registers = _issue(
            registers, a_at, b_at, loaded[step // 2], step % 2, n, kind, b[3]
        )
    _run("wgmma.commit_group.sync.aligned;")
    _run("wgmma.wait_group.sync.aligned 0;")
    done = fragmented_array.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(wide.registers.shape),
        _layout=wide.layout,
        _is_signed=None,
    )
    done = fragmented_array.optimization_barrier(done)
    return done.to_layout(fragmented_array.WGMMA_LAYOUT)


def _run(text: str) -> None:
    """Emit an instruction without operands."""
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, [], text, "", has_side_effects=True)


def _descriptor(ref, group, is_right: bool, swizzle: int):
    """Return the wgmma descriptor of a buffer, and strides along the contracted axis.

    Returns the descriptor of the start, the bytes from one group of 16 contracted
    numbers to the next, the bytes from one tile of 64 to the next, and whether wgmma
    must transpose the buffer.
    """
    (base, strides), (_, tile), fastest = mma_utils.create_descriptor(
        ref,
        swizzle=swizzle,
        large_tile=(WORD_COLUMNS, WORD_COLUMNS),
        group_size=group,
        logical_k_major=is_right,
    )
    return base, strides[1][0], tile, fastest != mma_utils.Dim.K


def _advance(descriptor, tiles: int, instructions: int):
    """Return the descriptor so many tiles of 64 and groups of 16 further on."""
    base, step, tile, _ = descriptor
    i64 = ir.IntegerType.get_signless(64)
    offset = mma_utils.encode_addr(tiles * tile + instructions * step)
    more = llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, offset)).result
    return llvm.add(base, more, overflow_flags=llvm.IntegerOverflowFlags.none)


def _issue(registers, a, b, word, selector: int, n: int, kind: str, b_transposed: bool):
    """Emit one wgmma.sp: sums += 64 x 32 of the sparse matrix times 32 x n."""
    count = len(registers)
    sums = ", ".join(f"${i}" for i in range(count))
    a_at, b_at, word_at = (f"${2 * count + i}" for i in range(3))
    # After the selector: scale of the sums, signs of both operands, and whether either
    # is transposed.
    text = (
        f"wgmma.mma_async.sp.sync.aligned.m64n{n}k{SPARSE_DEPTH}.f32.{kind}.{kind} "
        f"{{{sums}}}, {a_at}, {b_at}, {word_at}, {selector}, 1, 1, 1, 0, "
        f"{int(b_transposed)};"
    )
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["l", "l", "r"]
    one = registers[0].type
    struct = llvm.inline_asm(
        llvm.StructType.get_literal([one] * count),
        [*registers, a, b, word],
        text,
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    return [llvm.extractvalue(one, struct, [i]) for i in range(count)]
