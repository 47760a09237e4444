#!/bin/bash
# The recipe on a machine with one GPU and without Ray, from a bundle of pack.py, in one command:
#
#     run_packed.sh BUNDLE WORK OUT MINUTES HOURS [OPTIONS OF THE JOB]
#
# Makes HOURS of synthetic speech on all CPUs and trains for MINUTES; WORK is scratch. OUT gets the best model, the
# metrics and the report as a tar file in parts of 15 MiB (`cat OUT/result.tar.part-* | tar -x`); also if it is stopped.
set -euo pipefail
bundle=$(realpath "$1") work=$2 out=$3 minutes=$4 hours=$5
shift 5
recipe=$(dirname "$(realpath "$0")")
mkdir -p "$work/site" "$work/data" "$out"
python3 -m tarfile -e "$bundle/packages.tar.xz" "$work/site" # needs no program for xz
export PYTHONPATH=$work/site:$(realpath "$recipe/../../..") PYTHONUNBUFFERED=1

bring_out() {
    [ -e "$work/run/model/model.safetensors" ] || return 0
    tar -cf - -C "$work/run" --exclude=data --exclude=checkpoints --exclude=trial . |
        split -b 15M -d - "$out/result.tar.part-"
}
trap bring_out EXIT
trap 'kill -TERM $training; wait $training' TERM

cp -r "$bundle/speech/." "$work/data/"
time python3 "$recipe/synthetic_speech.py" --texts "$bundle/sentences.txt" --hours "$hours" --output "$work/data"
python3 "$recipe/train.py" --data "$work/data" --output "$work/run" --minutes "$minutes" --alone -- "$@" &
training=$!
wait $training
