# The job as a container: dependencies first, code last, nothing that compiles, no root.
# A site that wants its own base, or a digest of this one, gives --build-arg BASE_IMAGE=...; it needs Python 3.11 or
# newer as python3 with venv, and a CUDA driver on the host; the CUDA libraries come with the pinned torch wheel.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS dependencies
COPY requirements.txt constraints.txt /build/
RUN python3 -m venv /opt/job \
 && /opt/job/bin/python -m pip install --no-cache-dir --disable-pip-version-check -r /build/requirements.txt

FROM ${BASE_IMAGE}
COPY --from=dependencies /opt/job /opt/job
COPY LICENSE entrypoint.py /app/
COPY job /app/job
COPY configs /app/configs
# The cache is the only place that is written; mount a disk there.
RUN mkdir -p /cache && chown 10001:0 /cache && chmod 770 /cache
ENV PATH=/opt/job/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 XDG_CACHE_HOME=/cache HOME=/cache
WORKDIR /app
USER 10001:0
ENTRYPOINT ["python", "/app/entrypoint.py"]
CMD ["--help"]
