"""State of the random generators, as tensors.

A resumed run must draw the numbers that the uninterrupted one would have drawn, from Python, NumPy, torch on
the CPU and the rank's CUDA device. The states are plain tensors, so that a checkpoint holds no pickled
object.
"""

import logging
import random

import numpy as np
import torch
from torch import Tensor

_logger = logging.getLogger(__name__)


def capture_rng(device: torch.device) -> dict[str, Tensor]:
    """The states of all generators that this rank draws from.

    Keys: ``python`` int64 [626] (version, then 625 words), ``python_gauss`` float64 [0 or 1] (the cached
    second normal), ``numpy`` int64 [626] (624 words, position, has_gauss), ``numpy_gauss`` float64 [1],
    ``torch`` uint8 [n] and, for a CUDA ``device``, ``cuda`` uint8 [n].
    """
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    assert numpy_state["bit_generator"] == "MT19937"
    inner = numpy_state["state"]
    states = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(
            [*inner["key"].tolist(), inner["pos"], numpy_state["has_gauss"]], dtype=torch.int64
        ),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: dict[str, Tensor], device: torch.device) -> None:
    """Put the random generators back into the states that :func:`capture_rng` returned.

    On a CUDA ``device``, a state captured on a CPU has no ``cuda`` entry: that generator is left as it is,
    with a warning.
    """
    version, *words = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *key, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(key, dtype=np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": states["numpy_gauss"].item(),
        }
    )
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
        else:
            _logger.warning(
                "the checkpoint has no CUDA generator state (it was saved on a CPU); CUDA keeps its seed"
            )
