"""The fused operations, one file each: schemas, fakes, the autograd rule, the public function."""
