#!/bin/sh
# Rewrites the two lists of exact pins. Run through `make lock`, which provides uv.
#   pinned.txt  what the container runs (torch 2.7.1, the last with CUDA 11.8; Python 3.9 and up)
#   newest.txt  the newest of everything on Python 3.11
# torch pins its own CUDA packages exactly, and other ones in its CUDA 11.8 and CPU builds, so they stay out of the lists.
set -eu
uv=$1
lock() { # python version, constraints, output
    printf '%s\n' $2 >requirements/constraints.tmp
    "$uv" pip compile pyproject.toml --extra demo --extra dev --universal --python-version "$1" --quiet --upgrade \
        --constraint requirements/constraints.tmp --no-header --no-annotate --no-emit-index-url --no-emit-find-links |
        grep -vE '^(nvidia-|cuda-|triton==)' >"$3.tmp"
    { echo "# made by \`make lock\` (uv pip compile); do not edit"; cat "$3.tmp"; } >"$3"
    rm -f "$3.tmp" requirements/constraints.tmp
}
lock 3.9 "torch==2.7.1 diffusers==0.36.0" requirements/pinned.txt
lock 3.11 "torch==2.13.0" requirements/newest.txt
