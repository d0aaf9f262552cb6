#!/usr/bin/env bash
# Runs an experiment on all hosts of a Cloud TPU, and brings it back after preemption.
#
#   scripts/tpu_vm.sh create NAME                              a TPU (a queued resource), and wait for it
#   scripts/tpu_vm.sh setup  NAME                              this checkout and '.[tpu]', on all workers
#   scripts/tpu_vm.sh run    NAME FILE [key=value ...] [--steps N]
#   scripts/tpu_vm.sh logs   NAME                              follow worker 0
#   scripts/tpu_vm.sh stop   NAME                              the run saves and ends; the TPU stays
#   scripts/tpu_vm.sh delete NAME
#
# `run` starts the experiment on every worker, detached, and then watches from here: a TPU that was
# preempted is deleted, made and set up again, and the run goes on from its newest checkpoint. Ended
# (Ctrl-C, a closed laptop), it leaves the run alone; the same command watches it again. It watches
# from outside because what dies with a TPU cannot restart it; start it where it can stay, in tmux on
# a small machine.
#
# Settings, in the environment:
#   ZONE      such as us-central2-b (needed)
#   STORE     a folder that all workers share and that outlives the TPU, such as /mnt/jaxeco (needed
#             by setup and run); runs/NAME and the data sets lie in it
#   NFS       ADDRESS:/SHARE, such as a Filestore, which setup mounts at STORE
#   PREPARE   a line of bash that setup runs on all workers first: to mount something else, say
#   TYPE      such as v4-32 (needed by create, and by run, to make anew what was preempted)
#   VERSION   of the TPU's software (tpu-ubuntu2204-base)
#   PROJECT   of gcloud, if not the default one
#   SPOT      1: cheaper, can be preempted
#   INTERVAL  seconds between two looks at the TPU (60)
#
# docs/pods.md says more.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
}

need() {
  for setting in "$@"; do
    [ -n "${!setting:-}" ] || fail "$setting is not set; see $0 --help"
  done
}

gcloud_tpu() {
  gcloud compute tpus "$@" --zone="$ZONE" --quiet ${PROJECT:+--project="$PROJECT"}
}

# on WORKERS COMMAND: runs a line of bash on worker 0 or on "all"
on() {
  gcloud_tpu tpu-vm ssh "$NAME" --worker="$1" --command="$2"
}

# Words as bash reads them back, whatever is in them.
quoted() {
  printf '%q ' "$@"
}

# READY, PREEMPTED, ...; GONE if there is no such TPU.
state() {
  local said
  if said=$(gcloud_tpu tpu-vm describe "$NAME" --format='value(state)' 2>&1); then
    echo "$said"
  elif grep -qiE 'not[ _]?found' <<<"$said"; then
    echo GONE
  else
    echo "$said" >&2
    echo UNKNOWN # the network, say: look again later
  fi
}

create() {
  need TYPE
  local flags=()
  [ "${SPOT:-}" != 1 ] || flags=(--spot)
  gcloud_tpu queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
    --runtime-version="${VERSION:-tpu-ubuntu2204-base}" "${flags[@]}"
  echo "waiting for $NAME"
  local now
  while now=$(gcloud_tpu queued-resources describe "$NAME" --format='value(state.state)') &&
    [ "$now" != ACTIVE ]; do
    [ "$now" != FAILED ] || fail "$NAME cannot be made: gcloud compute tpus queued-resources" \
      "describe $NAME says why"
    sleep "${INTERVAL:-60}"
  done
}

delete() {
  gcloud_tpu queued-resources delete "$NAME" --force
}

setup() {
  need STORE
  local archive mount=true
  if [ -n "${NFS:-}" ]; then
    mount="mountpoint -q $(quoted "$STORE") || {
      sudo apt-get install -qq -y nfs-common
      sudo mkdir -p $(quoted "$STORE")
      sudo mount -t nfs $(quoted "$NFS" "$STORE")
      sudo chmod 1777 $(quoted "$STORE")
    }"
  fi
  archive=$(mktemp)
  # the tree as it is: what git knows, and what is new and not ignored
  git -C "$ROOT" ls-files -z --cached --others --exclude-standard |
    tar -C "$ROOT" --null -T - --ignore-failed-read -czf "$archive"
  gcloud_tpu tpu-vm scp "$archive" "$NAME:jaxeco.tar.gz" --worker=all
  rm -f "$archive"
  # uv brings a Python where the image's own is older than 3.11
  on all "set -e
    ${PREPARE:-true}
    $mount
    rm -rf ~/jaxeco && mkdir ~/jaxeco && tar -xzf ~/jaxeco.tar.gz -C ~/jaxeco
    python3 -m pip install -q --user uv || python3 -m pip install -q --user --break-system-packages uv
    python3 -m uv venv -q --clear --python 3.12 ~/jaxeco-env
    cd ~/jaxeco && python3 -m uv pip install -q --python ~/jaxeco-env/bin/python -e '.[tpu]'"
}

# Starts the run on all workers; where it goes on already, leaves it so.
start() {
  local words
  words=$(quoted "$@" --multihost --resume --workdir "$STORE/runs/$NAME")
  on all "cd ~/jaxeco || exit 1
    kill -0 \$(cat ~/jaxeco.pid 2>/dev/null) 2>/dev/null && exit
    rm -f ~/jaxeco.pid ~/jaxeco.status ~/jaxeco.stopped
    export TFDS_DATA_DIR=$(quoted "$STORE/tensorflow_datasets")
    nohup bash -c $(quoted "\$HOME/jaxeco-env/bin/python -m jaxeco.run $words &
      echo \$! >~/jaxeco.pid
      wait \$!
      echo \$? >~/jaxeco.status") >>~/jaxeco.log 2>&1 </dev/null &
    until [ -s ~/jaxeco.pid ]; do sleep 0.1; done"
}

# How it goes on worker 0: running, stopped, lost with its machine, an exit status, or unreachable.
progress() {
  # shellcheck disable=SC2016 # what is expanded is expanded there
  on 0 'if kill -0 $(cat ~/jaxeco.pid) 2>/dev/null; then echo running
    elif [ -e ~/jaxeco.stopped ]; then echo stopped
    else cat ~/jaxeco.status 2>/dev/null || echo lost; fi' || echo unreachable
}

# Sets everything up again, mounts too, and goes on; what still runs on a worker has lost the others.
again() {
  # shellcheck disable=SC2016
  "$0" setup "$NAME" && on all 'kill -KILL $(cat ~/jaxeco.pid) 2>/dev/null; true' && start "$@"
}

run() {
  need STORE TYPE
  case "${1:-}" in
    '' | -*) fail "run: expected NAME FILE [key=value ...]" ;;
  esac
  [ -f "$ROOT/$1" ] || fail "run: no file $1 in $ROOT"
  case " $* " in
    *' --workdir'*) fail "run: the run lies in $STORE/runs/$NAME; leave --workdir out" ;;
  esac
  local now went
  now=$(state)
  case "$now" in
    READY) start "$@" && echo "started on all workers; scripts/tpu_vm.sh logs $NAME shows it" ;;
    GONE) fail "there is no $NAME in $ZONE; scripts/tpu_vm.sh create $NAME makes it" ;;
  esac
  while sleep "${INTERVAL:-60}"; do
    now=$(state)
    case "$now" in
      READY)
        went=$(progress | tail -n 1)
        case "$went" in
          running | unreachable) ;;
          0) echo "the run is complete" && return 0 ;;
          stopped) echo "the run was stopped; run goes on from its checkpoint" && return 143 ;;
          143 | lost) # by SIGTERM that was not ours, or with its machine: maintenance
            echo "the run was ended from outside: starting it again"
            again "$@" || echo "that failed; trying again"
            ;;
          *)
            on 0 'tail -n 30 ~/jaxeco.log' || true
            echo "the run failed with status $went" >&2
            return 1
            ;;
        esac
        ;;
      PREEMPTED | TERMINATED | SUSPENDED | GONE)
        echo "$NAME is $now: making it again"
        "$0" delete "$NAME" || true
        { "$0" create "$NAME" && again "$@"; } || echo "that failed; trying again"
        ;;
      *) ;; # CREATING, STARTING, REPAIRING, UNKNOWN: wait
    esac
  done
}

stop() {
  # shellcheck disable=SC2016
  on all 'touch ~/jaxeco.stopped; kill -TERM $(cat ~/jaxeco.pid)'
}

case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  '') fail "no command given; see $0 --help" ;;
  create | setup | run | logs | stop | delete) ;;
  *) fail "unknown command '$1': expected create, setup, run, logs, stop or delete" ;;
esac
COMMAND=$1 NAME=${2:-}
[[ $NAME =~ ^[a-z][a-z0-9-]*$ ]] || fail "$COMMAND: expected the NAME of a TPU, such as pod-1, got '$NAME'"
shift 2
[ "$COMMAND" = run ] || [ $# = 0 ] || fail "$COMMAND takes NAME only, got '$1'"
command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
need ZONE
ROOT=$(cd "$(dirname "$0")/.." && pwd)
case "$COMMAND" in
  logs) on 0 'tail -n 100 -F ~/jaxeco.log' ;;
  *) "$COMMAND" "$@" ;;
esac
