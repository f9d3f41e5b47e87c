#!/usr/bin/env bash
# Runs fliqs_jax.main in N processes on this machine that work on one job together.
#
#   launch/local_processes.sh N [--port=PORT] [--dry_run] \
#       -- --config=configs/resnet18.py:digits --workdir=runs/digits ...
#
# Each process has the devices that it sees: on a CPU its own. Their lines are marked with
# the process's number. Where one fails the others are stopped. Interrupting the script
# stops them all. The port is a free one unless given.
#
# Exit status: 0 done, 75 if main asks to be started again, 2 wrong input, or that of the
# first process that failed.
set -uo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

port=
declare -A running=() # by process id of the system

free_port() {
  python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# Sets words to the command of a process.
set_words() {
  words=(python -m fliqs_jax.main --coordinator="localhost:$port"
    --num_processes="$count" --process_id="$1" "${main_flags[@]}")
}

stop() { kill "-$1" "${!running[@]}" 2>/dev/null; }

# Waits for all processes; returns the status of them together.
finish() {
  local process status result=0
  while ((${#running[@]})); do
    process=
    wait -n -p process "${!running[@]}"
    status=$?
    if [[ -z ${process-} ]]; then
      # A signal came first, or what ended was already taken off the list of jobs.
      for process in "${!running[@]}"; do
        kill -0 "$process" 2>/dev/null || break
        process=
      done
      [[ $process ]] || continue
      wait "$process"
      status=$?
    fi
    unset "running[$process]"
    if ((status && (result == 0 || result == 75))); then
      result=$status
      # The others would wait for it.
      ((status == 75)) || stop KILL
    fi
  done
  return $result
}

case ${1-} in --help | -h) help && exit ;; esac
count=${1-}
[[ $count =~ ^[1-9][0-9]*$ ]] ||
  reject "'$count' is no number of processes: expected N as the first argument"
shift
parse port '' "$@"
for flag in config workdir; do
  [[ $(main_flag "$flag") ]] || reject "main needs --$flag=…, after --"
done
port=${port:-$(free_port)}
trap 'stop TERM' INT TERM
for ((i = 0; i < count; i++)); do
  set_words "$i"
  if [[ $dry_run ]]; then
    perform "${words[@]}"
  else
    "${words[@]}" > >(sed -u "s/^/[$i] /") 2>&1 &
    running[$!]=$i
  fi
done
finish
