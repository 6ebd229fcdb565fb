"""What a run ran on, for ``env.json``: enough to repeat it or to see why a repetition differs.

Environment variables are an allow-list: a wider net (all of ``SLURM_*``) would catch tokens.
"""

import os
import platform
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fp8train import __version__
from fp8train.run_dir.git import git_state

_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_VISIBLE_DEVICES",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NCCL_DEBUG",
    "NCCL_IB_HCA",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_CPUS_PER_TASK",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "WORLD_SIZE",
)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, git revision of the working directory (None outside a repository), machine, command line,
    variables.
    """
    return {
        "versions": {
            "fp8train": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "cuda": torch.version.cuda,
        },
        "git": git_state(Path.cwd()),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "working_directory": str(Path.cwd()),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
