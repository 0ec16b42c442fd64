#!/bin/sh
# Build the sets that the bundled nano models are trained and measured on, from what scripts/install_data.sh installs:
#   scripts/build_nano_data.sh [FOLDER]      FOLDER: datasets/sets by default, where the configurations look
#
# Photographs are reduced to 640 pixels and films to 384: the crops that a small model sees are then of the scale that it
# is measured at, and large frames do not take longer to read than a step takes.
# Furniture is rendered once, as a store (the decoder of Gaussians is trained from it), which takes longest, and then
# written as shards. What is understood by few captions is taught: seen by a classifier of photographs, which nano learns
# to imitate. What is there already is left alone.
set -eu
cd "$(dirname "$0")/.."
sets=${1:-datasets/sets}
atoken=${ATOKEN:-.venv/bin/atoken}

build() { # name, folder, options...
    name=$1 folder=$2
    shift 2
    "$atoken" data build "$name" --out "$sets/$folder" "$@"
}

build photographs photographs-640 --max-side 640
build clips clips-384 --max-side 384
build camera camera
build games games
if [ -d node_modules/emoji-datasource-google ]; then
    build emoji emoji --from node_modules/emoji-datasource-google
else
    build emoji emoji
fi
"$(dirname "$atoken")/python" -m data.sources.furniture --out datasets/furniture
build furniture furniture --from datasets/furniture
build interiors interiors --from packages/usr/share/sweethome3d/sweethome3d.jar
for name in emoji furniture interiors; do
    "$atoken" data teach "$sets/$name/train" --out "$sets/$name-taught/train"
done
