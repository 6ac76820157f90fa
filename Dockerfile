# Images of Adapterline; `make image` builds them. Everything is installed from infra/lock, by hash.
#   job     (default) trains and runs flows: python -m components.training.job, prefect flow-run execute
#   worker  job, as the worker of a process pool, with a health check
#   server  MLflow, the Prefect server, S3 and the worker of the docker pool, for infra/compose.yaml; without torch
# Only what both builders of Docker know is used here: the legacy one builds every stage above the one asked for.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# --- thrown away: pip installs uv, uv installs the rest
FROM ${BASE_IMAGE} AS installer
# The base image's certificates, so that a company's proxy is trusted when its base image trusts it.
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt UV_SYSTEM_CERTS=1 \
    UV_NO_CACHE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never VIRTUAL_ENV=/opt/venv
# Another package index, for both.
ARG INDEX=https://pypi.org/simple
ENV PIP_INDEX_URL=${INDEX} UV_DEFAULT_INDEX=${INDEX}
COPY infra/lock/uv.txt /lock/
RUN test -s "$SSL_CERT_FILE" || { echo "expected certificates at $SSL_CERT_FILE in BASE_IMAGE; found none; install ca-certificates there"; exit 1; }; \
    python3 -m venv /uv \
 && /uv/bin/pip install --quiet --no-cache-dir --only-binary :all: --require-hashes --requirement /lock/uv.txt \
 && /uv/bin/uv venv --quiet --python python3 "$VIRTUAL_ENV"

FROM installer AS job-packages
ARG TORCH=cpu
# Where the CPU build of torch comes from: a page that lists wheels, or /wheels for build/wheels of the build context.
ARG TORCH_WHEELS=https://download.pytorch.org/whl/cpu/torch/
COPY infra/lock/${TORCH}.txt build/wheel[s]/*.whl /wheels/
RUN if [ "$TORCH" = cpu ]; then links="--find-links $TORCH_WHEELS"; fi; \
    /uv/bin/uv pip sync --quiet --only-binary :all: --require-hashes ${links:-} "/wheels/$TORCH.txt"
# Tests, headers, and the web pages of servers that do not run here; 290 MB.
RUN cd "$VIRTUAL_ENV"/lib/python3*/site-packages \
 && rm -rf torch/test torch/include pyarrow/include pyarrow/*flight* mlflow/server/js prefect/server/ui prefect/server/ui-v2 \
 && find torch/bin -type f ! -name torch_shm_manager -delete \
 && find pandas scipy sklearn matplotlib pyarrow -type d -name tests -prune -exec rm -rf {} + \
 && find . -name '*.pyi' -delete
# Bytecode cannot be written on a read-only root. That of what jobs and flows import saves them 10 s of CPU and takes
# 135 MB; that of all packages would take 470.
RUN "$VIRTUAL_ENV/bin/python" -c "import accelerate, boto3, datasets, great_expectations, mlflow.pyfunc, peft, \
    prefect.cli, prefect.engine, prefect.workers.process, sklearn.feature_extraction.text, sklearn.linear_model, torch; \
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification"

FROM installer AS server-packages
COPY infra/lock/server.txt /lock/
RUN /uv/bin/uv pip sync --quiet --only-binary :all: --require-hashes /lock/server.txt
RUN cd "$VIRTUAL_ENV"/lib/python3*/site-packages \
 && rm -rf pyarrow/include pyarrow/*flight* \
 && find pandas scipy sklearn matplotlib pyarrow -type d -name tests -prune -exec rm -rf {} + \
 && find . -name '*.pyi' -delete
RUN "$VIRTUAL_ENV/bin/python" -c "import mlflow.server, mlflow.server.auth, prefect.cli, prefect.server.api.server, \
    prefect_docker.worker, prefect_kubernetes.worker, psycopg2, boto3, asyncpg"

# --- what all images have: Python without its installers, a user, places to write
FROM ${BASE_IMAGE} AS bare
RUN rm -rf /usr/bin/pip* /usr/local/bin/pip* /usr/local/lib/python3*/ensurepip /usr/lib/python3*/ensurepip \
        /usr/local/lib/python3*/site-packages/* /usr/lib/python3/dist-packages/* /usr/share/python-wheels /root/.cache \
 && echo 'adapterline:x:10001:' >> /etc/group \
 && echo 'adapterline:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd \
 && mkdir -p /app/out /cache /data && chown 10001:10001 /app/out /cache /data
# requests, httpx and boto3 trust what the system trusts, and not their own lists: mount a company's bundle over it.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp PREFECT_HOME=/tmp/prefect ADAPTERLINE_CACHE=/cache HF_HOME=/cache/huggingface \
    DO_NOT_TRACK=1 MLFLOW_DISABLE_TELEMETRY=true \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt \
    AWS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt
WORKDIR /app
USER 10001:10001

# --- job
FROM bare AS job
COPY --from=job-packages /opt/venv /opt/venv
COPY LICENSE NOTICE prefect.yaml ./
COPY infra infra
COPY components components
COPY flows flows
ARG REVISION=unknown
ARG VERSION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title=adapterline org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.revision=${REVISION} org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.source=${SOURCE}
CMD ["python", "-m", "components.training.job", "--help"]

# --- worker: answers 503 when it no longer asks for work
FROM job AS worker
ENV PREFECT_WORKER_WEBSERVER_HOST=127.0.0.1 PREFECT_WORKER_WEBSERVER_PORT=8080 HEALTH_URL=http://127.0.0.1:8080/health
CMD ["prefect", "worker", "start", "--pool", "local", "--type", "process", "--with-healthcheck"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from os import environ as e; from urllib.request import urlopen; urlopen(e['HEALTH_URL'], timeout=4)"]

# --- server: the Prefect server unless another command is given; each has its page of health
FROM bare AS server
COPY --from=server-packages /opt/venv /opt/venv
COPY LICENSE NOTICE ./
COPY infra infra
ENV PREFECT_UI_STATIC_DIRECTORY=/tmp/prefect/ui HEALTH_URL=http://127.0.0.1:4200/api/health
CMD ["prefect", "server", "start"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from os import environ as e; from urllib.request import urlopen; urlopen(e['HEALTH_URL'], timeout=4)"]
ARG REVISION=unknown
ARG VERSION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title=adapterline-server org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.revision=${REVISION} org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.source=${SOURCE}

# --- what is built when no target is named
FROM job
