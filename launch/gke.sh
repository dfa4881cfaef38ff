#!/usr/bin/env bash
# rest_jax on TPU slices of a GKE cluster, as a JobSet (launch/jobset.yaml).
#
#   launch/gke.sh [--dry_run] COMMAND [rest_jax's arguments]
#   launch/gke.sh run --gin_file=runs/own_text.gin --gin.MODEL_DIR="'gs://BUCKET/run'"
#
# All of these: JOB_NAME, NAMESPACE, IMAGE (built from launch/Dockerfile), TPU_ACCELERATOR (tpu-v5-lite-podslice), TPU_TOPOLOGY (16x16),
# SLICES (1), HOSTS_PER_SLICE (64), CHIPS_PER_HOST (4), MAX_RESTARTS (3; exit code 42 does not count).
# The dry run prints the JobSet and the command that would get it. Follow it with: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=JOB_NAME
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$folder/common.sh"
parse_common "$@"
((${#ARGUMENTS[@]})) || usage 2
require JOB_NAME NAMESPACE IMAGE TPU_ACCELERATOR TPU_TOPOLOGY SLICES HOSTS_PER_SLICE CHIPS_PER_HOST MAX_RESTARTS

# Every name of the template must have a value: Template.substitute fails where one has none.
manifest=$(python3 - "$folder/jobset.yaml" "${ARGUMENTS[@]}" <<'PYTHON'
import json, os, string, sys

template, *arguments = sys.argv[1:]
# Kubernetes replaces $(NAME) in arguments; $$(NAME) stands for itself.
arguments = [argument.replace("$(", "$$(") for argument in arguments]
# Comment lines name placeholders without meaning them.
lines = [line for line in open(template, encoding="utf-8") if not line.startswith("#")]
values = {**os.environ, "ARGUMENTS_JSON": json.dumps(arguments, ensure_ascii=False)}
print(string.Template("".join(lines)).substitute(values), end="")
PYTHON
)
if "$DRY_RUN"; then
  printf '%s\n' "$manifest"
  execute kubectl create --filename=-
else
  # Not `apply`: of a JobSet that has ended it would say "unchanged", and start nothing.
  kubectl create --filename=- <<<"$manifest"
fi
