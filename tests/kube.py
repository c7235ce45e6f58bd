"""The files under k8s/, rendered as a user renders them, and what can be wrong with objects without a cluster."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from conftest import ROOT, need
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

Object = dict[str, Any]

FROM = "1.29"  # the first in which the Job's fields are not behind a switch
VERSIONS = (FROM, "1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
BY_HAND = {"finetune-s3"}  # Secrets that docs/operations.md tells how to make
_ALLOWED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip


def kubectl() -> str:
    found = shutil.which("kubectl", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    need("kubectl", found)
    return str(found)


def built(folder: Path) -> list[Object]:
    """The objects that kustomize makes of a folder."""
    made = subprocess.run([kubectl(), "kustomize", folder], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert not made.stderr, made.stderr  # warnings of what will not work any more
    return list(yaml.safe_load_all(made.stdout))


def layered(folder: Path, base: str, components: tuple[str, ...] = (), **more: object) -> list[Object]:
    """The objects of `base` under k8s/ with components and `more` of a kustomization; "jobset" wraps all of it."""
    if not (folder / "k8s").exists():
        shutil.copytree(ROOT / "k8s", folder / "k8s")  # kustomize takes nothing from elsewhere
    inner = [f"../k8s/components/{name}" for name in components if name != "jobset"]
    _kustomization(folder / "run", {"resources": [f"../k8s/{base}"], "components": inner, **more})
    wrap = {"resources": ["../run"], "components": ["../k8s/components/jobset"]}
    _kustomization(folder / "jobset", wrap)
    return built(folder / ("jobset" if "jobset" in components else "run"))


def patch(kind: str, *steps: tuple[str, str, object], rename: bool = False) -> Object:
    """A patch of every object of this kind: operations, paths and values."""
    listed = [{"op": do, "path": path, "value": value} for do, path, value in steps]
    return {"target": {"kind": kind}, "patch": yaml.safe_dump(listed), "options": {"allowNameChange": rename}}


def only(objects: list[Object], kind: str) -> Object:
    found = [each for each in objects if each["kind"] == kind]
    assert len(found) == 1, [each["kind"] for each in objects]
    return found[0]


def jobs(objects: list[Object]) -> list[Object]:
    """The Jobs, also those that a JobSet will make, as objects of their own."""
    found = [each for each in objects if each["kind"] == "Job"]
    for each in objects:
        if each["kind"] == "JobSet":
            found += [
                {"apiVersion": "batch/v1", "kind": "Job", "metadata": each["metadata"], **part["template"]}
                for part in each["spec"]["replicatedJobs"]
            ]
    return found


def pod(objects: list[Object]) -> Object:
    """The specification of the only pod."""
    (job,) = jobs(objects)
    found: Object = job["spec"]["template"]["spec"]
    return found


def misfits(objects: list[Object], version: str) -> list[str]:
    """Where objects have something that this version of Kubernetes (or JobSet) does not know, or lack something."""
    found = []
    for each in [one for one in objects if one["kind"] != "JobSet"] + jobs(objects):
        try:
            kubernetes_validate.validate(each, version, strict=True)
        except kubernetes_validate.ValidationError as e:
            found.append(f"{each['kind']} {version}: {e.message}")
    for job in jobs(objects):  # schemas do not say it
        several = [volume for volume in job["spec"]["template"]["spec"]["volumes"] if len(volume) != 2]
        found += [f"volume {volume['name']} is not of one kind: {', '.join(volume)}" for volume in several]
    for each in objects:
        if each["kind"] == "JobSet":
            understood = JobsetV1alpha2JobSet.from_dict(each).to_dict()
            found += [f"JobSet: {path} is not known" for path in _paths(each) - _paths(understood)]
    return found


def _paths(value: object, at: str = "") -> set[str]:
    if isinstance(value, dict):
        return {at} | {path for name, item in value.items() for path in _paths(item, f"{at}.{name}")}
    if isinstance(value, list):
        return {at} | {path for number, item in enumerate(value) for path in _paths(item, f"{at}[{number}]")}
    return {at}


def unrestricted(spec: Object) -> Iterator[str]:
    """What the Pod Security Standard *restricted* would refuse in a pod."""
    whole = spec.get("securityContext", {})
    yield from (name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name))
    if whole.get("sysctls") or whole.get("hostProcess"):
        yield "sysctls"
    for volume in spec.get("volumes", []):
        yield from (f"volume {kind}" for kind in volume.keys() - _ALLOWED_VOLUMES - {"name"})
    for each in spec["containers"] + spec.get("initContainers", []):
        own = {**whole, **each.get("securityContext", {})}
        allowed = {
            "privileged": not own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": own.get("runAsNonRoot") is True,
            "runAsUser": own.get("runAsUser") != 0,
            "seccompProfile": own.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "capabilities": own.get("capabilities", {}).get("drop") == ["ALL"],
            "added capabilities": not set(own.get("capabilities", {}).get("add", [])) - {"NET_BIND_SERVICE"},
            "procMount": own.get("procMount", "Default") == "Default",
            "hostPort": not any(port.get("hostPort") for port in each.get("ports", [])),
        }
        yield from (f"{each['name']}: {what}" for what, well in allowed.items() if not well)


def dangling(objects: list[Object]) -> Iterator[str]:
    """What an object names and nobody has."""
    there = {(each["kind"], each["metadata"]["name"]) for each in objects}
    for job in jobs(objects):
        spec = job["spec"]["template"]["spec"]
        named = {("ServiceAccount", spec["serviceAccountName"])} if "serviceAccountName" in spec else set()
        named |= {("Service", spec["subdomain"])} if "subdomain" in spec else set()
        for volume in spec["volumes"]:
            named |= {("ConfigMap", volume["configMap"]["name"])} if "configMap" in volume else set()
            claim = volume.get("persistentVolumeClaim")
            named |= {("PersistentVolumeClaim", claim["claimName"])} if claim else set()
        yield from (f"{kind} {name}" for kind, name in named - there)
        for rule in job["spec"]["podFailurePolicy"]["rules"]:
            name = rule.get("onExitCodes", {}).get("containerName")
            if name and name not in [each["name"] for each in spec["containers"]]:
                yield f"container {name}"
        volumes = {volume["name"] for volume in spec["volumes"]}
        for each in spec["containers"]:
            yield from (f"volume {name}" for name in volumes ^ {mount["name"] for mount in each["volumeMounts"]})
            secrets = {source["secretRef"]["name"] for source in each.get("envFrom", [])}
            yield from (f"Secret {name}" for name in secrets - BY_HAND)
            yield from (f"variable {name}" for name in _unset(each.get("env", [])))
    for each in objects:
        if each["kind"] == "Service":
            name = each["spec"]["selector"]["batch.kubernetes.io/job-name"]
            yield from [] if ("Job", name) in there else [f"Job {name}"]


def _unset(environ: list[Object]) -> Iterator[str]:
    """Variables that others refer to before they are set: Kubernetes leaves the reference as it stands."""
    known: set[str] = set()
    for each in environ:
        yield from set(re.findall(r"\$\((\w+)\)", each.get("value", ""))) - known
        known.add(each["name"])


def size(text: str) -> int:
    """Bytes of a quantity such as 8Gi."""
    units = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return int(text[:-2]) * units[text[-2:]]


def _kustomization(folder: Path, content: Object) -> None:
    folder.mkdir(exist_ok=True)
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({**head, **content}), encoding="utf-8")


@functools.cache
def overlay(name: str) -> list[Object]:
    """The objects of one folder under k8s/ as it is; not to be changed."""
    return built(ROOT / "k8s" / name)
