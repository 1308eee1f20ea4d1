"""The Triton kernels that compute and communicate at once: one file per family, over three shared files."""
