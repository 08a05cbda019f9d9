# What build.sh and launch.sh have in common: checks before anything is called.
# shellcheck shell=bash disable=SC2034

DRY_RUN=false
PROBLEMS=()

PROJECT_FORM='^([a-z][a-z0-9.-]*:)?[a-z][a-z0-9-]*[a-z0-9]$'
REGION_FORM='^[a-z]+-[a-z]+[0-9]+$'
IMAGE_FORM='^[a-z0-9.-]+(/[a-zA-Z0-9._-]+)+(:[a-zA-Z0-9._-]+|@sha256:[0-9a-f]{64})$'
IMAGE_EXAMPLE=europe-west1-docker.pkg.dev/my-project/beam/beam-lambda-sink:0.1.0
TEMPLATE_FORM='^gs://[a-z0-9][a-z0-9._-]*[a-z0-9]/[^[:space:]]+\.json$'
TEMPLATE_EXAMPLE=gs://my-bucket/templates/beam-lambda-sink.json
FOLDER_FORM='^gs://[a-z0-9][a-z0-9._-]*[a-z0-9]/[^[:space:]]*$'

problem() { PROBLEMS+=("$*"); }

# Whether a variable is set and has a form: NAME FORM "what it is, with an example".
check() {
  local value=${!1:-}
  if [[ -z $value ]]; then
    problem "$1 is not set; give $3"
  elif [[ ! $value =~ $2 ]]; then
    problem "$1=$value is not $3"
  fi
}

# The same for a variable that need not be set.
check_optional() {
  if [[ -n ${!1:-} ]]; then check "$@"; fi
}

check_gcloud() {
  if [[ $DRY_RUN == false ]] && ! command -v gcloud >/dev/null; then
    problem "gcloud is not on the PATH; install the Google Cloud CLI"
  fi
}

# All problems at once, then the end.
end_with_problems() {
  if ((${#PROBLEMS[@]})); then
    printf 'error: %s\n' "${PROBLEMS[@]}" >&2
    exit 2
  fi
}

# Show a command, and call it unless it is only to be shown.
run() {
  printf '%q ' "$@"
  printf '\n'
  if [[ $DRY_RUN == false ]]; then "$@"; fi
}
