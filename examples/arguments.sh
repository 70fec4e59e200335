# shellcheck shell=bash
# Shared by the scripts of the examples: KEY=value arguments and the Python interpreter. A script sets `script` (its
# path in the repository) and defines `usage` before it calls anything here.

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

die() { # MESSAGE
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# Sets the variable that ARGUMENT, KEY=value, names; --help prints the usage and ends the script.
take_argument() { # ARGUMENT KEY...
  local argument=$1 key
  shift
  case $argument in -h | --help) usage && exit 0 ;; esac
  for key in "$@"; do
    if [[ $argument == "$key="* ]]; then
      printf -v "$key" '%s' "${argument#*=}"
      return
    fi
  done
  # shellcheck disable=SC2154  # the script sets it
  die "argument $argument is unknown: see $script --help"
}

check_files() { # REMEDY FILE...; an empty FILE was not given
  local remedy=$1 file
  shift
  for file in "$@"; do
    [[ -z $file || -f $file ]] || die "$file does not exist: $remedy"
  done
}

check_seed() {
  [[ $SEED =~ ^[0-9]+$ ]] || die "SEED=$SEED is not a number: give one from 0 on"
}

# Sets `python`; the tools that the script calls get the same one.
find_python() {
  python=${PYTHON:-$repository/.venv/bin/python}
  command -v "$python" >/dev/null || die "no Python interpreter at $python: run \`make setup\` or set PYTHON"
  export PYTHON=$python PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
}
