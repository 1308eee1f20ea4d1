// The fused operators on CPU tensors. All of them compute partial results with ATen's GEMM straight into memory that
// the peers have mapped.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "plan.h"
#include "workspace.h"

namespace symmpatterns {

// out = sum (or average) over ranks of a @ b (+ bias), the same bits on every rank.
// a [M, K] and b [K, N] of any strides, bias [N], out [M, N] contiguous.
void matmul_all_reduce(
    const at::Tensor& a,
    const at::Tensor& b,
    const std::optional<at::Tensor>& bias,
    const at::Tensor& out,
    bool average,
    const WorkspaceView& view,
    Waiter waiter);

Needs matmul_all_reduce_needs(int64_t rows, int64_t columns, int64_t item_bytes, int world_size);

} // namespace symmpatterns
