#!/bin/sh
# Rewrites the lists of exact pins. Run through `make lock`, which provides uv.
#   pinned.txt  what `make install` installs (torch 2.7.1, the last with CUDA 11.8; Python 3.9 and up)
#   newest.txt  the newest of everything on Python 3.11
#   image.txt   those of pinned.txt that the container needs, with hashes; torch is installed beside them
#   image-runpod.txt   the same with RunPod's SDK
# torch pins its own CUDA packages exactly, and other ones in its CUDA 11.8 and CPU builds, so they stay out of the lists.
# Its own hash differs from build to build, too, so image.txt leaves it out.
set -eu
uv=$1
trap 'rm -f requirements/*.tmp' EXIT
lock() { # output, python version, constraints, further options
    list=$1 version=$2
    printf '%s\n' $3 >requirements/constraints.tmp
    shift 3
    "$uv" pip compile pyproject.toml --universal --python-version "$version" --quiet --no-header --no-annotate \
        --no-emit-index-url --no-emit-find-links --constraint requirements/constraints.tmp "$@" >requirements/list.tmp
    # A package with hashes ends with the first line without a backslash.
    { echo "# made by \`make lock\` (uv pip compile); do not edit"
      sed -E '/^(nvidia-|cuda-|triton==)/{:a;/\\$/{N;ba};d}' requirements/list.tmp; } >requirements/made.tmp
    mv requirements/made.tmp "$list"
}
lock requirements/pinned.txt 3.9 "torch==2.7.1 diffusers==0.36.0" --upgrade --all-extras
lock requirements/newest.txt 3.11 "torch==2.13.0" --upgrade --all-extras
lock requirements/image.txt 3.9 "" --constraint requirements/pinned.txt --generate-hashes --no-emit-package torch
lock requirements/image-runpod.txt 3.9 "" --constraint requirements/pinned.txt --generate-hashes --no-emit-package torch \
    --extra runpod
