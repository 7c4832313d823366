#!/usr/bin/env bash
# A Ray cluster of this machine alone, an S3 server, and Prometheus and Grafana where they are installed:
#
#     bash cluster/local/up.sh [FOLDER]      # runs/local by default; keeps data, logs, and the process ids for down.sh
#     source FOLDER/environment              # addresses and keys, for this shell alone
#     vavae submit pipeline --config configs/tiny.yaml storage.root=s3://vavae/runs --follow
#     bash cluster/local/down.sh [FOLDER]
#
# Everything listens on loopback alone. Ray asks for the token and the store for the keys of FOLDER, which nobody else can read.
set -euo pipefail
umask 077
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source cluster/local/environment.sh

folder=${1:-runs/local}
mkdir -p "$folder"
chmod 700 "$folder"
folder=$(cd "$folder" && pwd)
if compgen -G "$folder/*.pid" >/dev/null; then
    echo "error: $folder is up, or was when this machine went down: bash cluster/local/down.sh $folder" >&2
    exit 2
fi
environment s3
down() {
    bash cluster/local/down.sh "$folder"
    exit 2
}
trap down ERR INT TERM

# start NAME COMMAND…: in a session of its own, so that Ctrl-C here does not reach it.
start() {
    local name=$1
    shift
    setsid "$@" >"$folder/$name.log" 2>&1 </dev/null &
    echo "$! $(born $!)" >"$folder/$name.pid"
}

# wait_for NAME COMMAND…: until the command succeeds, while the process lives.
wait_for() {
    local name=$1 process began
    shift
    read -r process began <"$folder/$name.pid"
    for _ in $(seq 1200); do
        "$@" 2>/dev/null && return
        kill -0 "$process" 2>/dev/null || break
        sleep 0.1
    done
    echo "error: $name does not start: see $folder/$name.log" >&2
    tail -n 5 "$folder/$name.log" >&2
    return 1
}

answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1"); }

# The usual ports where they are free; others as they come, outside those of Ray's workers.
read -r dashboard head prometheus grafana metrics agent agent_grpc environments < <("$PYTHON" - <<'PYTHON'
import socket


def free(wanted: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", wanted))
    except OSError:
        return socket.create_server(("127.0.0.1", 0))


servers = [free(wanted) for wanted in (8265, 6379, 9090, 3000, 0, 0, 0, 0)]
print(*(server.getsockname()[1] for server in servers))
PYTHON
)

# s3.sh ends with its parent, which is to stay when this script has ended.
start s3 bash -c 'bash cluster/local/s3.sh "$0" vavae & trap "kill $!; wait $!" TERM; wait $!' "$folder/s3"
wait_for s3 test -e "$folder/s3/environment"

"$PYTHON" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$folder/token"
private=$(mktemp -d /tmp/ray-XXXXXX) # its sockets want a short path
echo "$private" >"$folder/ray.folder"
ln -s "$PWD/.venv" "$private/environment" # Ray starts workers through a shell, and quotes no path
ray=$private/ray                         # Ray opens it to every user of this machine
cat - "$folder/s3/environment" >"$folder/environment" <<ENVIRONMENT
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH='$folder/token'
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
export RAY_ADDRESS=127.0.0.1:$head
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
ENVIRONMENT
# The last is for nodes that are only ever alone: their address is that of loopback.
printf 'export PATH=%q:"$PATH"\n' "$(dirname "$PYTHON")" >>"$folder/environment"
# shellcheck disable=SC1091
source "$folder/environment"
export RAY_PROMETHEUS_HOST=http://127.0.0.1:$prometheus RAY_GRAFANA_HOST=http://127.0.0.1:$grafana
start ray "$private/environment/bin/python" -m ray.scripts.scripts start --head --block --node-ip-address 127.0.0.1 --port "$head" \
    --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" --metrics-export-port "$metrics" \
    --dashboard-agent-listen-port "$agent" --dashboard-agent-grpc-port "$agent_grpc" \
    --runtime-env-agent-port "$environments" --temp-dir "$ray" --disable-usage-stats
wait_for ray answers "$dashboard"
wait_for ray answers "$metrics"
wait_for ray answers "$agent"

if command -v prometheus >/dev/null; then
    sed -e "s|/tmp/ray/|$ray/|" -e "s|alerts.yml|$PWD/cluster/monitoring/alerts.yml|" \
        cluster/monitoring/prometheus.yml >"$folder/prometheus.yml"
    start prometheus prometheus --config.file "$folder/prometheus.yml" --storage.tsdb.path "$folder/prometheus" \
        --web.listen-address "127.0.0.1:$prometheus"
    wait_for prometheus answers "$prometheus"
fi
grafana_server=$(command -v grafana || command -v grafana-server || true)
if [ -n "$grafana_server" ]; then
    export VAVAE_PROMETHEUS=$RAY_PROMETHEUS_HOST VAVAE_BOARDS=$PWD/cluster/monitoring
    export VAVAE_RAY_BOARDS=$ray/session_latest/metrics/grafana/dashboards
    export GF_SERVER_HTTP_ADDR=127.0.0.1 GF_SERVER_HTTP_PORT=$grafana GF_PATHS_DATA=$folder/grafana
    export GF_PATHS_LOGS=$folder/grafana GF_PATHS_PROVISIONING=$PWD/cluster/monitoring/grafana
    # Ray's dashboard shows boards in frames; who is on this machine may look, and nobody may change anything.
    export GF_AUTH_ANONYMOUS_ENABLED=true GF_AUTH_ANONYMOUS_ORG_ROLE=Viewer GF_SECURITY_ALLOW_EMBEDDING=true
    export GF_SECURITY_ADMIN_PASSWORD__FILE=$folder/token GF_ANALYTICS_REPORTING_ENABLED=false
    server=()
    [ "$(basename "$grafana_server")" = grafana ] && server=(server)
    start grafana "$grafana_server" "${server[@]+"${server[@]}"}" --homepath "${GRAFANA_HOME:-/usr/share/grafana}"
    wait_for grafana answers "$grafana"
fi

trap - ERR INT TERM
echo "Ray Dashboard  http://127.0.0.1:$dashboard  (asks for the token in $folder/token)"
echo "S3             $AWS_ENDPOINT_URL  storage.root=s3://vavae/runs"
[ -e "$folder/prometheus.pid" ] && echo "Prometheus     $RAY_PROMETHEUS_HOST" || echo "Prometheus     is not installed"
[ -e "$folder/grafana.pid" ] && echo "Grafana        $RAY_GRAFANA_HOST/d/vavae" || echo "Grafana        is not installed"
echo "next           source $folder/environment"
