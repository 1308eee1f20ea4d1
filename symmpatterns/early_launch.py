"""Kernels that are launched while the one before them on the stream still runs: where that pays, and which GPUs can.

It is called programmatic dependent launch; docs/memory-ordering.md has its rules.
"""

from __future__ import annotations

import functools

import torch

from symmpatterns import config

# What a rank contributes to a collective at most. Two H200, CUDA graphs, 8192 columns in bf16: one row goes from 7.2 to
# 6.0 us (all-reduce as peer views) and from 5.5 to 4.8 (norm template), 64 rows gain 4 to 15 %; of more rows some programs
# gain and others lose up to half (bench/results/early_launch-nvidia-h200-w2.csv).
MOST_BYTES = 1 << 20


def pays(num_bytes: int, device: torch.device) -> bool:
    """Whether kernels around a collective of `num_bytes` a rank gain by it, and may (config.early_launch)."""
    return config.early_launch and device.type == "cuda" and num_bytes <= MOST_BYTES and _is_possible(device)


@functools.cache
def _is_possible(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
