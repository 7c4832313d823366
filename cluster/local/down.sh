#!/usr/bin/env bash
# End what up.sh has started, and nothing else: bash cluster/local/down.sh [FOLDER]
#
# The data of the S3 server and of Prometheus stay in FOLDER, as do the logs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source cluster/local/environment.sh
folder=${1:-runs/local}

# stop NAME: ask the process of that name to end, unless its number has gone to another one since.
stop() {
    local file=$folder/$1.pid process began
    [ -e "$file" ] || return 0
    read -r process began <"$file"
    if [ "$(born "$process")" = "$began" ]; then
        kill "$process"
        for _ in $(seq 1200); do
            kill -0 "$process" 2>/dev/null || break
            sleep 0.1
        done
        if kill -0 "$process" 2>/dev/null; then
            echo "error: $1, process $process, does not end: see $folder/$1.log" >&2
            return 1
        fi
        echo "$1 has ended"
    fi
    rm "$file"
}

left=0
for name in grafana prometheus ray s3; do
    stop "$name" || left=2
done
[ "$left" = 0 ] || exit "$left"
if [ -e "$folder/ray.folder" ]; then
    rm -rf "$(cat "$folder/ray.folder")"
fi
rm -f "$folder/ray.folder" "$folder/environment" "$folder/token"
