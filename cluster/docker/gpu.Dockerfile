# A GPU node: the locked environment, rlprm in it, nothing secret and no root. Linted, not built here: no engine was at hand.
#   docker build -f cluster/docker/gpu.Dockerfile -t rlprm:gpu .
# The CUDA libraries come with the Python packages; the image brings the toolkit for kernels that are compiled at first use.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# iproute2 and util-linux: preflight and vLLM ask `ip` and `lscpu`; libnuma1: vLLM; git: the commit in run.json
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates curl g++ git iproute2 libnuma1 util-linux \
    && rm -rf /var/lib/apt/lists/*

# Python 3.11, which the lock is for; Ubuntu 24.04 has 3.12
ARG UV_VERSION=0.13.8
ENV UV_PYTHON_INSTALL_DIR=/opt/python
RUN curl -LsSf "https://astral.sh/uv/${UV_VERSION}/install.sh" | env UV_INSTALL_DIR=/usr/local/bin sh \
    && uv venv --python 3.11 /opt/venv
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH

# Dependencies first: they change less often than the code
COPY cluster/lock/gpu.txt /tmp/gpu.txt
RUN uv pip install --no-cache --no-deps -r /tmp/gpu.txt && rm /tmp/gpu.txt

RUN groupadd --gid 1000 rlprm || true; \
    useradd --create-home --uid 1000 --gid 1000 rlprm 2>/dev/null || usermod --login rlprm --home /home/rlprm --move-home ubuntu

COPY --chown=1000:1000 . /opt/rlprm
RUN uv pip install --no-cache --no-deps --no-build-isolation -e /opt/rlprm

# One thread a process unless the placement says more; Ray asks for a token (none is in here: these are modes, not secrets)
# hadolint ignore=DL3064
ENV OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 \
    HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

USER 1000:1000
WORKDIR /home/rlprm
CMD ["rlprm", "doctor"]
