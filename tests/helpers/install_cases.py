"""Stand-ins for what a machine may lack."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "FASTKD_BUILD",
    "FASTKD_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS",
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "CUDA_HOME",
    "CUDA_PATH",
)
