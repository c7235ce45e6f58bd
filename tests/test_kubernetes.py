"""The manifests under k8s/ on a real cluster: its Job controller, its evictions, its names for pods.

KUBECONFIG names the cluster, KUBE_TEST_IMAGE the job's image, which its nodes have or can pull. What needs a disk that
outlives a pod takes one of the default storage class; where there is none and the cluster is of one node only,
KUBE_TEST_DIR may name a directory on that node that everybody may write.
"""

import base64
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import kube
import pytest
from conftest import tiny_config
from namespaces import Namespace, namespace

from job import config

IMAGE, CLUSTER, FOLDER = (os.environ.get(name, "") for name in ("KUBE_TEST_IMAGE", "KUBECONFIG", "KUBE_TEST_DIR"))
SPEC = "/spec/template/spec"
CONTAINER = f"{SPEC}/containers/0"
LITTLE = {"cpu": "20m", "memory": "256Mi", "ephemeral-storage": "100Mi"}
ENOUGH = {"cpu": "500m", "memory": "3Gi", "ephemeral-storage": "2Gi"}
PATIENCE = 600.0  # seconds for a tiny run on a busy node that must pull the image first
SHORT = 300.0  # for what only starts python, four times with growing pauses
LONG: dict[str, dict[str, object]] = {  # enough steps to be in their midst when the pod is evicted
    "train": {"max_steps": 800, "eval_every": 800, "log_every": 50},
    "checkpoint": {"every_steps": 50},
}

Step = tuple[str, str, object]


def job(folder: Path, name: str, *steps: Step, base: str = "base", needs: kube.Object = LITTLE) -> list[kube.Object]:
    """The objects of a run that needs no GPU, with further changes of its Job."""
    settings = folder / "run" / "run.yaml"
    settings.parent.mkdir(exist_ok=True)
    if not settings.exists():
        settings.write_text("run: {}\n")
    own = ("replace", f"{CONTAINER}/image", IMAGE or "finetune-job:test")
    little = ("replace", f"{CONTAINER}/resources", {"requests": needs, "limits": {**needs, "cpu": "2"}})
    held = {"name": "finetune", "behavior": "replace", "files": ["run.yaml"]}
    renamed = kube.patch("Job|Service", ("replace", "/metadata/name", name), rename=True)
    patches = [kube.patch("Job", own, little, *steps), renamed]
    return kube.layered(folder, base, configMapGenerator=[held], patches=patches)


def ends(script: str) -> Step:
    """The pod runs this shell script in the job's place."""
    return ("add", f"{CONTAINER}/command", ["sh", "-c", script])


def stored() -> list[Step]:
    """The pod has the disk that outlives it."""
    return [
        ("add", f"{SPEC}/volumes/-", {"name": "store", "persistentVolumeClaim": {"claimName": "store"}}),
        ("add", f"{CONTAINER}/volumeMounts/-", {"name": "store", "mountPath": "/store"}),
    ]


def together(name: str) -> Step:
    """All pods of a Job on one node: the disk can be mounted there only."""
    ours = {"matchLabels": {"batch.kubernetes.io/job-name": name}}
    near = {"topologyKey": "kubernetes.io/hostname", "labelSelector": ours}
    return ("add", f"{SPEC}/affinity", {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [near]}})


def disk(name: str) -> list[kube.Object]:
    """A claim of 1 GiB, and with KUBE_TEST_DIR the volume for it."""
    request = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "store"}, "spec": request}
    if not FOLDER:
        return [claim]
    given = {
        "accessModes": ["ReadWriteOnce"],
        "capacity": {"storage": "1Gi"},
        "persistentVolumeReclaimPolicy": "Retain",
        "hostPath": {"path": FOLDER},
        "claimRef": {"namespace": name, "name": "store"},
    }
    claim["spec"] = {**request, "storageClassName": "", "volumeName": name}
    return [{"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": given}, claim]


def packed(name: str, folder: Path) -> kube.Object:
    """The files of a folder as a ConfigMap."""
    data = {path.name: base64.b64encode(path.read_bytes()).decode() for path in folder.iterdir() if path.is_file()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "binaryData": data}


def seed(folder: Path, place: str) -> list[kube.Object]:
    """The Job that puts the model and the data where the runs find them."""
    parts = ("model", "data")
    volumes = [("add", f"{SPEC}/volumes/-", {"name": each, "configMap": {"name": each}}) for each in parts]
    mounts = [("add", f"{CONTAINER}/volumeMounts/-", {"name": each, "mountPath": f"/seed/{each}"}) for each in parts]
    script = "; ".join(f"mkdir -p {place}/{each} && cp -L /seed/{each}/* {place}/{each}/ || exit 1" for each in parts)
    return job(folder, "seed", ends(script), *stored(), *volumes, *mounts)


def settings(folder: Path, model: Path, place: str, run: str, **changes: dict[str, object]) -> Path:
    """The config of a run as its pod sees the world; the data lie beside it."""
    folder.mkdir(exist_ok=True)
    data: dict[str, object] = {f"{split}": [f"{place}/data/{split}.jsonl"] for split in ("train", "eval")}
    told: dict[str, object] = {"url": f"file://{place}/{run}", "cache": "/cache/finetune"}
    return tiny_config(folder, model, run=told, model={"base": f"file://{place}/model"}, data=data, **changes)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    if not (CLUSTER and IMAGE):
        pytest.skip("needs a cluster (KUBECONFIG) and the job's image on it (KUBE_TEST_IMAGE)")
    with namespace(tmp_path_factory.mktemp("cluster") / "pods.json") as made:
        yield made


@pytest.fixture(scope="module")
def begun(cluster: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Namespace:
    """Jobs that end with each status, all started at once, for most of the time they wait."""
    folder = tmp_path_factory.mktemp("begun")
    for status in (0, 1, 75):
        cluster.apply(job(folder, f"one-{status}", ends(f"exit {status}")))
        cluster.apply(job(folder, f"two-{status}", ends(f"exit {status}"), base="overlays/multi-node"))
    cluster.apply(job(folder, "one-64", needs=ENOUGH))  # the job itself, whose config lacks everything
    cluster.apply(job(folder, "two-64", ends("[ $JOB_COMPLETION_INDEX = 0 ] || exit 64"), base="overlays/multi-node"))
    return cluster


@pytest.fixture(scope="module")
def store(cluster: Namespace, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[str]:
    """Where pods find the model and the data, on a disk that stays."""
    classes = [each["metadata"].get("annotations", {}) for each in cluster.get("storageclass")["items"]]
    if not FOLDER and not any(each.get("storageclass.kubernetes.io/is-default-class") == "true" for each in classes):
        pytest.skip("needs a default storage class or, on a cluster of one node, KUBE_TEST_DIR")
    folder, place = tmp_path_factory.mktemp("seed"), f"/store/{cluster.name}"
    data = settings(folder / "data", tiny_model, place, "any").parent
    cluster.apply([*disk(cluster.name), packed("model", tiny_model), packed("data", data), *seed(folder, place)])
    assert cluster.ended("seed", SHORT)[0] == "Complete", cluster.logs("seed")
    yield place
    if FOLDER:  # what is in it is for its owner to remove
        cluster.kubectl("delete", "persistentvolume", cluster.name, "--wait=false")


def test_what_is_sent_to_the_cluster_is_valid_and_restricted(tmp_path: Path, tiny_model: Path) -> None:
    """Without a cluster: the jobs of these tests are held to what the API server would say."""
    kept = [*job(tmp_path, "pair", *stored(), together("pair"), base="overlays/multi-node"), *disk("n")]
    for objects in (seed(tmp_path, "/store/n"), kept, [packed("model", tiny_model)]):
        assert [fault for version in ("1.34", "1.36") for fault in kube.misfits(objects, version)] == []
    assert list(kube.dangling(kept)) == []
    assert list(kube.unrestricted(kube.pod(kept))) == []
    held = packed("model", tiny_model)["binaryData"].values()
    assert sum(map(len, held)) < 1 << 20  # what a ConfigMap may hold
    read = config.read(
        settings(tmp_path / "run", tiny_model, "/store/n", "any", **LONG), ["checkpoint.grace_seconds=110"]
    )
    assert (read.run.url, read.model.base) == ("file:///store/n/any", "file:///store/n/model")
    assert (read.train.max_steps, read.checkpoint.every_steps) == (800, 50)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["base", "overlays/multi-gpu", "overlays/multi-node"])
def test_the_server_accepts_each_overlay_without_a_warning(cluster: Namespace, folder: str) -> None:
    """Not even one of pod security, which it gives for a Job and enforces for its pods only."""
    cluster.apply(kube.overlay(folder), "--dry-run=server", "--warnings-as-errors")


@pytest.mark.slow
def test_the_namespace_refuses_other_pods(cluster: Namespace) -> None:
    """So that the other tests show that ours are restricted."""
    said = cluster.kubectl("run", "bare", f"--image={IMAGE or 'x'}", check=False)

    assert 'violates PodSecurity "restricted' in said


@pytest.mark.slow
@pytest.mark.parametrize("pods", ["one", "two"])
@pytest.mark.parametrize(
    ("status", "ending"),
    [(0, ("Complete", "")), (1, ("Failed", "BackoffLimitExceeded")), (64, ("Failed", "PodFailurePolicy"))],
)
def test_a_job_ends_as_the_status_says(begun: Namespace, pods: str, status: int, ending: tuple[str, str]) -> None:
    """Done is done, a permanent failure of any pod ends it at once, others are counted, in all pods together."""
    kind, why = begun.ended(f"{pods}-{status}", SHORT)

    assert kind == ending[0]
    assert why == ending[1] or not ending[1]
    least = {0: 1, 1: 4, 64: 1}[status]
    assert least <= len(begun.pods(f"{pods}-{status}")) <= least + (pods == "two")


@pytest.mark.slow
@pytest.mark.parametrize("pods", ["one", "two"])
def test_a_request_to_stop_never_counts_and_is_waited_for_by_each_pod_for_itself(begun: Namespace, pods: str) -> None:
    """After 10 seconds, and then 20; by the failures of two pods together it would be 20, and then 80."""
    name, count = f"{pods}-75", {"one": 1, "two": 2}[pods]

    begun.until(lambda: len(begun.pods(name)) >= 3 * count, SHORT, name)

    born = sorted(each["metadata"]["creationTimestamp"] for each in begun.pods(name))
    second, third = (datetime.fromisoformat(born[at]) for at in (count, 3 * count - 1))
    assert (third - second).total_seconds() < 60
    state = begun.get("job", name)["status"]
    assert not state.get("failed")
    assert not [each for each in state.get("conditions", []) if each["type"] == "Failed"]


@pytest.mark.slow
def test_a_run_whose_pod_is_evicted_goes_on_in_the_next(
    cluster: Namespace, store: str, tmp_path: Path, tiny_model: Path
) -> None:
    """It saves, ends with 75, and does not count; the next pod begins with what is safe."""
    settings(tmp_path / "run", tiny_model, store, "evicted", **LONG)
    cluster.apply(job(tmp_path, "evicted", *stored(), needs=ENOUGH))
    cluster.until(lambda: "sealed" in cluster.logs("evicted"), PATIENCE, "evicted")
    first = cluster.pods("evicted")[0]["metadata"]["name"]

    cluster.evict(first)

    assert cluster.ended("evicted", PATIENCE)[0] == "Complete", cluster.logs("evicted")
    assert not cluster.get("job", "evicted")["status"].get("failed")
    assert "going on after step" in cluster.logs("evicted")
    last = cluster.seen(first)[-1]["status"]
    assert last["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 75
    assert [each["reason"] for each in last["conditions"] if each["type"] == "DisruptionTarget"] == [
        "EvictionByEvictionAPI"
    ]


@pytest.mark.slow
def test_two_pods_find_each_other_and_do_one_run(
    cluster: Namespace, store: str, tmp_path: Path, tiny_model: Path
) -> None:
    """By the names that the headless Service gives them."""
    served = cluster.get("endpointslices", "--namespace=kube-system", "--selector=kubernetes.io/service-name=kube-dns")
    if not any(each.get("endpoints") for each in served["items"]):
        pytest.skip("needs a cluster that resolves names (a Service kube-dns with endpoints)")
    settings(tmp_path / "run", tiny_model, store, "pair")

    cluster.apply(job(tmp_path, "pair", *stored(), together("pair"), base="overlays/multi-node", needs=ENOUGH))

    assert cluster.ended("pair", PATIENCE)[0] == "Complete", cluster.logs("pair")
    assert "node 1 of 2 is here (pair-1)" in cluster.logs("pair")
    assert "training as node 1 of 2" in cluster.logs("pair")
