#!/usr/bin/env bash
# One machine with several GPUs: a cache, its pack, and students trained from it, one after the other.
#
#   bash pipelines/launch/one_machine.sh
#   sbatch --nodes=1 --gpus-per-node=8 --cpus-per-task=128 --mem=500G --time=24:00:00 \
#       --requeue --open-mode=append --signal=B:USR1@600 pipelines/launch/one_machine.sh
#
# `extract` and `train` start one process for each GPU themselves. Run the script again to go on: finished units,
# tars and steps are kept. On SIGUSR1 (SLURM's, before the time is up), SIGTERM or Ctrl-C the command that runs is
# asked to end, which saves a checkpoint; a SLURM job is then put back into the queue.
#
# What a whole pipeline file says is done on one machine by `proteus-cache pipeline FILE`.
set -uo pipefail

# Settings, all of which the environment may hold. PROTEUS_IMAGES: the images.
export PROTEUS_HOME=${PROTEUS_HOME:-$PWD/proteus}
TEACHER=${TEACHER:-dinov2_vitg14}
VIEWS=${VIEWS:-4}
STUDENTS=${STUDENTS:-vit_s14 vit_l14}
GPUS=${GPUS:-8}
LOG=${LOG:-$PROTEUS_HOME/logs/one_machine.log}
read -ra extract_flags <<<"${EXTRACT_FLAGS:-}" # more options for `extract`
read -ra train_flags <<<"${TRAIN_FLAGS:-}"     # more options for `train`

cache=$PROTEUS_HOME/caches/$TEACHER
pack=$PROTEUS_HOME/packs/$TEACHER
mkdir -p "$(dirname "$LOG")"
exec > >(exec tee -ia "$LOG") 2>&1

child=
stopped=
# shellcheck disable=SC2329  # called by the trap
stop() {
    stopped=yes
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap stop USR1 TERM INT

# Run a command so that signals are heard meanwhile; leave the script when it does not end well.
run() {
    echo "$(date '+%F %T') $*"
    "$@" &
    child=$!
    local status=0
    while true; do
        wait "$child"
        status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    child=
    if [ -n "$stopped" ]; then
        echo "$(date '+%F %T') stopped; run the script again to go on"
        if [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
        exit 1
    fi
    if [ "$status" -ne 0 ]; then exit "$status"; fi
}

run proteus-cache extract --teacher "$TEACHER" --views "$VIEWS" --out "$cache" --gpus "$GPUS" \
    ${extract_flags[@]+"${extract_flags[@]}"}
run proteus-cache pack "$cache" --out "$pack"
for student in $STUDENTS; do
    run proteus-cache train --student "$student" --data "$pack" --out "$PROTEUS_HOME/runs/$TEACHER-$student" \
        --gpus "$GPUS" --resume ${train_flags[@]+"${train_flags[@]}"}
done
