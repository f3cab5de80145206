#!/usr/bin/env bash
# TPU VMs without Kubernetes: on all workers of a slice that is there, or in the start-up script of one that is queued for.
#
#   launch/tpu_vm.sh run NAME ZONE --config=configs/tpu_pod.py --prompts=/shared/prompts.txt --workdir=/shared/runs/mine
#   launch/tpu_vm.sh queue NAME ZONE v5litepod-16 v2-alpha-tpuv5-lite --config=... --prompts=... --workdir=/shared/...
#
# `run` holds an ssh session for each worker: for an afternoon, not for a week. `queue` asks for spot capacity; its job is the
# start-up script, which also begins again after a reboot or when the same request is made again. SHARED (HOST:/SHARE) is an NFS
# share that is mounted at /shared; REPOSITORY is what is cloned.
set -euo pipefail
if (($# < 4)); then
    sed -n '2,5p' "$0" >&2
    exit 2
fi
form=$1 name=$2 zone=$3
shift 3

# The job's body, for a bare TPU VM; flags are quoted for the other shell.
body() {
    cat <<END
#!/usr/bin/env bash
set -euo pipefail
export HOME="\${HOME:-/root}"
sudo mkdir -p /shared
mountpoint -q /shared || sudo mount -t nfs ${SHARED:?HOST:/SHARE of an NFS share} /shared
[[ -d ~/referee_jax ]] || git clone --depth=1 ${REPOSITORY:?the URL of this repository} ~/referee_jax
cd ~/referee_jax
[[ -d ~/venv ]] || python3 -m venv ~/venv
. ~/venv/bin/activate
pip install --quiet -e ".[tpu,gs]"
. launch/env.sh
until python -m referee_jax.run --distributed$(printf ' %q' "$@"); do
    (( \$? == 2 )) && exit 2 # a command that cannot be carried out will not do better
    sleep 10
done
END
}

case $form in
run)
    exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$(body "$@")"
    ;;
queue)
    type=$1 runtime=$2
    shift 2
    script=$(mktemp)
    trap 'rm -f "$script"' EXIT
    body "$@" >"$script"
    gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
        --accelerator-type="$type" --runtime-version="$runtime" --spot --metadata-from-file=startup-script="$script"
    ;;
*)
    echo "run or queue, not $form" >&2
    exit 2
    ;;
esac
