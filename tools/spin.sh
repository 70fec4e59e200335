#!/usr/bin/env bash
# Runs a whole self-play: every phase of the plan that is not done, in order. Start it again at any time to continue.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tools/spin.sh CONFIG.yaml [--run-dir DIR] [--dry-run] [--until PHASE:T] [key=value ...]

Runs self-play fine-tuning: prepare, import, then for each iteration T generate:T, train:T, export:T, evaluate:T,
guard:T and rotate:T, then the baselines (with training.objective=dpo one iteration without generate:0, with sft also
without guard:0). A phase that is done is skipped, so the same command continues a run that was stopped or killed.

  CONFIG.yaml       the configuration, see examples/configs/; docs/configuration.md lists its keys
  --run-dir DIR     where everything goes (default: runs/NAME, NAME from the configuration)
  --dry-run         check everything, print the plan, start nothing
  --until PHASE:T   stop after this phase, for example --until train:0
  key=value         override a key of the configuration, for example spin.beta=0.2
  --help            this text

environment: PYTHON (interpreter, default .venv/bin/python of this repository), OMP_NUM_THREADS (threads per process),
  SPIN_LOG_LEVEL (DEBUG, INFO, WARNING or ERROR, of all ranks)
exit status: 0 done, 2 something you can fix (one line on stderr says what), 1 anything else, 130 or 143 stopped by a
  signal
TEXT
}

# ------------------------------------------------------------------------------------------------------------ arguments

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
original_command=("$0" "$@")
# shellcheck source=tools/launch.sh
source "$repository/tools/launch.sh"
config='' run_dir='' devices='' until='' dry_run=false overrides=()

die() { # STATUS MESSAGE
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

parse_arguments() {
  while (($#)); do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --dry-run) dry_run=true ;;
      --run-dir | --until)
        (($# > 1)) || die 2 "$1 needs a value: see tools/spin.sh --help"
        if [[ $1 == --until ]]; then until=$2; else run_dir=$2; fi
        shift
        ;;
      --run-dir=*) run_dir=${1#*=} ;;
      --until=*) until=${1#*=} ;;
      -*) die 2 "option $1 is unknown: see tools/spin.sh --help" ;;
      *=*) overrides+=("$1") ;;
      *)
        [[ -z $config ]] ||
          die 2 "argument $1 is neither key=value nor an option, and the configuration is already $config"
        config=$1
        ;;
    esac
    shift
  done
  [[ -n $config ]] || die 2 "no configuration given: usage: tools/spin.sh CONFIG.yaml [--run-dir DIR] [key=value ...]"
}

find_tools() {
  local tool
  for tool in flock mkfifo setpriv setsid tee; do
    command -v "$tool" >/dev/null || die 2 "the command $tool is missing: install util-linux and coreutils"
  done
  python=${PYTHON:-$repository/.venv/bin/python}
  command -v "$python" >/dev/null ||
    die 2 "the Python interpreter $python does not exist: run \`make setup\` or set PYTHON"
}

# ----------------------------------------------------------------------------------------------------------------- plan

# Sets run_dir, devices and result, and `plan` to one line of assignments per phase: phase, status, ranks, replan, what, command
# (megatron_spin/run/plan.py).
read_plan() { # [--check]
  local arguments=("$config" "${overrides[@]}" "$@") text
  [[ -z $run_dir ]] || arguments+=(--run-dir "$run_dir")
  [[ -z $until ]] || arguments+=(--until "$until")
  text=$("$python" "$repository/tools/plan.py" "${arguments[@]}") || exit $?
  mapfile -t plan < <(grep -a '^phase=' <<<"$text" || true) # -a: a path need not be UTF-8
  ((${#plan[@]})) || die 1 "tools/plan.py printed no phase"
  eval "$(grep -a '^run_dir=' <<<"$text")"
}

print_plan() {
  local line phase status ranks replan what command prefix
  printf 'plan for %s on %s\n' "$run_dir" "$devices"
  for line in "${plan[@]}"; do
    eval "$line"
    printf '  %-4s  %-26s %s\n' "$status" "$phase" "$what"
    prefix=''
    ((ranks == 1)) || prefix="($ranks ranks) "
    printf '        %s%s\n' "$prefix" "$(printf '%q ' "${command[@]}")"
  done
}

# One driver per run directory. The phase inherits the lock, so that no second driver starts while an orphan could still
# write.
take_lock() {
  mkdir -p "$run_dir/logs" 2>/dev/null || die 2 "run directory $run_dir cannot be created: choose another --run-dir"
  exec {lock}<>"$run_dir/.lock"
  local status=0
  flock --wait 3 --conflict-exit-code 75 "$lock" || status=$?
  if ((status == 75)); then
    die 2 "$run_dir is in use by another driver (process $(<"$run_dir/.lock")): wait for it, or stop it"
  elif ((status != 0)); then # as on Lustre mounted without -o flock; flock has said why
    echo "warning: $run_dir/.lock cannot be locked: make sure that no other driver works on this run" >&2
  fi
  printf '%s\n' "$$" >"$run_dir/.lock"
}

# ---------------------------------------------------------------------------------------------------------------- phase

# Starts a phase with its output on the terminal and in its log, waits for it, sets exit_code.
run_phase() { # RANKS COMMAND...
  local reader readers=() ranks=$1
  shift
  rm -f -- "$scratch/error"
  tee -a -- "$log" <"$scratch/stdout" & readers+=($!)
  tee -a -- "$log" <"$scratch/stderr" >&2 & readers+=($!)
  # Held open here, or the readers would end as soon as the first writer does, and wait for one that never came.
  exec {hold_stdout}>"$scratch/stdout" {hold_stderr}>"$scratch/stderr"
  (
    exec {hold_stdout}>&- {hold_stderr}>&-
    export SPIN_ERROR_FILE=$scratch/error SPIN_STDOUT=$scratch/stdout SPIN_STDERR=$scratch/stderr
    launch_local "$ranks" "$ranks_log" "$@"
  ) </dev/null &
  child=$!
  exit_code=0
  wait "$child" || exit_code=$?
  kill -KILL -- "-$child" 2>/dev/null || true # what it may have left behind
  child=''
  exec {hold_stdout}>&- {hold_stderr}>&-
  for reader in "${readers[@]}"; do wait "$reader" || true; done
}

# shellcheck disable=SC2329  # traps call it
stop() { # SIGNAL STATUS
  trap '' INT TERM
  printf '\nstopping %s ...\n' "$phase" >&2
  if [[ -n $child ]]; then
    kill -TERM -- "-$child" 2>/dev/null || true
    local i
    for ((i = 0; i < 100; i++)); do
      kill -0 "$child" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL -- "-$child" 2>/dev/null || true
  fi
  printf 'stopped by SIG%s in %s; to continue:%s\n' "$1" "$phase" "$(printf ' %q' "${original_command[@]}")" >&2
  exit "$2"
}

# Turns the failure of a phase into one line and the driver's exit status. The phase's processes print no such line:
# the first rank to fail leaves it in a file.
fail() {
  local message='' code=1
  if [[ -s $scratch/error ]]; then
    IFS=$'\t' read -r code message <"$scratch/error"
  fi
  # A rank that was killed is the cause; that its peers lost their connection to it is the consequence.
  if ((code == 1)) && { ((exit_code > 128)) || grep -qs 'exitcode *: -9' "$ranks_log"; }; then
    message="a process of $phase was killed by a signal (the kernel does that when memory runs out); its log is $log"
  elif [[ -z $message ]]; then
    message="$phase ended with status $exit_code and no message; its log is $log"
  fi
  # A rank that was stopped because another failed leaves its bar on this line.
  [[ ! -t 2 ]] || printf '\n' >&2
  printf 'error: %s\n' "$message" | tee -a -- "$log" >&2
  # A guard that stops a run says itself what to do: the same command would only stop again.
  [[ $phase == guard:* && $code == 2 ]] ||
    printf '%s did not finish (logs: %s*); the same command tries it again\n' "$phase" "${log%log}"
  ((code == 2)) || code=1
  exit "$code"
}

# ----------------------------------------------------------------------------------------------------------------- main

main() {
  local line number started phase='' status ranks replan what command
  parse_arguments "$@"
  find_tools
  export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  # Deprecations inside the libraries are not the user's; set PYTHONWARNINGS=default to see them.
  export PYTHONWARNINGS=${PYTHONWARNINGS-ignore::UserWarning,ignore::FutureWarning,ignore::DeprecationWarning}
  # The phases write into pipes: this is where their bars go, past the logs.
  if [[ -t 2 ]]; then
    SPIN_TERMINAL=$(tty <&2) || SPIN_TERMINAL='' # a terminal may have no name here, as in some containers
    export SPIN_TERMINAL
  fi
  read_plan --check
  if $dry_run; then
    print_plan
    return
  fi
  take_lock
  scratch=$(mktemp -d)
  trap 'rm -rf -- "$scratch"' EXIT
  mkfifo "$scratch/stdout" "$scratch/stderr"
  child=''
  trap 'stop INT 130' INT
  trap 'stop TERM 143' TERM
  printf 'run directory %s, on %s\n' "$run_dir" "$devices"
  for ((number = 1; number <= ${#plan[@]}; number++)); do
    eval "${plan[number - 1]}"
    line="[$number/${#plan[@]}] $phase"
    case $status in
      done) printf '%s: already done\n' "$line" && continue ;;
      skip) printf '%s: %s\n' "$line" "$what" && continue ;;
    esac
    printf '%s: %s\n' "$line" "$what"
    started=$SECONDS log=$run_dir/logs/${phase/:/_}.log ranks_log=$run_dir/logs/${phase/:/_}.ranks.log
    rm -f -- "$ranks_log"
    printf '=== %s %s\n' "$(date -u +%FT%TZ)" "$(printf '%q ' "${command[@]}")" >>"$log"
    run_phase "$ranks" "${command[@]}"
    ((exit_code == 0)) || fail
    printf '%s: done in %d s\n' "$line" $((SECONDS - started))
    ! $replan || read_plan
  done
  read_plan
  printf '%s: all of the plan%s is done; report: %q tools/report.py %q\n' \
    "$run_dir" "${until:+ up to $until}" "$python" "$run_dir"
  [[ -z $result ]] || printf 'the result is %s\n' "$result"
}

# In one line: bash reads a script as it runs it, and an update of this file must not change a run that is under way.
main "$@"; exit
