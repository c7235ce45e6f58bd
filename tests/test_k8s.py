"""The manifests under k8s/: every combination that makes sense is rendered, and looked at as the API server would."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import kube
import pytest
import yaml
from conftest import ROOT

from job import config

OVERLAYS = ("base", "overlays/multi-gpu", "overlays/multi-node")
CACHES = ("", "cache-nvme", "cache-pvc", "cache-ephemeral")
CREDENTIALS = ("", "s3-secret", "workload-identity")
PLACES = ((), ("spot", "kueue"), ("openshift",), ("kueue", "spot", "openshift"))


def combinations() -> list[tuple[str, ...]]:
    """Each overlay with each way to cache and with each to get credentials, at places that change by turns."""
    places = itertools.cycle(PLACES)
    return [("base", "cpu"), ("base", "cpu", "cache-pvc", "jobset")] + [
        (overlay, *filter(None, (cache, credentials)), *next(places), *wrap)
        for overlay, cache, credentials, wrap in itertools.product(OVERLAYS, CACHES, CREDENTIALS, ((), ("jobset",)))
        if (overlay, cache) != ("overlays/multi-node", "cache-pvc")  # a disk for one node
    ]


@pytest.mark.parametrize("combination", combinations(), ids="+".join)
def test_a_combination_is_what_kubernetes_and_jobset_accept(combination: tuple[str, ...], tmp_path: Path) -> None:
    """Known fields only, restricted pods, nothing named that is not there, and one number of nodes."""
    objects = kube.layered(tmp_path, combination[0], combination[1:])

    assert [fault for version in (kube.FROM, "1.37") for fault in kube.misfits(objects, version)] == []
    assert list(kube.unrestricted(kube.pod(objects))) == []
    assert list(kube.dangling(objects)) == []
    assert [each["kind"] for each in objects if each["kind"] in ("Job", "JobSet")] == [
        "JobSet" if "jobset" in combination else "Job"
    ]
    (job,) = kube.jobs(objects)
    nodes = {"PET_NNODES": str(job["spec"]["completions"])} if "multi-node" in combination[0] else {}
    told = {each["name"]: each.get("value") for each in kube.pod(objects)["containers"][0].get("env", [])}
    assert {name: told[name] for name in nodes} == nodes
    assert job["spec"]["parallelism"] == job["spec"]["completions"]


@pytest.mark.parametrize("components", [("rdma",), ("rdma", "spot", "kueue", "jobset")], ids="+".join)
def test_rdma_brings_its_devices_and_refuses_to_do_without(components: tuple[str, ...], tmp_path: Path) -> None:
    """The pod stays restricted: what it may lock is the node's to say. Beside the GPUs, and what finds the nodes."""
    objects = kube.layered(tmp_path, "overlays/multi-node", components)

    assert [fault for version in (kube.FROM, "1.37") for fault in kube.misfits(objects, version)] == []
    assert list(kube.unrestricted(kube.pod(objects))) == []
    assert list(kube.dangling(objects)) == []
    (container,) = kube.pod(objects)["containers"]
    limits, requests = (container["resources"][what] for what in ("limits", "requests"))
    assert limits == requests
    assert (limits["rdma/rdma_shared_device_a"], limits["nvidia.com/gpu"]) == (1, 8)
    told = {each["name"]: each.get("value") for each in container["env"]}
    assert told["NCCL_NET"] == "IB"
    assert "ibverbs-providers" in (ROOT / "Dockerfile").read_text()  # or NCCL finds no device
    assert told["PET_NNODES"] == "2"


def test_ipc_lock_is_given_to_a_root_that_may_do_nothing_else(tmp_path: Path) -> None:
    """To another user the kernel gives none in effect; the policies refuse it, which the page says with the remedy."""
    objects = kube.layered(tmp_path, "overlays/multi-node", ("rdma", "ipc-lock"))

    assert [fault for version in (kube.FROM, "1.37") for fault in kube.misfits(objects, version)] == []
    assert list(kube.unrestricted(kube.pod(objects))) == [
        "finetune: runAsNonRoot", "finetune: runAsUser", "finetune: added capabilities",
    ]  # fmt: skip
    (container,) = kube.pod(objects)["containers"]
    assert container["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"], "drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    # Its group may write what another user left in the cache, for this root may not by itself.
    assert kube.pod(objects)["securityContext"]["fsGroup"] == 10001
    assert kube.pod(objects)["securityContext"]["fsGroupChangePolicy"] == "Always"
    page = (ROOT / "docs" / "operations.md").read_text()
    assert "pod-security.kubernetes.io/enforce=privileged" in page


@pytest.mark.parametrize("version", kube.VERSIONS)
@pytest.mark.parametrize("folder", [*OVERLAYS, "overlays/jobset"])
def test_each_overlay_fits_each_version_of_kubernetes(folder: str, version: str) -> None:
    """From the first one that has all of the Job's fields."""
    assert kube.misfits(kube.overlay(folder), version) == []


def _typo(objects: list[kube.Object]) -> None:
    kube.pod(objects)["terminationGracePeriodSecond"] = 1


def _wrong_type(objects: list[kube.Object]) -> None:
    kube.pod(objects)["containers"][0]["env"][0]["value"] = 2


def _typo_of_jobset(objects: list[kube.Object]) -> None:
    policy = kube.only(objects, "JobSet")["spec"]["failurePolicy"]
    policy["rules"][0]["onJobFailureMessagePattern"] = policy["rules"][0].pop("onJobFailureMessagePatterns")


@pytest.mark.parametrize(
    ("folder", "harm", "said"),
    [
        ("overlays/multi-node", _typo, "terminationGracePeriodSecond"),
        ("overlays/multi-node", _wrong_type, "2 is not"),
        ("overlays/jobset", _typo, "terminationGracePeriodSecond"),
        ("overlays/jobset", _typo_of_jobset, "onJobFailureMessagePattern is not known"),
    ],
)
def test_a_typo_is_found(folder: str, harm: Callable[[list[kube.Object]], None], said: str) -> None:
    """In what Kubernetes knows and in what JobSet does."""
    objects = copy.deepcopy(kube.overlay(folder))

    harm(objects)

    assert said in "\n".join(kube.misfits(objects, "1.36"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, "volume hostPath"),
        ({"securityContext": {}}, "finetune: runAsNonRoot"),
        ({"securityContext": {"runAsNonRoot": True, "runAsUser": 0}}, "finetune: runAsUser"),
        ({"containers": [{"name": "finetune"}]}, "finetune: allowPrivilegeEscalation"),
        ({"containers": [{"name": "finetune"}]}, "finetune: capabilities"),
        ({"initContainers": [{"name": "first"}]}, "first: capabilities"),
    ],
)
def test_a_pod_that_is_not_restricted_is_found(change: kube.Object, said: str) -> None:
    """So that the check above means something."""
    assert said in list(kube.unrestricted({**kube.pod(kube.overlay("base")), **change}))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("ConfigMap x", ("volumes", 0, "configMap", "name")),
        ("Service x", ("subdomain",)),
        ("volume x", ("containers", 0, "volumeMounts", 0, "name")),
        ("variable SERVICE", ("containers", 0, "env", 2, "name")),
    ],
)
def test_what_is_named_and_not_there_is_found(name: str, path: tuple[str | int, ...]) -> None:
    """So that the check above means something."""
    objects = copy.deepcopy(kube.overlay("overlays/multi-node"))
    place = kube.pod(objects)
    for step in path[:-1]:
        place = place[step]  # type: ignore[index]

    place[path[-1]] = "x"  # type: ignore[index]

    assert name in list(kube.dangling(objects))


def test_the_config_is_one_of_the_presets_and_valid(tmp_path: Path) -> None:
    """And the pod is told to run what the ConfigMap holds."""
    objects = kube.overlay("base")
    held, container = kube.only(objects, "ConfigMap"), kube.pod(objects)["containers"][0]
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "config"]
    (name,) = held["data"]
    (tmp_path / name).write_text(held["data"][name])

    read = config.read(tmp_path / name, [container["args"][3]])

    assert container["args"][:3] == ["run", f"{mount['mountPath']}/{name}", "--set"]
    assert read.checkpoint.grace_seconds == 110
    assert held["data"][name] == (ROOT / "configs" / f"{read.run.name}.yaml").read_text()


def test_another_config_is_another_configmap(tmp_path: Path) -> None:
    """By a hash of its content, which the Job or the JobSet follows."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("run: {}\n")
    other = {"configMapGenerator": [{"name": "finetune", "behavior": "replace", "files": ["run.yaml"]}]}
    names = {kube.only(kube.overlay("base"), "ConfigMap")["metadata"]["name"]}

    for components in ((), ("jobset",)):
        objects = kube.layered(tmp_path, "base", components, **other)

        assert list(kube.dangling(objects)) == []
        names.add(kube.only(objects, "ConfigMap")["metadata"]["name"])
    assert len(names) == 2
    assert all(name.startswith("finetune-") for name in names)


@pytest.mark.parametrize("wrap", [(), ("jobset",)])
def test_a_run_is_renamed_as_a_whole(tmp_path: Path, wrap: tuple[str, ...]) -> None:
    """One patch of the Job's and the Service's name is enough; what an identity trusts keeps its own."""
    changes = [kube.patch("Job|Service", ("replace", "/metadata/name", "other"), rename=True)]

    objects = kube.layered(
        tmp_path, "overlays/multi-node", ("cache-ephemeral", "workload-identity", *wrap), patches=changes
    )

    assert list(kube.dangling(objects)) == []
    assert {each["kind"]: each["metadata"]["name"] for each in objects if each["kind"] != "ConfigMap"} == {
        "ServiceAccount": "finetune",
        **({"JobSet": "other"} if wrap else {"Job": "other", "Service": "other"}),
    }


def test_the_first_pod_is_found_by_what_kubernetes_tells_each() -> None:
    """By the labels that the Job's controller and JobSet's give it, so that no name is written twice."""
    told = {}
    for folder in ("overlays/multi-node", "overlays/jobset"):
        variables = {each["name"]: each for each in kube.pod(kube.overlay(folder))["containers"][0]["env"]}
        assert variables["PET_MASTER_ADDR"]["value"] == "$(JOB_NAME)-0.$(SERVICE)"
        told[folder] = [variables[name]["valueFrom"]["fieldRef"]["fieldPath"] for name in ("JOB_NAME", "SERVICE")]
    job, jobset = "metadata.labels['batch.kubernetes.io/job-name']", "metadata.labels['jobset.sigs.k8s.io/jobset-name']"
    assert told == {"overlays/multi-node": [job, job], "overlays/jobset": [job, jobset]}


@pytest.mark.parametrize("cache", CACHES)
def test_the_pod_may_use_what_its_volumes_may_hold(tmp_path: Path, cache: str) -> None:
    """On the node's disk, and in memory: beyond either the pod is killed."""
    spec = kube.pod(kube.layered(tmp_path, "base", (cache,) if cache else ()))
    limits, requests = (spec["containers"][0]["resources"][what] for what in ("limits", "requests"))
    disk = [each["emptyDir"] for each in spec["volumes"] if "emptyDir" in each]

    held = sum(kube.size(each["sizeLimit"]) for each in disk if each.get("medium") != "Memory")

    assert limits == requests
    assert held < kube.size(limits["ephemeral-storage"]) <= held + 2 * 2**30
    assert [kube.size(each["sizeLimit"]) for each in disk if each.get("medium") == "Memory"] == [8 * 2**30]


def test_what_is_to_be_edited_says_so_in_a_comment() -> None:
    """So that `grep -rn EDIT k8s` lists it all, and nothing else has the word."""
    for path in sorted((ROOT / "k8s").rglob("*.yaml")):
        for line in path.read_text().splitlines():
            assert "EDIT" not in line.partition("#")[0], f"{path}: {line}"
        assert list(yaml.safe_load_all(path.read_text())), path
