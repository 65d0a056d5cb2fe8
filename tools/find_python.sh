#!/bin/sh
# Print the first Python >= 3.12 that really runs (a pyenv shim can exist and not run).
# Order: $PYTHON, then 3.12 and 3.13 (megatron-core has wheels for them), on PATH or under pyenv, then the rest.
set -u

usable() {
    "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && { echo "$PYTHON"; exit 0; }
    echo "PYTHON=$PYTHON: expected a Python >= 3.12 with the venv module that runs;" \
        "found: $("$PYTHON" --version 2>&1 || echo 'it does not run')" >&2
    exit 1
fi

pyenv_root=${PYENV_ROOT:-${HOME:-}/.pyenv}
for candidate in python3.12 "$pyenv_root"/versions/3.12*/bin/python python3.13 \
    "$pyenv_root"/versions/3.13*/bin/python python3.14 "$pyenv_root"/versions/3.14*/bin/python \
    python3 python; do
    usable "$candidate" && { echo "$candidate"; exit 0; }
done

cat >&2 <<MESSAGE
No Python >= 3.12 that runs was found, on PATH or under $pyenv_root/versions.
Install one, for example:
    apt-get install python3.12 python3.12-venv      (Debian, Ubuntu)
    pyenv install 3.12                              (any system with pyenv)
or name it:  make PYTHON=/path/to/python3.12 env
MESSAGE
exit 1
