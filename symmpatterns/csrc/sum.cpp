#include "sum.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#else
#include <c10/util/Half.h>
#endif

namespace symmpatterns {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// Each loads or stores a run of elements; the plain loops are written so that the compiler vectorises them.
template <typename T, typename A>
void load(A* to, const T* from, int64_t count) {
  std::memcpy(to, from, count * sizeof(T));
}

template <typename T, typename A>
void store(T* to, const A* from, int64_t count) {
  std::memcpy(to, from, count * sizeof(T));
}

template <>
void load(float* to, const BFloat16* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
    std::memcpy(to + i, &bits, sizeof(bits));
  }
}

template <>
void store(BFloat16* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof(bits));
    const uint32_t nearest_even = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    to[i].bits = static_cast<uint16_t>(is_nan ? 0x7FC0u : nearest_even);
  }
}

template <>
void load(float* to, const Float16* from, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < count; ++i) {
    to[i] = _cvtsh_ss(from[i].bits);
  }
#else
  for (; i < count; ++i) {
    to[i] = static_cast<float>(c10::Half(from[i].bits, c10::Half::from_bits()));
  }
#endif
}

template <>
void store(Float16* to, const float* from, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), kNearest));
  }
  for (; i < count; ++i) {
    to[i].bits = static_cast<uint16_t>(_cvtss_sh(from[i], kNearest));
  }
#else
  for (; i < count; ++i) {
    to[i].bits = c10::Half(from[i]).x;
  }
#endif
}

template <typename T, typename O>
void sum(O* out, const void* const* sources, int count, int64_t begin, int64_t end, bool average) {
  using A = typename Accumulator<T>::type;
  constexpr int64_t kRun = 1024; // two of these stay in the first-level cache
  alignas(64) A total[kRun];
  alignas(64) A term[kRun];
  for (int64_t start = begin; start < end; start += kRun) {
    const int64_t n = std::min(kRun, end - start);
    load(total, static_cast<const T*>(sources[0]) + start, n);
    for (int r = 1; r < count; ++r) {
      load(term, static_cast<const T*>(sources[r]) + start, n);
      for (int64_t i = 0; i < n; ++i) {
        total[i] += term[i];
      }
    }
    if (average) {
      for (int64_t i = 0; i < n; ++i) {
        total[i] /= static_cast<A>(count);
      }
    }
    store(out + start, total, n);
  }
}

} // namespace

void sum_over_ranks(
    DType dtype, DType out_dtype, void* out, const void* const* sources, int count, int64_t begin, int64_t end,
    bool average) {
  const bool widens = out_dtype != dtype; // to float32, as the caller has checked
  switch (dtype) {
    case DType::kFloat32:
      return sum<float>(static_cast<float*>(out), sources, count, begin, end, average);
    case DType::kFloat64:
      return sum<double>(static_cast<double*>(out), sources, count, begin, end, average);
    case DType::kBFloat16:
      return widens ? sum<BFloat16>(static_cast<float*>(out), sources, count, begin, end, average)
                    : sum<BFloat16>(static_cast<BFloat16*>(out), sources, count, begin, end, average);
    case DType::kFloat16:
      return widens ? sum<Float16>(static_cast<float*>(out), sources, count, begin, end, average)
                    : sum<Float16>(static_cast<Float16*>(out), sources, count, begin, end, average);
  }
}

} // namespace symmpatterns
