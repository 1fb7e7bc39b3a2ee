"""Attention maps, the attention-transfer loss and the taps."""
