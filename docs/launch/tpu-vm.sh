#!/usr/bin/env bash
# Trains on every VM of a Cloud TPU slice, or of several slices of a queued resource:
#
#   docs/launch/tpu-vm.sh NAME ZONE FOLDER gpt2_124m --mesh=fsdp=-1
#
# flaxlm has to be installed on the VMs, with libtpu:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#     --command="pip install 'flaxlm[tpu]'"
# Each process asks its machine's metadata who it is. FOLDER is mounted on all of them
# (Filestore, or Cloud Storage with gcsfuse). The first Ctrl-C saves and stops.
set -euo pipefail

if [ "$#" -lt 3 ]; then
  echo "usage: $0 NAME ZONE FOLDER [CONFIG] [--section.field=value ...]" >&2
  exit 2
fi
name=$1 zone=$2 folder=$3
shift 3

token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
arguments=$(printf ' %q' "$@" "--runs-dir=$folder/runs")
command="FLAXLM_JOB_TOKEN=$token FLAXLM_DATA_DIR=$folder/data flaxlm train$arguments"

exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --ssh-flag=-tt --command="$command"
