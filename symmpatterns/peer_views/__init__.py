"""Peer views: the peers' symmetric buffers as ordinary tensors of a graph, so that Inductor's own kernels use them.

plan.py       what a graph wants to keep in slots, as text, and where each tensor lies
slots.py      the memory behind it: two slots for each (group, device), their rotation and growth
operators.py  peer_buffers, store_, barrier_, reduce_peers, copy_out
lowerings.py  how Inductor compiles them

docs/peer-views.md has the argument why no slot is overwritten while somebody reads it.
"""

from __future__ import annotations

from symmpatterns.peer_views import operators  # noqa: F401  registers torch.ops.symmpatterns.peer_buffers and the others
from symmpatterns.peer_views.plan import Piece, Plan

__all__ = ["Piece", "Plan"]
