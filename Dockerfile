# fp8train on PyTorch's own CUDA image. Nothing in continuous integration builds this file; docs/clusters.md says how it is used.
#   docker build -t fp8train .
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/workspace/fp8train/runs" -v "$PWD/data:/workspace/fp8train/data" \
#       fp8train launch/torchrun.sh configs/llama/llama3_8b.yaml
FROM pytorch/pytorch:2.11.0-cuda13.0-cudnn9-runtime

# torch.compile (train.compile) lets Triton build its launchers, which takes a C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

# The image's torch lies in the system's Python, so that is where everything goes.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /workspace/fp8train
COPY pyproject.toml README.md LICENSE ./
COPY fp8train ./fp8train
# The constraint makes pip fail rather than replace the torch that fits this CUDA.
RUN python3 -c "import torch; print(f'torch=={torch.__version__}')" > /tmp/image-torch.txt \
    && python3 -m pip install --constraint /tmp/image-torch.txt ".[hf]" \
    && python3 -c "import torch; assert f'torch=={torch.__version__}' == open('/tmp/image-torch.txt').read().strip(); \
        assert torch.version.cuda" \
    && rm /tmp/image-torch.txt \
    && fp8train --version

COPY configs ./configs
COPY launch ./launch
COPY tools ./tools

CMD ["fp8train", "doctor"]
