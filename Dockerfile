# Subpage as a container.
#
#   docker build -t subpage .
#   docker run --rm -p 127.0.0.1:8000:8000 --read-only --tmpfs /tmp \
#       -v subpage:/var/lib/subpage -e SUBPAGE_TOKEN="$(openssl rand -hex 32)" subpage
#
# In a container the service listens on all addresses, so it does not start without a token: SUBPAGE_TOKEN, or those of
# `docker exec … subpage token create`, which are kept in the volume. compose.yaml has PostgreSQL beside it.
#
# Base images are pinned by digest: what is built does not depend on what the tag names on that day. To move one, take the
# digest of `docker buildx imagetools inspect python:3.11-slim-bookworm` and put it in both places.
#
# The root file system may be read-only. Three places are written:
#   /tmp                large request bodies while they are read (a tmpfs, or a volume as large as the largest body)
#   /var/lib/subpage    what has to last
#   /var/cache/subpage  compiled kernels. The image carries those for the processor model that built it, and the volume
#                       starts as a copy of them. On another model, or with an empty volume mounted there, the first
#                       start compiles them again; /readyz answers once that is done.

FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    UV_NO_CACHE=1 \
    UV_COMPILE_BYTECODE=1
WORKDIR /opt/subpage
RUN python -m venv .venv
COPY requirements.lock requirements-installer.lock ./
COPY deploy/install.py deploy/
RUN .venv/bin/python deploy/install.py requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY capture/ capture/
COPY engine/ engine/
COPY scale/ scale/
COPY service/ service/
COPY client/ client/
RUN .venv/bin/python deploy/install.py requirements.lock . \
 && .venv/bin/pip uninstall --yes setuptools uv pip

FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
LABEL org.opencontainers.image.title="subpage" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin subpage \
 && install -d -o subpage -g subpage -m 0700 /var/lib/subpage \
 && install -d -o subpage -g subpage /var/cache/subpage
COPY --from=build /opt/subpage/.venv /opt/subpage/.venv
ENV PATH=/opt/subpage/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SUBPAGE_HOST=0.0.0.0 \
    SUBPAGE_PORT=8000 \
    SUBPAGE_KERNEL_CACHE=/var/cache/subpage \
    SUBPAGE_STORE=sqlite:////var/lib/subpage/subpage.db \
    SUBPAGE_LOG_FORMAT=json
WORKDIR /opt/subpage
# By number, so that an orchestrator can see that it is not root.
USER 10001
RUN python -m engine.warm
VOLUME ["/var/lib/subpage", "/var/cache/subpage"]

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os; from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open(f\"http://127.0.0.1:{os.environ['SUBPAGE_PORT']}/livez\", timeout=3)"]
CMD ["subpage", "serve"]
