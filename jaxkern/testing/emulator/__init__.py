"""An emulator of Mosaic GPU kernels on a CPU. Its public names: `jaxkern.testing`."""
