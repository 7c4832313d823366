#!/usr/bin/env bash
# The whole system on this machine: bash cluster/local/quickstart.sh [key.path=value …] [--dry-run] [--print-config]
#
# With --s3 everything goes through an S3 server on loopback, whose data is deleted at the end; --s3=FOLDER keeps it there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source cluster/local/environment.sh

s3=no folder= temporary=
arguments=()
for argument in "$@"; do
    case $argument in
    --s3) s3=yes temporary=--temporary ;;
    --s3=*) s3=yes folder=${argument#--s3=} ;;
    *) arguments+=("$argument") ;;
    esac
done

if [ "$s3" = no ]; then
    environment quickstart
else
    environment s3
    folder=${folder:-$(mktemp -d)}
    # In a session of its own, for Ctrl-C is the pipeline's, which still has a checkpoint to put. It ends with this process.
    PYTHON=$PYTHON setsid bash cluster/local/s3.sh "$folder" vavae $temporary &
    until [ -e "$folder/environment" ]; do
        kill -0 $! 2>/dev/null || exit 2
        sleep 0.1
    done
    # shellcheck disable=SC1091
    source "$folder/environment"
    arguments=(storage.root=s3://vavae/runs "${arguments[@]+"${arguments[@]}"}")
fi
exec "$PYTHON" -m ray_jobs.pipeline --config configs/quickstart.yaml "${arguments[@]+"${arguments[@]}"}"
