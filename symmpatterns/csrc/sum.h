// Sums over ranks: of values in the dtype they were sent in, in rank order, in float32 (float64 for float64), rounded once
// to the dtype of the result: the same, or float32.
#pragma once

#include <cstdint>

namespace symmpatterns {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// out[i] = sum over r of sources[r][i], divided by the number of sources if `average`, for begin <= i < end.
// `out` may be one of the sources if the dtypes are equal. Element by element the same on every rank, whatever range it is computed in.
void sum_over_ranks(
    DType dtype, DType out_dtype, void* out, const void* const* sources, int count, int64_t begin, int64_t end,
    bool average);

} // namespace symmpatterns
