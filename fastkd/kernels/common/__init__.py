"""What the kernels of all operations share."""
