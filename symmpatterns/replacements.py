"""torch.ops.symmpatterns.*: the operators that rewrites put into graphs; all are callable in eager mode too.

Each operator has one reference, the same work with torch's own collectives: the fallback for groups of one rank and for
torch's fake groups, and what the tests compare with. The operators are in operators/, a file each.
"""

from __future__ import annotations

from symmpatterns.operators._common import FLOAT8, MATMUL_DTYPES
from symmpatterns.operators.all_gather_matmul import all_gather_matmul_reference
from symmpatterns.operators.all_reduce_rms_norm import all_reduce_rms_norm_reference
from symmpatterns.operators.matmul_all_reduce import matmul_all_reduce_reference
from symmpatterns.operators.matmul_reduce_scatter import matmul_reduce_scatter_reference

__all__ = [
    "FLOAT8",
    "MATMUL_DTYPES",
    "all_gather_matmul_reference",
    "all_reduce_rms_norm_reference",
    "matmul_all_reduce_reference",
    "matmul_reduce_scatter_reference",
]
