"""What the first compilation of a process sets up, and takes seconds for: done once, before ranks are forked.

A function of one aten call: no kernel is generated, so no thread is started. Inductor asks the C++ compiler which vector
instructions there are, which it would ask again for every cache directory.
"""

from __future__ import annotations

import os
from unittest import mock

import parameterized  # noqa: F401  every module of tests imports it, and pytest
import pytest  # noqa: F401
import torch
import torch._functorch.config
import torch._inductor.config
from torch._inductor import cpu_vec_isa

torch.set_num_threads(1)  # threads do not survive a fork
with (
    mock.patch.dict(os.environ),
    torch._inductor.config.patch(fx_graph_cache=False),
    torch._functorch.config.patch(enable_autograd_cache=False),
):
    torch.compile(torch.mm)(torch.ones(2, 2), torch.ones(2, 2))
    cpu_vec_isa.pick_vec_isa()
torch._dynamo.reset()
torch._dynamo.utils.counters.clear()
