# Sourced by the scripts beside it: refusals, and commands that a dry run prints instead.
# shellcheck shell=bash

DRY_RUN=false

# Takes --dry_run and --help from the front of the script's arguments; the rest stays in ARGUMENTS.
parse_common() {
  while (($#)); do
    case "$1" in
      --dry_run) DRY_RUN=true ;;
      --help | -h) usage 0 ;;
      *) break ;;
    esac
    shift
  done
  # shellcheck disable=SC2034 # read by the scripts
  ARGUMENTS=("$@")
}

# The comment at the top of the script.
usage() {
  sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p}}' "$0" >&2
  exit "$1"
}

refuse() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# Exits with 2 and names every variable that is not set; there are no defaults that could be somebody else's.
require() {
  local name missing=()
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || missing+=("$name")
  done
  ((${#missing[@]} == 0)) || refuse "set ${missing[*]} (docs/launch.md says what they are), e.g. ${missing[0]}=... $0"
}

# A command line that a shell reads back as it was.
quoted() {
  local text
  printf -v text '%q ' "$@"
  printf '%s' "${text% }"
}

# Runs a command, or prints it in a dry run.
execute() {
  if "$DRY_RUN"; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}
