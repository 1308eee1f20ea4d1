#include "norm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace symmpatterns {
namespace {

constexpr int64_t kGrain = 1 << 15; // elements that are worth another thread
constexpr int kLanes = 16; // partial sums of squares: a fixed order, which the compiler may still vectorise

void require(bool condition, const std::string& what, const char* problem) {
  if (!condition) {
    throw std::invalid_argument(what + ": " + problem);
  }
}

template <typename T>
struct Operands {
  std::vector<const T*> parts; // one for each rank, in order
  const T* residual;
  const T* weight;
  T* norm;
  T* sum;
  int64_t columns;
  double eps;
  bool average;
};

// One row; `total` is room for it.
template <typename T>
void normalise(const Operands<T>& on, int64_t row, float* total) {
  const int64_t n = on.columns, start = row * n;
  const T* first = on.parts[0] + start;
  for (int64_t i = 0; i < n; ++i) {
    total[i] = static_cast<float>(first[i]);
  }
  for (size_t r = 1; r < on.parts.size(); ++r) {
    const T* part = on.parts[r] + start;
    for (int64_t i = 0; i < n; ++i) {
      total[i] += static_cast<float>(part[i]);
    }
  }
  if (on.average) {
    for (int64_t i = 0; i < n; ++i) {
      total[i] /= static_cast<float>(on.parts.size());
    }
  }
  if (on.residual != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      total[i] += static_cast<float>(on.residual[start + i]);
    }
  }
  float squares[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      squares[lane] += total[i + lane] * total[i + lane];
    }
  }
  float square = 0;
  for (; i < n; ++i) {
    square += total[i] * total[i];
  }
  for (const float each : squares) {
    square += each;
  }
  const float scale = 1.0f / std::sqrt(square / static_cast<float>(n) + static_cast<float>(on.eps));
  for (i = 0; i < n; ++i) {
    on.sum[start + i] = static_cast<T>(total[i]);
  }
  for (i = 0; i < n; ++i) {
    const float weight = on.weight != nullptr ? static_cast<float>(on.weight[i]) : 1.0f;
    on.norm[start + i] = static_cast<T>(total[i] * scale * weight);
  }
}

template <typename T>
const T* data_of(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

} // namespace

void all_reduce_rms_norm(
    const at::Tensor& x,
    const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& weight,
    const at::Tensor& norm,
    const at::Tensor& sum,
    double eps,
    bool average,
    const WorkspaceView& view,
    Waiter waiter) {
  const std::string what = waiter.what;
  const auto fits = [&](const at::Tensor& tensor, int64_t elements) {
    return tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == x.scalar_type() &&
        tensor.numel() == elements;
  };
  require(x.dim() == 2 && x.numel() > 0, what, "x must be a matrix that is not empty");
  const int64_t rows = x.size(0), columns = x.size(1);
  require(fits(x, x.numel()) && fits(norm, x.numel()) && fits(sum, x.numel()), what,
          "x, norm and sum must be contiguous CPU tensors of one shape and dtype");
  require(!residual || fits(*residual, x.numel()), what, "residual must be contiguous, with the shape and dtype of x");
  require(!weight || fits(*weight, columns), what, "weight must be contiguous [N], with the dtype of x");
  const auto dtype = x.scalar_type();
  require(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, what,
          "takes float32, bfloat16 and float16");

  Call call(view, std::move(waiter));
  const int64_t bytes = x.numel() * x.element_size();
  std::memcpy(call.staging(call.rank()), x.const_data_ptr(), static_cast<size_t>(bytes));
  call.publish_to_all(call.rank());
  call.await_all(0); // every rank has entered the call: invariant I
  const auto finish = [&](auto example) {
    using T = decltype(example);
    Operands<T> on{{},  data_of<T>(residual), data_of<T>(weight), norm.mutable_data_ptr<T>(), sum.mutable_data_ptr<T>(),
                   columns, eps, average};
    for (int r = 0; r < call.world_size(); ++r) {
      on.parts.push_back(reinterpret_cast<const T*>(call.staging(r)));
    }
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / columns), [&](int64_t begin, int64_t end) {
      std::vector<float> total(static_cast<size_t>(columns));
      for (int64_t row = begin; row < end; ++row) {
        normalise(on, row, total.data());
      }
    });
  };
  if (dtype == at::kFloat) {
    finish(float());
  } else if (dtype == at::kBFloat16) {
    finish(at::BFloat16());
  } else {
    finish(at::Half());
  }
  call.finish();
}

} // namespace symmpatterns
