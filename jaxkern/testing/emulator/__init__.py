"""Mosaic GPU kernels on a CPU. Import it from `jaxkern.testing`."""
