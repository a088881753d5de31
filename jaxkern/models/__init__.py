"""Read open checkpoints into a `TransformerLM`, and write them.

`load_native` and `save_native` do so in a form that compressed models have too. All
four need the `safetensors` package: `pip install "jaxkern-fused[models]"`.
"""

from ._config import read_config as read_config
from ._load import load as load
from ._native import load_native as load_native
from ._native import save_native as save_native
from ._save import save as save

__all__ = ["load", "load_native", "read_config", "save", "save_native"]
