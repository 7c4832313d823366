#!/usr/bin/env bash
# Lint, types and tests: bash tests/run.sh [--tests-only] [--long | --gpu | --integrations] [pytest arguments …]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source cluster/local/environment.sh

lint=yes
layer=
select=(-m "not long and not gpu and not integrations")
processes=(-n 2 --dist loadfile)
arguments=()
for argument in "$@"; do
    case $argument in
    --tests-only) lint=no ;;
    --long) select=(-m long) processes=() ;;
    --gpu) select=(-m gpu) processes=() ;;
    --integrations) select=(-m integrations) processes=() lint=no layer=integrations ;;
    *) arguments+=("$argument") processes=() ;;
    esac
done

environment test
if [ "$lint" = yes ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
fi
if [ -n "$layer" ]; then
    environment_above "$layer"
fi
exec "$PYTHON" -m pytest "${select[@]}" "${processes[@]+"${processes[@]}"}" "${arguments[@]+"${arguments[@]}"}"
