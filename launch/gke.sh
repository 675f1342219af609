#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that has JobSet: fills in launch/jobset.yaml and applies it. Needs kubectl, signed in to the cluster.
#
#   launch/gke.sh --name omni7b --image IMAGE --bucket BUCKET --accelerator tpu-v5-lite-podslice --topology 4x4 --chips 4 -- \
#     train --config omniretriever_7b --workdir gs://BUCKET/runs/omni7b --config.data.train=gs://BUCKET/shards
#
# --name NAME         of the JobSet                 --image IMAGE      of launch/Dockerfile, in a registry the cluster reads
# --bucket BUCKET     mounted at /bucket            --workdir DIR      where the smoke job tries the storage (gs://BUCKET/runs/NAME)
# --accelerator NAME  node label of the chip        --topology AxB[xC] of a slice
# --chips N           chips of a host (4)           --slices N         slices that train as one (1)
# --restarts N        starts after a loss (10)      --account NAME     Kubernetes service account (default)
# --namespace NAME    (default)                     --no-smoke         leave the smoke job out
# --dry-run           print the YAML
#
# LIBTPU_INIT_ARGS of this machine is taken to the hosts; for tpu7x the options without which libtpu 0.0.42 aborts follow it.
set -euo pipefail

# The same as in omni_jax/planning/chips.py, as a test checks.
tpu7x=(--xla_tpu_enable_sparse_core_collective_offload_all_reduce=false --xla_tpu_offload_gather_to_sparsecore=false)
name="" image="" bucket="" workdir="" accelerator="" topology="" chips=4 slices=1 restarts=10 account=default namespace=default smoke=1 dry=""
fail() {
  echo "launch/gke.sh: $1" >&2
  exit 2
}
while (($#)); do
  case $1 in
    --name | --image | --bucket | --workdir | --accelerator | --topology | --chips | --slices | --restarts | --account | --namespace)
      [[ -n ${2:-} && $2 != --* ]] || fail "$1 takes a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    --no-smoke) smoke="" && shift ;;
    --dry-run) dry=1 && shift ;;
    --) shift && break ;;
    *) fail "unknown option $1; options go before --, the arguments of omni-jax after it" ;;
  esac
done
for needed in name image bucket accelerator topology; do
  [[ -n ${!needed} ]] || fail "--$needed is missing"
done
(($#)) || fail "nothing to run; give the arguments of omni-jax behind --"
for word in "$name" "$image" "$bucket" "$accelerator" "$account" "$namespace"; do
  [[ $word =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] || fail "$word: letters, digits and . _ / : @ - alone"
done
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "--name $name: at most 40 small letters, digits and -, a letter first"
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology $topology: write 4x4 or 4x4x4"
for number in chips slices; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] || fail "--$number takes a whole number of 1 or more"
done
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts takes a whole number"
all=$((${topology//x/*}))
((all % chips == 0 || all < chips)) || fail "--chips $chips: a slice of $topology is $all chips, not so many whole hosts"
((all >= chips)) || chips=$all
workdir=${workdir:-gs://$bucket/runs/$name}

words=(/omni_jax/launch/host.sh --workdir "$workdir" --slices "$slices")
[[ -n $smoke ]] || words+=(--no-smoke)
libtpu=${LIBTPU_INIT_ARGS:-}
[[ $accelerator != tpu7x* ]] || libtpu+="${libtpu:+ }${tpu7x[*]}"
[[ -z $libtpu || $libtpu == --[a-z]*_* ]] || fail "LIBTPU_INIT_ARGS $libtpu: options of libtpu begin with --, as --xla_name=value"
[[ -z $libtpu ]] || words+=(--libtpu "$libtpu")
words+=(-- "$@")
# YAML's double quotes are those of JSON.
command=""
for word in "${words[@]}"; do
  [[ $word != *[[:cntrl:]]* ]] || fail "${word@Q}: control characters"
  word=${word//\\/\\\\}
  command+="${command:+, }\"${word//\"/\\\"}\""
done

text=$(grep -v '^#' "$(dirname "$0")/jobset.yaml")
text=${text//"{{hosts}}"/"$((all / chips))"}
for field in name namespace restarts slices account accelerator topology image chips bucket; do
  text=${text//"{{$field}}"/"${!field}"}
done
text=${text//"{{command}}"/"[$command]"}
if [[ -n $dry ]]; then
  echo "$text"
else
  command -v kubectl > /dev/null || fail "kubectl is not on PATH"
  kubectl apply -f - <<< "$text"
fi
