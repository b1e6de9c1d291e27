# syntax=docker/dockerfile:1
# The endpoint's image: `docker run IMAGE serve` listens on 8080 with the weights in /opt/ml/model.
# torch's CUDA 11.8 wheels bring every CUDA library, so the `base` image is enough.
ARG BASE=nvidia/cuda:11.8.0-base-ubuntu22.04

FROM ghcr.io/astral-sh/uv:0.13.8 AS uv

FROM ${BASE} AS build
ARG PYTHON=3.9
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu118
ENV UV_LINK_MODE=copy UV_PYTHON_INSTALL_DIR=/opt/python UV_CACHE_DIR=/cache/uv
COPY --from=uv /uv /usr/local/bin/uv
RUN --mount=type=cache,target=/cache/uv uv python install ${PYTHON} && uv venv --python ${PYTHON} /opt/venv
COPY requirements/pinned.txt /tmp/pinned.txt
RUN --mount=type=cache,target=/cache/uv \
    VIRTUAL_ENV=/opt/venv uv pip install --index ${TORCH_INDEX} --index-strategy unsafe-best-match -r /tmp/pinned.txt

FROM ${BASE} AS sagemaker
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
ENV PATH=/opt/app/container:/opt/venv/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 \
    VTON_WEIGHTS=/opt/ml/model
COPY --from=build /opt/python /opt/python
COPY --from=build /opt/venv /opt/venv
COPY . /opt/app
WORKDIR /opt/app
EXPOSE 8080
CMD ["serve"]
