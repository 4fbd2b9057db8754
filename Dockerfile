# A machine for the course. Build it, then open JupyterLab at the address that the container prints:
#     docker build --tag effad .
#     docker run --rm --publish 8888:8888 effad
# The same two commands as anywhere else:
#     docker run --rm effad make tutorial
#     docker run --rm effad make test
# TORCH_INDEX names the wheel index with CPU builds of torch (pytorch.org says which); without it,
# pip installs torch with CUDA, which is several GB larger:
#     docker build --tag effad --build-arg TORCH_INDEX=... .
# The stage serve is a machine that answers over HTTP with a detector of yours (docs/deployment.md):
#     docker build --target serve --tag effad-serve .
#     docker run --rm --publish 127.0.0.1:8000:8000 --volume ./build/runs/my_part:/detector:ro effad-serve

# .devcontainer/devcontainer.json builds this stage alone and brings the files itself.
FROM python:3.14-slim AS machine
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --shell /bin/bash learner \
    && install --directory --owner=learner --group=learner /course
# JupyterLab refuses to run as root; 1000 is learner.
USER 1000

FROM machine AS serve
WORKDIR /course
COPY --chown=learner:learner . .
ARG TORCH_INDEX=""
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --constraint constraints.txt \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} '.[serve]'
EXPOSE 8000
# 0.0.0.0: callers come from outside of the container. /detector holds a detector.safetensors.
CMD [".venv/bin/effad", "serve", "/detector", "--host", "0.0.0.0"]

FROM machine AS course
WORKDIR /course
COPY --chown=learner:learner . .
ARG TORCH_INDEX=""
RUN PIP_NO_CACHE_DIR=1 make .venv/.installed TORCH_INDEX="$TORCH_INDEX"
EXPOSE 8888
# `make lab`, but for callers from outside of the container.
CMD [".venv/bin/python", "-m", "jupyterlab", "--ip=0.0.0.0", "--no-browser", "--LabApp.default_url=/lab/tree/notebooks"]
