# The service in a container: see docs/en/deploy.md. Package indexes, and torch without CUDA, are chosen
# at build time: --build-arg PIP_ARGS="--index-url ... --extra-index-url ..."
FROM python:3.12-slim AS build
ARG PIP_ARGS=""
WORKDIR /source
RUN python -m venv /opt/khaosz
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY recipes recipes
COPY khaosz khaosz
RUN /opt/khaosz/bin/pip install --no-cache-dir -c constraints.txt ${PIP_ARGS} \
    ".[serve,rag,structured]"

FROM python:3.12-slim
# The kernels of quantised models are compiled for the processor at the first start.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/khaosz /opt/khaosz
RUN useradd --uid 10001 --no-create-home --home-dir /data khaosz \
    && install --directory --owner=khaosz --mode=0700 /data
ENV PATH=/opt/khaosz/bin:$PATH \
    KHAOSZ_CACHE=/data/cache \
    PYTHONUNBUFFERED=1
USER khaosz
# runs/ with trained models, cache/models/ with pulled ones, khaosz-data/
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s CMD ["python", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["khaosz"]
# Exits with an error without KHAOSZ_API_KEY, which addresses other than loopback require.
CMD ["serve", "--host", "0.0.0.0"]
