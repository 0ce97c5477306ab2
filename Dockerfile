# The service in a container: see docs/en/deploy.md. Where the packages come from, and torch without
# CUDA, is said by the one who builds: --build-arg PIP_ARGS="--index-url ... --extra-index-url ..."
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
# The kernels of quantised models are compiled at the first start, for the processor that is there.
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
# runs/ with models that were trained, cache/models/ with those that were pulled, khaosz-data/
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s CMD ["python", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["khaosz"]
# Without KHAOSZ_API_KEY it says so and ends: outside of this container is off loopback.
CMD ["serve", "--host", "0.0.0.0"]
