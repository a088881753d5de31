from pathlib import Path as _Path

from .installation import check_installation as _check_installation

# Every module of the library imports this folder. Without this, `import jaxkern.nn`
# would go on where the other distribution has replaced `jaxkern/__init__.py`.
_check_installation(str(_Path(__file__).parents[1]))
