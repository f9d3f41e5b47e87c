#!/usr/bin/env bash
# Runs fliqs_jax.main on a TPU slice of a GKE cluster, as a JobSet, until it is done.
#
#   launch/gke.sh run --name=NAME --image=REGISTRY/IMAGE:TAG --topology=2x4
#       --chips_per_node=8 [--accelerator=tpu-v5-lite-podslice] [--max_restarts=50]
#       [--poll=30] [--dry_run] -- --config=configs/resnet18.py --workdir=gs://BUCKET/RUN ...
#   launch/gke.sh status|logs|stop --name=NAME [--dry_run]
#
# `run` builds and pushes the image, starts the JobSet (gke_jobset.yaml) and follows the log
# of worker 0. The cluster restarts it where a node was preempted or main exits with status
# 75, up to --max_restarts times; any other failure is final. A JobSet that is done is
# deleted; one that failed stays, without nodes, for its logs. `run` again, with the same
# flags, takes over one whose `run` was interrupted. `stop` deletes it, if it is there. The
# node pool is the cluster's: see docs/tpu.md. --poll is in seconds.
#
# Needs docker and kubectl, whose current context is a cluster with JobSet 0.6 or later.
# Exit status: 0 done, 1 failed, 2 wrong input, 130 interrupted.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' image='' topology='' chips_per_node='' max_restarts=50 poll=30
accelerator=tpu-v5-lite-podslice
started= # whether there may be a JobSet

# Stands in for docker and kubectl with --dry_run, and answers as if all went well.
rehearsed() {
  quoted "$@" >&3
  echo >&3
  case "$1 $2 $3" in
    'kubectl apply '*) cat >&3 ;;
    'kubectl get '*) [[ ! $started ]] || echo "$name/Completed" ;;
  esac
}

# Prints how the JobSet ended, RUNNING where it has not and ABSENT where there is none.
state() {
  local reply
  reply=$(kubectl get jobset "$name" --ignore-not-found \
    -o 'jsonpath={.metadata.name}/{.status.terminalState}')
  case $reply in
    '') echo ABSENT ;;
    */) echo RUNNING ;;
    *) echo "${reply#*/}" ;;
  esac
}

# Prints the nodes of a slice such as 4x4, of so many chips each.
num_nodes() {
  local chips=$((${topology//x/*}))
  ((chips % chips_per_node == 0)) ||
    reject "--chips_per_node=$chips_per_node does not divide the $chips of $topology"
  echo $((chips / chips_per_node))
}

# Prints words as a JSON list, which YAML reads; in arguments Kubernetes takes $$ as $.
arguments() {
  local word words=()
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//'$'/'$$'}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    words+=("\"${word//$'\t'/\\t}\"")
  done
  local IFS=,
  echo "[${words[*]}]"
}

# Prints the JobSet, with its placeholders filled in.
manifest() {
  local text field
  local -A values=(
    [NAME]=$name [IMAGE]=$image [ACCELERATOR]=$accelerator [TOPOLOGY]=$topology
    [NODES]=$nodes [CHIPS]=$chips_per_node [MAX_RESTARTS]=$max_restarts
    [ARGUMENTS]=$(arguments --distributed "${main_flags[@]}")
  )
  text=$(<"$here/gke_jobset.yaml")
  # The arguments come last: they may have anything in them.
  for field in NAME IMAGE ACCELERATOR TOPOLOGY NODES CHIPS MAX_RESTARTS ARGUMENTS; do
    text=${text//"\${$field}"/"${values[$field]}"}
  done
  echo "$text"
}

follow() {
  kubectl logs --follow --tail=100 \
    --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
}

delete() {
  kubectl delete jobset "$name" --ignore-not-found
  started=
}

start() {
  docker build --file "$here/Dockerfile" --tag "$image" "$root"
  docker push "$image"
  started=1
  manifest | kubectl apply -f -
}

run() {
  local now
  trap 'exit 130' INT TERM
  trap remains EXIT
  now=$(state)
  if [[ $now == ABSENT ]]; then start; fi
  started=1
  while true; do
    now=$(state)
    case $now in
      Completed)
        delete
        say "done: $(main_flag workdir)"
        return
        ;;
      Failed)
        started=
        say "main failed and is not restarted; logs: $script logs --name=$name"
        exit 1
        ;;
      ABSENT)
        started=
        say "$name was deleted"
        exit 1
        ;;
    esac
    follow || sleep "$poll" # before a worker is up, and between two starts
  done
}

# Leaves nothing that costs money unsaid.
remains() {
  [[ ! $started ]] ||
    say "$name may still run and cost money. Delete it: $script stop --name=$name"
}

status() { echo "$name: $(state)"; }

logs() { follow; }

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

command=${1-}
case $command in
  run | status | logs | stop) shift ;;
  --help | -h) help && exit ;;
  *) reject "'$command' is no command: expected run, status, logs or stop" ;;
esac
if [[ $command == run ]]; then
  parse 'name image topology chips_per_node accelerator max_restarts poll' '' "$@"
  require name image topology chips_per_node
  check_name "$name"
  check_count chips_per_node "$chips_per_node"
  check_count max_restarts "$max_restarts"
  check_count poll "$poll"
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    reject "--topology='$topology' is none: expected one such as 2x4 or 4x4x4"
  ((chips_per_node)) || reject '--chips_per_node=0 is none'
  nodes=$(num_nodes)
  check_main_flags
else
  parse 'name' '' "$@"
  require name
fi
if [[ $dry_run ]]; then
  exec 3>&1
  docker() { rehearsed docker "$@"; }
  kubectl() { rehearsed kubectl "$@"; }
fi
for tool in docker kubectl; do
  command -v $tool >/dev/null || reject "$tool is not installed"
done
"$command"
