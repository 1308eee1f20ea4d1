// The fused operators on CPU tensors. All of them compute partial results with ATen's GEMM straight into memory that
// the peers have mapped.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "plan.h"
#include "workspace.h"

namespace symmpatterns {

// a @ b (+ bias): a [M, K] and b [K, N] of any strides, bias [N]; or batches of them, [B, M, K], [B, K, N] and bias
// [B, N]. Operands in float8 are multiplied by scale_a [M or 1] and scale_b [N or 1] (float32, [1] for all). The product
// is computed in float32 and rounded once to `dtype`.
struct Product {
  const at::Tensor& a;
  const at::Tensor& b;
  const std::optional<at::Tensor>& bias;
  std::optional<at::Tensor> scale_a;
  std::optional<at::Tensor> scale_b;
  at::ScalarType dtype;
};

// out = sum (or average) over ranks of the product, the same bits on every rank. out [M, N] (or [B, M, N]) contiguous,
// of the product's dtype or float32.
void matmul_all_reduce(
    const Product& product, const at::Tensor& out, bool average, const WorkspaceView& view, Waiter waiter);

// out = this rank's part, along `scatter_dim`, of the sum (or average) over ranks of the product.
// out [M / W, N] for scatter_dim 0, [M, N / W] for scatter_dim 1; contiguous, of the product's dtype or float32.
void matmul_reduce_scatter(
    const Product& product, const at::Tensor& out, int scatter_dim, bool average, const WorkspaceView& view,
    Waiter waiter);

// outs[i] = a @ bs[i] (+ biases[i]), where a is all ranks' shards side by side along `gather_dim`; also written to
// `gathered`, if given. a_shard [S, K] of any strides gives a [W * S, K] (gather_dim 0) or [S, W * K] (gather_dim 1).
// scale_a and scale_bs[i] are those of the gathered a and of bs[i]; the dtype of each product is that of its out.
void all_gather_matmul(
    const at::Tensor& a_shard,
    const std::vector<at::Tensor>& bs,
    const std::vector<std::optional<at::Tensor>>& biases,
    const std::vector<at::Tensor>& outs,
    const std::optional<at::Tensor>& gathered,
    int gather_dim,
    const std::optional<at::Tensor>& scale_a,
    const std::vector<std::optional<at::Tensor>>& scale_bs,
    const WorkspaceView& view,
    Waiter waiter);

// The collectives alone. x of any strides and shape, out contiguous: [the elements of x], [1 / W of them, rank's part
// of the first dimension], [W times them].
void all_reduce(const at::Tensor& x, const at::Tensor& out, bool average, const WorkspaceView& view, Waiter waiter);
void reduce_scatter(const at::Tensor& x, const at::Tensor& out, bool average, const WorkspaceView& view, Waiter waiter);
void all_gather(const at::Tensor& x, const at::Tensor& out, const WorkspaceView& view, Waiter waiter);

// What they need of a workspace: `elements` is M * N of the full result for the reductions, and the elements of one
// rank's shard for the gathers.
Needs reduction_needs(int64_t elements, int64_t item_bytes, int world_size);
Needs gather_needs(int64_t elements, int64_t item_bytes, int world_size);

} // namespace symmpatterns
