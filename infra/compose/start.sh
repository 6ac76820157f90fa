#!/bin/sh
# What each container of infra/compose.yaml runs. Secrets come as files named after the variables that they become, so that
# they stand in no configuration, on no command line and in nothing that `docker inspect` shows.
#   start.sh s3|mlflow|prefect|setup|worker-docker|worker-local
set -eu

for file in /run/secrets/*; do
  [ -e "$file" ] || continue
  value=$(cat "$file") || { echo "error: expected to read $file; found no right to; run infra/compose/prepare.sh" >&2; exit 1; }
  export "${file##*/}=$value"
done
# In a container of the project's network. Where containers share the host's, tests say otherwise.
listen=${LISTEN:-0.0.0.0} STORE_OPTIONS=${STORE_OPTIONS:-}
database() { echo "$1://adapterline:$POSTGRES_PASSWORD@${POSTGRES_ADDRESS:-postgres:5432}/$2"; }

case $1 in
  s3)
    rm -f /data/mini.options # it would go before the options here
    # Its own parts talk on loopback. Their ports are open to the network of the project, whose members have the keys anyway.
    # shellcheck disable=SC2086  # several options
    exec weed mini $STORE_OPTIONS -dir=/data -ip=127.0.0.1 -ip.bind="$listen" -s3.port="${S3_PORT:-8333}" -s3.port.iceberg=0 -s3.port.lance=0 \
      -webdav=false -admin.ui=false -master.telemetry=false -bucket=adapterline
    ;;
  mlflow)
    umask 077
    cat >/tmp/auth.ini <<INI
[mlflow]
auth_cache_ttl_seconds = 60
default_permission = READ
database_uri = $(database postgresql+psycopg2 mlflow_auth)
admin_username = $MLFLOW_TRACKING_USERNAME
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
    export MLFLOW_AUTH_CONFIG_PATH=/tmp/auth.ini MLFLOW_AUTH_ADMIN_PASSWORD="$MLFLOW_TRACKING_PASSWORD"
    MLFLOW_BACKEND_STORE_URI=$(database postgresql+psycopg2 mlflow)
    export MLFLOW_BACKEND_STORE_URI
    exec mlflow server --host "$listen" --port "${MLFLOW_PORT:-5000}" --workers 2 --app-name basic-auth \
      --artifacts-destination s3://adapterline/mlflow
    ;;
  prefect)
    PREFECT_SERVER_DATABASE_CONNECTION_URL=$(database postgresql+asyncpg prefect)
    PREFECT_SERVER_API_AUTH_STRING=$PREFECT_API_AUTH_STRING
    # Who holds a slot of a limit is written to the volume: a server that forgot it would never free the slot. The lock names
    # its process by number, which is the same in each life of this container.
    PREFECT_HOME=/data/prefect PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem
    rm -f "$PREFECT_HOME/concurrency_leases/expirations.lock"
    export PREFECT_SERVER_DATABASE_CONNECTION_URL PREFECT_SERVER_API_AUTH_STRING PREFECT_HOME PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE
    exec prefect server start --host "$listen" --port "${PREFECT_PORT:-4200}"
    ;;
  setup)
    python -m infra.compose.setup
    if [ -n "${ADAPTERLINE_WEBHOOK_URL:-}" ]; then python -m infra.automations; else python -m infra.automations --without-webhook; fi
    exec prefect --no-prompt deploy --all
    ;;
  worker-docker)
    exec python -m infra.docker_worker --pool docker
    ;;
  worker-local)
    exec prefect worker start --pool local --type process --name local --install-policy never --with-healthcheck
    ;;
  *)
    echo "error: expected s3, mlflow, prefect, setup, worker-docker or worker-local; found '$1'; correct infra/compose.yaml" >&2
    exit 1
    ;;
esac
