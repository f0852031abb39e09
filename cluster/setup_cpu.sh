#!/usr/bin/env bash
# Create .venv with the locked CPU environment and this checkout in it. Does nothing when that is already so.
#   PYTHON=python3.11 cluster/setup_cpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3.11}"
lock=cluster/lock/cpu.txt
torch_wheels=https://download.pytorch.org/whl/cpu
stamp=.venv/.rlprm-setup

fail() { printf 'setup: %s\n' "$1" >&2; exit 1; }
say() { printf 'setup: [%3ds] %s\n' "$SECONDS" "$1"; }

# The folder is part of the key: console scripts and the editable install hold absolute paths.
key=$( { pwd; cat "$lock" pyproject.toml cluster/setup_cpu.sh; } | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/rlprm ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
    exit 0
fi

command -v "$python" >/dev/null || fail "found no $python; install Python 3.11, or name it: make PYTHON=/path/to/python3.11 ..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$version" = 3.11 ] || fail "$python is Python $version; the lock is for Python 3.11: make PYTHON=/path/to/python3.11 ..."

torch=$(grep -E '^torch==' "$lock")
[ "${torch%+cpu}" != "$torch" ] || fail "$lock asks for '$torch'; expected a +cpu build"

# A virtual environment that was moved or half made is made again.
if ! .venv/bin/python -c "import pip, sys; sys.exit(sys.prefix != '$PWD/.venv')" 2>/dev/null; then
    say "creating .venv with $python"
    "$python" -m venv --clear .venv || fail "could not create .venv; on Debian and Ubuntu install python3.11-venv"
fi
rm -f "$stamp"
# watched LABEL TOTAL COMMAND...: run pip with its output in the log, and say how far it is: on a terminal all the time in
# one line, elsewhere every 15 s. pip's own bar says nothing about a list of packages.
watched() {
    local label=$1 total=$2 pid have started=$SECONDS shown=$SECONDS tty=0; shift 2
    [ -t 1 ] && tty=1
    local from; from=$(wc -l <"$log")
    "$@" >>"$log" 2>&1 & pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.5
        [ "$tty" = 1 ] || [ $((SECONDS - shown)) -ge 15 ] || continue
        shown=$SECONDS
        if tail -n "+$((from + 1))" "$log" | grep -q '^Installing collected'; then
            have=$(find .venv/lib/python3.11/site-packages -maxdepth 1 -name '*.dist-info' | wc -l)
            line="$label: about $have of $total installed"
        else
            have=$(tail -n "+$((from + 1))" "$log" | grep -cE '^(Collecting|Looking|Processing|Requirement already) ' || true)
            line="$label: $have of $total fetched"
        fi
        line="$line, $((SECONDS - started)) s (usually 60 to 90 s in all)"
        if [ "$tty" = 1 ]; then printf '\r\033[Ksetup: [%3ds] %s' "$SECONDS" "$line"; else say "$line"; fi
    done
    [ "$tty" = 0 ] || printf '\r\033[K'
    wait "$pid"
}
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# torch first. The local version in the requirement (+cpu) never matches the CUDA build, so asking is safe everywhere:
# first what pip is configured with (a folder of wheels, a mirror), then PyTorch's own CPU wheels. Short limits and no
# retries, because an unreachable host otherwise costs minutes.
installed() { .venv/bin/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' 2>/dev/null || true; }
log=.venv/setup.log
: >"$log"
if [ "$(installed)" != "$torch" ]; then
    say "installing $torch"
    if ! pip install --quiet --no-deps --timeout 5 --retries 0 "$torch" >>"$log" 2>&1; then
        say "pip's configured sources have no $torch; asking $torch_wheels"
        pip install --quiet --no-deps --timeout 10 --retries 2 --index-url "$torch_wheels" "$torch" >>"$log" 2>&1 || {
            tail -n 5 "$log" >&2
            fail "found $torch neither in pip's configured sources nor at $torch_wheels; make that address reachable, or put the wheel in a folder and set PIP_FIND_LINKS to it"
        }
    fi
    [ "$(installed)" = "$torch" ] || fail "installed '$(installed)', expected '$torch'; remove .venv and try again"
fi

total=$(grep -c == "$lock")
say "installing the other $((total - 1)) packages of $lock (2.5 GB)"
watched packages "$total" pip install --progress-bar off --no-deps -r "$lock" || { tail -n 20 "$log" >&2; fail "pip failed; the whole log is in $log"; }
# hatchling is in the lock, so nothing is fetched for this step.
pip install --quiet --no-deps --no-build-isolation -e . >>"$log" 2>&1 || { tail -n 20 "$log" >&2; fail "pip failed; the whole log is in $log"; }

[ "$(installed)" = "$torch" ] || fail "the environment holds '$(installed)', expected '$torch'; remove .venv and try again"
for unwanted in torchvision torchaudio torchcodec; do
    if pip show --quiet "$unwanted" >/dev/null 2>&1; then
        fail "$unwanted is in .venv; its CUDA build breaks 'import transformers' on a CPU machine: .venv/bin/pip uninstall $unwanted"
    fi
done
printf '%s\n' "$key" >"$stamp"
say "done"
