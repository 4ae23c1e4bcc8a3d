#!/usr/bin/env bash
# Distil on every host of a TPU slice. From a machine with gcloud:
#
#   TPU=my-slice ZONE=us-central2-b NFS=10.0.0.2:/share REPOSITORY=ADDRESS \
#     scripts/launch/tpu_pod.sh pi0_aloha_l6 --data.path /shared/my_aloha \
#       --checkpoint-dir /shared/runs --mesh.fsdp 16
#
# Repeating the command resumes the run, for instance after a preemption. With STOP=1 in front, the
# run saves and stops. Requirements: docs/launch.md.
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}"
on_every_host() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}
if [[ -n "${STOP:-}" ]]; then
  on_every_host "pkill -TERM -f '^[^ ]*python[^ ]* scripts/train_distill.py' || true"
  exit
fi

: "${NFS:?host:/share of a file system for checkpoints and data}"
: "${REPOSITORY:?address to clone shallow_pi from}" "${REVISION:=main}"
# Quoted for the remote shell.
printf -v arguments ' %q' "$@"
on_every_host "
  set -e
  command -v mount.nfs > /dev/null || sudo apt-get install --yes --quiet nfs-common
  sudo mkdir -p /shared
  mountpoint --quiet /shared || sudo mount -t nfs $NFS /shared
  test -d shallow_pi || git clone --quiet $REPOSITORY shallow_pi
  cd shallow_pi
  git fetch --quiet origin $REVISION && git checkout --quiet --detach FETCH_HEAD
  python3 -m pip install --quiet --user uv
  ~/.local/bin/uv sync --quiet --extra tpu --extra gcs
  SHALLOW_PI_MULTIHOST=1 ~/.local/bin/uv run --no-sync scripts/train_distill.py$arguments --resume"
