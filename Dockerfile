# syntax=docker/dockerfile:1
# hadolint global ignore=DL3006
# The endpoint's image. Targets: `sagemaker` (the default) reads its weights from /opt/ml/model; `compiled` is the same with
# what VTON_COMPILE needs; `baked` carries the weights of the build context `weights`; `runpod` too, and is RunPod's worker.
# torch's wheels bring every CUDA library, so the `base` image of CUDA is enough.
# The tags are here, where hadolint does not look for them.
ARG BASE=nvidia/cuda:11.8.0-base-ubuntu22.04
ARG UV_IMAGE=ghcr.io/astral-sh/uv:0.13.8

FROM ${UV_IMAGE} AS uv

# The folder of weights for `baked`: docker build --build-context weights=FOLDER takes the place of this stage.
FROM scratch AS weights

FROM ${BASE} AS libraries
ARG PYTHON=3.9
ARG TORCH=2.7.1
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu118
ENV VIRTUAL_ENV=/opt/venv UV_PYTHON_INSTALL_DIR=/opt/python UV_CACHE_DIR=/cache/uv \
    UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_HTTP_TIMEOUT=300
COPY --from=uv /uv /usr/local/bin/uv
COPY requirements/image.txt /tmp/image.txt
# torch comes after the packages whose hashes are known, so that what it shares with them is theirs.
RUN --mount=type=cache,target=/cache/uv \
    mkdir -p /opt/python \
    && uv venv --python "${PYTHON}" /opt/venv \
    && uv pip install --require-hashes --no-deps --requirement /tmp/image.txt \
    && uv pip install --index "${TORCH_INDEX}" "torch==${TORCH}" \
    && uv pip check

FROM libraries AS runpod-libraries
COPY requirements/image-runpod.txt /tmp/image-runpod.txt
RUN --mount=type=cache,target=/cache/uv \
    uv pip install --require-hashes --no-deps --requirement /tmp/image-runpod.txt \
    && uv pip check

FROM ${BASE} AS code
ARG TRAINING=yes
COPY . /opt/app
# Compiled by contents: the root of a container is often read-only, and a file mounted over one of these still counts.
RUN --mount=type=bind,from=libraries,source=/opt/python,target=/opt/python \
    --mount=type=bind,from=libraries,source=/opt/venv,target=/opt/venv \
    rm -r /opt/app/requirements \
    && if [ "${TRAINING}" != yes ]; then rm /opt/app/container/train; fi \
    && chmod -R a+rX /opt/app \
    && /opt/venv/bin/python -m compileall -q --invalidation-mode checked-hash /opt/app

FROM ${BASE} AS environment
ENV PATH=/opt/venv/bin:${PATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility VTON_WEIGHTS=/opt/ml/model
WORKDIR /opt/app
# No USER: SageMaker wants root. Nothing is written but to /tmp, so that any other user will do.
ENTRYPOINT ["/opt/app/container/entrypoint"]

FROM environment AS runtime
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m CMD ["python", "-c", \
    "import os, urllib.request as web; env = os.environ.get; \
    web.urlopen(f\"http://127.0.0.1:{env('VTON_PORT') or env('SAGEMAKER_BIND_TO_PORT') or 8080}/ping\", timeout=4)"]
CMD ["serve"]
COPY --from=libraries /opt/python /opt/python
COPY --from=libraries /opt/venv /opt/venv

FROM runtime AS sagemaker
COPY --from=code /opt/app /opt/app

# For VTON_COMPILE: with a compiler, and with what was compiled before, in the build context `compilations`.
FROM scratch AS compilations

FROM sagemaker AS compiled
# The headers are for a Python of the base's own; that of uv brings its own. torch's C++ headers would be compiled ahead
# into 150 MB of /tmp at each start, for kernels that run on the CPU.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt --mount=type=cache,target=/var/lib/apt \
    apt-get update && apt-get install --yes --no-install-recommends g++ libpython3-dev
ENV VTON_COMPILE=inductor \
    TORCHINDUCTOR_CACHE_DIR=/opt/compilations/inductor TRITON_CACHE_DIR=/opt/compilations/triton \
    TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS=0
COPY --from=compilations / /opt/compilations

FROM code AS verified
ARG VARIANT=mix
COPY --from=weights / /opt/weights
RUN --mount=type=bind,from=libraries,source=/opt/python,target=/opt/python \
    --mount=type=bind,from=libraries,source=/opt/venv,target=/opt/venv \
    chmod -R a+rX /opt/weights \
    && PYTHONPATH=/opt/app /opt/venv/bin/python -m container.weights_cli verify --dir /opt/weights --variant "${VARIANT}"

FROM runtime AS baked
ARG VARIANT=mix
ENV VTON_WEIGHTS=/opt/weights VTON_VARIANT=${VARIANT}
COPY --from=verified /opt/weights /opt/weights
COPY --from=code /opt/app /opt/app

# A worker asks the platform for its jobs: it listens on no port, and what it does is its sign of life.
FROM environment AS runpod
ARG VARIANT=mix
ENV VTON_WEIGHTS=/opt/weights VTON_VARIANT=${VARIANT}
CMD ["runpod"]
COPY --from=runpod-libraries /opt/python /opt/python
COPY --from=runpod-libraries /opt/venv /opt/venv
COPY --from=verified /opt/weights /opt/weights
COPY --from=code /opt/app /opt/app

FROM sagemaker
