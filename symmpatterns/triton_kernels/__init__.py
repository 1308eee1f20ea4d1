"""The Triton kernels that compute and communicate at once; they import torch, triton and each other's shared files only."""
