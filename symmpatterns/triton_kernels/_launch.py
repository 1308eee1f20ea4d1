"""Launches a kernel again with other operands, without what Triton does for each launch.

``kernel[grid](...)`` binds and specialises every argument and encodes every TMA descriptor: 100 us of the host for
kernels like these. What it decides depends on shapes, strides, dtypes and alignment alone. So the first call of each
such signature goes that way and is recorded; the later ones hand Triton's own launcher the same arguments with the
operands' addresses exchanged. Where a launch cannot be repeated, every call takes the first way.

All private names of Triton are in `_call_of`, `_compile` and `_leave_filters_of_warnings`: Triton 3.6 generates a launcher
for each kernel, later versions have one for all.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from symmpatterns import compat, config, early_launch
from symmpatterns.triton_kernels._background import exclusive, is_background, is_expected, submit
from symmpatterns.triton_kernels._sync import INTERPRETED
from symmpatterns.triton_kernels._workspace import WorkspaceLike

_SIGNATURES = 4096  # of a workspace, and addresses of a descriptor, that are remembered at a time
_TORCH_ALIGNMENT = 512  # of what torch allocates
_ALIGNMENT = 16  # Triton compiles other code for addresses that are no multiple of this


def early(state: torch.Tensor, num_bytes: int) -> dict[str, bool]:
    """Options of a launch of a call that sends `num_bytes`: it need not wait for the kernel before, which the kernel does
    itself (`_sync.await_kernel_before`)."""
    return {"launch_pdl": True} if not INTERPRETED and early_launch.pays(num_bytes, state.device) else {}


class Launcher(Protocol):
    """Starts one kernel: `launch_kernel` itself, a recorder's, or `compile_kernel`, which only gets it ready."""

    def __call__(
        self, kernel: Any, programs: int, sources: dict[str, int], args: Sequence[Any], constants: dict[str, Any]
    ) -> None: ...


def launch_kernel(
    kernel: Any, programs: int, sources: dict[str, int], args: Sequence[Any], constants: dict[str, Any]
) -> None:
    """kernel[(programs,)](*args, **constants). `sources`: parameters that hold an operand, with the operand's index."""
    _compile_alone(kernel, programs, args, constants)
    kernel[(programs,)](*args, **constants)


def _compile_alone(kernel: Any, programs: int, args: Sequence[Any], constants: dict[str, Any]) -> None:
    """Before a launch, while the thread may be compiling the kernel: the launch itself finds it compiled."""
    if is_expected(kernel):
        with exclusive(kernel):
            kernel.warmup(*args, grid=(programs,), **constants)


def compile_kernel(
    kernel: Any, programs: int, sources: dict[str, int], args: Sequence[Any], constants: dict[str, Any]
) -> None:
    """Has what `launch_kernel` would launch compiled in the background. Nobody looks into the memory of operands."""
    _leave_filters_of_warnings()
    device = triton.runtime.driver.active.get_current_device()
    submit(kernel, functools.partial(_compile, device, kernel, programs, args, constants))


_with_launcher: set[Any] = set()  # compiled kernels


def _compile(device: int, kernel: Any, programs: int, args: Sequence[Any], constants: dict[str, Any]) -> None:
    torch.cuda.set_device(device)
    compiled = kernel.warmup(*args, grid=(programs,), **constants)
    # Triton 3.6 has a C compiler make a launcher for each signature, and caches that too.
    if compiled is not None and compiled.hash not in _with_launcher:
        _with_launcher.add(compiled.hash)
        triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)


class _Warnings:
    """The module `warnings` for Triton's code generator, which leaves its filters alone in the background."""

    def __getattr__(self, name: str) -> Any:
        return getattr(warnings, name)

    def catch_warnings(self, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if is_background() else warnings.catch_warnings(*args, **kwargs)

    def simplefilter(self, *args: Any, **kwargs: Any) -> None:
        if not is_background():
            warnings.simplefilter(*args, **kwargs)


@functools.cache
def _leave_filters_of_warnings() -> None:
    """Triton 3.6 sets and restores the process's filters at each node of a kernel's source. Were the main thread to leave
    a context of its own meanwhile, that one's filters would come back when Triton restores them, and stay."""
    from triton.compiler import code_generator

    if hasattr(code_generator, "warnings"):
        code_generator.warnings = _Warnings()


class _Address:
    """Stands for a tensor where Triton asks for nothing but the address."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class _Descriptor:
    """A TMA descriptor of an operand: encoded once for each address."""

    def __init__(self, descriptor: TensorDescriptor, encode: Callable[[Any], Any]) -> None:
        self._descriptor = copy.copy(descriptor)
        self._descriptor.base = None  # the operand may be freed
        self._encode = encode
        self._encoded: dict[int, Any] = {}

    def at(self, address: int) -> Any:
        encoded = self._encoded.get(address)
        if encoded is None:
            if len(self._encoded) >= _SIGNATURES:
                self._encoded.clear()
            moved = copy.copy(self._descriptor)
            moved.base = _Address(address)
            encoded = self._encoded[address] = self._encode(moved)
        return encoded


class _Call:
    """Triton's launcher of one compiled kernel: ``call(*head, *arguments)`` or ``call(*head, arguments)``."""

    def __init__(
        self,
        call: Any,
        head: list[Any],
        packed: bool,
        encoders: list[Callable[[Any], Any] | None],
        scratch: tuple[int, int],
    ) -> None:
        self.call = call
        self.head = head  # [3] is the stream
        self.packed = packed
        self.encoders = encoders  # of the descriptors, in the order of the parameters
        self.scratch = scratch  # bytes of memory that the kernel asks for, and where in `head` its address belongs


def _call_of(compiled: Any, programs: int) -> _Call | None:
    """None for a kernel that Triton launches in a way that is not known here."""
    from triton.backends.nvidia import driver

    run = compiled.run
    if run.profile_scratch_size or run.global_scratch_align > _TORCH_ALIGNMENT or getattr(run, "gsan_enabled", False):
        return None
    scratch = programs * run.num_ctas * run.global_scratch_size
    metas = getattr(compiled.metadata, "tensordesc_meta", None) or []
    extra = len(inspect.signature(driver.make_tensordesc_arg).parameters) - 2

    def encoder(meta: Any) -> Callable[[Any], Any] | None:
        if meta is None:
            return None
        return lambda descriptor: driver.make_tensordesc_arg(descriptor, meta, *[None] * extra)[0]

    head = [programs, 1, 1, 0, compiled.function, run.launch_cooperative_grid, run.launch_pdl]
    if hasattr(run, "arg_annotations"):
        head += [compiled.packed_metadata, None, None, None, None, None, run.arg_annotations, run.kernel_signature]
        return _Call(triton.runtime.driver.active.utils.launch, head, True, [encoder(m) for m in metas], (scratch, 11))
    head += [None, None, compiled.packed_metadata, None, None, None]
    call = run.launch
    if inspect.isfunction(call):  # a wrapper that encodes descriptors
        call = inspect.getclosurevars(call).nonlocals.get("launcher")
    if not inspect.isbuiltin(call):
        return None
    return _Call(call, head, False, [encoder(m) for m in metas], (scratch, 7))


class _Step:
    """One launch, to be repeated."""

    def __init__(
        self, call: _Call, arguments: Sequence[Any], sources: Sequence[int | None], pointers: Sequence[int]
    ) -> None:
        """`sources`: the index of the operand that each argument holds."""
        self._call = call.call
        self._head = call.head
        self._packed = call.packed
        self._scratch = call.scratch
        self._args: list[Any] = [] if self._packed else list(self._head)
        self._pointers: list[tuple[int, int, int]] = []  # position among the arguments, operand, bytes from its start
        self._descriptors: list[tuple[int, int, int, _Descriptor]] = []
        encoders = iter(call.encoders)
        for value, source in zip(arguments, sources, strict=True):
            position = len(self._args)
            if isinstance(value, TensorDescriptor):
                encode = next(encoders, None)
                if source is None or encode is None:
                    raise LookupError("a descriptor of no operand, or one that is not encoded")
                offset = value.base.data_ptr() - pointers[source]
                self._descriptors.append((position, source, offset, _Descriptor(value, encode)))
                self._args += [None, *value.shape, *value.strides]
            elif isinstance(value, torch.Tensor):
                if source is not None:
                    self._pointers.append((position, source, value.data_ptr() - pointers[source]))
                self._args.append(value.data_ptr())  # a table of the workspace stays where it is
            else:
                self._args.append(value)

    def __call__(self, pointers: Sequence[int], device: torch.device, stream: int) -> None:
        args = self._args.copy()
        for position, operand, offset in self._pointers:
            args[position] = pointers[operand] + offset
        for position, operand, offset, descriptor in self._descriptors:
            args[position] = descriptor.at(pointers[operand] + offset)
        head = self._head.copy() if self._packed else args
        head[3] = stream
        size, place = self._scratch
        if size:
            # Freed when this returns, which is safe: the allocator hands it out again behind this launch on the stream.
            scratch = torch.empty(size, dtype=torch.int8, device=device)
            head[place] = scratch.data_ptr()
        if self._packed:
            self._call(*head, args)
        else:
            self._call(*args)


class _Recorder:
    """Starts kernels and keeps what is needed to repeat them; `steps` is empty if one of them cannot be."""

    def __init__(self, pointers: Sequence[int]) -> None:
        self._pointers = pointers
        self._repeatable = True
        self._steps: list[_Step] = []

    @property
    def steps(self) -> tuple[_Step, ...]:
        return tuple(self._steps) if self._repeatable else ()

    def launch(
        self, kernel: Any, programs: int, sources: dict[str, int], args: Sequence[Any], constants: dict[str, Any]
    ) -> None:
        _compile_alone(kernel, programs, args, constants)
        compiled = kernel[(programs,)](*args, **constants)
        call = _call_of(compiled, programs)
        if call is None:
            self._repeatable = False
            return
        names = kernel.arg_names
        bound = dict(zip(names, args)) | constants
        try:
            step = _Step(call, [bound[n] for n in names], [sources.get(n) for n in names], self._pointers)
        except LookupError:
            self._repeatable = False
        else:
            self._steps.append(step)


def _is_observed() -> bool:
    """Whether somebody (a profiler) asked Triton to be told of each launch."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


def repeat(
    workspace: WorkspaceLike,
    options: Hashable,
    operands: Sequence[torch.Tensor | None],
    first: Callable[[Launcher], None],
    stream: torch.cuda.Stream | None = None,
) -> None:
    """``first(launch_kernel)``, or what it launched when it was called with like operands before.

    On the current stream, or on `stream`, where a kernel may not ask for scratch memory. `options` and the operands'
    shapes, strides, dtypes and devices have to decide all that `first` does, its checks too; the numbers in `first`'s
    `sources` are indices of `operands`. The workspace keeps what is remembered; one that keeps no launches has the
    kernels compiled only.
    """
    if INTERPRETED:
        first(launch_kernel)
        return
    launches = workspace.launches
    if launches is None:
        first(compile_kernel)
        return
    signature: list[Hashable] = [options, workspace.site, config.timeout_s, config.early_launch]
    pointers = []
    bits = 0
    for operand in operands:
        pointer = 0
        if operand is None:
            signature.append(None)
        else:
            pointer = operand.data_ptr()
            signature.append((operand.shape, operand.stride(), operand.dtype, operand.get_device()))
        pointers.append(pointer)
        bits |= pointer
    device = workspace.state.get_device()
    if bits % _ALIGNMENT or compat.current_cuda_device() != device or _is_observed():
        with torch.cuda.stream(stream):
            first(launch_kernel)
        return
    key = tuple(signature)
    steps = launches.get(key)
    if steps is None:
        recorder = _Recorder(pointers)
        with torch.cuda.stream(stream):
            first(recorder.launch)
        if len(launches) >= _SIGNATURES:
            launches.clear()
        launches[key] = recorder.steps
    elif steps:
        raw = compat.current_raw_stream(device) if stream is None else stream.cuda_stream
        for step in steps:
            step(pointers, workspace.state.device, raw)
    else:
        with torch.cuda.stream(stream):
            first(launch_kernel)
