#!/usr/bin/env bash
# Prepares or embeds on a GKE cluster that has KubeRay: fills in launch/rayjob.yaml and applies it. Needs kubectl, signed in to the cluster.
#
#   launch/ray.sh --name embed --image IMAGE --bucket BUCKET --decoders 32 --accelerator tpu-v5-lite-podslice --topology 2x4 --chips 8 \
#     --slices 4 -- embed --model gs://BUCKET/omni7b --manifest /bucket/clips.jsonl --out /bucket/clips.npz
#
# --name NAME         of the RayJob                 --image IMAGE      of launch/Dockerfile, in a registry the cluster reads
# --bucket BUCKET     mounted at /bucket            --decoders N       CPU nodes at most (8)
# --cpus N            of a CPU node (14)            --memory N         GiB of a CPU node (50)
# --accelerator NAME  node label of the chip        --topology AxB[xC] of a slice; both with embed alone
# --chips N           chips of a host (4)           --slices N         slices at most (1)
# --tpu-cpus N        CPUs of a TPU host (24)       --tpu-memory N     GiB of a TPU host (96)
# --restarts N        clusters after the first (2)  --account NAME     Kubernetes service account (default)
# --namespace NAME    (default)                     --dry-run          print the YAML
set -euo pipefail

# Some are read by their names alone, where the YAML is filled in.
# shellcheck disable=SC2034
rayversion=2.60.0 # as in requirements.lock, as a test checks
# shellcheck disable=SC2034
name="" image="" bucket="" decoders=8 cpus=14 memory=50 accelerator="" topology="" chips=4 slices=1 tpucpus=24 tpumemory=96
restarts=2 account=default namespace=default dry=""
fail() {
  echo "launch/ray.sh: $1" >&2
  exit 2
}
while (($#)); do
  case $1 in
    --name | --image | --bucket | --decoders | --cpus | --memory | --accelerator | --topology | --chips | --slices | --tpu-cpus | --tpu-memory)
      [[ -n ${2:-} && $2 != --* ]] || fail "$1 takes a value"
      field=${1#--}
      declare "${field//-/}=$2"
      shift 2
      ;;
    --restarts | --account | --namespace)
      [[ -n ${2:-} && $2 != --* ]] || fail "$1 takes a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    --dry-run) dry=1 && shift ;;
    --) shift && break ;;
    *) fail "unknown option $1; options go before --, the arguments of omni-jax after it" ;;
  esac
done
for needed in name image bucket; do
  [[ -n ${!needed} ]] || fail "--$needed is missing"
done
(($#)) || fail "nothing to run; give the arguments of omni-jax behind --"
case $1 in
  embed) [[ -n $accelerator && -n $topology ]] || fail "--accelerator and --topology are missing; embed needs them" ;;
  prepare) [[ -z $accelerator$topology ]] || fail "--accelerator and --topology: prepare decodes on CPU nodes alone; leave them out" ;;
  *) fail "$1: prepare and embed run on Ray; use launch/gke.sh for other commands" ;;
esac
for word in "$name" "$image" "$bucket" "${accelerator:-none}" "$account" "$namespace"; do
  [[ $word =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] || fail "$word: letters, digits and . _ / : @ - alone"
done
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "--name $name: at most 40 small letters, digits and -, a letter first"
topology=${topology:-1x1}
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology $topology: write 4x4 or 4x4x4"
for number in decoders cpus memory chips slices tpucpus tpumemory; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] || fail "--$number takes a whole number of 1 or more"
done
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts takes a whole number"
all=$((${topology//x/*}))
((all % chips == 0 || all < chips)) || fail "--chips $chips: a slice of $topology is $all chips, not so many whole hosts"
((all >= chips)) || chips=$all
hosts=$((all / chips))

words=(omni-jax "$@" --ray auto)
[[ $1 != embed ]] || words+=(--actors "$((slices * hosts))" --actor-resources "TPU=$chips")
# A shell of the head reads the line: words in single quotes. Status 1 says that records were skipped, which is no failure of the job.
line=""
for word in "${words[@]}"; do
  [[ $word != *[[:cntrl:]]* ]] || fail "${word@Q}: control characters"
  line+="'${word//\'/\'\\\'\'}' "
done
line+='|| test $? -eq 1'
# YAML's double quotes are those of JSON.
line=${line//\\/\\\\}
entrypoint="\"${line//\"/\\\"}\""

text=$(grep -v '^#' "$(dirname "$0")/rayjob.yaml")
if [[ -z $accelerator ]]; then
  text=${text%%      # begin of the TPU slices*}${text##*# end of the TPU slices}
fi
for field in name namespace restarts rayversion account image bucket decoders cpus memory slices hosts accelerator topology chips tpucpus tpumemory; do
  text=${text//"{{$field}}"/"${!field}"}
done
text=${text//"{{entrypoint}}"/"$entrypoint"}
if [[ -n $dry ]]; then
  echo "$text"
else
  command -v kubectl > /dev/null || fail "kubectl is not on PATH"
  kubectl apply -f - <<< "$text"
fi
