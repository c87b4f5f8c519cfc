# The gateway: HTTP, and those commands of `safegraft` that need no torch (keys, reference add, …). It holds the base
# dependencies of pyproject.toml and the extras `scaled` (Postgres, S3) and `otel` (traces), so no torch.
# Build it from the root of the repository: docker build -f docker/gateway.Dockerfile -t safegraft-gateway .
FROM python:3.11.16-slim-bookworm

LABEL org.opencontainers.image.title="safegraft gateway" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /src

# Dependencies in a layer of their own: they change rarely, our code often. tomllib reads them out of pyproject.toml, so
# that they are written down once; constraints.txt says which versions were tested.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*project["dependencies"], *project["optional-dependencies"]["scaled"], *project["optional-dependencies"]["otel"], sep="\n")' > requirements.txt \
    && pip install --no-cache-dir -r requirements.txt -c constraints.txt

COPY README.md LICENSE ./
COPY safegraft/ safegraft/
COPY service/ service/
RUN pip install --no-cache-dir --no-deps .

# By number, because Kubernetes can only tell from a number that it is not root; the same one as the worker's, because
# both write to /data. The folder is made here, so that an empty volume takes over its owner.
RUN groupadd --gid 10001 safegraft \
    && useradd --no-log-init --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin safegraft \
    && install --directory --owner safegraft --group safegraft --mode 0750 /data
USER 10001:10001

# uvicorn puts its working directory in front of Python's search path; this one is empty and only root can write to it.
WORKDIR /opt/safegraft

# The grace period: an open stream of events would otherwise hold up the stop until it is a kill.
ENV PYTHONUNBUFFERED=1 \
    SAFEGRAFT_DATA=/data \
    UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN=8 \
    UVICORN_WS=none
VOLUME /data
EXPOSE 8000

# Not ready means: the database, the broker or every reference is missing. So a new installation is unhealthy until its
# first reference is added. No proxy, because Docker can hand one to every container, and this is a call to itself.
HEALTHCHECK --interval=15s --timeout=10s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/readyz', timeout=8)"]

CMD ["uvicorn", "--factory", "service.main:app", "--host", "0.0.0.0", "--port", "8000"]
