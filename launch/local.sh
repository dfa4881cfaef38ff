#!/usr/bin/env bash
# rest_jax on this machine's CPU.
#
#   launch/local.sh [--dry_run] COMMAND [rest_jax's arguments]
#   launch/local.sh run --gin_file=runs/smoke.gin --model_dir=/tmp/smoke
#
# DEVICES=n in the environment splits the CPU into n devices, to try a mesh. PYTHON is the interpreter (python).
# The exit code is rest_jax's: 0 done, 2 the configuration or the data, 42 preempted after saving, 1 otherwise.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_common "$@"
((${#ARGUMENTS[@]})) || usage 2

environment=(JAX_PLATFORMS=cpu)
if [[ -n "${DEVICES:-}" ]]; then
  environment+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES")
fi
command=(env "${environment[@]}" "${PYTHON:-python}" -m rest_jax "${ARGUMENTS[@]}")
# Replaced, not called: signals reach rest_jax itself, and its exit code is the script's.
"$DRY_RUN" || exec "${command[@]}"
execute "${command[@]}"
