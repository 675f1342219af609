#!/usr/bin/env bash
# What every host of a pod runs: the smoke job first, then omni-jax. tpu_vm.sh and the GKE job call it.
#
#   launch/host.sh --workdir gs://BUCKET/runs/omni7b --slices 1 -- train --config omniretriever_7b --workdir gs://BUCKET/runs/omni7b
#
# --workdir DIR  of the run, where the smoke job tries the storage
# --slices N     slices the chips are in (default 1)
# --libtpu ARGS  options of the TPU compiler, added to LIBTPU_INIT_ARGS where it does not name them
# --no-smoke     leave the smoke job out
# --dry-run      print what would run
set -euo pipefail

workdir="" slices=1 libtpu="" smoke=1 dry=""
fail() {
  echo "launch/host.sh: $1" >&2
  exit 2
}
while (($#)); do
  case $1 in
    --workdir | --slices)
      [[ -n ${2:-} && $2 != --* ]] || fail "$1 takes a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    --libtpu)
      [[ ${2:-} == --[a-z]*_* ]] || fail "--libtpu takes options of libtpu, as '--xla_name=value --xla_other=value'"
      libtpu=$2
      shift 2
      ;;
    --no-smoke) smoke="" && shift ;;
    --dry-run) dry=1 && shift ;;
    --) shift && break ;;
    *) fail "unknown option $1; options go before --, the arguments of omni-jax after it" ;;
  esac
done
(($#)) || fail "nothing to run; give the arguments of omni-jax behind --"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices takes a whole number of 1 or more"
[[ -z $smoke || -n $workdir ]] || fail "--workdir is missing"

export OMNI_JAX_COORDINATOR=auto  # JAX asks the platform for the other hosts
for option in $libtpu; do
  # What is set already stays.
  [[ " ${LIBTPU_INIT_ARGS:-} " == *" ${option%%=*}"[=\ ]* ]] || export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:+$LIBTPU_INIT_ARGS }$option"
done
trying=(omni-jax smoke --workdir "$workdir" --slices "$slices")
if [[ -n $dry ]]; then
  echo "export OMNI_JAX_COORDINATOR=$OMNI_JAX_COORDINATOR"
  [[ -z ${LIBTPU_INIT_ARGS:-} ]] || echo "export LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS@Q}"
  [[ -z $smoke ]] || echo "${trying[@]@Q}"
  echo omni-jax "${@@Q}"
  exit 0
fi
[[ -z $smoke ]] || "${trying[@]}"
exec omni-jax "$@"
