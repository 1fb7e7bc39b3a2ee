"""Triton kernels of relational knowledge distillation."""
