#!/usr/bin/env bash
# A Docker engine and a Python base image on a bare Debian machine, where no container registry can be reached: for CI.
#   export DOCKER_HOST=$(infra/engine.sh start FOLDER)     an engine that answers already is used instead
#   infra/engine.sh stop FOLDER                            ends what start started, its containers too; keeps the base image
# Needs root and Debian's packages. The engine keeps everything in FOLDER, listens on a socket there, and has no bridge:
# containers and builds use --network host. BASE_IMAGE names the base image (python:3.11-slim-bookworm); it is pulled where
# that is possible, and else made of Debian's own Python, which takes a minute and is kept as FOLDER/base.tar.
set -euo pipefail

BASE_IMAGE=${BASE_IMAGE:-python:3.11-slim-bookworm}
START_S=60 STOP_S=30

fail() { echo "error: expected $1; found $2; $3" >&2; exit 1; }
say() { echo "engine: $*" >&2; }
usage() { fail "infra/engine.sh start|stop FOLDER" "'$*'" "name a verb and a folder"; }

[ $# -eq 2 ] || usage "$@"
verb=$1
[ "$verb" = start ] || [ "$verb" = stop ] || usage "$@"
mkdir -p "$2" 2>/dev/null || fail "a folder that can be made" "$2" "name another"
folder=$(cd "$2" && pwd -P)
ours=unix://$folder/docker.sock

answers() { DOCKER_HOST=${1:-} timeout 20 docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

# Install the packages of the named programs that are missing.
install() {
  local missing=() pair
  for pair in "$@"; do command -v "${pair%%=*}" >/dev/null || missing+=("${pair##*=}"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  [ "$(id -u)" -eq 0 ] || fail "root, to install ${missing[*]}" "user $(id -un)" "install them, or use an engine that runs"
  command -v apt-get >/dev/null || fail "apt-get, to install ${missing[*]}" "none" "install them, or use an engine that runs"
  say "installing ${missing[*]}"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >"$folder/apt.log" 2>&1 </dev/null || fail "apt-get to install ${missing[*]}" "an error" "see $folder/apt.log"
}

# Process id in a file, if it is that of a running program of this name that was given our folder.
running() {  # file name
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] &&
    tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF "$folder/" && echo "$pid"
}

start_engine() {
  install dockerd=docker.io docker=docker.io
  if answers; then return; fi  # a package may have started one
  [ "$(id -u)" -eq 0 ] || fail "root, to start an engine" "user $(id -un)" "use an engine that runs, by DOCKER_HOST"
  # No bridge and no firewall rules: neither is to be had in a container or a small virtual machine, nor needed.
  # Its standard output must not be ours, or $(…) around this script would wait for it.
  setsid dockerd --data-root "$folder/data" --exec-root "$folder/exec" --pidfile "$folder/dockerd.pid" --host "$ours" \
    --bridge=none --iptables=false --ip6tables=false --log-level warn >"$folder/dockerd.log" 2>&1 </dev/null &
  local deadline=$((SECONDS + START_S)) started=$!
  until answers "$ours"; do
    kill -0 "$started" 2>/dev/null || fail "dockerd to start" "$(tail -n 1 "$folder/dockerd.log" | cut -c 1-300)" "see $folder/dockerd.log"
    [ $SECONDS -lt $deadline ] || fail "an answer of dockerd within $START_S s" "none" "see $folder/dockerd.log"
    sleep 0.2
  done
  export DOCKER_HOST=$ours
}

base_image() {
  if docker image inspect "$BASE_IMAGE" >/dev/null 2>&1; then return; fi
  if [ ! -s "$folder/base.tar" ] && timeout 60 docker pull --quiet "$BASE_IMAGE" >/dev/null 2>&1; then return; fi
  if [ ! -s "$folder/base.tar" ]; then
    install mmdebstrap=mmdebstrap
    say "making $BASE_IMAGE of Debian's packages"
    # The certificates are those of this machine, so that downloads work behind a proxy that this machine trusts.
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates \
      --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' \
      --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
      --dpkgopt='path-exclude=/usr/share/locale/*' \
      --customize-hook='ln -s python3 "$1/usr/bin/python"' \
      --customize-hook='cat /etc/ssl/certs/ca-certificates.crt >"$1/etc/ssl/certs/ca-certificates.crt"' \
      --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/log/*' \
      bookworm "$folder/base.part.tar" >"$folder/base.log" 2>&1 </dev/null ||
      fail "mmdebstrap to make a base image" "$(tail -n 1 "$folder/base.log" | cut -c 1-300)" "see $folder/base.log"
    mv "$folder/base.part.tar" "$folder/base.tar"
  fi
  docker import --change 'ENV LANG=C.UTF-8' --change 'CMD ["python3"]' "$folder/base.tar" "$BASE_IMAGE" >/dev/null ||
    fail "the engine to import $folder/base.tar" "an error" "remove the file and try again"
}

end() {  # pid, and then whatever it takes
  local sign tenths
  for sign in TERM KILL; do
    kill -s "$sign" "$1" 2>/dev/null || return 0
    for ((tenths = 0; tenths < STOP_S * 10; tenths++)); do
      [ -d "/proc/$1" ] && ! grep -qs '^State:.Z' "/proc/$1/status" || return 0
      sleep 0.1
    done
  done
  fail "process $1 to end" "it running after $STOP_S s" "look at it"
}

case $verb in
  start)
    command -v docker >/dev/null && answers "$ours" && export DOCKER_HOST=$ours
    if ! { command -v docker >/dev/null && answers "${DOCKER_HOST:-}"; }; then
      unset DOCKER_HOST
      start_engine
    fi
    base_image
    echo "${DOCKER_HOST:-unix:///var/run/docker.sock}"
    ;;
  stop)
    if pid=$(running "$folder/dockerd.pid" dockerd); then
      export DOCKER_HOST=$ours
      mapfile -t containers < <(timeout 20 docker ps --all --quiet 2>/dev/null)
      [ ${#containers[@]} -eq 0 ] || timeout 60 docker rm --force --volumes "${containers[@]}" >/dev/null 2>&1 || true
      end "$pid"
    fi
    # An engine that was killed leaves its containerd and its mounts.
    if pid=$(running "$folder/exec/containerd/containerd.pid" containerd); then end "$pid"; fi
    awk -v f="$folder/" 'index($2, f) == 1 {print $2}' /proc/self/mounts | tac | while read -r mount; do umount "$mount"; done
    ;;
esac
