#!/usr/bin/env bash
# Start a job from the template, or update one: see README.md. With --dry_run it only shows the
# command.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=templates/dataflow/common.sh
source "$HERE/common.sh"

usage() {
  cat <<'END'
usage: PROJECT=... REGION=... TEMPLATE=... IMAGE=... STAGING_LOCATION=... JOB_NAME=... \
         templates/dataflow/launch.sh [--dry_run] [--update] PARAMETER=VALUE ...

  PROJECT           ID of the Google Cloud project that runs the job
  REGION            region of the job
  TEMPLATE, IMAGE   what build.sh made
  STAGING_LOCATION  where the job's files go: gs://BUCKET/FOLDER
  JOB_NAME          name of the job; there is no second running one with it in the region

and, if wanted: SERVICE_ACCOUNT of the workers, SUBNETWORK as regions/REGION/subnetworks/NAME,
PUBLIC_IPS=false, MACHINE_TYPE, NUM_WORKERS, MAX_WORKERS.

PARAMETER is one of those in README.md; sdk_container_image is set from IMAGE.
END
}

UPDATE=false
PARAMETERS=()
for argument in "$@"; do
  case $argument in
    --dry_run) DRY_RUN=true ;;
    --update) UPDATE=true ;;
    -h | --help) usage && exit 0 ;;
    sdk_container_image=*) problem "sdk_container_image is set from IMAGE; leave it out" ;;
    [a-z]*=*) PARAMETERS+=("$argument") ;;
    *) problem "$argument is neither PARAMETER=VALUE nor --dry_run nor --update" ;;
  esac
done

check PROJECT "$PROJECT_FORM" "the ID of a project, such as my-project"
check REGION "$REGION_FORM" "a region, such as europe-west1"
check TEMPLATE "$TEMPLATE_FORM" "a template's place, such as $TEMPLATE_EXAMPLE"
check IMAGE "$IMAGE_FORM" "an image with a tag, such as $IMAGE_EXAMPLE"
check STAGING_LOCATION "$FOLDER_FORM" "a folder, such as gs://my-bucket/dataflow"
check JOB_NAME '^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$' \
  "a job's name (lower case letters, digits and -), such as orders-to-lambda"
check_optional SERVICE_ACCOUNT '^[a-z0-9-]+@[a-z0-9.-]+\.gserviceaccount\.com$' \
  "a service account, such as sink@my-project.iam.gserviceaccount.com"
check_optional SUBNETWORK '^(https://[^[:space:]]+/)?regions/[a-z0-9-]+/subnetworks/[a-z0-9-]+$' \
  "a subnetwork, such as regions/europe-west1/subnetworks/default"
check_optional PUBLIC_IPS '^(true|false)$' "true or false"
check_optional MACHINE_TYPE '^[a-z0-9-]+$' "a machine type, such as n2-standard-2"
check_optional NUM_WORKERS '^[1-9][0-9]*$' "a number of workers, such as 1"
check_optional MAX_WORKERS '^[1-9][0-9]*$' "a number of workers, such as 4"

# Without one that fits, which is said already, any will do for what follows.
[[ ${IMAGE:-} =~ $IMAGE_FORM ]] || IMAGE=$IMAGE_EXAMPLE
PARAMETERS+=("sdk_container_image=$IMAGE")
if ! command -v python3 >/dev/null; then
  problem "python3 is not on the PATH; install Python"
else
  while IFS= read -r line; do problem "$line"; done \
    < <(python3 "$HERE/check_parameters.py" "$HERE/metadata.json" "${PARAMETERS[@]}")
fi
check_gcloud

# Values have commas; so something that none of them has separates them.
SEPARATOR=""
for candidate in '~' ';' '|' '#' '!' '%'; do
  if [[ -z $SEPARATOR && ${PARAMETERS[*]} != *"$candidate"* ]]; then SEPARATOR=$candidate; fi
done
[[ -n $SEPARATOR ]] || problem "the parameters have all of ~ ; | # ! % in them; leave one of these out"
end_with_problems

JOINED=""
for parameter in "${PARAMETERS[@]}"; do JOINED+=$SEPARATOR$parameter; done

command=(gcloud dataflow flex-template run "$JOB_NAME" --project="$PROJECT" --region="$REGION"
  --template-file-gcs-location="$TEMPLATE" --staging-location="$STAGING_LOCATION"
  --temp-location="$STAGING_LOCATION" --enable-streaming-engine
  --parameters="^$SEPARATOR^${JOINED#"$SEPARATOR"}")
if [[ -n ${SERVICE_ACCOUNT:-} ]]; then command+=(--service-account-email="$SERVICE_ACCOUNT"); fi
if [[ -n ${SUBNETWORK:-} ]]; then command+=(--subnetwork="$SUBNETWORK"); fi
if [[ ${PUBLIC_IPS:-} == false ]]; then command+=(--disable-public-ips); fi
if [[ -n ${MACHINE_TYPE:-} ]]; then command+=(--worker-machine-type="$MACHINE_TYPE"); fi
if [[ -n ${NUM_WORKERS:-} ]]; then command+=(--num-workers="$NUM_WORKERS"); fi
if [[ -n ${MAX_WORKERS:-} ]]; then command+=(--max-workers="$MAX_WORKERS"); fi
if [[ $UPDATE == true ]]; then command+=(--update); fi
run "${command[@]}"
