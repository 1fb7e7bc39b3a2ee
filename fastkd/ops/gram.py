"""The former name of :mod:`fastkd.ops.fsp`, for one release more."""

from fastkd.ops.fsp import FSPLossFunction, FSPMatrixFunction, fsp_loss, fsp_matrix

__all__ = ["FSPLossFunction", "FSPMatrixFunction", "fsp_loss", "fsp_matrix"]
