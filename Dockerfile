# The job as a container: dependencies first, code last; no pip, no root. `make image` builds it.
#
# The CUDA libraries come with the pinned torch wheel (CUDA 13.0), the driver comes from the host, so the smallest flavour
# of NVIDIA's image is enough. A site's own base, or a digest of this one: make image BASE_IMAGE=…; it must be Debian or
# Ubuntu with Python 3.11 or newer among its packages.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04

# hadolint ignore=DL3006 -- the tag is in the argument
FROM ${BASE_IMAGE} AS system
# Versions are those of the base's distribution on the day of the build, with its security fixes; the
# SBOM lists them. libgomp1 is what bitsandbytes' CPU library links. NCCL opens libibverbs and its
# providers for InfiniBand and RoCE, and talks over TCP without. gcc and the headers of C and Python
# are for Triton: on a GPU it compiles its driver module at the first use, and TRL's loss is a Triton
# kernel. What that never reads of gcc and Python is removed again: the link-time optimizer, the
# sanitizers, the static libpython. /cache and /etc/finetune are places for mounts, as nothing can be
# made later where the root file system is read-only. Group 0 may write, because OpenShift gives any
# user that group.
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    ca-certificates libgomp1 python3 gcc libc6-dev libpython3-dev ibverbs-providers libibverbs1 \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
 && find /usr/lib /usr/bin \( -name lto1 -o -name '*lto-dump*' -o -name 'lib*san.*' -o -name 'lib*san_*' \
    -o -name 'libpython*.a' \) -delete \
 && mkdir -p /etc/finetune /opt/job/sbom \
 && install -d -o 10001 -g 0 -m 770 /cache \
 && dpkg-query -W -f '${Package} ${Version} ${Architecture}\n' >/opt/job/sbom/debian.txt

FROM system AS dependencies
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY requirements.txt constraints.txt /build/
# DeepSpeed comes as source without anything to compile; --use-pep517 makes old pips build it apart, as new ones do.
# A site with an index of its own gives its pip.conf as a secret, so that no credentials stay in a layer:
# make image BUILD_OPTIONS='--secret id=pip,src=pip.conf'
# Packages that a site adds to those that the job needs: BUILD_OPTIONS='--build-arg ADDITIONAL_PACKAGES=name==1.2'
ARG ADDITIONAL_PACKAGES=
# hadolint ignore=SC2086 -- several packages are several words
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /opt/job \
 && /opt/job/bin/python -m pip install --no-cache-dir --no-compile --use-pep517 --disable-pip-version-check \
    -r /build/requirements.txt ${ADDITIONAL_PACKAGES}
# What no run reads: tests, static libraries, the headers of torch and Arrow (those in Triton's package are read),
# bitsandbytes for other CUDA versions than torch's, and pip. Bytecode is made here, as a read-only start could not keep it, and not tied to the times of the files,
# which some image formats change.
RUN site=$(echo /opt/job/lib/python3*/site-packages) \
 && find "$site" -type d -name tests -prune -exec rm -rf {} + \
 && rm -rf "$site"/torch/include "$site"/torch/share "$site"/torch/test "$site"/torch/bin/*[Tt]est* \
    "$site"/pyarrow/include "$site"/pyarrow/src \
 && find "$site" -name '*.a' -delete \
 && find "$site"/bitsandbytes -name 'lib*.so' ! -name '*_cpu.so' ! -name '*_cuda13*.so' -delete \
 && /opt/job/bin/python -m pip uninstall --quiet --yes pip \
 && python3 -m compileall -q -f -j 0 -x torch/testing --invalidation-mode unchecked-hash "$site"

FROM dependencies AS sbom
COPY pyproject.toml /build/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /tmp/tool \
 && /tmp/tool/bin/python -m pip install --no-cache-dir --disable-pip-version-check -c /build/constraints.txt cyclonedx-bom \
 && /tmp/tool/bin/cyclonedx-py environment --output-reproducible --pyproject /build/pyproject.toml \
    -o /opt/job/sbom/python.cdx.json /opt/job/bin/python

FROM dependencies AS code
COPY LICENSE entrypoint.py /app/
COPY configs /app/configs
COPY job /app/job
# Readable by any user, whatever the umask of who checked it out.
RUN chmod -R a+rX,go-w /app && python3 -m compileall -q --invalidation-mode unchecked-hash /app

FROM system
COPY --from=dependencies /opt/job /opt/job
COPY --from=sbom /opt/job/sbom/python.cdx.json /opt/job/sbom/
COPY --from=code /app /app
# USER is a name for libraries that ask for one where the user has no line in /etc/passwd; torch does.
ENV PATH=/opt/job/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache XDG_CACHE_HOME=/cache USER=job \
    FINETUNE_ALIVE=/tmp/alive \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
USER 10001:0
# The job touches the file every ten seconds. Kubernetes ignores this and has a probe of its own in k8s/base.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["sh", "-c", "test -n \"$(find \"$FINETUNE_ALIVE\" -mmin -2)\""]
# No shell in between: python is process 1 and gets the signals.
ENTRYPOINT ["python", "/app/entrypoint.py"]
CMD ["--help"]
# Version, revision and source come from `make image` as labels: buildah 1.28 takes a label with an argument from its cache
# whatever the argument is now, and the image would name an older commit.
LABEL org.opencontainers.image.title="finetune-job" \
      org.opencontainers.image.description="LoRA and QLoRA fine-tuning as a batch job that survives preemption" \
      org.opencontainers.image.licenses="Apache-2.0"
