# SPDX-License-Identifier: Apache-2.0
# Sourced: makes and enters the virtual environment $VENV (default .venv) and installs the package
# into it with the extras named in $1, once for each state of setup.py.
VENV=${VENV:-.venv}
stamp=$VENV/installed-$1-$(cksum < setup.py | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    python3 -m venv "$VENV"
    # torch first, at a version that is tested: DeepSpeed looks for it while it is built.
    "$VENV/bin/pip" install -q --upgrade pip "setuptools>=77" wheel packaging torch==2.13.0
    "$VENV/bin/pip" install -q --no-build-isolation -e ".[$1]"
    touch "$stamp"
fi
export PATH="$PWD/$VENV/bin:$PATH"
case $VENV in /*) export PATH="$VENV/bin:$PATH" ;; esac
