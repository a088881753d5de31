"""Compression of the MLPs of a trained language model.

`compress` makes a smaller `jaxkern.nn.TransformerLM` of a trained one: with low-rank
weights, with 2:4-sparse weights, with both, or with 2:4-sparse activations. It returns
a `Report` with a `LayerReport` for each layer.
"""

from ._compress import compress as compress
from ._report import LayerReport as LayerReport
from ._report import Report as Report

__all__ = ["LayerReport", "Report", "compress"]
