"""Who allocates what in symmetric memory: the marker, its lowering, and the memory behind it.

operators.py  to_symmetric (the marker) and symmetric_empty (what is left of it in compiled code)
lowerings.py  how Inductor compiles the marker: the producer's own buffer, the producer under a scope, or one copy
pool.py       the buffers: owned by compiled functions, shared between them, chosen alike on every rank

docs/allocation.md tells how they work together.
"""

from __future__ import annotations

from symmpatterns.allocation import operators  # noqa: F401  registers torch.ops.symmpatterns.to_symmetric
from symmpatterns.allocation.operators import new, under_symmetric_memory
from symmpatterns.allocation.pool import live_buffers, live_bytes, take

__all__ = ["live_buffers", "live_bytes", "new", "take", "under_symmetric_memory"]
