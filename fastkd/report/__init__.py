"""Reports on finished runs: the published tables with ours beside them, curves, and attention maps."""
