# Subpage as a container.
#
#   docker build -t subpage .
#   docker run --rm -p 127.0.0.1:8000:8000 --read-only --tmpfs /tmp subpage
#
# The root file system may be read-only. Two places are written:
#   /tmp                large request bodies while they are read (a tmpfs, or a volume as large as the largest body)
#   /var/cache/subpage  compiled kernels. The image carries those for the processor model that built it, and the volume
#                       starts as a copy of them. On another model, or with an empty volume mounted there, the first
#                       start compiles them again; /readyz answers once that is done.

FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/subpage
RUN python -m venv .venv
COPY requirements.lock ./
RUN .venv/bin/pip install --require-hashes --only-binary=:all: -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY engine/ engine/
COPY service/ service/
RUN .venv/bin/pip install --no-deps --no-build-isolation . \
 && .venv/bin/pip uninstall --yes setuptools pip

FROM python:3.11-slim
LABEL org.opencontainers.image.title="subpage" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin subpage \
 && install -d -o subpage -g subpage /var/cache/subpage
COPY --from=build /opt/subpage/.venv /opt/subpage/.venv
ENV PATH=/opt/subpage/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SUBPAGE_KERNEL_CACHE=/var/cache/subpage
WORKDIR /opt/subpage
USER subpage
RUN python -m engine.warm
VOLUME /var/cache/subpage

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/livez', timeout=3)"]
CMD ["subpage", "serve", "--host", "0.0.0.0", "--port", "8000"]
