# popo-lite for NVIDIA GPUs: docs/install.md has the commands.
#
# A plain Python image: torch's wheel brings CUDA's libraries, and the driver comes from the host through NVIDIA's
# container toolkit. The compiler is for Triton, which builds its launcher when a kernel first runs.
FROM python:3.12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/popo-lite
COPY pyproject.toml README.md LICENSE CHANGELOG.md constraints.txt constraints-newest.txt ./
COPY recipes recipes
COPY popo_lite popo_lite
RUN pip install --no-cache-dir --constraint constraints.txt '.[gpu,trackers]'

# Not root: a run needs no more than /work and the volume with caches. HOME is there too, so that any other user, such
# as docker run --user "$(id -u):$(id -g)", can write what torch, Triton and vLLM keep.
RUN useradd --home-dir /cache --uid 1000 popo \
    && mkdir -p /cache /work \
    && chmod 1777 /cache /work
USER popo
ENV HOME=/cache \
    USER=popo \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["popo-lite"]
CMD ["--help"]
