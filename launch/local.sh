#!/usr/bin/env bash
# Runs omni-jax as several processes of one machine that work as one. When one is lost, the others are stopped and all start again, from the
# newest whole checkpoint.
#
#   launch/local.sh --processes 2 --devices 4 --restarts 3 -- train --config tiny --workdir runs/tiny
#
# --processes N  how many (default 2)
# --devices N    CPU devices of each, simulated (default: what JAX finds)
# --port N       of process 0; a start after a loss takes the next one (default 8476)
# --restarts N   starts after a loss, at most (default 0)
# --grace N      seconds for the others to leave by themselves once one is lost (default 15)
# --dry-run      print what would run
# OMNI_JAX       the command, with its first arguments where it has some (default omni-jax)
#
# SIGTERM and Ctrl-C are handed on. The status is that of the processes: 75 when they saved and left.
set -euo pipefail
set -m  # each process in a group of its own: Ctrl-C comes here first, and reaches them once

processes=2 devices=0 port=8476 restarts=0 grace=15 dry=""
fail() {
  echo "launch/local.sh: $1" >&2
  exit 2
}
while (($#)); do
  case $1 in
    --processes | --devices | --port | --restarts | --grace)
      [[ ${2:-} =~ ^[0-9]{1,6}$ ]] || fail "$1 takes a whole number"
      declare "${1#--}=$((10#$2))"
      shift 2
      ;;
    --dry-run) dry=1 && shift ;;
    --) shift && break ;;
    *) fail "unknown option $1; options go before --, the arguments of omni-jax after it" ;;
  esac
done
(($#)) || fail "nothing to run; give the arguments of omni-jax behind --"
((processes > 0)) || fail "--processes must be 1 or more"

read -ra command <<< "${OMNI_JAX:-omni-jax}"
command+=("$@")

# variables PROCESS ATTEMPT: the environment of that process, one NAME=VALUE a line.
variables() {
  echo "OMNI_JAX_COORDINATOR=127.0.0.1:$((port + $2))"
  echo "OMNI_JAX_PROCESSES=$processes"
  echo "OMNI_JAX_PROCESS=$1"
  ((devices == 0)) || printf '%s\n' JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices"
}

if [[ -n $dry ]]; then
  for ((i = 0; i < processes; i++)); do
    mapfile -t assigned < <(variables "$i" 0)
    echo env "${assigned[@]@Q}" "${command[@]@Q}"
  done
  exit 0
fi
command -v "${command[0]}" > /dev/null || fail "${command[0]} is not on PATH; activate the environment or set OMNI_JAX"

declare -A running=()
asked=""
# send SIGNAL: to every process that runs.
send() {
  local pid
  for pid in "${!running[@]}"; do kill "-$1" "$pid" 2> /dev/null || true; done
}
trap 'asked=1; send TERM' TERM
trap 'asked=1; send INT' INT
trap 'send KILL' EXIT

# collect: waits for one process to end, or for a signal; sets `worst` to the first status that is not 0.
collect() {
  local pid="" code=0
  wait -n -p pid "${!running[@]}" || code=$?
  [[ -n ${pid:-} ]] || return 0  # a signal came
  unset "running[$pid]"
  ((worst)) || worst=$code
}

# attempt NUMBER: starts all processes and waits for them; sets `worst`.
attempt() {
  local i ends
  worst=0
  for ((i = 0; i < processes; i++)); do
    mapfile -t assigned < <(variables "$i" "$1")
    env "${assigned[@]}" "${command[@]}" < /dev/null &
    running[$!]=1
  done
  # Those that are asked to leave save first, however long that takes.
  while ((${#running[@]})) && [[ -n $asked || $worst == 0 || $worst == 75 ]]; do collect; done
  # One was lost, and the others wait for it without end.
  ends=$((SECONDS + grace))
  while ((${#running[@]} && SECONDS < ends)); do
    sleep 0.2
    for i in "${!running[@]}"; do
      kill -0 "$i" 2> /dev/null || unset "running[$i]"
    done
  done
  send KILL
  wait
  running=()
}

for ((number = 0; ; number++)); do
  attempt "$number"
  case $worst in 0 | 2 | 75 | 130) exit "$worst" ;; esac  # done, bad input, or asked to leave: another start would end the same way
  [[ -z $asked ]] || exit "$worst"
  if ((number == restarts)); then
    echo "launch/local.sh: a process was lost (status $worst); run it again to resume from the newest whole checkpoint" >&2
    exit "$worst"
  fi
  echo "launch/local.sh: a process was lost (status $worst); starting all again ($((number + 1)) of $restarts)" >&2
done
