#!/usr/bin/env bash
# Build the images of the Dockerfile; `make image` calls this.
#   infra/image.sh [TARGET...]      job worker server; all three by default
# Environment: TORCH cpu|cuda    IMAGE adapterline    BASE_IMAGE python:3.11-slim-bookworm    WHEELS folder with a wheel of
#   torch, instead of PyTorch's own index    PIP_INDEX_URL another package index    SOURCE address for the label
# Makes adapterline:cpu, adapterline:cpu-worker and adapterline:server.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=${TORCH:-cpu} IMAGE=${IMAGE:-adapterline} BASE_IMAGE=${BASE_IMAGE:-python:3.11-slim-bookworm}
fail() { echo "error: expected $1; found $2; $3" >&2; exit 1; }

# A client that has BuildKit: built in before release 23, a plug-in since.
client() {
  for docker in docker /usr/bin/docker; do
    command -v "$docker" >/dev/null || continue
    release=$("$docker" version --format '{{.Client.Version}}' 2>/dev/null || true)
    if [ "${release%%.*}" -lt 23 ] 2>/dev/null || "$docker" buildx version >/dev/null 2>&1; then
      echo "$docker" 1; return
    fi
  done
  echo docker 0
}

[[ $TORCH = cpu || $TORCH = cuda ]] || fail "TORCH to be cpu or cuda" "$TORCH" "choose one"
command -v docker >/dev/null || fail "the program docker" "none" "install Docker, or run infra/engine.sh start FOLDER"
docker version >/dev/null 2>&1 ||
  fail "a Docker engine" "no answer${DOCKER_HOST:+ at $DOCKER_HOST}" "start it, or run infra/engine.sh start FOLDER and set DOCKER_HOST"
read -r docker buildkit < <(client)

commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || commit+=-dirty
remote=$(git remote get-url origin 2>/dev/null || true)
[[ $remote =~ ^https://[^@]*$ ]] || remote=unknown        # a path of this machine, or a password, is nobody's business
arguments=(
  --build-arg "TORCH=$TORCH" --build-arg "BASE_IMAGE=$BASE_IMAGE" --build-arg "REVISION=$commit"
  --build-arg "VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" --build-arg "SOURCE=${SOURCE:-$remote}"
)
[ -z "${PIP_INDEX_URL:-}" ] || arguments+=(--build-arg "INDEX=$PIP_INDEX_URL")
# Without a bridge, as with infra/engine.sh, a build reaches the package index only through the host's network.
docker network ls --format '{{.Driver}}' | grep -qx bridge || arguments+=(--network host)

rm -rf build/wheels
mkdir -p build/wheels
if [ "$TORCH" = cpu ] && [ -n "${WHEELS:-}" ]; then
  version=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' infra/lock/cpu.txt)
  cp --link "$WHEELS/torch-$version"-*.whl build/wheels/ 2>/dev/null || cp "$WHEELS/torch-$version"-*.whl build/wheels/ ||
    fail "torch $version in $WHEELS" "none" "run make lock, or unset WHEELS"
  arguments+=(--build-arg TORCH_WHEELS=/wheels)
fi

[ $# -gt 0 ] || set -- job worker server
for target in "$@"; do
  case $target in
    job) tag=$IMAGE:$TORCH ;;
    worker) tag=$IMAGE:$TORCH-worker ;;
    server) tag=$IMAGE:server ;;
    *) fail "a target among job, worker, server" "$target" "choose one" ;;
  esac
  begin=$SECONDS
  DOCKER_BUILDKIT=$buildkit "$docker" build "${arguments[@]}" --target "$target" --tag "$tag" . >build/image.log 2>&1 ||
    { tail -n 30 build/image.log >&2; fail "$tag to build" "the lines above" "see build/image.log"; }
  docker image inspect --format "$tag {{.Size}}" "$tag" |
    awk -v s=$((SECONDS - begin)) '{printf "%-26s %6.0f MB  %4d s\n", $1, $2 / 1e6, s}'
done
