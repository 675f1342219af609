"""What libtpu reads from the environment when it is loaded on a machine without a TPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
"""It asks no metadata server, claims no device, writes no logs and prints no warnings."""

_GOOGLE, _NO_CHIPS = "0x1ae0", ("0x0042", "0x001f")  # PCI vendor; its network card and its disks


def silence_libtpu(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Sets NO_TPU where libtpu is installed, the machine has no TPU and JAX_PLATFORMS asks for none; call it before jax is imported.

    What the user has set stays. A device of Google's that is not known to be something else counts as a TPU.

    Args:
      root: folder that holds `dev` and `sys`.
    """
    if importlib.util.find_spec("libtpu") is None or "tpu" in environment.get("JAX_PLATFORMS", "") or _has_tpu(root):
        return
    for name, value in NO_TPU.items():
        environment.setdefault(name, value)


def _has_tpu(root: Path) -> bool:
    if any((root / "dev").glob("accel*")):
        return True
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        try:
            if vendor.read_text().strip() == _GOOGLE and vendor.with_name("device").read_text().strip() not in _NO_CHIPS:
                return True
        except OSError:  # unplugged meanwhile
            continue
    return False
