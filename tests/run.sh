#!/usr/bin/env bash
# Lint, types and tests: bash tests/run.sh [--tests-only] [--long | --gpu | --integrations] [--python VERSION] [pytest arguments …]
#
# With `--python 3.13` the tests that need no Ray, in an environment of that Python with the newest packages for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source cluster/local/environment.sh

lint=yes version= layer=
select=(-m "not long and not gpu and not integrations")
processes=(-n 2 --dist loadfile)
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --tests-only) lint=no ;;
    --long) select=(-m long) processes=() ;;
    --gpu) select=(-m gpu) processes=() ;;
    --integrations) select=(-m integrations) processes=() lint=no layer=integrations ;;
    --python)
        version=${2-}
        if [[ ! $version =~ ^3\.[0-9]+$ ]]; then
            echo "error: --python wants a version such as 3.13, not '$version'" >&2
            exit 2
        fi
        lint=no select=(-m "not long and not gpu and not integrations and not ray and not jobs")
        shift
        ;;
    *) arguments+=("$1") processes=() ;;
    esac
    shift
done

environment test ${version:+"$version"}
if [ "$lint" = yes ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
fi
if [ -n "$layer" ]; then
    environment_above "$layer"
fi
exec "$PYTHON" -m pytest "${select[@]}" "${processes[@]+"${processes[@]}"}" "${arguments[@]+"${arguments[@]}"}"
