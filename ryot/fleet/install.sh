#!/bin/sh
# Installs the bundle beside this file on a device without network, by the same steps as a push:
#   sh install.sh [--root DIR] [--trusted-keys FILE] [--restart COMMAND] [--health COMMAND]
# It needs Python 3.11 or later, and no package. Files of trusted keys come from you, not from where this came from: with
# them the bundle and SHA256SUMS, which lists all else here, have to be signed. This file and ryot-device.pyz ask for that
# themselves, so where they may have been changed, check them with a program of your own first (deploy/README.md).
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
if command -v sha256sum > /dev/null && ! (cd "$here" && sha256sum -c SHA256SUMS > /dev/null); then
    echo "Error: a file of this kit is damaged or missing; copy it again" >&2
    exit 1
fi
for python in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
    [ -n "$python" ] || continue
    if "$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        [ ! -d "$here/wheels" ] || set -- --wheels "$here/wheels" "$@"
        exec "$python" -I "$here/ryot-device.pyz" "$@" install "$here/bundle"
    fi
done
echo "Error: no Python 3.11 or later was found; install one, or name it: PYTHON=/path/to/python3 sh install.sh" >&2
exit 1
