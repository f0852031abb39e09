# A node without a GPU, for trying things and for tests: the locked CPU environment, rlprm in it, nothing secret and no root.
# Linted, not built here: no engine was at hand.
#   docker build -f cluster/docker/cpu.Dockerfile -t rlprm:cpu .
FROM python:3.11.13-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# util-linux: vLLM asks `lscpu`; libnuma1: vLLM; iproute2: preflight; make: the tests; git: the commit in run.json
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git iproute2 libnuma1 make util-linux \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 rlprm

# Dependencies first: they change less often than the code. torch's CPU build is on PyTorch's own index only.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
COPY cluster/lock/cpu.txt /tmp/cpu.txt
RUN python -m venv /opt/venv \
    && grep -E '^torch==' /tmp/cpu.txt >/tmp/torch.txt \
    && pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu -r /tmp/torch.txt \
    && grep -vE '^torch==' /tmp/cpu.txt >/tmp/rest.txt \
    && pip install --no-cache-dir --no-deps -r /tmp/rest.txt \
    && rm /tmp/*.txt

COPY --chown=1000:1000 . /opt/rlprm
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e /opt/rlprm

# Modes, not secrets: no token is in here
# hadolint ignore=DL3064
ENV OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 \
    HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

USER 1000:1000
WORKDIR /home/rlprm
CMD ["rlprm", "doctor"]
