#!/usr/bin/env bash
# XPK: one command for what gke_jobset.yaml says by hand, on a cluster that `xpk cluster create` made.
#
#   export CLUSTER=mine ZONE=us-west4-a PROJECT=mine IMAGE=gcr.io/mine/referee_jax:tpu
#   launch/xpk.sh NAME --config=configs/tpu_pod.py --prompts=/shared/prompts.txt --workdir=/shared/runs/NAME
#
# TPU_TYPE (v5litepod-16) and SLICES (1) may be set. /shared is a Filestore that the cluster mounts by itself (`xpk storage attach
# --type=gcpfilestore --auto-mount=true --mount-point=/shared ...`). Stop it with: xpk workload delete.
# XPK sends its author telemetry until `xpk config set send-telemetry false`.
set -euo pipefail
name=${1:?"use: $0 NAME [flags of referee_jax.run]"}
shift
command="python -m referee_jax.run --distributed $(printf '%q ' "$@")"
exec xpk workload create \
    --workload="$name" \
    --cluster="${CLUSTER:?}" --zone="${ZONE:?}" --project="${PROJECT:?}" \
    --tpu-type="${TPU_TYPE:-v5litepod-16}" --num-slices="${SLICES:-1}" \
    --docker-image="${IMAGE:?the image of launch/Dockerfile.tpu}" \
    --max-restarts=100 \
    --command="$command"
