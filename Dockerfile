# syntax=docker/dockerfile:1
# Two images: `docker build --target cpu .` (the default) and `docker build --target gpu .`; see docs/deploy.md.
# Python packages are pinned with their hashes by deploy/lock.py, and in a layer of their own: a change of ours does not
# install them again.

# Debian 12 has the Python that the tests run on
ARG CPU_BASE=debian:bookworm-slim
# torch brings the CUDA libraries it wants; this base has the rest: the environment that makes the host mount its driver
ARG GPU_BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${CPU_BASE} AS cpu-base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

FROM ${GPU_BASE} AS gpu-base
# a compiler and Python's headers: Triton builds a launcher for each kernel when it is first used
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*

FROM cpu-base AS cpu-build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/foregate
WORKDIR /src
COPY deploy/requirements.txt deploy/
RUN /opt/foregate/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement deploy/requirements.txt
# builds without CUDA, some gigabytes smaller than PyPI's
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN /opt/foregate/bin/pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX_URL" "torch==$TORCH_VERSION"
COPY pyproject.toml setup.py README.md LICENSE ./
COPY server server
COPY engine engine
COPY cache cache
COPY kernels kernels
# what the compiler could not build would only be slow: here it is an error
RUN /opt/foregate/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    && ls /opt/foregate/lib/python3*/site-packages/kernels/cpu/libforegate.so \
          /opt/foregate/lib/python3*/site-packages/cache/native/libforegate_io.so

FROM gpu-base AS gpu-build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/foregate
WORKDIR /src
COPY deploy/requirements.txt deploy/requirements-gpu.txt deploy/
RUN /opt/foregate/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement deploy/requirements.txt
# a layer of its own: some gigabytes that hardly ever change
# hadolint ignore=DL3059
RUN /opt/foregate/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement deploy/requirements-gpu.txt
COPY pyproject.toml setup.py README.md LICENSE ./
COPY server server
COPY engine engine
COPY cache cache
COPY kernels kernels
RUN /opt/foregate/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    && ls /opt/foregate/lib/python3*/site-packages/kernels/cpu/libforegate.so \
          /opt/foregate/lib/python3*/site-packages/cache/native/libforegate_io.so

FROM gpu-base AS gpu
COPY --from=gpu-build /opt/foregate /opt/foregate
RUN useradd --create-home --uid 10001 foregate && install --directory --owner foregate /models
# a number, so that Kubernetes can see that it is not root
USER 10001:10001
# the venv's Python, and where models, their packed experts and compiled kernels are kept
ENV PATH=/opt/foregate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FOREGATE_HOME=/models \
    HF_HOME=/models/hub \
    TRITON_CACHE_DIR=/models/triton
VOLUME /models
EXPOSE 8000
HEALTHCHECK --start-period=15m --interval=10s --timeout=6s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["foregate"]
CMD ["serve", "demo", "--host", "0.0.0.0"]

FROM cpu-base AS cpu
COPY --from=cpu-build /opt/foregate /opt/foregate
RUN useradd --create-home --uid 10001 foregate && install --directory --owner foregate /models
USER 10001:10001
ENV PATH=/opt/foregate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FOREGATE_HOME=/models \
    HF_HOME=/models/hub
VOLUME /models
EXPOSE 8000
HEALTHCHECK --start-period=15m --interval=10s --timeout=6s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["foregate"]
CMD ["serve", "demo", "--host", "0.0.0.0"]
