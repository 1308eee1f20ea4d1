"""How generated code calls operators of ours: straight to the Python function, where it is Python's code that calls.

The dispatcher takes longer for lists of sizes and tensors than most of these calls do. Code in C++ has to go that way.
"""

from __future__ import annotations

from typing import Any

from torch._inductor import ir
from torch._inductor.virtualized import V

from symmpatterns import compat


def call_of(buffer: Any) -> tuple[Any, tuple[int, ...]]:
    """The call that returns a buffer, and which of its outputs that is; up to torch 2.13 also where it is the only one."""
    output: tuple[int, ...] = ()
    while isinstance(buffer, ir.MultiOutput):
        output = tuple(index for _, index in buffer.indices) + output
        buffer = buffer.inputs[0]
    return buffer, output


def import_with(call: Any, line: str) -> None:
    """Has an import at the top of the Python code in which a call is made."""
    generate = call.codegen

    def codegen(wrapper: Any) -> None:
        wrapper.add_import_once(line)
        generate(wrapper)

    call.codegen = codegen


def call_directly(call: Any, module: str, function: str) -> None:
    """Has a call (an ExternKernel) made as ``function(...)`` of a module that generated code may import."""
    if not V.graph.cpp_wrapper and not compat.is_fx_wrapper(V.graph):
        name = f"symmpatterns_{function}"
        call.python_kernel_name = name
        import_with(call, f"from {module} import {function} as {name}")
