# syntax=docker/dockerfile:1
# The server with all that it needs but models. Built with
#   docker build -t image-generation-inference .
# and, with stable-fast compiled for COMPILE_BACKEND=stable-fast,
#   docker build --build-arg STABLE_FAST=true -t image-generation-inference .

ARG CUDA=13.0.2
ARG UBUNTU=24.04
ARG STABLE_FAST=false

# What every stage runs on. PyTorch's own packages bring the CUDA libraries along; gcc and
# Python's headers are for Triton, which compiles small launchers while it runs.
FROM nvidia/cuda:${CUDA}-base-ubuntu${UBUNTU} AS base
ENV DEBIAN_FRONTEND=noninteractive \
    PATH=/opt/igi/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        "gcc=4:13.*" "libc6-dev=2.*" "python3=3.12.*" "python3-dev=3.12.*" "python3-venv=3.12.*" \
    && rm -rf /var/lib/apt/lists/*

# Dependencies first: they change less often than the code, and weigh gigabytes.
FROM base AS installed
WORKDIR /opt/igi/source
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/igi/venv \
    && python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > /tmp/dependencies.txt \
    && python -m pip install --constraint constraints.txt --requirement /tmp/dependencies.txt
COPY README.md LICENSE ./
COPY ipc ipc
COPY supervisor supervisor
COPY gpu_worker gpu_worker
RUN python -m pip install --no-cache-dir --no-deps .

# Configurations and tokenizers of the four families, for single-file checkpoints.
FROM installed AS configs
COPY scripts/fetch_configs scripts/fetch_configs
RUN python scripts/fetch_configs /opt/igi/configs

# With or without stable-fast, by STABLE_FAST.
FROM installed AS stable-fast-false

FROM nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS stable-fast-true
ENV DEBIAN_FRONTEND=noninteractive \
    PATH=/opt/igi/venv/bin:$PATH
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        "g++=4:13.*" "ninja-build=1.11.*" "python3=3.12.*" "python3-dev=3.12.*" "python3-venv=3.12.*" \
    && rm -rf /var/lib/apt/lists/*
COPY --from=installed /opt/igi/venv /opt/igi/venv
COPY scripts/build_stable_fast /opt/igi/scripts/
RUN PYTHON=/opt/igi/venv/bin/python /opt/igi/scripts/build_stable_fast

# hadolint ignore=DL3006
FROM stable-fast-${STABLE_FAST} AS compiled

FROM base AS server
LABEL org.opencontainers.image.title="Image Generation Inference" \
      org.opencontainers.image.licenses="MIT"
COPY --from=compiled /opt/igi/venv /opt/igi/venv
COPY --from=configs /opt/igi/configs /opt/igi/configs
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin igi \
    && install --directory --owner=igi --group=igi /data /models
USER 10001:10001
WORKDIR /home/igi
ENV DATA_DIR=/data \
    MODEL_DIR=/models \
    CONFIG_DIR=/opt/igi/configs \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/data", "/models"]
EXPOSE 1234
# Whether the supervisor lives: it replaces workers by itself, so this is no question of /ready.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ.get('PORT', '1234')}/hc\", timeout=4)"]
ENTRYPOINT ["igi"]
CMD ["serve"]
