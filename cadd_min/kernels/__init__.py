"""The fused kernels of csrc/ as Python sees them: their random words, and how they are built."""
