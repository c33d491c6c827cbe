# CPU image. Not built by the project's own tests, which run without a Docker engine.
FROM python:3.11-slim AS build
WORKDIR /src
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml setup.py README.md LICENSE ./
COPY server server
COPY engine engine
COPY kernels kernels
COPY cache cache
# an index with torch's CPU builds keeps gigabytes of CUDA out: --build-arg TORCH_INDEX_URL=...
ARG TORCH_INDEX_URL=
RUN python -m venv /opt/foregate \
    && /opt/foregate/bin/pip install --no-cache-dir ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch==2.13.0 \
    && /opt/foregate/bin/pip install --no-cache-dir .

FROM python:3.11-slim
COPY --from=build /opt/foregate /opt/foregate
RUN useradd --create-home --uid 10001 foregate && mkdir /models && chown foregate /models
USER foregate
ENV FOREGATE_HOME=/models PATH=/opt/foregate/bin:$PATH
VOLUME /models
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=15s \
    CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"
ENTRYPOINT ["foregate"]
CMD ["serve", "demo", "--host", "0.0.0.0"]
