"""The check that no other distribution shares the library's folder."""

import os


def check_installation(package: str) -> None:
    """Raise if the abandoned distribution `jaxkern` is installed into our folder.

    The package index has it under our import name, and pip installs both into one
    folder: the later one replaces `__init__.py` of the first, and uninstalling either
    damages the other. The names beside `package` tell, without the time that importing
    `importlib.metadata` takes. A distribution in another folder of `sys.path` does not
    mix with ours: Python imports the first one only.

    Raises:
        ImportError: metadata of the other distribution is beside `package`.
    """
    folder = os.path.dirname(package)
    for name in os.listdir(folder):
        if name.startswith("jaxkern-") and name.endswith((".dist-info", ".egg-info")):
            raise ImportError(
                "jaxkern: jaxkern-fused must not share its folder with the abandoned "
                f"distribution jaxkern, got {name} in {folder}. To repair it, run: pip "
                "uninstall --yes jaxkern jaxkern-fused; pip install jaxkern-fused"
            )
