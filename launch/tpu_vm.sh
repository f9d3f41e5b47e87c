#!/usr/bin/env bash
# Runs fliqs_jax.main on all workers of a Cloud TPU slice, through preemptions, until it
# is done, and deletes the slice.
#
#   launch/tpu_vm.sh run --name=NAME --zone=ZONE --accelerator=v5litepod-8 [--spot]
#       [--project=PROJECT] [--runtime=VERSION] [--max_restarts=50] [--poll=30]
#       [--dry_run] -- --config=configs/resnet18.py --workdir=gs://BUCKET/RUN ...
#   launch/tpu_vm.sh status|logs|stop --name=NAME --zone=ZONE [--project=PROJECT]
#       [--dry_run]
#
# `run` creates a queued resource, waits for it, copies this package to its workers,
# installs it there and follows the log of worker 0. A slice that was preempted is deleted
# and created anew; exit status 75 of main starts it again; either way main resumes its
# workdir, up to --max_restarts times. Any other failure is final. In the end the slice is
# deleted, and the workers' logs are in WORKDIR/logs. `run` again, with the same flags,
# takes over a slice whose `run` was interrupted. `stop` deletes it, if it is there.
# --runtime follows from --accelerator unless given, --poll is in seconds. --dry_run
# prints the commands of a run without incidents, and runs none.
#
# Needs gcloud, logged in. Exit status: 0 done, 1 failed, 2 wrong input, 130 interrupted.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' zone='' project='' accelerator='' runtime='' spot='' max_restarts=50 poll=30
created= # whether there may be a slice that costs money
restarts=0
silent=0 # attempts in a row that reached no worker

tpus() { # NOUN VERB ARGUMENT...
  gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"}
}

# Stands in for gcloud with --dry_run: prints the call, and answers as if all went well.
rehearsed_gcloud() {
  quoted gcloud "$@" >&3
  echo >&3
  case $4 in
    describe) if [[ $created ]]; then echo ACTIVE; else echo NOT_FOUND >&2 && return 1; fi ;;
    ssh) case $* in *STATUS=*) echo STATUS=0 ;; esac ;;
  esac
}

# Prints the state of the queued resource, ABSENT where there is none.
state() {
  local reply errors try
  errors=$(mktemp)
  for try in 1 2 3 4 5; do
    if reply=$(tpus queued-resources describe "$name" --format='value(state.state)' \
      2>"$errors"); then
      break
    elif grep -q NOT_FOUND "$errors"; then
      reply=ABSENT
      break
    fi
    reply=
    ((try == 5)) || sleep "$poll"
  done
  [[ $reply ]] || say "cannot tell the state of $name: $(tail -n 1 "$errors")"
  rm -f "$errors"
  [[ $reply ]] && echo "$reply"
}

create() {
  created=1
  tpus queued-resources create "$name" --node-id="$name" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" ${spot:+--spot} --quiet
}

delete() {
  tpus queued-resources delete "$name" --force --quiet
  created=
}

on_workers() { # WORKERS COMMAND
  tpus tpu-vm ssh "$name" --worker="$1" --ssh-flag='-o ServerAliveInterval=30' \
    --command="$2" --quiet
}

# Prints what a worker does.
job() {
  cat <<JOB
mkdir -p ~/fliqs_jax && cd ~/fliqs_jax && tar xzf ~/fliqs_jax.tar.gz &&
export PATH=\$PATH:~/.local/bin &&
{ command -v uv || python3 -m pip install --quiet --user uv; } &&
uv venv --quiet --allow-existing --python 3.12 venv &&
uv pip install --quiet --python venv/bin/python '.[tpu]' &&
venv/bin/python -m fliqs_jax.main --distributed $(quoted "${main_flags[@]}")
echo \$? > ~/fliqs_jax.status
gcloud storage cp ~/fliqs_jax.log $(quoted "$(main_flag workdir)")/logs/\$(hostname).log
JOB
}

# Copies the package to all workers and starts the job where it does not run.
start() {
  local package=${TMPDIR:-/tmp}/fliqs_jax-$name.tar.gz
  perform tar czf "$package" -C "$root" --exclude=__pycache__ \
    fliqs_jax configs pyproject.toml setup.cfg README.md LICENSE || return
  tpus tpu-vm scp "$package" "$name:fliqs_jax.tar.gz" --worker=all --quiet || return
  # The job inherits the lock and holds it while it runs: a second start does nothing.
  on_workers all "exec 9>~/fliqs_jax.lock; flock -n 9 || exit 0; rm -f ~/fliqs_jax.status
setsid nohup bash -c $(quoted "$(job)") >>~/fliqs_jax.log 2>&1 </dev/null &"
}

# Prints the log of worker 0 until its job has ended.
follow() {
  on_workers 0 'tail -n 100 --pid=$$ -F ~/fliqs_jax.log 2>/dev/null &
flock ~/fliqs_jax.lock sleep 0.3; kill $!'
}

# Runs main once. Sets outcome: done, again, failed, or lost where workers went silent.
attempt() {
  local replies statuses
  outcome=lost
  ((++silent))
  start || return 0
  silent=0
  follow || return 0
  # shellcheck disable=SC2016
  replies=$(on_workers all \
    'flock ~/fliqs_jax.lock true; echo STATUS=$(cat ~/fliqs_jax.status)') || return 0
  statuses=$(sed -n 's/.*STATUS=\([0-9]*\).*/\1/p' <<<"$replies" | sort -nu | xargs)
  case " $statuses " in
    '  ') ;;
    ' 0 ') outcome='done' ;;
    ' 75 ' | ' 0 75 ') outcome=again ;;
    *) outcome=failed ;;
  esac
}

# Ends with a reason, without the slice.
give_up() {
  say "$1; logs: $(main_flag workdir)/logs"
  delete
  exit 1
}

restart() {
  ((++restarts <= max_restarts)) || give_up "giving up after $max_restarts restarts"
}

run() {
  local outcome now
  trap 'exit 130' INT TERM
  trap remains EXIT
  while true; do
    now=$(state) # whose failure ends the script
    case $now in
      ABSENT) create ;;
      ACTIVE)
        created=1
        attempt
        case $outcome in
          'done') delete && say "done: $(main_flag workdir)" && return ;;
          again) say 'main asks to be started again' && restart ;;
          failed)
            # The workers of a slice that goes away fail in any way.
            [[ $(state) != ACTIVE ]] ||
              give_up 'main failed on a worker and is not restarted'
            ;;
          lost)
            ((silent <= max_restarts)) || give_up "no connection to $name"
            say "no connection to $name" && sleep "$poll"
            ;;
        esac
        ;;
      FAILED | SUSPENDED)
        created=1
        say "$name is $now: deleting it, to create it anew"
        restart
        delete
        sleep "$poll"
        ;;
      *)
        created=1
        say "$name is $now"
        sleep "$poll"
        ;;
    esac
  done
}

# Leaves nothing that costs money unsaid.
remains() {
  local where="--name=$name --zone=$zone${project:+ --project=$project}"
  [[ ! $created ]] ||
    say "$name may still exist, run and cost money. Delete it: $script stop $where"
}

status() { echo "$name: $(state)"; }

logs() {
  local now
  now=$(state)
  if [[ $now != ACTIVE && ! $dry_run ]]; then
    say "$name is $now: the logs of jobs that ended are in WORKDIR/logs"
    exit 1
  fi
  follow
}

stop() {
  local now
  now=$(state)
  if [[ $now == ABSENT && ! $dry_run ]]; then
    echo "$name: nothing to stop"
  else
    delete
    echo "$name: deleted"
  fi
}

runtime_of() { # ACCELERATOR
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-*) echo tpu-ubuntu2204-base ;;
  esac
}

command=${1-}
case $command in
  run | status | logs | stop) shift ;;
  --help | -h) help && exit ;;
  *) reject "'$command' is no command: expected run, status, logs or stop" ;;
esac
case " $* " in *' --help '*) help && exit ;; esac
if [[ $command == run ]]; then
  parse 'name zone project accelerator runtime max_restarts poll' spot "$@"
  require name zone accelerator
  check_name "$name"
  check_count max_restarts "$max_restarts"
  check_count poll "$poll"
  runtime=${runtime:-$(runtime_of "$accelerator")}
  [[ $accelerator =~ -[0-9]+$ && $runtime ]] || reject \
    "--accelerator='$accelerator' is unknown: expected v5litepod-N, v5p-N, v6e-N or v4-N"
  check_main_flags
else
  parse 'name zone project poll' '' "$@"
  require name zone
fi
if [[ $dry_run ]]; then
  exec 3>&1
  gcloud() { rehearsed_gcloud "$@"; }
elif ! command -v gcloud >/dev/null; then
  reject 'gcloud is not installed: https://cloud.google.com/sdk/docs/install'
fi
"$command"
