# Built by `make docker-build`; torch's wheel for Linux brings CUDA, so a slim base is enough for `--gpus all`.
FROM python:3.11-slim

# The caller's user and group, so that what a run writes into the mounted folder belongs to the caller.
ARG UID=1000
ARG GID=1000
RUN groupadd --gid "$GID" --non-unique student && useradd --uid "$UID" --gid "$GID" --non-unique --create-home student

WORKDIR /workspace
RUN chown "$UID:$GID" /workspace

# Requirements first: this layer, the large one, is built again only when they change.
COPY requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt

USER $UID:$GID
COPY --chown=$UID:$GID . .
CMD ["python", "train.py"]
