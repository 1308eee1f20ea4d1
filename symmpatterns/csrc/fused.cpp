#include "fused.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <cstring>
#include <vector>

#include "errors.h"
#include "sum.h"

namespace symmpatterns {
namespace {

constexpr int64_t kGrain = 1 << 15; // elements that are worth another thread

std::string shape_of(const at::Tensor& tensor) {
  std::string text = "[";
  for (const auto size : tensor.sizes()) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

void require(bool condition, const std::string& what, const std::string& problem) {
  if (!condition) {
    throw std::invalid_argument(what + ": " + problem);
  }
}

DType dtype_of(const at::Tensor& tensor, const std::string& what) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      require(false, what, std::string("no such operator for ") + c10::toString(tensor.scalar_type()));
      return DType::kFloat32;
  }
}

void check_matmul(
    const std::string& what, const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias) {
  require(a.dim() == 2 && b.dim() == 2, what, "a and b must be matrices, not " + shape_of(a) + " and " + shape_of(b));
  require(a.size(1) == b.size(0), what, "a " + shape_of(a) + " and b " + shape_of(b) + " do not fit");
  require(a.is_cpu() && b.is_cpu(), what, "a and b must be CPU tensors");
  require(a.scalar_type() == b.scalar_type(), what, "a and b must have one dtype");
  if (bias) {
    require(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == b.size(1), what,
            "bias must be a CPU tensor [N = " + std::to_string(b.size(1)) + "], not " + shape_of(*bias));
    require(bias->scalar_type() == a.scalar_type(), what, "bias must have the dtype of a and b");
  }
}

void check_out(const std::string& what, const at::Tensor& out, const at::Tensor& a, int64_t rows, int64_t columns) {
  require(out.is_cpu() && out.is_contiguous() && out.scalar_type() == a.scalar_type(), what,
          "out must be a contiguous CPU tensor of the dtype of a");
  require(out.dim() == 2 && out.size(0) == rows && out.size(1) == columns, what,
          "out must be [" + std::to_string(rows) + ", " + std::to_string(columns) + "], not " + shape_of(out));
}

// Rows of a @ b (+ bias), computed into `to`.
void multiply(
    char* to, const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias, Rows rows) {
  const int64_t count = rows.end - rows.begin;
  if (count == 0) {
    return;
  }
  at::Tensor target = at::from_blob(to, {count, b.size(1)}, a.options().requires_grad(false));
  const at::Tensor part = count == a.size(0) ? a : a.narrow(0, rows.begin, count);
  if (bias) {
    at::addmm_out(target, *bias, part, b);
  } else {
    at::mm_out(target, part, b);
  }
}

void sum_in_parallel(
    DType dtype, char* out, const std::vector<const void*>& sources, int64_t begin, int64_t end, bool average) {
  const int count = static_cast<int>(sources.size());
  at::parallel_for(begin, end, kGrain, [&](int64_t from, int64_t to) {
    sum_over_ranks(dtype, out, sources.data(), count, from, to, average);
  });
}

void copy_in_parallel(char* to, const char* from, int64_t begin, int64_t end) {
  at::parallel_for(begin, end, kGrain * 4, [&](int64_t first, int64_t last) {
    std::memcpy(to + first, from + first, static_cast<size_t>(last - first));
  });
}

} // namespace

Needs matmul_all_reduce_needs(int64_t rows, int64_t columns, int64_t item_bytes, int world_size) {
  if (rows == 0 || columns == 0) {
    return {0, 0};
  }
  return {rows * columns * item_bytes, 2 * world_size};
}

// Flags of a rank: [r] "rank r's partial result is in r's staging memory", [world_size + r] "the rows that rank r owns
// are summed there". Both algorithms wait for flag [r] of every r, which is invariant I.
void matmul_all_reduce(
    const at::Tensor& a,
    const at::Tensor& b,
    const std::optional<at::Tensor>& bias,
    const at::Tensor& out,
    bool average,
    const WorkspaceView& view,
    Waiter waiter) {
  const std::string what = waiter.what;
  check_matmul(what, a, b, bias);
  const DType dtype = dtype_of(a, what);
  const int64_t rows = a.size(0), columns = b.size(1);
  check_out(what, out, a, rows, columns);
  if (rows == 0 || columns == 0) {
    return; // on all ranks alike, so no epoch is used
  }
  const at::AutoDispatchBelowADInplaceOrView without_autograd;
  Call call(view, std::move(waiter));
  const int rank = call.rank(), world_size = call.world_size();
  const int64_t row_bytes = columns * bytes_of(dtype);
  char* result = static_cast<char*>(out.mutable_data_ptr());

  std::vector<const void*> partials(world_size);
  for (int r = 0; r < world_size; ++r) {
    partials[r] = call.staging(r);
  }
  multiply(call.staging(rank), a, b, bias, {0, rows});
  call.publish_to_all(rank);
  call.await_all(0);

  if (all_reduce_algorithm(rows, columns, bytes_of(dtype), world_size) == Algorithm::kOneShot) {
    sum_in_parallel(dtype, result, partials, 0, rows * columns, average);
    call.finish();
    return;
  }
  // Only the owner of a row reads anybody's partial of it, so its sum may take the place of its own partial.
  const Rows own = rows_of(rows, rank, world_size);
  sum_in_parallel(dtype, call.staging(rank), partials, own.begin * columns, own.end * columns, average);
  call.publish_to_all(world_size + rank);
  copy_in_parallel(result, call.staging(rank), own.begin * row_bytes, own.end * row_bytes);
  for (int step = 1; step < world_size; ++step) {
    const int owner = (rank + step) % world_size;
    const Rows theirs = rows_of(rows, owner, world_size);
    call.await(owner, world_size + owner);
    copy_in_parallel(result, call.staging(owner), theirs.begin * row_bytes, theirs.end * row_bytes);
  }
  call.finish();
}

} // namespace symmpatterns
