#!/usr/bin/env bash
# rest_jax as N processes on this machine's CPU that work together as hosts of a pod do.
#
#   launch/local_multiprocess.sh [--dry_run] N COMMAND [rest_jax's arguments]
#   launch/local_multiprocess.sh 2 run --gin_file=runs/smoke.gin --model_dir=/tmp/smoke
#
# Each line of output has its process's number in front. SIGTERM and SIGINT are passed on to all processes, which save and exit with 42.
# DEVICES=n in the environment gives each process n devices (1). PYTHON is the interpreter (python). PORT is the coordinator's (a free one).
# GRACE_SECONDS is how long the others may go on when one has failed, before they are killed (900: longer than their own time-out).
# The exit code is 2 if a process exited with it, else 42 likewise, else the first that is not 0.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_common "$@"
((${#ARGUMENTS[@]} >= 2)) || usage 2
processes=${ARGUMENTS[0]}
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || refuse "N is '$processes'; it must be a number of processes, 1 or more."

python=${PYTHON:-python}
if [[ -z "${PORT:-}" ]]; then
  if "$DRY_RUN"; then PORT=PORT; else
    PORT=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  fi
fi
# One process compiles for all: gloo gives up on a process that is 30 s late. Not with a cache of programs: a process that finds one there
# has nothing to give, and the others wait for it.
environment=(JAX_PLATFORMS=cpu JAX_SHARE_BINARY_BETWEEN_HOSTS=true JAX_ENABLE_COMPILATION_CACHE=false)
flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${DEVICES:-1}"

command_of() { # process_id
  command=(env "${environment[@]}" "XLA_FLAGS=$flags" "$python" -u -m rest_jax "${ARGUMENTS[@]:1}"
    "--coordinator_address=127.0.0.1:$PORT" "--num_processes=$processes" "--process_id=$1")
}

if "$DRY_RUN"; then
  for ((id = 0; id < processes; id++)); do
    command_of "$id"
    execute "${command[@]}"
  done
  exit 0
fi

pids=() readers=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((id = 0; id < processes; id++)); do
  command_of "$id"
  exec {out}> >(exec sed -u "s/^/[$id] /")
  readers+=($!)
  exec {err}> >(exec sed -u "s/^/[$id] /" >&2)
  readers+=($!)
  # The process itself is the job, so that signals and its exit code are its own.
  "${command[@]}" >&"$out" 2>&"$err" {out}>&- {err}>&- &
  pids+=($!)
  exec {out}>&- {err}>&-
done

declare -A codes=()
deadline=
while ((${#codes[@]} < processes)); do
  for pid in "${pids[@]}"; do
    [[ -z "${codes[$pid]:-}" ]] || continue
    kill -0 "$pid" 2>/dev/null && continue
    code=0
    wait "$pid" || code=$?
    codes[$pid]=$code
    ((code == 0)) || deadline=${deadline:-$((SECONDS + ${GRACE_SECONDS:-900}))}
  done
  if [[ -n "$deadline" ]] && ((SECONDS > deadline)); then
    printf '%s: killing what is left of the processes\n' "${0##*/}" >&2
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
  sleep 0.2 || true
done

# What was printed last is on its way still; a process's child that lives on must not keep us.
for ((tries = 0; tries < 100; tries++)); do
  kill -0 "${readers[@]}" 2>/dev/null || break
  sleep 0.05
done

result=0
for pid in "${pids[@]}"; do
  code=${codes[$pid]}
  if ((code == 2 || (code == 42 && result != 2) || (code != 0 && result == 0))); then result=$code; fi
done
exit "$result"
