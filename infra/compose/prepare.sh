#!/bin/sh
# Make the secrets and settings that infra/compose.yaml wants. Run it before the first `up`; again it changes nothing.
#   infra/compose/prepare.sh
# Each secret is a file of mode 600 in infra/compose/secrets, of user 10001, as whom the containers run: Compose hands files
# over as they are. Without being root that takes a container of the engine, from adapterline:server (`make image`).
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets

fail() { echo "error: expected $1; found $2; $3" >&2; exit 1; }
token() { od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }
secret() {
  [ -e "secrets/$1" ] || { printf '%s' "$2" >"secrets/.$1" && mv "secrets/.$1" "secrets/$1"; }
}

socket=${DOCKER_SOCKET:-/var/run/docker.sock}
[ -S "$socket" ] || fail "the engine's socket at $socket" "none" "start Docker, or set DOCKER_SOCKET"

if [ "$(stat -c %u secrets)" != 10001 ]; then
  secret POSTGRES_PASSWORD "$(token 24)"
  secret AWS_ACCESS_KEY_ID "$(token 10)"
  secret AWS_SECRET_ACCESS_KEY "$(token 24)"
  secret MLFLOW_TRACKING_PASSWORD "$(token 18)"
  secret MLFLOW_FLASK_SERVER_SECRET_KEY "$(token 32)"
  secret PREFECT_API_AUTH_STRING "admin:$(token 18)"
  secret ADAPTERLINE_WEBHOOK_URL "" # write it there to be told of failures
  if [ "$(id -u)" -eq 0 ]; then
    chown -R 10001:10001 secrets
  else
    docker run --rm --network none --user 0 --volume "$PWD/secrets:/secrets" adapterline:server chown -R 10001:10001 /secrets ||
      fail "the engine to give the secrets to user 10001" "an error" "build the images first (make image), or run this as root"
  fi
fi

[ -e ../.env ] || cat >../.env <<ENV
# Written by infra/compose/prepare.sh; docker compose reads it. See infra/compose.yaml for what else may stand here.
COMPOSE_FILE=compose.yaml$(command -v nvidia-smi >/dev/null || echo ':compose/cpu.yaml')
DOCKER_SOCKET=$socket
DOCKER_GID=$(stat -c %g "$socket")
ENV
echo "secrets: infra/compose/secrets    settings: infra/.env"
