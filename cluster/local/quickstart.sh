#!/usr/bin/env bash
# The whole system on this machine: bash cluster/local/quickstart.sh [key.path=value …] [--dry-run] [--print-config]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source cluster/local/environment.sh
environment quickstart
exec "$PYTHON" -m ray_jobs.pipeline --config configs/quickstart.yaml "$@"
