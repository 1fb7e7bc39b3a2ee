"""What finished runs show: the published tables with ours beside them, curves, and attention maps."""
