# fp8train on PyTorch's own CUDA image. Nothing in continuous integration builds this file; docs/clusters.md says how it is used.
#   docker build -t fp8train .
#   docker run --rm fp8train --help
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" --entrypoint launch/torchrun.sh \
#       -v "$PWD/runs:/workspace/fp8train/runs" -v "$PWD/data:/workspace/fp8train/data" fp8train configs/llama/llama3_8b.yaml
# Extras: hf is pure Python. Those of engines (te, deepspeed) are compiled beside torch, which needs the -devel base:
#   docker build --build-arg BASE=2.11.0-cuda13.0-cudnn9-devel --build-arg EXTRAS=hf,te,deepspeed -t fp8train .
ARG BASE=2.11.0-cuda13.0-cudnn9-runtime
FROM pytorch/pytorch:${BASE}
ARG EXTRAS=hf

# torch.compile (train.compile) lets Triton build its launchers, which takes a C compiler and Python's headers.
# git tells a run's revision; tini ends what a process leaves behind.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends gcc git libc6-dev python3-dev tini \
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
    && case ",${EXTRAS}," in *,te,*|*,deepspeed,*) \
        python3 -m pip install --constraint /tmp/image-torch.txt wheel "setuptools>=77" ninja . \
        && python3 -m pip install --constraint /tmp/image-torch.txt --no-build-isolation ".[${EXTRAS}]" ;; \
    *) python3 -m pip install --constraint /tmp/image-torch.txt ".[${EXTRAS}]" ;; esac \
    && python3 -c "import torch; assert f'torch=={torch.__version__}' == open('/tmp/image-torch.txt').read().strip(); \
        assert torch.version.cuda" \
    && rm /tmp/image-torch.txt \
    && fp8train --version

COPY configs ./configs
COPY launch ./launch
COPY tools ./tools

# Runs and data are mounted there; a --user of any number may write to all that is not mounted.
RUN useradd --create-home --uid 10001 fp8train \
    && mkdir runs data \
    && chmod 1777 runs data /home/fp8train
ENV HOME=/home/fp8train
USER 10001

ENTRYPOINT ["tini", "-g", "--", "fp8train"]
CMD ["doctor"]
