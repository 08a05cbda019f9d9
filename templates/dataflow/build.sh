#!/usr/bin/env bash
# Build the image and the template: see README.md. With --dry_run it only shows the commands.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
# shellcheck source=templates/dataflow/common.sh
source "$HERE/common.sh"

usage() {
  cat <<'END'
usage: PROJECT=... IMAGE=... TEMPLATE=... templates/dataflow/build.sh [--dry_run]

  PROJECT   ID of the Google Cloud project that builds
  IMAGE     where the image goes: LOCATION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG
  TEMPLATE  where the template goes: gs://BUCKET/NAME.json
END
}

for argument in "$@"; do
  case $argument in
    --dry_run) DRY_RUN=true ;;
    -h | --help) usage && exit 0 ;;
    *) problem "$argument is no argument of build.sh; it takes --dry_run only" ;;
  esac
done

check PROJECT "$PROJECT_FORM" "the ID of a project, such as my-project"
check IMAGE "$IMAGE_FORM" "an image with a tag, such as $IMAGE_EXAMPLE"
check TEMPLATE "$TEMPLATE_FORM" "a template's place, such as $TEMPLATE_EXAMPLE"
check_gcloud
end_with_problems

run gcloud builds submit "$ROOT" --project="$PROJECT" --config="$HERE/cloudbuild.yaml" \
  --substitutions="_IMAGE=$IMAGE"
run gcloud dataflow flex-template build "$TEMPLATE" --project="$PROJECT" --image="$IMAGE" \
  --sdk-language=PYTHON --metadata-file="$HERE/metadata.json"
