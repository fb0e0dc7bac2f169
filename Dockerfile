# navit with its dependencies, for TPUs or for NVIDIA GPUs (docs/launching.md):
#   docker build --tag navit .
#   docker build --tag navit --build-arg EXTRAS=cuda,remote .
FROM python:3.12-slim

# Extras of setup.cfg, and the packages that fsspec needs for gs:// and s3://.
ARG EXTRAS=tpu,remote
ARG FILESYSTEMS="gcsfs s3fs"
# The user that runs navit: navit or root.
ARG RUN_AS=navit

RUN useradd --create-home navit
WORKDIR /navit
# Tokenizers (*.model) at the root of the clone come along.
COPY LICENSE README.md pyproject.toml setup.cfg *.model ./
COPY navit navit
RUN pip install --no-cache-dir --editable ".[${EXTRAS}]" ${FILESYSTEMS} \
    && chown navit .
COPY configs configs
COPY data data

USER ${RUN_AS}
CMD ["navit", "--help"]
