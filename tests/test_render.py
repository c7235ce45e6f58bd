"""A run's own files for a cluster, made from the templates."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import kube
import pytest
import yaml
from conftest import ROOT

Job = Callable[..., subprocess.CompletedProcess[str]]
PRESET = ROOT / "configs" / "qwen3-8b-qlora-24gb.yaml"
IMAGE = "registry.example.com/me/job@sha256:" + "0" * 64


def script(job: Job, *arguments: object) -> str:
    done = job("render", "slurm", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(job: Job, *arguments: object) -> list[kube.Object]:
    done = job("render", "k8s", *arguments, "--image", IMAGE)
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    assert not list(kube.dangling(made))
    assert not [misfit for version in (kube.VERSIONS[0], kube.VERSIONS[-1]) for misfit in kube.misfits(made, version)]
    return made


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_a_batch_script_is_the_template_with_what_was_told(
    nodes: int, gpus: int, job: Job, tmp_path: Path, tiny_run: Callable[..., Path]
) -> None:
    """Name, nodes, GPUs, time and config are in their places, and the shell can read it."""
    config = tiny_run(train={"global_batch_size": 64})

    made = script(job, config, "--nodes", nodes, "--gpus", gpus, "--time", "4:00:00")

    (tmp_path / "made.sbatch").write_text(made)
    subprocess.run(["bash", "-n", tmp_path / "made.sbatch"], check=True)
    told = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", made, re.MULTILINE))
    expected = {"job-name": "tiny", "nodes": str(nodes), "gpus-per-node": str(gpus), "time": "4:00:00"}
    expected |= {"cpus-per-task": str(8 * max(1, gpus)), "mem": f"{64 * max(1, gpus)}G"}
    assert {name: told[name] for name in expected} == expected
    assert f"CONFIG=${{1:-{config}}} " in made
    assert "exec bash" not in made


def test_a_container_is_given_the_folders_that_the_config_names(
    job: Job, tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """And its own; each once, with what is below it; what is done is that of the template."""
    store, checkout = tmp_path / "lustre" / "runs", (ROOT / ".smoke" / "data" / "eval.jsonl").as_uri()
    config = tmp_path / "mine" / "run.yaml"
    config.parent.mkdir()
    tiny_run(run={"url": store.as_uri()}, data={"eval": [checkout]}).rename(config)
    base = yaml.safe_load(config.read_text())["model"]["base"]
    (tmp_path / "train.jsonl").rename(config.parent / "train.jsonl")
    config.write_text(config.read_text().replace(f"{tmp_path}/train.jsonl", f"{config.parent}/data/train.jsonl"))

    made = script(job, config, "--containers", "apptainer", "--image", "job.sif")

    mounted = re.findall(r"^MOUNTS=\"(.*?)\"", made, re.MULTILINE)[0].split()
    assert mounted == sorted([base, str(store), str(config.parent)])
    assert re.search(rf"^IMAGE={tmp_path}/job.sif +#", made, re.MULTILINE)
    assert re.search(r"^WITH=apptainer +#", made, re.MULTILINE)
    template = (ROOT / "slurm" / "train.sbatch").read_text()
    assert made[made.index("say() {") :] == template[template.index("say() {") :]


def test_what_is_left_to_the_user_is_said(job: Job, tiny_run: Callable[..., Path]) -> None:
    """Line by line, beside the script and not in it."""
    done = job("render", "slurm", tiny_run())

    marked = [line for line in done.stdout.splitlines() if "# EDIT" in line and not line.startswith("IMAGE=")]
    assert marked
    assert all(f"as the template has it: {line}" in done.stderr for line in marked)


@pytest.mark.parametrize(
    "components", [(), ("spot", "s3-secret"), ("jobset",), ("spot", "workload-identity", "jobset")]
)
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("gpus", [0, 4])
def test_objects_are_those_of_the_templates_with_what_was_told(
    nodes: int, gpus: int, components: tuple[str, ...], job: Job
) -> None:
    """Valid for the oldest and the newest Kubernetes, with the run's name, image, GPUs, nodes and config."""
    made = objects(job, PRESET, "--nodes", nodes, "--gpus", gpus, *(w for name in components for w in ("--with", name)))

    (run,) = kube.jobs(made)
    pod = kube.pod(made)
    container = pod["containers"][0]
    assert run["metadata"]["name"] == "qwen3-8b-qlora-24gb"
    assert container["image"] == IMAGE
    assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus
    assert run["spec"]["completions"] == run["spec"]["parallelism"] == nodes
    environ = {each["name"]: each.get("value") for each in container.get("env", [])}
    assert environ.get("PET_NNODES", "1") == str(nodes)
    config = kube.only(made, "ConfigMap")
    assert config["data"]["run.yaml"] == PRESET.read_text()
    assert config["metadata"]["name"] in [v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v]
    assert ("JobSet" in {each["kind"] for each in made}) == ("jobset" in components)
    assert pod["terminationGracePeriodSeconds"] == (15 if "spot" in components else 120)


@pytest.mark.parametrize(
    ("name", "label"),
    [("support.bot", "support-bot"), ("7b.x", "run-7b-x"), ("a" * 39 + "." + "b" * 9, "a" * 39)],
)
def test_a_runs_name_becomes_one_that_kubernetes_takes(name: str, label: str, job: Job, tmp_path: Path) -> None:
    """For Services, and for the pods of JobSets, whose names are longer."""
    config = tmp_path / "run.yaml"
    config.write_text(PRESET.read_text().replace("name: qwen3-8b-qlora-24gb", f"name: {name}"))

    made = objects(job, config, "--nodes", 2)

    assert kube.only(made, "Job")["metadata"]["name"] == kube.only(made, "Service")["metadata"]["name"] == label


def test_a_cache_is_as_large_as_it_says_also_without_gpus(job: Job) -> None:
    """In whatever order the components are named."""
    made = objects(job, PRESET, "--gpus", 0, "--with", "cache-pvc", "--with", "cpu")

    (cache,) = [volume for volume in kube.pod(made)["volumes"] if volume["name"] == "cache"]
    assert cache == {"name": "cache", "persistentVolumeClaim": {"claimName": "qwen3-8b-qlora-24gb-cache"}}


def test_a_disk_that_pods_do_not_have_is_said(job: Job, tiny_run: Callable[..., Path]) -> None:
    """A path of this machine means nothing there."""
    done = job("render", "k8s", tiny_run(), "--image", IMAGE)

    assert done.returncode == 0
    assert re.search(r"file:///\S+/run is on a disk, which the pods have only if you mount it", done.stderr)
    assert "run.cache" in done.stderr


WRONG = {
    "time": (("slurm", "--time", "soon"), "such as 24:00:00"),
    "short": (("slurm", "--time", "4:59"), "a start needs 5 at least"),
    "image": (("slurm", "--image", "x.sif"), "--containers and --image belong together"),
    "sif": (("slurm", "--containers", "apptainer"), "--containers and --image belong together"),
    "space": (("slurm", "--containers", "apptainer", "--image", "my job.sif"), "has a space or a sign in it"),
    "batch": (("slurm", "--gpus", "3"), "global_batch_size 16 is not micro_batch_size 2 x 3 processes"),
    "component": (("k8s", "--image", "x", "--with", "spots"), "there are cache-ephemeral"),
    "cpu": (("k8s", "--image", "x", "--with", "cpu"), "use --gpus 0 alone"),
    "caches": (("k8s", "--image", "x", "--with", "cache-pvc", "--with", "cache-nvme"), "a run has one cache"),
    "rdma": (("k8s", "--image", "x", "--with", "rdma"), "--with rdma is for several nodes"),
    "pvc": (("k8s", "--image", "x", "--nodes", "2", "--with", "cache-pvc"), "a disk of one node"),
    "no image": (("k8s",), "Missing option '--image'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused(name: str, job: Job) -> None:
    """With the permanent status, and nothing printed that somebody could submit."""
    (kind, *arguments), told = WRONG[name]

    done = job("render", kind, PRESET, *arguments)

    assert done.returncode == 64
    assert told in " ".join(done.stderr.split())
    assert not done.stdout


@pytest.mark.parametrize("arguments", [("slurm",), ("k8s", "--image", "x")])
def test_an_installation_without_templates_says_so(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """The image has none."""
    shutil.copy(ROOT / "entrypoint.py", tmp_path)
    line = [sys.executable, tmp_path / "entrypoint.py", "render", arguments[0], PRESET, *arguments[1:]]

    done = subprocess.run(
        line, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 64, done.stderr
    assert "render reads the templates beside entrypoint.py" in done.stderr
