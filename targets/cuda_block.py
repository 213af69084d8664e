"""The vocabulary of GPU kernels: one text that a GPU and a plain CPU both run.

A kernel is a grid of blocks of threads, written as phases: what every thread does up to a barrier.
On a GPU a phase is the threads' code with a barrier after it. In the serial reading, which LLVM
compiles for any CPU, a phase is a loop over the threads, and what a thread keeps from phase to
phase has a copy for each. Between barriers threads may not see each other's writes, so the loop
computes exactly what the GPU must: kernels are tested without one. What only threads of a warp do
together (tensor cores) is a step between phases too.

The serial reading says nothing of races inside a phase (every index that a phase both writes and
reads must belong to one thread), of memory limits, or of speed.

Kernels of a stream overlap (programmatic dependent launch, of CUDA's programming guide) on GPUs
that can: a grid starts while the one before it drains, and waits for it before it reads what
kernels write (``Block.wait``). ``finish`` says so to TVM.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import tvm
from tvm.backend.cuda.op import cuda_func_call
from tvm.ir import Expr
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from mxcompile.targets import cpu_norm
from mxcompile.targets.cpu_norm import int64

PHASED: Final = "mxcompile.phased"
"""The attribute of functions that have all barriers that they need."""

WARP: Final = 32
"""Threads that run in step."""

LANES: Final = (16, 8, 4, 2, 1)
"""What tells the threads of a warp apart, for ``Block.across``."""

_MMA: Final = """
__device__ __forceinline__ void mxcompile_mma(int* c, const int* a, const int* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
"""


_RELEASE: Final = "mxcompile_release"
_WAIT: Final = "mxcompile_wait"
_RESIDENT: Final = "mxcompile_resident_"
"""CUDA functions that ``finish`` finds in a kernel; the last one, named with a number, is empty."""

_OVERLAPS: Final = 90
"""From this compute capability on, ten times over, a GPU overlaps kernels."""

_TAGS: Final = "tirx.kernel_launch_params"


@dataclass(frozen=True, slots=True)
class Private:
    """Values of one type that each thread keeps from phase to phase."""

    buffer: Any
    count: int
    serial: bool

    def at(self, thread: Expr, index: int | Expr) -> Any:
        """Where a thread's value lies in the buffer."""
        return thread * self.count + index if self.serial else int64(index)

    def get(self, thread: Expr, index: int | Expr = 0, lanes: int = 1) -> Expr:
        """A thread's value, or neighbours."""
        return load(self.buffer, self.at(thread, index), lanes=lanes)

    def set(self, thread: Expr, value: Expr, index: int | Expr = 0) -> None:
        """Replace a thread's value, or neighbours, as many as ``value`` has lanes."""
        store(self.buffer, value, self.at(thread, index))

    def add(self, thread: Expr, value: Expr, index: int | Expr = 0) -> None:
        """Add to a thread's value."""
        self.set(thread, self.get(thread, index) + value, index)

    def fill(self, thread: Expr, value: Expr) -> None:
        """Set all of a thread's values."""
        for index in range(self.count):
            self.set(thread, value, index)


@dataclass(frozen=True, slots=True)
class Block:
    """A block of threads inside a kernel: its place in the grid, and what it can do."""

    index: tuple[Expr, ...]
    threads: int
    serial: bool
    thread: Expr | None

    def phase(self, body: Callable[[Expr], None], *, barrier: bool = True) -> None:
        """Run ``body(thread)`` on every thread.

        Without the barrier no thread may read in a later phase what another wrote in this one.
        """
        if self.thread is None:
            with T.serial(0, self.threads) as t:
                body(t)
            return
        body(self.thread)
        if barrier:
            T.evaluate(T.tvm_storage_sync("shared"))

    def wait(self) -> None:
        """From here on read what earlier kernels wrote, and write memory."""
        if not self.serial:
            _depend(_WAIT, "wait")

    def unrolled(self, count: int) -> Any:
        """A loop that a GPU unrolls, so that what it counts may number registers."""
        return T.serial(0, count) if self.serial else T.unroll(0, count)

    def shared(self, *shape: int, dtype: str = "float32") -> Any:
        """Memory that all threads of the block see.

        TVM may put what is used later in the place of what is used no more: the barrier between
        them is the caller's.
        """
        scope = "global" if self.serial else "shared"
        return T.alloc_buffer([int64(d) for d in shape], dtype, scope=scope)

    def private(self, count: int, dtype: str = "float32") -> Private:
        """Registers of each thread."""
        size = count * self.threads if self.serial else count
        scope = "global" if self.serial else "local"
        buffer = T.alloc_buffer([int64(size)], dtype, scope=scope)
        return Private(buffer, count, self.serial)

    def reduce(
        self, values: Private, combine: Callable[[Expr, Expr], Expr], start: float
    ) -> Callable[..., Expr]:
        """Combine the threads' float32 values, each with its likes.

        What is returned gives every thread of later phases the result of an index, of the first by
        default.
        """
        parts = self.shared(values.count, self.threads // WARP)

        def fold(index: int = 0) -> Expr:
            total = registers(1, "float32")
            store(total, T.float32(start), 0)
            with T.unroll(0, self.threads // WARP) as i:
                store(total, combine(total[0], parts[index, i]), 0)
            return total[0]

        def keep(t: Expr) -> None:
            with when(t % WARP == 0):
                for index in range(values.count):
                    store(parts, values.get(t, index), index, t // WARP)

        self.across(values, LANES, combine)
        self.phase(lambda t: None)  # what is kept may lie where threads still read, see ``shared``
        self.phase(keep)
        return fold

    def across(
        self, values: Private, lanes: Sequence[int], combine: Callable[[Expr, Expr], Expr]
    ) -> None:
        """Combine every value with those of the threads whose number differs in bits of ``lanes``.

        These are distinct powers of two below ``WARP``; ``combine`` commutes, so that the threads
        end up with the same. Every thread of a warp takes part.
        """
        for lane in lanes:
            if self.thread is not None:
                for index in range(values.count):
                    mine = values.get(self.thread, index)
                    other = T.call_extern(
                        str(mine.ty.dtype), "__shfl_xor_sync", T.uint32(2**32 - 1), mine, lane
                    )
                    values.set(self.thread, combine(mine, hold(other)), index)
                continue
            # Each pair once: the thread that has not the bit, and the one that has it.
            with T.serial(0, self.threads // 2) as pair:
                low = hold(pair // lane * (2 * lane) + pair % lane)
                with T.serial(0, values.count) as index:
                    both = hold(combine(values.get(low, index), values.get(low + lane, index)))
                    values.set(low, both, index)
                    values.set(low + lane, both, index)

    def dp4a(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """``c`` plus the dot product of four signed bytes of each word."""
        if not self.serial:
            return T.call_pure_extern("int32", "__dp4a", a, b, c)
        for shift in (24, 16, 8, 0):
            c = c + (a << shift >> 24) * (b << shift >> 24)
        return c

    def mma(self, c: Private, a: Private, a_at: int | Expr, b: Private) -> None:
        """Every warp adds a product of int8 matrices to int32: C[16, 8] += A[16, 32] B[32, 8].

        Fragments lie in the warp's threads as the PTX ISA lays out ``mma.m16n8k32``; four bytes
        of A from ``a_at``, of B and of C each fill a register.
        """
        if not self.serial:
            places = ((c, 0), (a, a_at), (b, 0))
            pointers = [T.address_of(p.buffer[int64(i)]) for p, i in places]
            T.evaluate(cuda_func_call("mxcompile_mma", *pointers, source_code=_MMA))
            return

        def byte(matrix: Private, thread: Expr, register: Expr, position: Expr) -> Expr:
            word = matrix.get(thread, register)
            return word << (24 - position * 8) >> 24

        with T.grid(self.threads // WARP, WARP, 4, WARP) as (warp, lane, i, k):
            row, column = lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2
            quad = k % 16 // 4
            left = a_at + row // 8 + k // 16 * 2
            first = warp * WARP
            x = byte(a, first + row % 8 * 4 + quad, left, k % 4)
            y = byte(b, first + column * 4 + quad, k // 16, k % 4)
            c.add(first + lane, x * y, i)


def build(emit: Callable[[], None]) -> PrimFunc:
    """Make a kernel: ``emit`` declares its parameters and launches grids."""
    return cpu_norm.build(emit).with_attr(PHASED, True)


def launch(
    grid: Sequence[int | Expr],
    threads: int,
    serial: bool,
    body: Callable[[Block], None],
    *,
    waits: bool = False,
    resident: int = 0,
) -> None:
    """Run ``body`` for every block of a grid of one to three dimensions.

    A body that ``waits`` calls ``Block.wait`` itself, once, after what needs no other kernel. If
    ``resident`` is given, registers are few enough for so many blocks on a multiprocessor: those of
    the kernels before and after find room beside them.
    """
    with ExitStack() as stack:
        if serial:
            index = [stack.enter_context(T.serial(int64(0), int64(n))) for n in grid]
            body(Block(tuple(index), threads, serial, None))
            return
        index = [
            stack.enter_context(T.launch_thread(f"blockIdx.{axis}", int64(n)))
            for axis, n in zip("xyz", grid, strict=False)
        ]
        thread = stack.enter_context(T.launch_thread("threadIdx.x", threads))
        if resident:
            _call(f"{_RESIDENT}{resident}", "")
        _depend(_RELEASE, "launch_dependents")
        block = Block(tuple(index), threads, serial, thread)
        if not waits:
            block.wait()
        body(block)


def _depend(name: str, instruction: str) -> None:
    """Call an instruction that GPUs before Hopper do without."""
    guarded = f"""
#if __CUDA_ARCH__ >= {10 * _OVERLAPS}
  asm volatile("griddepcontrol.{instruction};" ::: "memory");
#endif
"""
    _call(name, guarded)


def _call(name: str, body: str) -> None:
    """Call a CUDA function of no arguments."""
    source = f"__device__ __forceinline__ void {name}() {{{body}}}\n"
    T.evaluate(cuda_func_call(name, source_code=source))


@tvm.tirx.transform.prim_func_pass(opt_level=0)  # type: ignore[untyped-decorator]
def finish(function: PrimFunc, _mod: tvm.IRModule, _context: Any) -> PrimFunc:
    """A pass over device code, which has what ``launch`` asked for said in attributes.

    A kernel that waits for the one before it starts while that runs, where the GPU can. Its
    parameters may not be declared free of aliases then: compilers take what is read through such a
    pointer, and never written, for constant, and read it before the wait.
    """
    text = str(function.body)
    if found := re.search(f'"{_RESIDENT}(\\d+)"', text):
        function = function.with_attr("tirx.launch_bounds_min_blocks_per_sm", int(found[1]))
    arch = str(function.attrs["target"].attrs.get("arch", ""))
    if int(arch.removeprefix("sm_") or 0) < _OVERLAPS or f'"{_WAIT}"' not in text:
        return function
    tags = [*function.attrs[_TAGS], "tirx.use_programtic_dependent_launch"]
    return function.with_attr(_TAGS, tags).with_attr("tirx.noalias", False)


def byte_perm(low: Expr, high: Expr, selector: Expr, serial: bool) -> Expr:
    """Four bytes of the eight of two uint32; each nibble of a selector, 0 to 7, picks one."""
    if not serial:
        return T.call_pure_extern("uint32", "__byte_perm", low, high, selector)
    result = T.uint32(0)
    for byte in range(4):
        index = hold(selector >> T.uint32(4 * byte) & T.uint32(7))
        word = T.Select(index < T.uint32(4), low, high)
        picked = word >> ((index & T.uint32(3)) * T.uint32(8)) & T.uint32(255)
        result = result | picked << T.uint32(8 * byte)
    return result


def hold(value: Expr) -> Expr:
    """Compute a value now, into a register, to be used any number of times in this phase."""
    dtype = value.ty.dtype
    element = str(dtype).split("x")[0]
    register = T.alloc_buffer([int64(dtype.lanes)], element, scope="local")
    store(register, value, 0)
    return load(register, 0, lanes=dtype.lanes)


def registers(count: int, dtype: str) -> Any:
    """Registers that live within a phase."""
    return T.alloc_buffer([int64(count)], dtype, scope="local")


def load(buffer: Any, *index: int | Expr, lanes: int = 1) -> Expr:
    """Load neighbours in the last dim."""
    *lead, last = (int64(i) for i in index)
    return buffer[(*lead, T.Ramp(last, _one_like(last), lanes) if lanes > 1 else last)]


def store(buffer: Any, value: Expr, *index: int | Expr) -> None:
    """Store neighbours in the last dim, as many as ``value`` has lanes."""
    *lead, last = (int64(i) for i in index)
    lanes = value.ty.dtype.lanes
    place = T.Ramp(last, _one_like(last), lanes) if lanes > 1 else last
    T.buffer_store(buffer, value, [*lead, place])


def _one_like(index: Expr) -> Expr:
    return T.int64(1) if str(index.ty.dtype) == "int64" else T.int32(1)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Emit what follows under a condition."""
    with T.If(condition), T.Then():
        yield


def strided(thread: Expr, threads: int, extent: Expr, body: Callable[[Expr], None]) -> None:
    """Share ``extent`` pieces of work between the threads; neighbours get neighbours."""
    zero = T.Cast(extent.ty.dtype, T.int32(0))
    with T.serial(zero, (extent - thread + (threads - 1)) // threads) as i:
        body(hold(i * threads + thread))
