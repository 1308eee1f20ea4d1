"""The parts of fusion_aware_alloc.py: operators, lowerings, and the pool of buffers."""
