"""FSP matrices and the FSP loss."""
