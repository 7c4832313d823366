#!/usr/bin/env bash
# Wait until the cloud says that it takes this machine away, and tell Ray, so that trainings save: drain.sh aws|gcp
set -uo pipefail

# Whether there is a notice. AWS gives it two minutes before the end, Google half a minute.
notice() {
    case $1 in
    aws)
        local token address=http://169.254.169.254/latest
        token=$(curl -sfX PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$address/api/token") &&
            curl -sf -H "X-aws-ec2-metadata-token: $token" "$address/meta-data/spot/instance-action"
        ;;
    gcp)
        curl -sf -H "Metadata-Flavor: Google" http://metadata.google.internal/computeMetadata/v1/instance/preempted |
            grep -q TRUE
        ;;
    *)
        echo "error: drain.sh takes aws or gcp, not '$1'" >&2
        exit 2
        ;;
    esac
}

case ${1:-} in aws) seconds=110 ;; *) seconds=25 ;; esac
until notice "${1:-}" >/dev/null; do
    sleep "${DRAIN_POLL_SECONDS:-5}"
done
exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the cloud takes the machine away" \
    --deadline-remaining-seconds "$seconds"
