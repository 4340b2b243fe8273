# The workflow with everything that it needs, for CPUs: `docker build --tag quest-suite .`, then
# `docker run --rm --volume "$PWD/results:/quest/results" quest-suite --cores all --configfile workflow/config/smoke.yaml`.
FROM python:3.11-slim-bookworm
# A compiler builds the integer kernels. Its version is that of the Debian release of the image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /quest
COPY . .
RUN pip install --no-cache-dir --constraint locks/pip.txt --editable .
ENTRYPOINT ["snakemake"]
CMD ["--cores", "all"]
