"""The GEMM families for large matrices: GPUs' copy engines send pieces of rows while the next piece is multiplied.

Products are ordinary kernels on the caller's stream, transfers copies on a second one, so that communication takes no
multiprocessor. The ranks meet in barriers of one warp on that second stream (relay.py). docs/memory-ordering.md has the
argument why nobody overwrites what somebody reads. On CPU tensors the same steps run one after the other.
"""
