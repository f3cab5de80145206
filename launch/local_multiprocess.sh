#!/usr/bin/env bash
# N processes with M simulated CPU devices each, on this machine: what a cluster does, to be looked at.
#
#   launch/local_multiprocess.sh 2 4 --config=configs/shapes.py --workdir=runs/two_by_four
#
# Each process makes its share of the items (--shard_index). Output of process I is prefixed "[I]". SIGTERM and Ctrl-C reach all
# of them as SIGTERM. Exits with 0, or as the first process in the row that failed did. PYTHON names the interpreter.
set -euo pipefail
if (($# < 3)) || [[ ! $1 =~ ^[1-9][0-9]*$ || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "use: $0 PROCESSES DEVICES --config=FILE --workdir=DIR [flags of referee_jax.run]" >&2
    exit 2
fi
count=$1 devices=$2
shift 2

children=()
# What bash puts into the background ignores SIGINT.
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' TERM INT

for ((i = 0; i < count; i++)); do
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices \
        "${PYTHON:-python}" -m referee_jax.run "$@" "--shard_index=$i" "--shard_count=$count" > >(sed -u "s/^/[$i] /") 2>&1 &
    children+=("$!")
done

status=0
for child in "${children[@]}"; do
    # A signal to this script ends `wait`, not the child; of one that has ended, bash says each time how.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    own=0
    wait "$child" || own=$?
    ((status)) || status=$own
done
exit "$status"
