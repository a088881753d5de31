"""Read open checkpoints into a `TransformerLM`, and write them.

`load` and `save` need the `safetensors` package: `pip install "jaxkern-fused[models]"`.
"""

from ._config import read_config as read_config
from ._load import load as load
from ._save import save as save

__all__ = ["load", "read_config", "save"]
