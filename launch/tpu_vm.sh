#!/usr/bin/env bash
# rest_jax on all hosts of a Cloud TPU slice, got as a queued resource.
#
#   launch/tpu_vm.sh [--dry_run] create                            asks for the slice and waits until it is there
#   launch/tpu_vm.sh [--dry_run] install                           installs SOURCE on every host
#   launch/tpu_vm.sh [--dry_run] COMMAND [rest_jax's arguments]    runs it on every host; again after exit code 42
#   launch/tpu_vm.sh [--dry_run] stop                              SIGTERM to it: saves, and exits with 42
#   launch/tpu_vm.sh [--dry_run] delete                            gives the slice back
#
# Always: PROJECT, ZONE, TPU_NAME. For create: ACCELERATOR_TYPE (v5litepod-256), RUNTIME_VERSION (v2-alpha-tpuv5-lite); SPOT=true for spot capacity.
# For install: SOURCE, what pip installs (a wheel or an index's name; 'rest_jax[gcs] @ git+https://...' has what a MODEL_DIR on gs:// needs).
# MAX_RESTARTS: how often COMMAND is begun again after exit code 1 (3); after 42 it always is, unless it was `stop` that ended it; after 2 never.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_common "$@"
((${#ARGUMENTS[@]})) || usage 2
action=${ARGUMENTS[0]}
require PROJECT ZONE TPU_NAME
place=("--project=$PROJECT" "--zone=$ZONE")

on_every_host() { # command line for the hosts' shell
  execute gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" --worker=all "--command=$1"
}

case "$action" in
  create)
    require ACCELERATOR_TYPE RUNTIME_VERSION
    spot=()
    [[ "${SPOT:-false}" != true ]] || spot=(--spot)
    execute gcloud compute tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" "${place[@]}" \
      "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION" "${spot[@]}"
    describe=(gcloud compute tpus queued-resources describe "$TPU_NAME" "${place[@]}" "--format=value(state.state)")
    if "$DRY_RUN"; then
      execute "${describe[@]}"
      exit 0
    fi
    while state=$("${describe[@]}"); [[ "$state" != ACTIVE ]]; do
      case "$state" in
        FAILED | SUSPENDED | SUSPENDING) refuse "the queued resource $TPU_NAME is $state; see: $(quoted "${describe[@]}")" ;;
      esac
      printf '%s %s: %s\n' "$(date +%H:%M:%S)" "$TPU_NAME" "$state"
      sleep 30
    done
    ;;
  install)
    require SOURCE
    # uv brings the interpreter: that of the TPU's Ubuntu 22.04 is Python 3.10, too old for JAX.
    on_every_host "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/rest_jax \
&& ~/.local/bin/uv pip install --quiet --python ~/rest_jax/bin/python $(quoted "$SOURCE") 'jax[tpu]'"
    ;;
  stop)
    # The interpreter alone: the shells around it have its command line in theirs, and must live to write the exit code down.
    on_every_host "touch ~/rest_jax.stopped; pkill -TERM -f '^[^ ]*/rest_jax/bin/python -u -m rest_jax ' || true"
    ;;
  delete)
    execute gcloud compute tpus queued-resources delete "$TPU_NAME" "${place[@]}" --force --quiet
    ;;
  *)
    # The exit code is read from a file: gcloud's own says no more than that some host failed.
    line="rm -f ~/rest_jax.stopped ~/rest_jax.exit; ~/rest_jax/bin/python -u -m rest_jax $(quoted "${ARGUMENTS[@]}"); echo \$? > ~/rest_jax.exit"
    ask=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" --worker=0 "--command=cat ~/rest_jax.exit")
    asked=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" --worker=0 "--command=test ! -e ~/rest_jax.stopped || echo stopped")
    restarts=0
    while true; do
      on_every_host "$line" || true
      if "$DRY_RUN"; then
        execute "${ask[@]}"
        exit 0
      fi
      code=$("${ask[@]}") || code=255 # the host is gone
      case "$code" in
        0 | 2) exit "$code" ;;
        # Only a host that says so was stopped: one that can not be asked may have been taken away.
        42) [[ "$("${asked[@]}")" != stopped ]] || exit 42 ;;
        *) ((restarts++ < ${MAX_RESTARTS:-3})) || exit "$code" ;;
      esac
      printf '%s: exit code %s; again\n' "${0##*/}" "$code" >&2
      sleep 10
    done
    ;;
esac
