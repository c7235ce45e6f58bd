"""Where am I: the hardware that this process was given."""

from collections.abc import Mapping
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/gpus")


def gpus(environ: Mapping[str, str], driver: Path = _DRIVER) -> int:
    """How many NVIDIA GPUs this process may use, without loading CUDA: 0 where there is no driver."""
    present = len(list(driver.iterdir())) if driver.is_dir() else 0
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
