#!/usr/bin/env bash
# Every command of this project; without an argument it lists them.
set -euo pipefail
CALLED_FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

# The environment of ./run.sh setup, which every other command makes sure of first.
VENV=$PWD/.venv
STAMP=$VENV/.setup-done

usage() {
  cat <<'END'
usage: ./run.sh COMMAND [arguments]

  setup                install into .venv (done by every other command when needed)
  demo [...]           the whole pipeline on this machine, without AWS and without Kafka;
                       --runner=flink: with a real Kafka broker, on a Flink cluster;
                       --source=kinesis: with a stream whose shards split while it is read;
                       --http: with its page at http://127.0.0.1:9464/, until Ctrl-C
  run [...]            the pipeline; run --help lists its options
  test [...]           the tests, with a real Kafka broker and a real Flink cluster;
                       --fast leaves both out, --flink runs only those on Flink;
                       folders run in several processes, -n 0: in one
  check                format, lint, types, then test --fast
  bench [...]          measure throughput, with a real Kafka broker;
                       --runner=flink: both readers on a Flink cluster too;
                       --latency: how soon a record is answered;
                       --soak: minutes of everything at once, and what became of each record
  lambda [...]         only the local AWS Lambda endpoint
  clean                remove .venv and everything the tools left in this folder
  help                 this list

Arguments after a command go to the program behind it: pytest for test.
PYTHON=/path/to/python chooses the interpreter for setup (3.10 to 3.13).
END
}

say() { printf 'run.sh: %s\n' "$*" >&2; }

usage_error() {
  say "$* (./run.sh help lists the commands)"
  exit 2
}

no_arguments() {
  (($# == 1)) || usage_error "$1 takes no arguments"
}

# --- Python -------------------------------------------------------------------------------------

# Whether a command is Python 3.10 to 3.13. It has to be run: a name on the PATH may be a stub.
is_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
    >/dev/null 2>&1
}

find_python() {
  if [[ -n ${PYTHON:-} ]]; then
    if ! is_supported "$PYTHON"; then
      say "PYTHON=$PYTHON is not Python 3.10, 3.11, 3.12 or 3.13"
      return 1
    fi
    printf '%s\n' "$PYTHON"
    return
  fi
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.10; do
    if is_supported "$name"; then
      printf '%s\n' "$name"
      return
    fi
  done
  say "no Python 3.10, 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=... ./run.sh"
  return 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# What the environment was made for: these dependencies, in this folder (it does not move).
wanted_stamp() { printf '%s %s\n' "$(cksum <pyproject.toml)" "$PWD"; }

is_set_up() {
  [[ -x $VENV/bin/python && -f $STAMP && $(<"$STAMP") == "$(wanted_stamp)" ]] || return 1
  [[ -z ${PYTHON:-} || $(version_of "$PYTHON" 2>/dev/null) == "$(version_of "$VENV/bin/python")" ]]
}

setup() {
  local python
  if is_set_up; then return; fi
  python=$(find_python) || exit 1
  # One at a time: two that install into the same folder break it.
  exec 9>.venv.lock
  if command -v flock >/dev/null && ! flock -n 9; then
    say "waiting for another setup to end"
    flock 9
  fi
  if ! is_set_up; then
    say "installing into .venv with Python $(version_of "$python") (a minute or two)"
    rm -f "$STAMP"
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      say "this Python has no ensurepip: apt-get install python$(version_of "$python")-venv"
      exit 1
    fi
    # Made anew when it cannot be added to: another version, another folder, a removed Python.
    if ! is_reusable "$python"; then
      "$python" -m venv --clear "$VENV"
    fi
    "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet --editable '.[dev]'
    wanted_stamp >"$STAMP"
  fi
  exec 9>&-
}

is_reusable() {
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 &&
    [[ $(version_of "$VENV/bin/python") == "$(version_of "$1")" ]] &&
    grep -qF "$VENV" "$VENV/bin/activate"
}

# --- Kafka and Flink, as servers of tests and demo ----------------------------------------------

has_java() {
  local java=java version
  if [[ -n ${JAVA_HOME:-} ]]; then java=$JAVA_HOME/bin/java; fi
  version=$("$java" -XshowSettings:properties -version 2>&1 |
    sed -n 's/^ *java\.specification\.version = \([0-9]*\).*/\1/p') || return 1
  [[ -n $version ]] && ((version >= 17))
}

# Each argument is a server: kafka, flink.
has_jars() { "$VENV/bin/python" -m pipeline.local.jars fetched "$@"; }

has_registry() { "$VENV/bin/python" -m tests.servers.schema_registry --fetched; }

# Maven is needed only to fetch the jars.
has_maven() { command -v mvn >/dev/null || { has_jars "$@" && has_registry; }; }

# Java 17 and Maven: installed on Debian and its like by root, else asked for.
require_java() {
  local packages=()
  if ! has_java; then packages+=(openjdk-17-jre-headless); fi
  if ! has_maven "$@"; then packages+=(maven); fi
  if ((${#packages[@]} == 0)); then return; fi
  if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    say "$* needs Java 17 or newer and Maven: sudo apt-get install ${packages[*]}" \
      "(./run.sh test --fast and ./run.sh demo do without)"
    exit 1
  fi
  say "installing ${packages[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >/dev/null
  # Newer releases have only newer versions.
  if [[ ${packages[0]} == openjdk-* ]] && ! apt-cache show "${packages[0]}" >/dev/null 2>&1; then
    packages[0]=default-jre-headless
  fi
  apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
  if ! has_java; then
    say "java is still older than 17: set JAVA_HOME to a newer one"
    exit 1
  fi
}

require_servers() {
  require_java "$@"
  if ! has_jars "$@"; then say "fetching the jars of $* (kafka: 45 MB, flink: 190 MB; once)"; fi
  "$VENV/bin/python" -m pipeline.local.jars fetch "$@"
}

require_registry() {
  if ! has_registry; then say "fetching the schema registry (about 110 MB, once)"; fi
  "$VENV/bin/python" -m tests.servers.schema_registry --fetch
}

# A browser and its driver, for the tests of the page.
require_browser() {
  if command -v chromedriver >/dev/null && command -v chromium >/dev/null; then return; fi
  if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    say "the tests of the page need Chromium: sudo apt-get install chromium chromium-driver" \
      "(./run.sh test --fast does without)"
    exit 1
  fi
  say "installing chromium (about 130 MB, once)"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >/dev/null
  apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null
}

# Whether the arguments ask for a Flink cluster.
on_flink() { [[ " $* " == *" --runner=flink "* || " $* " == *" --runner flink "* ]]; }

# --- Commands -----------------------------------------------------------------------------------

run_tests() {
  local marks="" argument arguments=()
  for argument in "$@"; do
    case $argument in
      --fast) marks="not broker and not flink" ;;
      --flink) marks=flink ;;
      *) arguments+=("$argument") ;;
    esac
  done
  if [[ $marks != not* ]]; then require_servers kafka flink; fi
  if [[ -z $marks ]]; then
    require_registry
    require_browser
  fi
  # First, so that what the caller says wins: -m, and -n 0 for one process. How many they are, and
  # which tests belong together, is in tests/conftest.py.
  exec "$VENV/bin/python" -m pytest -m "$marks" -n auto --dist loadfile --no-loadscope-reorder \
    ${arguments[@]+"${arguments[@]}"}
}

command=${1:-help}
case $command in
  help | -h | --help)
    usage
    ;;
  setup)
    no_arguments "$@"
    setup
    ;;
  demo | lambda)
    setup
    if [[ $command == demo ]] && on_flink "$@"; then require_servers kafka flink; fi
    cd "$CALLED_FROM" # file names among the arguments are relative to it
    exec "$VENV/bin/python" -m pipeline.local "$@"
    ;;
  run)
    setup
    cd "$CALLED_FROM" # file names among the arguments are relative to it
    exec "$VENV/bin/python" -m pipeline "${@:2}"
    ;;
  test)
    setup
    run_tests "${@:2}"
    ;;
  check)
    no_arguments "$@"
    setup
    "$VENV/bin/ruff" format --check --quiet . ||
      { say "not formatted; to format: .venv/bin/ruff format ."; exit 1; }
    "$VENV/bin/ruff" check --quiet .
    "$VENV/bin/mypy" --no-error-summary
    run_tests --fast
    ;;
  bench)
    setup
    if on_flink "$@"; then require_servers kafka flink; else require_servers kafka; fi
    exec "$VENV/bin/python" -m tests.bench "${@:2}"
    ;;
  clean)
    no_arguments "$@"
    rm -rf "$VENV" .venv.lock build dist ./*.egg-info \
      .hypothesis .mypy_cache .pytest_cache .ruff_cache
    find . -name __pycache__ -type d -prune -exec rm -rf {} +
    ;;
  *)
    usage_error "unknown command: $command"
    ;;
esac
