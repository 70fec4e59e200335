#!/usr/bin/env bash
# Runs a whole self-play: every phase of the plan that is not done yet, in order. Start it again at any time: it goes on where it stopped.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tools/spin.sh CONFIG.yaml [--run-dir DIR] [--dry-run] [--until PHASE:T] [key=value ...]

Runs self-play fine-tuning: prepare, import, then for each iteration T generate:T, train:T, export:T, evaluate:T, guard:T and rotate:T, then the
baselines (with training.objective=dpo one iteration without generate:0, with sft without guard:0, too).
A phase that is done is skipped, so the same command continues a run that was stopped or killed.

  CONFIG.yaml       the configuration, see examples/configs/; docs/configuration.md lists its keys
  --run-dir DIR     where everything goes (default: runs/NAME, NAME from the configuration)
  --dry-run         check everything, print the plan, start nothing
  --until PHASE:T   stop after this phase, for example --until train:0
  key=value         override a key of the configuration, for example spin.beta=0.2
  --help            this text

environment: PYTHON (interpreter, default .venv/bin/python of this repository), OMP_NUM_THREADS (threads a process)
exit status: 0 done, 2 something you can mend (one line on stderr says what), 1 anything else, 130 or 143 stopped by a signal
TEXT
}

# ---------------------------------------------------------------------------------------------------------------- arguments

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
original_command=("$0" "$@")
config='' run_dir='' until='' dry_run=false overrides=()

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
        [[ -z $config ]] || die 2 "argument $1 is neither key=value nor an option, and the configuration is already $config"
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
  command -v "$python" >/dev/null || die 2 "the Python interpreter $python does not exist: run \`make setup\` or set PYTHON"
}

# --------------------------------------------------------------------------------------------------------------------- plan

# First line: the run directory and the result, if there is one yet. Then a line a phase: phase, status, processes, what it does, command... with
# TABs between (megatron_spin/run/plan.py).
read_plan() { # [--check]
  local arguments=("$config" "${overrides[@]}" "$@") text
  [[ -z $run_dir ]] || arguments+=(--run-dir "$run_dir")
  [[ -z $until ]] || arguments+=(--until "$until")
  text=$("$python" "$repository/tools/plan.py" "${arguments[@]}") || exit $?
  mapfile -t plan <<<"$text"
  IFS=$'\t' read -r _ run_dir result <<<"${plan[0]}"
  plan=("${plan[@]:1}")
}

print_plan() {
  local line fields ranks
  printf 'plan for %s\n' "$run_dir"
  for line in "${plan[@]}"; do
    IFS=$'\t' read -r -a fields <<<"$line"
    printf '  %-4s  %-26s %s\n' "${fields[1]}" "${fields[0]}" "${fields[3]}"
    ranks=''
    ((fields[2] == 1)) || ranks="(${fields[2]} ranks) "
    printf '        %s%s\n' "$ranks" "$(printf '%q ' "${fields[@]:4}")"
  done
}

# One driver a run directory. The phase inherits the lock, so that no second driver starts while an orphan could still write.
take_lock() {
  mkdir -p "$run_dir/logs" 2>/dev/null || die 2 "run directory $run_dir cannot be created: choose another --run-dir"
  exec {lock}<>"$run_dir/.lock"
  flock --wait 3 "$lock" || die 2 "$run_dir is in use by another driver (process $(<"$run_dir/.lock")): wait for it, or stop it"
  printf '%s\n' "$$" >"$run_dir/.lock"
}

# ------------------------------------------------------------------------------------------------------------------- launch

# The launcher: replaces the calling (sub)shell by COMMAND on PROCESSES ranks. torchrun here; srun will stand beside it.
# Whatever it starts dies with its parent: after a kill -9 of the driver nothing goes on writing into the run directory.
launch() { # PROCESSES COMMAND...
  local processes=$1
  shift
  if ((processes == 1)); then
    unset WORLD_SIZE RANK LOCAL_RANK
    exec setsid setpriv --pdeathsig KILL "$python" "$@" >"$SPIN_STDOUT" 2>"$SPIN_STDERR"
  fi
  local threads=$(($(nproc) / processes))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
  # Rank 0 speaks to the terminal; torchrun itself and the other ranks only to a log, for their complaints are mostly consequences.
  # shellcheck disable=SC2016  # expanded by the rank
  local rank='[[ $LOCAL_RANK != 0 ]] || exec >"$SPIN_STDOUT" 2>"$SPIN_STDERR"; exec setpriv --pdeathsig KILL "$@"'
  exec setsid setpriv --pdeathsig KILL "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" --no-python \
    bash -c "$rank" rank "$python" "$@" >>"$ranks_log" 2>&1
}

# Starts a phase with its output on the terminal and in its log, waits for it, sets `status`.
run_phase() { # PROCESSES COMMAND...
  local reader readers=()
  export SPIN_ERROR_FILE=$scratch/error SPIN_STDOUT=$scratch/stdout SPIN_STDERR=$scratch/stderr
  rm -f -- "$SPIN_ERROR_FILE"
  tee -a -- "$log" <"$SPIN_STDOUT" & readers+=($!)
  tee -a -- "$log" <"$SPIN_STDERR" >&2 & readers+=($!)
  # Held open here, or the readers would end as soon as the first writer does, and wait for one that never came.
  exec {hold_stdout}>"$SPIN_STDOUT" {hold_stderr}>"$SPIN_STDERR"
  (launch "$@" {hold_stdout}>&- {hold_stderr}>&-) </dev/null &
  child=$!
  status=0
  wait "$child" || status=$?
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

# Turns the failure of a phase into one line and the driver's exit status.
fail() {
  local message='' code=1
  if [[ -s $SPIN_ERROR_FILE ]]; then
    IFS=$'\t' read -r code message <"$SPIN_ERROR_FILE"
  fi
  # A rank that was killed is the cause; that its peers lost their connection to it is the consequence.
  if ((code == 1)) && { ((status > 128)) || grep -qs 'exitcode *: -9' "$ranks_log"; }; then
    message="a process of $phase was killed by a signal (the kernel does that when memory runs out); its log is $log"
  elif [[ -z $message ]]; then
    message="$phase ended with status $status and no message; its log is $log"
  fi
  # A tool prints its own line, which has reached the terminal unless it came from another rank than 0.
  if ! tail -c "+$((log_start + 1))" "$log" | grep -qxF "error: $message"; then
    printf 'error: %s\n' "$message" | tee -a -- "$log" >&2
  fi
  [[ $phase == guard:* && $code == 2 ]] || printf '%s did not finish (logs: %s*); the same command continues from there\n' "$phase" "${log%log}"
  ((code == 2)) || code=1
  exit "$code"
}

# --------------------------------------------------------------------------------------------------------------------- main

main() {
  local fields number started
  parse_arguments "$@"
  find_tools
  export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  # Deprecations inside the libraries are not the user's; set PYTHONWARNINGS=default to see them.
  export PYTHONWARNINGS=${PYTHONWARNINGS-ignore::UserWarning,ignore::FutureWarning,ignore::DeprecationWarning}
  read_plan --check
  if $dry_run; then
    print_plan
    return
  fi
  take_lock
  scratch=$(mktemp -d)
  trap 'rm -rf -- "$scratch"' EXIT
  mkfifo "$scratch/stdout" "$scratch/stderr"
  phase='' child=''
  trap 'stop INT 130' INT
  trap 'stop TERM 143' TERM
  printf 'run directory %s\n' "$run_dir"
  for ((number = 1; number <= ${#plan[@]}; number++)); do
    IFS=$'\t' read -r -a fields <<<"${plan[number - 1]}"
    phase=${fields[0]}
    case ${fields[1]} in
      done) printf '[%d/%d] %s: already done\n' "$number" "${#plan[@]}" "$phase" && continue ;;
      skip) printf '[%d/%d] %s: %s\n' "$number" "${#plan[@]}" "$phase" "${fields[3]}" && continue ;;
    esac
    printf '[%d/%d] %s: %s\n' "$number" "${#plan[@]}" "$phase" "${fields[3]}"
    started=$SECONDS log=$run_dir/logs/${phase/:/_}.log ranks_log=$run_dir/logs/${phase/:/_}.ranks.log
    rm -f -- "$ranks_log"
    printf '=== %s %s\n' "$(date -u +%FT%TZ)" "$(printf '%q ' "${fields[@]:4}")" >>"$log"
    log_start=$(stat -c %s -- "$log")
    run_phase "${fields[2]}" "${fields[@]:4}"
    ((status == 0)) || fail
    printf '[%d/%d] %s: done in %d s\n' "$number" "${#plan[@]}" "$phase" $((SECONDS - started))
    [[ $phase != guard:* ]] || read_plan # what a guard rolls back leaves the plan
  done
  read_plan
  printf '%s: all of the plan%s is done; report: %q tools/report.py %q\n' "$run_dir" "${until:+ up to $until}" "$python" "$run_dir"
  [[ -z $result ]] || printf 'the result is %s\n' "$result"
}

# In one line: bash reads a script as it runs it, and an update of this file must not change a run that is under way.
main "$@"; exit
