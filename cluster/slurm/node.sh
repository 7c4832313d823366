#!/usr/bin/env bash
# Ray on one node of an allocation until it is ended; srun starts it for ray.sbatch. The head is on the first node.
set -euo pipefail
folder=$(mktemp -d /tmp/ray-XXXXXX) # its sockets want a short path, and Ray opens what lies in it to everybody
# shellcheck disable=SC2329
finish() {
    trap '' TERM INT
    # shellcheck disable=SC2046
    kill $(jobs -p) 2>/dev/null && wait || true
    rm -rf "$folder"
}
trap finish EXIT
trap 'exit 0' TERM INT

export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # when it is ended no job is left

# Ports as the system gives them: those that Ray has by default are one another's where nodes share a machine.
options=(--block --disable-usage-stats --temp-dir "$folder/ray" --num-cpus "$SLURM_CPUS_ON_NODE"
    --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --min-worker-port 0 --max-worker-port 0 --dashboard-agent-listen-port 0)
if [ "$SLURM_NODEID" = 0 ]; then
    options+=(--head --node-ip-address "${RAY_ADDRESS%:*}" --port "${RAY_ADDRESS##*:}" --dashboard-host 127.0.0.1
        --dashboard-port "$VAVAE_DASHBOARD_PORT" --ray-client-server-port "$VAVAE_CLIENT_PORT")
else
    until (exec 3<>"/dev/tcp/${RAY_ADDRESS%:*}/${RAY_ADDRESS##*:}") 2>/dev/null; do
        sleep 0.5
    done
    options+=(--address "$RAY_ADDRESS")
fi
ray start "${options[@]}" >"$folder/log" 2>&1 &
wait $! || {
    status=$?
    echo "error: Ray has ended on $(hostname):" >&2
    tail -n 5 "$folder/log" >&2
    exit "$status"
}
