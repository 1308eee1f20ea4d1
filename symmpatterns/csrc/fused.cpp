#include "fused.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>

#include <algorithm>
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

DType dtype_of(at::ScalarType type, const std::string& what) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      require(false, what, std::string("no such operator for ") + c10::toString(type));
      return DType::kFloat32;
  }
}

// To be asked before the sizes of a's last dimensions are.
void check_matrices(const std::string& what, const at::Tensor& a) {
  require(a.is_cpu() && (a.dim() == 2 || a.dim() == 3), what,
          "a must be a CPU matrix or a batch of them, not " + shape_of(a));
}

// Whether a product with this left factor can be computed: `rows` and `inner` are those of a, or of the gathered a.
void check_product(const std::string& what, const Product& product, int64_t rows, int64_t inner) {
  const at::Tensor &a = product.a, &b = product.b;
  const int64_t dims = a.dim(), columns = b.dim() > 0 ? b.size(-1) : 0;
  check_matrices(what, a);
  require(b.is_cpu() && b.dim() == dims, what, "b must be a CPU tensor like a, not " + shape_of(b));
  require(b.size(-2) == inner && (dims == 2 || a.size(0) == b.size(0)), what,
          "a [" + std::to_string(rows) + ", " + std::to_string(inner) + "] and b " + shape_of(b) + " do not fit");
  require(a.scalar_type() == b.scalar_type(), what, "a and b must have one dtype");
  if (product.bias) {
    const at::Tensor& bias = *product.bias;
    require(bias.is_cpu() && bias.dim() == dims - 1 && bias.size(-1) == columns && (dims == 2 || bias.size(0) == a.size(0)),
            what, "bias must be a CPU tensor [N = " + std::to_string(columns) + "], not " + shape_of(bias));
    // Where the product is rounded to another dtype than that of its operands, it is computed in float32.
    const bool fits = a.scalar_type() == product.dtype ? bias.scalar_type() == product.dtype
                                                       : at::isFloatingType(bias.scalar_type());
    require(fits, what, std::string("bias must have the dtype of the product, not ") + c10::toString(bias.scalar_type()));
  }
  const auto check_scale = [&](const std::optional<at::Tensor>& scale, int64_t count, const char* name) {
    require(!scale || (scale->is_cpu() && scale->scalar_type() == at::kFloat && scale->dim() == 1 &&
                       (scale->size(0) == 1 || scale->size(0) == count)),
            what, std::string(name) + " must be float32 [1] or [" + std::to_string(count) + "]");
  };
  check_scale(product.scale_a, rows, "scale_a");
  check_scale(product.scale_b, columns, "scale_b");
  (void)dtype_of(product.dtype, what);
}

void check_flat(const std::string& what, const at::Tensor& out, const at::Tensor& like, int64_t elements) {
  require(like.is_cpu() && out.is_cpu() && out.is_contiguous() && out.scalar_type() == like.scalar_type(), what,
          "out must be a contiguous CPU tensor of the dtype of the input");
  require(out.numel() == elements, what,
          "out must have " + std::to_string(elements) + " elements, not " + std::to_string(out.numel()));
}

// An output [..., rows, columns] of dtype `dtype` or, if `may_widen`, of float32.
void check_out(
    const std::string& what, const at::Tensor& out, at::ScalarType dtype, bool may_widen, int64_t rows, int64_t columns) {
  require(out.is_cpu() && out.is_contiguous(), what, "out must be a contiguous CPU tensor");
  require(out.scalar_type() == dtype || (may_widen && out.scalar_type() == at::kFloat), what,
          std::string("out cannot be ") + c10::toString(out.scalar_type()) + " for products of " + c10::toString(dtype));
  require(out.dim() >= 2 && out.size(-2) == rows && out.size(-1) == columns, what,
          "out must be [" + std::to_string(rows) + ", " + std::to_string(columns) + "], not " + shape_of(out));
}

char* bytes(const at::Tensor& tensor) {
  return static_cast<char*>(tensor.mutable_data_ptr());
}

// The product, computed into `to`.
void multiply(char* to, const Product& product) {
  const at::Tensor &a = product.a, &b = product.b;
  std::vector<int64_t> shape(a.sizes().begin(), a.sizes().end());
  shape.back() = b.size(-1);
  at::Tensor target = at::from_blob(to, shape, a.options().dtype(product.dtype).requires_grad(false));
  if (a.scalar_type() != product.dtype) { // float8, or a product that is rounded less (more) than its operands
    at::Tensor exact = at::matmul(a.to(at::kFloat), b.to(at::kFloat));
    if (product.scale_a) {
      exact.mul_(product.scale_a->unsqueeze(-1)).mul_(*product.scale_b);
    }
    if (product.bias) {
      exact.add_(product.bias->unsqueeze(-2));
    }
    target.copy_(exact);
  } else if (a.dim() == 3) {
    if (product.bias) {
      at::baddbmm_out(target, product.bias->unsqueeze(-2), a, b);
    } else {
      at::bmm_out(target, a, b);
    }
  } else if (product.bias) {
    at::addmm_out(target, *product.bias, a, b);
  } else {
    at::mm_out(target, a, b);
  }
}

// A matrix of bytes: rows of `row_bytes`, `stride` bytes apart.
struct Block {
  char* start;
  int64_t rows;
  int64_t row_bytes;
  int64_t stride;
};

void copy(const Block& to, const Block& from) {
  if (to.stride == to.row_bytes && from.stride == from.row_bytes) {
    at::parallel_for(0, to.rows * to.row_bytes, kGrain * 4, [&](int64_t first, int64_t last) {
      std::memcpy(to.start + first, from.start + first, static_cast<size_t>(last - first));
    });
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain * 4 / std::max<int64_t>(1, to.row_bytes));
  at::parallel_for(0, to.rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      std::memcpy(to.start + row * to.stride, from.start + row * from.stride, static_cast<size_t>(to.row_bytes));
    }
  });
}

// The dtypes of a reduction: of what is sent, and of the result.
struct Dtypes {
  DType sent;
  DType result;
};

// Sums the elements [begin, end) of the ranks' staging memory into the same place of `out`.
void sum(const Call& call, Dtypes dtypes, char* out, int64_t begin, int64_t end, bool average) {
  std::vector<const void*> sources;
  for (int r = 0; r < call.world_size(); ++r) {
    sources.push_back(call.staging(r));
  }
  at::parallel_for(begin, end, kGrain, [&](int64_t from, int64_t to) {
    sum_over_ranks(dtypes.sent, dtypes.result, out, sources.data(), call.world_size(), from, to, average);
  });
}

// Sums a block of the ranks' staging memory, `offset` bytes into it, to consecutive rows in `out`.
void sum_block(const Call& call, Dtypes dtypes, char* out, int64_t offset, const Block& shape, bool average) {
  const int64_t columns = shape.row_bytes / bytes_of(dtypes.sent);
  const int64_t out_row_bytes = columns * bytes_of(dtypes.result);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
  at::parallel_for(0, shape.rows, grain, [&](int64_t first, int64_t last) {
    std::vector<const void*> sources(call.world_size());
    // A row at a time, or all at once where they follow each other.
    const bool dense = shape.stride == shape.row_bytes;
    const int64_t rows_at_once = dense ? last - first : 1;
    for (int64_t row = first; row < last; row += rows_at_once) {
      for (int r = 0; r < call.world_size(); ++r) {
        sources[r] = call.staging(r) + offset + row * shape.stride;
      }
      sum_over_ranks(dtypes.sent, dtypes.result, out + row * out_row_bytes, sources.data(), call.world_size(), 0,
                     rows_at_once * columns, average);
    }
  });
}

// Flags of the reductions: [r] "rank r's partial result is in r's staging memory", [world_size + r] "the rows that
// rank r owns are summed there". Every call awaits flag [r] of every r, which is invariant I.

// The partial result [rows, columns] of this rank is in its staging memory: out = the sum over ranks.
void finish_all_reduce(Call& call, Dtypes dtypes, char* out, int64_t rows, int64_t columns, bool average) {
  const int rank = call.rank(), world_size = call.world_size();
  const int64_t row_bytes = columns * bytes_of(dtypes.sent);
  call.publish_to_all(rank);
  call.await_all(0);
  // A wider result does not fit into the place of a partial one, which is where two-shot puts it.
  if (dtypes.sent != dtypes.result ||
      all_reduce_algorithm(rows, columns, bytes_of(dtypes.sent), world_size) == Algorithm::kOneShot) {
    sum(call, dtypes, out, 0, rows * columns, average);
    call.finish();
    return;
  }
  // Only the owner of a row reads anybody's partial of it, so its sum may take the place of its own partial.
  const Rows own = rows_of(rows, rank, world_size);
  sum(call, dtypes, call.staging(rank), own.begin * columns, own.end * columns, average);
  call.publish_to_all(world_size + rank);
  for (int step = 0; step < world_size; ++step) {
    const int owner = (rank + step) % world_size;
    if (owner != rank) {
      call.await(owner, world_size + owner);
    }
    const Rows part = rows_of(rows, owner, world_size);
    const int64_t start = part.begin * row_bytes, count = part.end - part.begin;
    copy({out + start, count, row_bytes, row_bytes}, {call.staging(owner) + start, count, row_bytes, row_bytes});
  }
  call.finish();
}

// Likewise: out = this rank's block of the sum over ranks.
void finish_reduce_scatter(Call& call, Dtypes dtypes, char* out, int64_t offset, const Block& shape, bool average) {
  call.publish_to_all(call.rank());
  call.await_all(0);
  sum_block(call, dtypes, out, offset, shape, average);
  call.finish();
}

void store_shard(Call& call, const at::Tensor& shard) {
  at::from_blob(call.staging(call.rank()), shard.sizes(), shard.options().requires_grad(false)).copy_(shard);
}

} // namespace

Needs reduction_needs(int64_t elements, int64_t item_bytes, int world_size) {
  return elements == 0 ? Needs{0, 0} : Needs{elements * item_bytes, 2 * world_size};
}

Needs gather_needs(int64_t elements, int64_t item_bytes, int world_size) {
  return elements == 0 ? Needs{0, 0} : Needs{elements * item_bytes, world_size};
}

void matmul_all_reduce(
    const Product& product, const at::Tensor& out, bool average, const WorkspaceView& view, Waiter waiter) {
  const at::Tensor &a = product.a, &b = product.b;
  check_matrices(waiter.what, a);
  check_product(waiter.what, product, a.size(-2), a.size(-1));
  check_out(waiter.what, out, product.dtype, true, a.size(-2), b.size(-1));
  const int64_t columns = b.size(-1), rows = columns == 0 ? 0 : out.numel() / columns;
  require(rows * columns == out.numel() && out.dim() == a.dim(), waiter.what, "out must have the product's shape");
  if (out.numel() == 0) {
    return; // on all ranks alike, so no epoch is used
  }
  const Dtypes dtypes{dtype_of(product.dtype, waiter.what), dtype_of(out.scalar_type(), waiter.what)};
  const at::AutoDispatchBelowADInplaceOrView without_autograd;
  Call call(view, std::move(waiter));
  multiply(call.staging(call.rank()), product);
  finish_all_reduce(call, dtypes, bytes(out), rows, columns, average);
}

void matmul_reduce_scatter(
    const Product& product, const at::Tensor& out, int scatter_dim, bool average, const WorkspaceView& view,
    Waiter waiter) {
  const std::string& what = waiter.what;
  const at::Tensor &a = product.a, &b = product.b;
  require(a.dim() == 2, what, "a must be a CPU matrix, not " + shape_of(a));
  check_product(what, product, a.size(0), a.size(1));
  require(scatter_dim == 0 || scatter_dim == 1, what, "scatter_dim is 0 or 1, not " + std::to_string(scatter_dim));
  int64_t part[2] = {a.size(0), b.size(1)};
  const Dtypes dtypes{dtype_of(product.dtype, what), dtype_of(out.scalar_type(), what)};
  const int64_t row_bytes = part[1] * bytes_of(dtypes.sent);
  require(part[scatter_dim] % view.world_size == 0, what,
          "dimension " + std::to_string(scatter_dim) + " of the result, " + std::to_string(part[scatter_dim]) +
              ", cannot be divided among " + std::to_string(view.world_size) + " ranks");
  part[scatter_dim] /= view.world_size;
  check_out(what, out, product.dtype, true, part[0], part[1]);
  if (out.numel() == 0) {
    return;
  }
  const at::AutoDispatchBelowADInplaceOrView without_autograd;
  Call call(view, std::move(waiter));
  multiply(call.staging(call.rank()), product);
  const int64_t part_bytes = part[1] * bytes_of(dtypes.sent);
  const int64_t offset = call.rank() * (scatter_dim == 0 ? part[0] * row_bytes : part_bytes);
  finish_reduce_scatter(call, dtypes, bytes(out), offset, {nullptr, part[0], part_bytes, row_bytes}, average);
}

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
    Waiter waiter) {
  const std::string what = waiter.what;
  require(gather_dim == 0 || gather_dim == 1, what, "gather_dim is 0 or 1, not " + std::to_string(gather_dim));
  require(a_shard.is_cpu() && a_shard.dim() == 2, what, "a_shard must be a CPU matrix, not " + shape_of(a_shard));
  require(!bs.empty() && bs.size() == outs.size() && bs.size() == biases.size() && bs.size() == scale_bs.size(),
          what, "as many bs (at least one) as outs, biases and scales");
  const int64_t item = a_shard.element_size();
  int64_t shape[2] = {a_shard.size(0), a_shard.size(1)};
  shape[gather_dim] *= view.world_size;
  const at::AutoDispatchBelowADInplaceOrView without_autograd;
  // Where all of a goes, if it is brought together at all.
  at::Tensor whole;
  if (gathered) {
    check_out(what, *gathered, a_shard.scalar_type(), false, shape[0], shape[1]);
    whole = *gathered;
  } else if (!multiplies_shards(a_shard.size(0), gather_dim)) {
    whole = at::empty({shape[0], shape[1]}, a_shard.options().requires_grad(false));
  }
  for (size_t i = 0; i < bs.size(); ++i) {
    const at::ScalarType dtype = outs[i].scalar_type();
    check_product(what, {a_shard, bs[i], biases[i], scale_a, scale_bs[i], dtype}, shape[0], shape[1]);
    check_out(what, outs[i], dtype, false, shape[0], bs[i].size(1));
  }
  const auto multiply_rows = [&](const at::Tensor& a, int64_t first_row) {
    const auto scale = scale_a && scale_a->size(0) > 1 ? scale_a->narrow(0, first_row, a.size(0)) : scale_a;
    for (size_t i = 0; i < bs.size(); ++i) {
      multiply(bytes(outs[i]) + first_row * bs[i].size(1) * outs[i].element_size(),
               {a, bs[i], biases[i], scale, scale_bs[i], outs[i].scalar_type()});
    }
  };
  if (a_shard.numel() == 0) { // on all ranks alike: K is 0, or there are no rows
    multiply_rows(a_shard.new_empty({shape[0], shape[1]}), 0);
    return;
  }

  Call call(view, std::move(waiter));
  const int rank = call.rank(), world_size = call.world_size();
  const int64_t rows = a_shard.size(0), row_bytes = a_shard.size(1) * item;
  store_shard(call, a_shard);
  call.publish_to_all(rank);
  // The own shard first, then the others in the order in which they are expected; each is awaited: invariant I.
  for (int step = 0; step < world_size; ++step) {
    const int source = (rank + step) % world_size;
    if (source != rank) {
      call.await(source, source);
    }
    if (whole.defined()) {
      const int64_t offset = source * (gather_dim == 0 ? rows * row_bytes : row_bytes);
      copy({bytes(whole) + offset, rows, row_bytes, shape[1] * item}, {call.staging(source), rows, row_bytes, row_bytes});
    }
    if (multiplies_shards(rows, gather_dim)) {
      multiply_rows(at::from_blob(call.staging(source), a_shard.sizes(), a_shard.options().requires_grad(false)),
                    source * rows);
    }
  }
  call.finish();
  if (!multiplies_shards(rows, gather_dim)) {
    multiply_rows(whole, 0);
  }
}

void all_reduce(const at::Tensor& x, const at::Tensor& out, bool average, const WorkspaceView& view, Waiter waiter) {
  const DType dtype = dtype_of(x.scalar_type(), waiter.what);
  check_flat(waiter.what, out, x, x.numel());
  if (x.numel() == 0) {
    return;
  }
  const at::AutoDispatchBelowADInplaceOrView without_autograd;
  Call call(view, std::move(waiter));
  store_shard(call, x);
  finish_all_reduce(call, {dtype, dtype}, bytes(out), x.numel(), 1, average);
}

void reduce_scatter(const at::Tensor& x, const at::Tensor& out, bool average, const WorkspaceView& view, Waiter waiter) {
  const DType dtype = dtype_of(x.scalar_type(), waiter.what);
  require(x.dim() > 0 && x.size(0) % view.world_size == 0, waiter.what,
          "the first dimension of " + shape_of(x) + " cannot be divided among " + std::to_string(view.world_size) +
              " ranks");
  check_flat(waiter.what, out, x, x.numel() / view.world_size);
  if (x.numel() == 0) {
    return;
  }
  const at::AutoDispatchBelowADInplaceOrView without_autograd;
  Call call(view, std::move(waiter));
  store_shard(call, x);
  const int64_t part_bytes = out.numel() * bytes_of(dtype);
  finish_reduce_scatter(call, {dtype, dtype}, bytes(out), call.rank() * part_bytes, {nullptr, 1, part_bytes, part_bytes},
                        average);
}

void all_gather(const at::Tensor& x, const at::Tensor& out, const WorkspaceView& view, Waiter waiter) {
  check_flat(waiter.what, out, x, x.numel() * view.world_size);
  if (x.numel() == 0) {
    return;
  }
  const at::AutoDispatchBelowADInplaceOrView without_autograd;
  Call call(view, std::move(waiter));
  const int rank = call.rank(), world_size = call.world_size();
  const int64_t shard_bytes = x.numel() * x.element_size();
  store_shard(call, x);
  call.publish_to_all(rank);
  for (int step = 0; step < world_size; ++step) {
    const int source = (rank + step) % world_size;
    if (source != rank) {
      call.await(source, source);
    }
    copy({bytes(out) + source * shard_bytes, 1, shard_bytes, shard_bytes},
         {call.staging(source), 1, shard_bytes, shard_bytes});
  }
  call.finish();
}

} // namespace symmpatterns
