# Sourced by the scripts of this checkout: a virtual environment in `.venv` with the package and one extra.

# environment EXTRA [VERSION]: make or complete it, and set PYTHON to its interpreter. What is there is not installed again.
# `.venv` holds the versions that docker/requirements.txt names. For a version of Python it is `.venv-python<VERSION>`, with
# the newest packages.
environment() {
    local extra=$1 version=${2:-} checkout folder python stamp wanted
    local -a locked=()
    checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    folder="$checkout/.venv${version:+-python$version}"
    PYTHON="$folder/bin/python"
    stamp="$folder/installed-$extra"
    wanted=$(cat "$checkout/pyproject.toml" "$checkout/cluster/docker/requirements.txt" | cksum)
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ ! -x "$PYTHON" ]; then
        python=$(find_python ${version:+"$version"}) || {
            echo "error: no Python ${version:-3.10 to 3.13} on the path: install one, or name it in VAVAE_PYTHON" >&2
            return 2
        }
        "$python" -m venv "$folder" || {
            echo "error: $python cannot make virtual environments: install its venv package" >&2
            rm -rf "$folder"
            return 2
        }
    fi
    # Several of these versions are not made for Python 3.10.
    if [ -z "$version" ] && "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        locked=(--constraint cluster/docker/requirements.txt)
    fi
    echo "installing '.[$extra]' into $folder (some minutes the first time)"
    # One command for everything: separate ones may resolve to versions that do not go together.
    (cd "$checkout" && set -o pipefail && "$PYTHON" -m pip install --disable-pip-version-check \
        "${locked[@]+"${locked[@]}"}" --editable ".[$extra]" | seldom) || {
        echo "error: the installation failed; the lines above say why. Run the command again to continue" >&2
        return 2
    }
    # Each extra holds the ones before it.
    for extra in quickstart s3 test; do
        echo "$wanted" >"$folder/installed-$extra"
        [ "$folder/installed-$extra" = "$stamp" ] && break
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

# environment_above EXTRA: an environment beside that of PYTHON that sees its packages and installs an extra into itself
# alone, whatever other versions that takes; PYTHON becomes its interpreter.
environment_above() {
    local extra=$1 checkout below folder stamp wanted site
    checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    below=$PYTHON folder="${PYTHON%/bin/python}-$extra"
    stamp="$folder/installed-$extra" wanted=$(cksum <"$checkout/pyproject.toml")
    PYTHON="$folder/bin/python"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    echo "installing '.[$extra]' into $folder, above ${below%/bin/python}"
    [ -x "$PYTHON" ] || "$below" -m venv "$folder" || return 2
    site='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$below" -c "$site" >"$("$PYTHON" -c "$site")/below.pth" || return 2
    (cd "$checkout" && "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable ".[$extra]") || {
        echo "error: the installation failed; the lines above say why. Run the command again to continue" >&2
        return 2
    }
    echo "$wanted" >"$stamp"
}

# find_python [VERSION]: the first interpreter of that version, or of one that will do.
find_python() {
    local candidate known="${1:-3.10 3.11 3.12 3.13}"
    for candidate in "${VAVAE_PYTHON:-}" "python${1:-3}" python3 python3.13 python3.12 python3.11 python3.10 python; do
        if [ -n "$candidate" ] && "$candidate" -c \
            'import sys; sys.exit("{}.{}".format(*sys.version_info) not in sys.argv[1].split())' "$known" 2>/dev/null; then
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
