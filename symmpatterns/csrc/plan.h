// How the fused operators divide their work, in one place. A plan depends only on what is equal on all ranks: not on
// K, for example, which may differ where a dimension is sharded unevenly.
#pragma once

#include <algorithm>
#include <cstdint>

namespace symmpatterns {

// Rows [begin, end) of part `index` of `parts`; parts differ by one row at most and may be empty.
struct Rows {
  int64_t begin;
  int64_t end;
};
inline Rows rows_of(int64_t rows, int index, int parts) {
  const int64_t each = rows / parts, more = rows % parts;
  const int64_t begin = index * each + std::min<int64_t>(index, more);
  return {begin, begin + each + (index < more ? 1 : 0)};
}

enum class Algorithm {
  kOneShot, // every rank sums everything: one exchange, world_size reads of the result's size
  kTwoShot, // every rank sums its rows and the others copy them: two exchanges, two reads
};

// Measured on two cores: where the second exchange pays for the reads it saves. Two ranks: never.
constexpr int64_t kTwoShotFrom = int64_t(320) << 10; // bytes of the result times (world size - 2)

inline Algorithm all_reduce_algorithm(int64_t rows, int64_t columns, int64_t item_bytes, int world_size) {
  return rows * columns * item_bytes * (world_size - 2) >= kTwoShotFrom ? Algorithm::kTwoShot : Algorithm::kOneShot;
}

// all-gather -> matmul: one GEMM a shard, straight from the peers' memory as they arrive, or first gather and then one
// GEMM? Each GEMM reads (and packs) b once more: 10 to 20 % of the time at 16 to 128 rows a shard, nothing from 256 on.
// Gathering along K always comes first: partial products in 16 bits would be rounded once a shard.
constexpr int64_t kRowsOfAShardGemm = 256;

inline bool multiplies_shards(int64_t shard_rows, int gather_dim) {
  return gather_dim == 0 && shard_rows >= kRowsOfAShardGemm;
}

// What a call needs of its workspace: bytes of a half of the staging memory, and flags.
struct Needs {
  int64_t staging_bytes;
  int64_t flags;
};

} // namespace symmpatterns
