# An image for launch.k8s --image: the repository as the working directory, installed for `python`.
#
#   docker build --tag mi .                              CPUs
#   docker build --tag mi:cuda --build-arg EXTRAS=sweep,cuda .
#   docker build --tag mi:tpu --build-arg EXTRAS=sweep,tpu .
#   docker run --rm mi python -m mi.main --config=configs/lm.py:tiny --workdir=/runs/first
#
# The CUDA libraries come with the extra, so the host needs only NVIDIA's driver and container toolkit.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG EXTRAS=sweep
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# git names the commit in versions.json.
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*

WORKDIR /mi

# Packages change less often than the code, so they have a layer of their own.
COPY pyproject.toml setup.py README.md LICENSE ./
COPY requirements requirements
COPY mi/__init__.py mi/__init__.py
RUN pip install --no-cache-dir ".[${EXTRAS}]" --constraint requirements/lock.txt

COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
    && git config --system --add safe.directory /mi

CMD ["mi-train", "--help"]
