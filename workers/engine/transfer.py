"""From host arrays to the device, without making the host wait for what the device still computes."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def to_device(values: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """The array as a tensor there; on CPU it shares the array's memory."""
    tensor: torch.Tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def indices(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 [n]."""
    return to_device(np.array(values, dtype=np.int64), device)


def column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """float64 [n, 1], to go with one row each."""
    return to_device(np.array(values, dtype=np.float64), device).unsqueeze(1)
