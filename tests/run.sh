#!/usr/bin/env bash
# Lint, types and tests: bash tests/run.sh [--tests-only] [--long | --gpu] [pytest arguments …]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source cluster/local/environment.sh

lint=yes
select=(-m "not long and not gpu")
processes=(-n 2 --dist loadfile)
arguments=()
for argument in "$@"; do
    case $argument in
    --tests-only) lint=no ;;
    --long) select=(-m long) processes=() ;;
    --gpu) select=(-m gpu) processes=() ;;
    *) arguments+=("$argument") processes=() ;;
    esac
done

environment test
if [ "$lint" = yes ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
fi
exec "$PYTHON" -m pytest "${select[@]}" "${processes[@]+"${processes[@]}"}" "${arguments[@]+"${arguments[@]}"}"
