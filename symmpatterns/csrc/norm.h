// all-reduce -> residual add -> RMSNorm on CPU tensors, in one call of the workspace.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "workspace.h"

namespace symmpatterns {

// sum = all ranks' x, summed in rank order in float32, (/ world size) (+ residual), rounded once;
// norm = sum / sqrt(mean(sum^2 over the last dimension) + eps) (* weight), of the sum before it was rounded.
// All [M, N] and contiguous, weight [N]; float32, bfloat16 or float16, all of one dtype.
void all_reduce_rms_norm(
    const at::Tensor& x,
    const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& weight,
    const at::Tensor& norm,
    const at::Tensor& sum,
    double eps,
    bool average,
    const WorkspaceView& view,
    Waiter waiter);

} // namespace symmpatterns
