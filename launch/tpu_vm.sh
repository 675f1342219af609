#!/usr/bin/env bash
# Trains on Cloud TPU VMs: asks for a queued resource, waits for it, installs the project on every host, runs the smoke job, then omni-jax.
# A preempted slice is requested again, and the run resumes from the newest whole checkpoint. Needs gcloud, signed in.
#
#   launch/tpu_vm.sh --name omni --zone ZONE --type v5litepod-16 --version v2-alpha-tpuv5-lite --source gs://BUCKET/omni_jax.tar.gz \
#     --workdir gs://BUCKET/runs/omni7b -- \
#     train --config omniretriever_7b --workdir gs://BUCKET/runs/omni7b --config.data.train=gs://BUCKET/shards
#
# --name NAME       of the queued resource            --zone ZONE       where
# --type TYPE       accelerator type of a slice       --version NAME    TPU software version of its VMs
# --source FILE     gs:// archive of the project: git archive --format tar.gz HEAD | gcloud storage cp - FILE
# --workdir DIR     gs:// folder of the run           --before COMMAND  on every host before the run, in the project's folder
# --slices N        slices that train as one (1)      --restarts N      times to ask again for what was taken away (10)
# --spot            capacity that may be taken away   --delete          give the resource back at the end, whatever the end
# --no-smoke        leave the smoke job out           --dry-run         print what would run
#
# Run again after an interruption here: what exists is used.
set -euo pipefail

name="" zone="" type="" version="" source="" workdir="" before="" slices=1 restarts=10 spot="" delete="" smoke=1 dry=""
fail() {
  echo "launch/tpu_vm.sh: $1" >&2
  exit 2
}
while (($#)); do
  case $1 in
    --name | --zone | --type | --version | --source | --workdir | --before | --slices | --restarts)
      [[ -n ${2:-} && $2 != --* ]] || fail "$1 takes a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    --spot) spot=1 && shift ;;
    --delete) delete=1 && shift ;;
    --no-smoke) smoke="" && shift ;;
    --dry-run) dry=1 && shift ;;
    --) shift && break ;;
    *) fail "unknown option $1; options go before --, the arguments of omni-jax after it" ;;
  esac
done
for needed in name zone type version source workdir; do
  [[ -n ${!needed} ]] || fail "--$needed is missing"
done
(($#)) || fail "nothing to run; give the arguments of omni-jax behind --"
[[ $workdir == gs://?* ]] || fail "--workdir $workdir: every host must see it; give a gs:// folder"
[[ $source == gs://?* ]] || fail "--source $source: every host fetches it; give a gs:// file"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices takes a whole number of 1 or more"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts takes a whole number"
[[ $type != tpu7x* && $type != v7x* ]] || fail "--type $type: this generation is rented through GKE alone; use launch/gke.sh"
[[ -n $dry ]] || command -v gcloud > /dev/null || fail "gcloud is not on PATH"

resource=(gcloud compute tpus queued-resources)
do_or_print() {
  if [[ -n $dry ]]; then printf '%s ' "${@@Q}" && echo; else "$@"; fi
}
# on_all COMMAND: on every host of every slice, in the project's folder.
on_all() {
  do_or_print "${resource[@]}" ssh "$name" --zone "$zone" --worker=all --node=all --command "mkdir -p omni_jax && cd omni_jax && $1"
}
state() {
  "${resource[@]}" describe "$name" --zone "$zone" --format 'value(state.state)' 2> /dev/null || true
}
remove() {
  do_or_print "${resource[@]}" delete "$name" --zone "$zone" --force --quiet
}

create=("${resource[@]}" create "$name" --zone "$zone" --accelerator-type "$type" --runtime-version "$version")
if ((slices > 1)); then create+=(--node-count "$slices" --node-prefix "$name"); else create+=(--node-id "$name"); fi
[[ -z $spot ]] || create+=(--spot)

# acquire: returns once the resource is there; one that was taken away or refused is removed first.
acquire() {
  if [[ -n $dry ]]; then
    do_or_print "${create[@]}"
    echo "# wait until it is ACTIVE"
    return
  fi
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      "") "${create[@]}" ;;
      SUSPENDED | FAILED)
        echo "launch/tpu_vm.sh: $name is $now; asking for it again" >&2
        remove
        ;;
      *)
        echo "launch/tpu_vm.sh: $name is $now; waiting" >&2
        sleep 60
        ;;
    esac
  done
}

install="gcloud storage cat ${source@Q} | tar -xz && (test -e .venv/.tpu || (make setup && .venv/bin/pip install -q -e '.[tpu,gcs]' && touch .venv/.tpu))"
run=(launch/host.sh --workdir "$workdir" --slices "$slices")
[[ -n $smoke ]] || run+=(--no-smoke)
run+=(-- "$@")
[[ -z $delete ]] || trap remove EXIT

for ((number = 0; ; number++)); do
  acquire
  status=0
  {
    on_all "$install" &&
      { [[ -z $before ]] || on_all "$before"; } &&
      on_all "PATH=\$PWD/.venv/bin:\$PATH ${run[*]@Q}"
  } || status=$?
  ((status)) || exit 0
  [[ -z $dry ]] || exit "$status"
  # 2 is bad input, which another slice would refuse too. ssh says 255 for a host that is gone; 75 is a run that saved and left.
  ((status != 2 && number < restarts)) || exit "$status"
  echo "launch/tpu_vm.sh: the run ended with status $status; resuming ($((number + 1)) of $restarts)" >&2
  sleep 60
done
