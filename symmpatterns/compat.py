"""Every private torch name that symmpatterns touches, in one place, with what differs between versions.

torch 2.11   ``post_grad_custom_post_pass`` takes one callable; ``has_allocation`` is no virtual of the allocator.
torch 2.13+  the hook also takes a list; ``Library.register_symm_mem_args`` exists.
torch 2.15+  in Inductor's IR a call with one output is that output itself, without a MultiOutput beside it,
             and one ``wait_tensors`` follows a coalesced collective.

docs/compatibility.md has what users notice of it.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

MINIMUM_TORCH = (2, 11)
_guards: Any = torch._C._dynamo.guards


def torch_version() -> tuple[int, int]:
    """(major, minor) of the torch in use."""
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if match is None:
        raise ImportError(f"cannot read torch's version from {torch.__version__!r}")
    return int(match[1]), int(match[2])


def require_torch() -> None:
    """Raises ImportError when torch is too old or was built without torch.distributed."""
    if torch_version() < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(
            f"symmpatterns needs torch {wanted} or newer, this is torch {torch.__version__}; upgrade torch"
        )
    if not torch.distributed.is_available():
        raise ImportError("symmpatterns needs torch.distributed, which this build of torch does not have")


# --- process groups ---------------------------------------------------------------------------------------------


def resolve_process_group(name: str) -> ProcessGroup:
    """The process group of that name; raises RuntimeError if there is none."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def group_store(pg: ProcessGroup) -> Store:
    """The key-value store through which the ranks of `pg` were initialised."""
    from torch.distributed.distributed_c10d import _get_process_group_store

    return _get_process_group_store(pg)


def backend_name(pg: ProcessGroup) -> str:
    """For example "gloo", "nccl", "cpu:gloo,cuda:nccl" or "fake"."""
    from torch.distributed.distributed_c10d import _world

    return str(_world.pg_map[pg][0]) if pg in _world.pg_map else pg.name()


def live_groups() -> Any:
    """The process groups that have not been destroyed; stays up to date."""
    from torch.distributed.distributed_c10d import _world

    return _world.pg_map


def group_names() -> list[str]:
    """Of the process groups that this rank is in."""
    from torch.distributed.distributed_c10d import _world

    return list(_world.pg_names.values())


def is_fake_group(pg: ProcessGroup) -> bool:
    """Groups of torch's "fake" backend have one process that pretends: their collectives do nothing."""
    return "fake" in backend_name(pg)


def global_ranks(pg: ProcessGroup) -> list[int]:
    """The global ranks of a group's members, in group order."""
    return torch.distributed.get_process_group_ranks(pg)


def vllm_groups() -> dict[str, str]:
    """vLLM's names of its groups ("tp:0"), where it is loaded, and the names of their process groups."""
    import sys

    state = sys.modules.get("vllm.distributed.parallel_state")
    coordinators = ((name, reference()) for name, reference in getattr(state, "_groups", {}).items())
    groups = ((name, getattr(coordinator, "device_group", None)) for name, coordinator in coordinators)
    return {name: group.group_name for name, group in groups if group is not None}


# --- symmetric memory ---------------------------------------------------------------------------------------------


def symm_mem_class() -> Any:
    """torch's binding of c10d::symmetric_memory::SymmetricMemory."""
    from torch._C._distributed_c10d import _SymmetricMemory

    return _SymmetricMemory


def is_symm_mem_tensor(tensor: torch.Tensor) -> bool:
    """Whether torch allocated a CUDA tensor in symmetric memory.

    torch 2.11 has no such question. There the driver is asked whether other processes may map the memory, which is so
    for symmetric memory and not for what the caching allocator takes from cudaMalloc.
    """
    cls = symm_mem_class()
    if hasattr(cls, "is_symm_mem_tensor"):
        return bool(cls.is_symm_mem_tensor(tensor))
    return _can_be_exported(tensor.untyped_storage().data_ptr())


def _can_be_exported(address: int) -> bool:
    mask = ctypes.c_uint64(0)
    allowed_handle_types = 14  # CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES
    failed = cuda_driver().cuPointerGetAttribute(ctypes.byref(mask), allowed_handle_types, ctypes.c_uint64(address))
    return not failed and mask.value != 0


@functools.lru_cache(maxsize=1)
def cuda_driver() -> ctypes.CDLL:
    """The CUDA driver's library; OSError without it."""
    return ctypes.CDLL("libcuda.so.1")


def storage_identity(tensor: torch.Tensor) -> int:
    """The memory of `tensor`, for `storage_use_count`, as long as the tensor lives."""
    return tensor.untyped_storage()._cdata


# How many tensors and storages share a memory; without a function around it, because it is called for each buffer.
storage_use_count: Callable[[int], int] = torch._C._storage_Use_Count

# (tensor, size, stride, offset): as_strided at a third of the cost, and without `tensor` as the base of a view. From
# torch 2.15 on size and stride must be tuples, which a torch.Size is not to it.
reinterpret: Callable[..., torch.Tensor] = _guards._reinterpret_tensor


def current_raw_stream(device: int) -> int:
    """The handle of the current CUDA stream: what Triton launches on, at a tenth of the cost of a Stream object."""
    return torch._C._cuda_getCurrentRawStream(device)


def current_cuda_device() -> int:
    """torch.cuda.current_device() where CUDA is in use already, at a third of the cost."""
    return torch._C._cuda_getDevice()


def is_profiled() -> bool:
    """Whether a profiler of torch's records calls."""
    return torch.autograd.profiler._is_profiler_enabled


@functools.cache
def keep_order_of_recomputed_loops() -> None:
    """Has Inductor keep what a loop depends on when it computes the loop anew, to fuse it with one of other shape on a CPU.

    Up to torch 2.13 it forgets that the loop reads a buffer as a mutation left it: it may then run before a collective's
    wait or on the other side of a barrier. torch 2.11 forgets artificial dependencies as well, and with them that the loop
    stores into a buffer of somebody else.
    """
    if torch_version() >= (2, 15):
        return
    from torch._inductor.dependencies import StarDep, WeakDep
    from torch._inductor.scheduler import SchedulerNode
    from torch.utils._ordered_set import OrderedSet

    recompute = SchedulerNode.recompute_size_and_body

    def keeping(self: Any, *args: Any, **kwargs: Any) -> None:
        artificial = OrderedSet(dep for dep in self.read_writes.reads if isinstance(dep, (WeakDep, StarDep)))
        recompute(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.with_read(artificial).rename(self.mutation_renames))

    SchedulerNode.recompute_size_and_body = keeping  # type: ignore[method-assign]


_MEETS_PEERS = "symmpatterns_meets_peers"  # in a module's meta: what `keep_order_of_calls` was told


def keep_order_of_calls(graph: Any, calls: Sequence[Any], allocations: Mapping[str, int]) -> None:
    """Has Inductor make calls that wait for peers, and start its own collectives, in the order in which the graph has them.

    It orders its own alone. All others it may put anywhere that their arguments allow, by sizes too, of which ranks may have
    different ones: then one rank waits at one call and another at the next.

    calls        the operators that wait, Inductor's collectives too, as often as the graph calls them
    allocations  by the name of a node whose lowering allocates memory (`meets_peers`), behind how many calls it does so
    """
    if calls and graph.owning_module is not None:
        graph.owning_module.meta[_MEETS_PEERS] = frozenset(calls), len(calls), dict(allocations)
        _patch_order_of_calls()


def meets_peers(call: Any, allocates_for: str | None = None) -> None:
    """Marks a call that a lowering makes, for `keep_order_of_calls`; its operator is not one that the graph has.

    allocates_for  name of the graph's node that it allocates memory for, whose place is in `allocations`; without one the
                   call keeps the place at which it was lowered
    """
    call.symmpatterns_meets_peers = allocates_for


@functools.cache
def _patch_order_of_calls() -> None:
    from torch._inductor import comms
    from torch._inductor.dependencies import WeakDep
    from torch._inductor.virtualized import V

    order = comms.decide_global_ordering_of_comms

    def decide(nodes: list[Any], *args: Any) -> list[Any]:
        nodes = order(nodes, *args)
        known = getattr(getattr(V.graph, "module", None), "meta", {}).get(_MEETS_PEERS)
        # Of all calls back to one that stays whoever reads its results: others may be taken out.
        behind: list[str] = []
        for call in _in_order(nodes, *known) if known else ():
            for name in behind:
                call.add_fake_dep(WeakDep(name, mutating_buf=next(iter(call.get_buffer_names())), is_fake=True))
            behind = [*([] if call.has_side_effects() else behind), *_lasting_names(call)]
        return nodes

    comms.decide_global_ordering_of_comms = decide  # type: ignore[assignment]


def _lasting_names(call: Any) -> list[str]:
    """Of the results of a call those by which another one can come behind it, and behind nothing else.

    What the call has written to may be written to again. Its name is that writer's then, for who was lowered later.
    """
    own = [result.get_name() for result in call.get_outputs() if not result.get_mutations()]
    return own or list(call.get_buffer_names())


def _in_order(
    nodes: Sequence[Any], operators: Collection[Any], count: int, allocations: Mapping[str, int]
) -> list[Any]:
    """The scheduler's nodes that wait for peers, in the order of the graph; `nodes` is in the order of lowerings.

    What allocates memory was lowered when the loop that writes there may have been already. It comes where the graph says,
    and behind what counts its elements, where data do; at the beginning should the graph's calls not be found again.
    """
    from torch._inductor import comms

    found: list[tuple[float, Any]] = [
        (index, node)
        for index, node in enumerate(nodes)
        if comms.contains_collective(node) or getattr(node.node, "op_overload", None) in operators
    ]
    places = [-1.0, *(index + 0.5 for index, _ in found)]
    numbers = {symbol: index for index, node in enumerate(nodes) for symbol in node.node.get_unbacked_symbol_defs()}
    for index, node in enumerate(nodes):
        if hasattr(node.node, "symmpatterns_meets_peers"):
            marker = node.node.symmpatterns_meets_peers
            behind = allocations.get(marker, 0) if len(places) == count + 1 else 0
            counted = [numbers.get(s, -1) + 0.25 for s in node.node.get_free_symbol_uses(unbacked_only=True)]
            found.append((index if marker is None else max([places[behind], *counted]), node))
    return [node for _, node in sorted(found, key=lambda item: item[0])]


def mark_as_peers_memory(name: str) -> None:
    """Tells Inductor, while it lowers a graph, that a buffer is memory of the peers', which is not its own to manage.

    * It may not take the memory for temporaries, nor compute in it.
    * Its autotuner may not save it before trying a kernel and put it back after: what lies between the parts that the
      kernel stores is written by peers. It tries the kernel on the memory itself, which stores what it would anyway.
    * Kernels that store into such buffers are fused whatever Inductor thinks of its peak memory: it takes these for
      buffers that could be used again, large ones.
    """
    from torch._inductor.virtualized import V

    V.graph.never_reuse_buffers.add(name)
    _peers_buffers(V.graph).add(name)
    _patch_for_peers_memory()


def _peers_buffers(graph: Any) -> set[str]:
    names: set[str] = graph.__dict__.setdefault("symmpatterns_peers_buffers", set())
    return names


@functools.cache
def _patch_for_peers_memory() -> None:
    from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
    from torch._inductor.scheduler import Scheduler
    from torch._inductor.virtualized import V
    from torch.utils._ordered_set import OrderedSet

    saved, increases = SIMDKernelFeatures.get_mutations, Scheduler.can_fusion_increase_peak_memory

    def get_mutations(self: Any) -> Any:
        return OrderedSet(name for name in saved(self) if name not in _peers_buffers(V.graph))

    def stores_to_peers(node: Any) -> bool:
        stored = (name for buffer in node.get_outputs() for name in buffer.get_mutations())
        return not _peers_buffers(V.graph).isdisjoint(stored)

    def can_fusion_increase_peak_memory(self: Any, node1: Any, node2: Any) -> bool:
        return not (stores_to_peers(node1) and stores_to_peers(node2)) and increases(self, node1, node2)

    SIMDKernelFeatures.get_mutations = get_mutations  # type: ignore[method-assign]
    Scheduler.can_fusion_increase_peak_memory = can_fusion_increase_peak_memory  # type: ignore[method-assign]


_LAUNCHES_EARLY = "symmpatterns_launches_early"  # in a module's meta
_EARLY_PROGRAMS = 512


@functools.cache
def order_kernels() -> None:
    """Has every kernel that Inductor generates, and launches while the kernel before it runs (programmatic dependent
    launch), wait for that kernel before it touches any memory.

    Inductor does so itself if `triton.enable_pdl` is set, but has a kernel wait for what it needs of the node before, and
    one that needs nothing never waits. Ours wait for the kernel before them, and rely on its having waited.
    """
    from torch._inductor.codegen.triton import TritonKernel
    from torch._inductor.virtualized import V

    is_enabled, arrange = TritonKernel._enable_pdl_codegen, TritonKernel._filter_pdl

    def is_small(kernel: Any) -> bool:
        """One launch of few programs."""
        return (
            type(kernel) is TritonKernel
            and not (kernel.is_combo_kernel or kernel.mix_order_reduction or kernel.cooperative_reduction)
            and _has_few_programs(kernel)
        )

    def enabled() -> bool:
        meta = getattr(getattr(V.graph, "module", None), "meta", {})
        return bool(is_enabled()) or (_LAUNCHES_EARLY in meta and is_small(V.kernel))

    def arranged(self: Any, code: Any) -> None:
        arrange(self, code)
        rest = [line for line in code._lines if not (type(line) is str and self.GDC_WAIT in line)]
        # By what it has as well: the answer may be about the kernel that it becomes a part of.
        if len(rest) < len(code._lines) or self._enable_pdl_codegen():
            code._lines = [self.GDC_WAIT, *rest]

    TritonKernel._enable_pdl_codegen = staticmethod(enabled)  # type: ignore[method-assign]
    TritonKernel._filter_pdl = arranged  # type: ignore[method-assign]


def _has_few_programs(kernel: Any) -> bool:
    """Whether that is known of a kernel of Inductor's; one runs about a row of a reduction, or else 1024 elements."""
    from torch._inductor.virtualized import V

    elements = math.prod(size for prefix, size in kernel.numels.items() if not prefix.startswith("r"))
    most = _EARLY_PROGRAMS * (1 if kernel.features.is_reduction() else 1024)
    return bool(V.graph.sizevars.statically_known_leq(elements, most))


def launch_early(graph: Any) -> None:
    """Has Inductor launch a graph's small kernels while the kernel before them runs, behind `order_kernels`.

    Large ones gain little, and may be crowded on the multiprocessors that the kernel before leaves first.
    """
    from torch._inductor import config

    # Its quick launcher cannot do it; where nothing else may launch kernels, they stay as they are.
    if graph.owning_module is not None and not getattr(config, "strict_static_triton_launcher", False):
        graph.owning_module.meta[_LAUNCHES_EARLY] = True


def use_symmetric_mem_pool(device: torch.device) -> Any:
    """A context in which the CUDA caching allocator takes its memory from torch's symmetric memory pool."""
    import torch.distributed._symmetric_memory as symm_mem

    return torch.cuda.use_mem_pool(symm_mem.get_mem_pool(device), device=device)


# --- the dispatcher -----------------------------------------------------------------------------------------------

# Whether a tensor among the arguments, or in a list among them, requires a gradient.
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad


def leads_to_kernel(keyset: Any) -> bool:
    """Whether a call with these dispatch keys goes from autograd straight to a device's kernel.

    It does without dispatch modes, tensor subclasses, meta tensors and functionalisation.
    """
    behind = keyset & torch._C._after_ADInplaceOrView_keyset
    return behind.highestPriorityTypeId() in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def below_autograd() -> Any:
    """A context whose calls autograd does not see."""
    return torch._C._AutoDispatchBelowAutograd()


def redispatch_below_autograd(overload: Any, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    """The call of an operator, with the dispatch keys of the one that is under way, from behind autograd on."""
    with below_autograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)


# --- Triton -------------------------------------------------------------------------------------------------------


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1 when its functions were defined)."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(triton.cdiv, InterpretedFunction) or isinstance(triton.language.cdiv, InterpretedFunction)


def tensor_at(
    address: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor over memory that somebody else keeps alive, with a storage of its own.

    Operators may not return two tensors of one storage, and torch has no public way to make a second one.
    """
    span = 1 + sum((n - 1) * s for n, s in zip(size, stride)) if all(size) else 0
    storage = torch._C._construct_storage_from_data_pointer(address, device, span * dtype.itemsize)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, tuple(size), tuple(stride))


@contextlib.contextmanager
def without_memory(device: torch.device) -> Iterator[WithoutMemory]:
    """`WithoutMemory`, in place of the modes that are on (Inductor's would make fake tensors).

    And above autograd, wherever the caller is: below it `contiguous` and `reshape` come to a mode whole, as views that may
    be copies.
    """
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), WithoutMemory(device) as nowhere:
        yield nowhere


class WithoutMemory(TorchDispatchMode):
    """A context in which tensors of `device` have no memory: operators compute nothing there.

    Views are made. What another operator would give is a tensor of those sizes, strides and dtype, at an address of the
    alignment that its memory would have; what would be written to stays as it is. Nobody may look at elements.
    """

    _ADDRESS = 1 << 20

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def tensor(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """A tensor without memory, `offset` elements into what would be its storage."""
        with _disable_current_modes():
            return tensor_at(self._ADDRESS + offset * dtype.itemsize, size, stride, dtype, self.device)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor without memory that is like another one, which may be fake."""
        return self.tensor(tensor.shape, tensor.stride(), tensor.dtype, int(tensor.storage_offset()))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.is_view:
            return function(*args, **kwargs)
        if function._schema.is_mutable:
            return kwargs.get("out", args[0] if args else None)
        args, kwargs = tree_map_only(torch.Tensor, _on_meta, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        results = function(*args, **kwargs)
        return tree_map_only(torch.Tensor, self.like, results)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


# --- Inductor -----------------------------------------------------------------------------------------------------


def settle_triton_cache(device: torch.device) -> None:
    """Has Triton keep what it compiles where Inductor wants it.

    Inductor says so itself, but only when it makes a kernel in this process, which is before our kernels are launched or
    after or never: a process that gets the graph from Inductor's cache would look for them elsewhere.
    """
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index))


def may_compile_beside_inductor() -> bool:
    """Whether a thread may compile what a graph launches while Inductor compiles the graph.

    Not where Inductor compiles in forks of this process, which would inherit what the thread has locked; and there is no
    need to where the graph is compiled for another process.
    """
    from torch._inductor import config
    from torch._inductor.virtualized import V

    return config.worker_start_method != "fork" and not V.aot_compilation


def get_post_grad_hook() -> Any:
    """What is on ``torch._inductor.config.post_grad_custom_post_pass``."""
    from torch._inductor import config

    return config.post_grad_custom_post_pass


def set_post_grad_hook(value: Any) -> None:
    """Sets ``torch._inductor.config.post_grad_custom_post_pass`` for all threads.

    From torch 2.13 on, a value that is assigned holds for the assigning thread alone. What an entry takes from the
    environment holds for all, so the pass goes there; a thread that has assigned something is set by itself.
    """
    from torch._inductor import config as inductor_config
    from torch.utils import _config_module

    config: Any = inductor_config
    name = "post_grad_custom_post_pass"
    entry = config._config[name]
    unset = _config_module._UNSET_SENTINEL
    for_all_threads = isinstance(entry.user_override, contextvars.ContextVar)
    is_assigned = not for_all_threads or entry.user_override.get() is not unset
    if for_all_threads and (value is None or not is_assigned):
        entry.env_value_default = unset if value is None else value
        config._hash_dirty_var.set(True)
        config._mark_get_dict_dirty(name)
    if is_assigned:
        setattr(config, name, value)


def compiled_graph_code() -> Any:
    """The code object that runs each compiled graph, if this process has any: how a graph is found on the stack."""
    import sys

    module = sys.modules.get("torch._inductor.output_code")
    return None if module is None else module.CompiledFxGraph.__call__.__code__


def is_fx_wrapper(graph: Any) -> bool:
    """Whether Inductor generates a graph instead of Python code for this GraphLowering."""
    return bool(getattr(graph, "fx_wrapper", False))


_INPLACEABLE = (
    "index_put",
    "_unsafe_index_put",
    "slice_scatter",
    "select_scatter",
    "diagonal_scatter",
    "as_strided_scatter",
)
_INPLACEABLE_CALLS = (
    "auto_functionalized",
    "auto_functionalized_v2",
    "triton_kernel_wrapper_functional",
    "with_effects",
)


def may_write_in_place(node: Any, buffer: Any) -> bool:
    """Whether what runs after our pass may let `node` write to `buffer`, one of its inputs: Inductor's reinplacing, or vLLM,
    which chooses how its operators are computed, and removes the copies of what nobody reads later."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name() in _INPLACEABLE_CALLS
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "vllm_ir":
        return "maybe_inplace" in target.overloadpacket.overloads()
    if not isinstance(target, torch._ops.OpOverload) or node.args[:1] != (buffer,):
        return False
    return target._schema.name.removeprefix("aten::") in _INPLACEABLE


def compiles_cpp_at_run_time() -> bool:
    """Whether the graph becomes C++ code that looks operators up by itself (`cpp_wrapper`, but not AOTInductor)."""
    from torch._inductor import config as inductor_config
    from torch._inductor.virtualized import V

    return bool(inductor_config.cpp_wrapper) and not V.aot_compilation


def layout_constraint(overload: Any) -> str:
    """Which strides of its inputs an operator relies on, by the name of torch's tag: "needs_exact_strides", ..."""
    from torch._library.utils import get_layout_constraint_tag

    return get_layout_constraint_tag(overload).name


def inductor_uses_cuda_graphs() -> bool:
    """Whether the graph being compiled will be launched from CUDA graphs that Inductor makes."""
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


def inductor_counters() -> Any:
    """The Counter that Inductor stores with a cached graph (as differences) and applies again on a cache hit."""
    from torch._dynamo.utils import counters

    return counters["inductor"]


def own_counters() -> Any:
    """``torch._dynamo.utils.counters["symmpatterns"]``."""
    from torch._dynamo.utils import counters

    return counters["symmpatterns"]


def common_wait() -> Any:
    """The operator that waits for all results of a coalesced collective, from torch 2.15 on; None before."""
    packet = getattr(torch.ops._c10d_functional, "wait_tensors", None)
    return None if packet is None else packet.default


def sizes_in_graph(graph: Any, sizes: Sequence[Any]) -> list[Any]:
    """Sizes as arguments of a node at the graph's insertion point: nodes for symbolic ones where torch can make them.

    torch 2.11 takes the symbols themselves; later versions warn about that and can compute them from the inputs.
    """
    if any(isinstance(n, torch.SymInt) for n in sizes) and hasattr(graph, "materialize_symints"):
        return list(graph.materialize_symints(sizes))
    return list(sizes)


def adopt_for_vllm(pass_class: type) -> None:
    """Lets vLLM, if it is loaded, take instances of `pass_class` as passes of its own kind, with their own identity.

    Anything else it wraps, and takes the source text of the class for the identity of what it caches.
    """
    import sys

    for name in ("vllm.compilation.inductor_pass", "vllm.compilation.passes.inductor_pass"):
        base = getattr(sys.modules.get(name), "InductorPass", None)
        if base is not None and not issubclass(pass_class, base):
            base.register(pass_class)


# --- declarations of torch's own ----------------------------------------------------------------------------------


def registered_symm_mem_args(overload: Any) -> tuple[str, ...]:
    """What ``Library.register_symm_mem_args`` (torch 2.13+) was told about an operator."""
    from torch._library.simple_registry import singleton

    for name in (f"{overload._schema.name}.{overload._overloadname}", overload._schema.name):
        entry = singleton._data.get(name)
        names = None if entry is None or not hasattr(entry, "symm_mem_args") else entry.symm_mem_args.get()
        if names:
            return tuple(names)
    return ()


def symm_mem_args_fingerprint() -> str:
    """Everything that ``Library.register_symm_mem_args`` was told, as text."""
    from torch._library.simple_registry import singleton

    entries = [(name, e.symm_mem_args.get()) for name, e in singleton._data.items() if hasattr(e, "symm_mem_args")]
    return ";".join(sorted(f"{name}|{','.join(args)}" for name, args in entries if args))
