"""Contrastive distillation against drawn rows of two banks."""
