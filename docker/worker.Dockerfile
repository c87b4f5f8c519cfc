# The worker: takes jobs from the queue and runs the engine. It also holds the command line (`safegraft reference …`).
# Build it from the root of the repository: docker build -f docker/worker.Dockerfile -t safegraft-worker .
FROM python:3.11.16-slim-bookworm

LABEL org.opencontainers.image.title="safegraft worker" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /src
COPY pyproject.toml constraints.txt ./

# torch first and alone: it is by far the largest layer. Empty: pip's own index, whose Linux build brings CUDA along and
# runs without a GPU too. For a smaller image name an index of CPU builds. --no-deps, so that nothing but torch itself
# comes from that index; what torch needs is installed in the next step.
ARG TORCH_INDEX_URL=""
RUN pip install --no-cache-dir --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch -c constraints.txt

# Dependencies in a layer of their own: they change rarely, our code often. tomllib reads them out of pyproject.toml, so
# that they are written down once; constraints.txt says which versions were tested.
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*project["dependencies"], *project["optional-dependencies"]["engine"], *project["optional-dependencies"]["scaled"], *project["optional-dependencies"]["otel"], sep="\n")' > requirements.txt \
    && pip install --no-cache-dir -r requirements.txt -c constraints.txt

COPY README.md LICENSE ./
COPY safegraft/ safegraft/
COPY worker/ worker/
RUN pip install --no-cache-dir --no-deps .

# By number, because Kubernetes can only tell from a number that it is not root; the same one as the gateway's, because
# both write to /data. The folder is made here, so that an empty volume takes over its owner.
RUN groupadd --gid 10001 safegraft \
    && useradd --no-log-init --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin safegraft \
    && install --directory --owner safegraft --group safegraft --mode 0750 /data
USER 10001:10001

# matplotlib lists the machine's fonts once and keeps the list at home: here, and not while a customer's first job waits.
RUN python -c 'import matplotlib.font_manager'

# Celery puts its working directory in front of Python's search path; this one is empty and only root can write to it.
WORKDIR /opt/safegraft

# That no client of a model hub goes online is set by the worker itself: worker/offline.py.
ENV PYTHONUNBUFFERED=1 \
    SAFEGRAFT_DATA=/data \
    SAFEGRAFT_DEVICE=cpu
VOLUME /data

# Asks this container's own worker, through the broker. Its main process answers, also while the child works on a job;
# so this says that worker and broker hear each other, and nothing about the child.
# Docker sets HOSTNAME to the name that Celery calls its worker by. Each check starts a Python: not too often.
HEALTHCHECK --interval=60s --timeout=30s --start-period=60s --retries=3 \
    CMD ["sh", "-c", "exec celery -A worker.main inspect ping --timeout 10 -d celery@$HOSTNAME"]

CMD ["celery", "-A", "worker.main", "worker", "--loglevel", "INFO", "--without-gossip", "--without-mingle"]
