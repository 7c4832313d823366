# Sourced by the scripts of this checkout: a virtual environment in `.venv` with the package and one extra.

# environment EXTRA: make or complete it, and set PYTHON to its interpreter. What is there is not installed again.
environment() {
    local extra=$1 checkout python stamp wanted
    checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    PYTHON="$checkout/.venv/bin/python"
    stamp="$checkout/.venv/installed-$extra"
    wanted=$(cksum <"$checkout/pyproject.toml")
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ ! -x "$PYTHON" ]; then
        python=$(find_python) || {
            echo "error: no Python 3.10, 3.11 or 3.12 on the path: install one, or name it in VAVAE_PYTHON" >&2
            return 2
        }
        "$python" -m venv "$checkout/.venv" || {
            echo "error: $python cannot make virtual environments: install its venv package" >&2
            rm -rf "$checkout/.venv"
            return 2
        }
    fi
    echo "installing '.[$extra]' into $checkout/.venv (some minutes the first time)"
    # One command for everything: separate ones may resolve to versions that do not go together.
    (cd "$checkout" && set -o pipefail && "$PYTHON" -m pip install --disable-pip-version-check --editable ".[$extra]" | seldom) || {
        echo "error: the installation failed; the lines above say why. Run the command again to continue" >&2
        return 2
    }
    # Each extra holds the ones before it.
    for extra in quickstart s3 test; do
        echo "$wanted" >"$checkout/.venv/installed-$extra"
        [ "$checkout/.venv/installed-$extra" = "$stamp" ] && break
    done
}

# seldom: of the lines of pip those that say what it is at, one in ten seconds.
seldom() {
    local line next=0
    while IFS= read -r line; do
        case $line in
        Collecting* | *Downloading* | Building* | Installing*)
            # Installing is the last step and a long one.
            if [ "$SECONDS" -ge "$next" ] || [[ $line = "Installing collected"* ]]; then
                next=$((SECONDS + 10))
                printf '%4d s  %.100s\n' "$SECONDS" "${line#"${line%%[! ]*}"}"
            fi
            ;;
        esac
    done
}

# environment_above EXTRA: an environment `.venv-EXTRA` that sees `.venv` below it and installs an extra into itself
# alone, whatever other versions that takes; PYTHON becomes its interpreter.
environment_above() {
    local extra=$1 checkout below folder stamp wanted site
    checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    below=$PYTHON folder="$checkout/.venv-$extra"
    stamp="$folder/installed-$extra" wanted=$(cksum <"$checkout/pyproject.toml")
    PYTHON="$folder/bin/python"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    echo "installing '.[$extra]' into $folder, above $checkout/.venv"
    [ -x "$PYTHON" ] || "$below" -m venv "$folder" || return 2
    site='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$below" -c "$site" >"$("$PYTHON" -c "$site")/below.pth" || return 2
    (cd "$checkout" && "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable ".[$extra]") || {
        echo "error: the installation failed; the lines above say why. Run the command again to continue" >&2
        return 2
    }
    echo "$wanted" >"$stamp"
}

find_python() {
    local candidate
    for candidate in "${VAVAE_PYTHON:-}" python3 python3.12 python3.11 python3.10 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# born PROCESS: when it began; nothing where there is none. It tells a process from a later one of the same number.
born() {
    "$(dirname "${BASH_SOURCE[0]}")/../../.venv/bin/python" - "$1" <<'PYTHON'
import sys

import psutil

if psutil.pid_exists(int(sys.argv[1])):
    print(psutil.Process(int(sys.argv[1])).create_time())
PYTHON
}
