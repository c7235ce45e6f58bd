"""What the code, the image, Kubernetes, Slurm, systemd and the pages must say alike."""

import itertools
import re
import tomllib

import kube
import pytest
import yaml
from conftest import ROOT

from job import alive, cluster, config, errors, inputs

OVERLAYS = ["base", "overlays/multi-gpu", "overlays/multi-node", "overlays/jobset"]
RETRIES = 3  # failures that a scheduler forgives
PORT = 29400
PLACES = ("k8s", "slurm", "spot")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


FILES = sorted(str(path.relative_to(ROOT)) for place in PLACES for path in (ROOT / place).rglob("*") if path.is_file())


def one(pattern: str, name: str) -> str:
    """What the file `name` says at the only place that looks so."""
    found = set(re.findall(pattern, text(name), re.MULTILINE))
    assert len(found) == 1, (name, pattern, found)
    return str(found.pop())


def sky() -> kube.Object:
    loaded: kube.Object = yaml.safe_load(text("spot/skypilot.yaml"))
    return loaded


def test_a_job_ends_as_its_exit_statuses_say() -> None:
    """Permanent failures at once, requests to stop never, the rest after three more; in several pods as in one."""
    for folder in ("base", "overlays/multi-gpu", "overlays/multi-node"):
        (job,) = kube.jobs(kube.overlay(folder))
        rules = [
            (rule["action"], rule.get("onExitCodes", {}).get("values") or rule["onPodConditions"])
            for rule in job["spec"]["podFailurePolicy"]["rules"]
        ]

        assert rules == [
            ("FailJob", [errors.PERMANENT]),
            ("Ignore", [errors.AGAIN]),
            ("Ignore", [{"type": "DisruptionTarget", "status": "True"}]),
        ]
        assert job["spec"]["backoffLimit"] == RETRIES
        assert job["spec"]["podReplacementPolicy"] == "Failed"
        per_index = {name: job["spec"].get(name) for name in ("backoffLimitPerIndex", "maxFailedIndexes")}
        assert list(per_index.values()) == ([RETRIES, 0] if "multi-node" in folder else [None, None])


@pytest.mark.parametrize(
    ("message", "action"),
    [
        (
            "Container finetune for pod n/p failed with exit code 64 matching FailJob rule at index 0",
            "FailJobSet",
        ),
        (
            "Container finetune for pod n/p failed with exit code 75 matching FailJob rule at index 1",
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
        (
            "Pod n/p has condition DisruptionTarget matching FailJob rule at index 2",
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
        ("Whatever a later version says", None),
    ],
)
def test_a_jobset_tells_the_reasons_of_a_failed_job_apart(message: str, action: str | None) -> None:
    """By the message of Kubernetes' Job controller; one that it does not know counts as any failure."""
    objects = kube.overlay("overlays/jobset")
    policy, (job,) = kube.only(objects, "JobSet")["spec"]["failurePolicy"], kube.jobs(objects)

    matching = [
        rule["action"]
        for rule in policy["rules"]
        if any(re.fullmatch(pattern, message) for pattern in rule["onJobFailureMessagePatterns"])
    ]

    assert matching == ([action] if action else [])
    assert policy["maxRestarts"] == RETRIES
    assert job["spec"]["backoffLimit"] == 0
    assert {rule["action"] for rule in job["spec"]["podFailurePolicy"]["rules"]} == {"FailJob"}


def test_the_other_schedulers_know_the_statuses() -> None:
    """Slurm's script, systemd's unit with its own, SkyPilot and dstack."""
    assert one(r"^case \$status in (\d+) \| \d+\)", "slurm/train.sbatch") == str(errors.DONE)
    assert one(r"^case \$status in \d+ \| (\d+)\)", "slurm/train.sbatch") == str(errors.PERMANENT)
    assert one(r"\[ \$status -ne (\d+) \]", "slurm/train.sbatch") == str(errors.AGAIN)
    unit = dict(re.findall(r"^(\w+)=(.*)$", text("spot/finetune.service"), re.MULTILINE))
    assert unit["RestartPreventExitStatus"] == f"{errors.DONE} {errors.PERMANENT}"
    assert unit["SuccessExitStatus"] == unit["RestartForceExitStatus"] == str(errors.AGAIN)
    assert re.findall(r'^"exited (\d+)"\)', text("spot/again.sh"), re.MULTILINE) == [
        str(errors.AGAIN), str(errors.DONE), str(errors.PERMANENT),
    ]  # fmt: skip
    assert sky()["resources"]["job_recovery"]["recover_on_exit_codes"] == [errors.AGAIN]
    assert one(r"-ne (\d+) \] \|\| exit", "spot/dstack.yml") == str(errors.PERMANENT)
    assert one(r"-eq (\d+) \]", "spot/dstack.yml") == str(errors.AGAIN)


def test_a_failure_is_forgiven_as_often_everywhere() -> None:
    """Three times; then somebody has to look."""
    assert {
        int(one(r"^RETRIES=(\d+)", "slurm/train.sbatch")),
        int(one(r"^RETRIES=(\d+)", "spot/again.sh")),
        int(one(r"\$failures -le (\d+)", "spot/dstack.yml")),
        sky()["resources"]["job_recovery"]["max_restarts_on_errors"],
    } == {RETRIES}


def told_grace(arguments: list[str]) -> int:
    """The seconds that the job is told, as an argument after --set."""
    told = [word for before, word in itertools.pairwise(arguments) if before == "--set"]
    return int(dict(word.split("=") for word in told)["checkpoint.grace_seconds"])


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize(("components", "given", "end"), [((), 120, 10), (("spot",), 15, 5)])
def test_the_job_is_told_less_time_than_kubernetes_gives(
    overlay: str, components: tuple[str, ...], given: int, end: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is left is for the log, and for the end of the container."""
    more = (*components, "jobset") if overlay == "overlays/jobset" else components
    below = "overlays/multi-node" if overlay == "overlays/jobset" else overlay
    pod = kube.pod(kube.layered(tmp_path_factory.mktemp("k8s"), below, more))

    assert pod["terminationGracePeriodSeconds"] == given
    assert told_grace(pod["containers"][0]["args"]) == given - end
    assert end < given - inputs.AT_THE_END


def test_the_job_is_told_less_time_than_slurm_and_systemd_give() -> None:
    """Docker is given as long as systemd gives docker."""
    warned = int(one(r"^#SBATCH --signal=B:USR1@(\d+)", "slurm/train.sbatch"))
    assert int(one(r"^#SBATCH --signal=B:USR1@(\d+)", "slurm/train-multinode.sbatch")) == warned
    assert int(one(r"^#SBATCH --signal=B:USR1@(\d+)", "slurm/sweep.sbatch")) == warned
    assert int(one(r"^GRACE=(\d+)", "slurm/train.sbatch")) == warned - 10
    stop = int(one(r"^TimeoutStopSec=(\d+)", "spot/finetune.service"))
    assert int(one(r"--stop-timeout (\d+)", "spot/finetune.service")) == stop
    assert int(one(r"--set checkpoint.grace_seconds=(\d+)", "spot/finetune.service")) == stop - 10
    assert int(one(r"--stop-timeout (\d+)", "spot/skypilot.yaml")) == stop


def test_the_images_places_are_those_that_are_mounted() -> None:
    """The config, the cache, scratch, and the file that says that the job lives."""
    dockerfile = text("Dockerfile")
    mounts = {mount["mountPath"] for mount in kube.pod(kube.overlay("base"))["containers"][0]["volumeMounts"]}
    run = text("spot/finetune.service")

    assert mounts == {"/etc/finetune", "/cache", "/tmp", "/dev/shm"}
    assert re.search(r"mkdir -p .*/etc/finetune", dockerfile)
    assert "HOME=/cache XDG_CACHE_HOME=/cache" in dockerfile
    for name in ("spot/finetune.service", "spot/skypilot.yaml"):
        assert "target=/cache" in text(name), name
        assert "target=/etc/finetune/run.yaml,readonly" in text(name), name
        assert "--read-only --tmpfs /tmp --shm-size 8g" in text(name), name
    assert run.count("/etc/finetune/run.yaml") >= 2
    assert kube.pod(kube.overlay("base"))["containers"][0]["args"][:2] == ["run", "/etc/finetune/run.yaml"]
    (shm,) = [v["emptyDir"] for v in kube.pod(kube.overlay("base"))["volumes"] if v["name"] == "shm"]
    assert shm == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert yaml.safe_load(text("spot/dstack.yml"))["resources"]["shm_size"] == "8GB"


def test_the_images_program_is_the_one_that_is_started() -> None:
    """By its entrypoint, and by who names it himself."""
    dockerfile = text("Dockerfile")

    assert 'ENTRYPOINT ["python", "/app/entrypoint.py"]' in dockerfile
    assert "/opt/job/bin/python /app/entrypoint.py" in text("slurm/train.sbatch")
    assert "python -m venv /opt/job" in dockerfile.replace("python3", "python")
    assert "/app/entrypoint.py" in text("spot/dstack.yml")


def test_the_user_is_the_same_everywhere() -> None:
    """And of the group that may write: OpenShift gives it any user."""
    user, group = one(r"^USER (\d+:\d+)$", "Dockerfile").split(":")
    who = kube.pod(kube.overlay("base"))["securityContext"]

    assert who["runAsUser"] == int(user)
    assert who["runAsGroup"] == int(group)
    for name in ("spot/finetune.service", "spot/skypilot.yaml"):
        assert f"--owner={user} --group={group} --mode=0770" in text(name), name
    assert f"-o {user} -g {group} -m 770 /cache" in text("Dockerfile")


def test_the_sign_of_life_is_looked_for_where_it_is() -> None:
    """Not before it can be there, and with patience for several that are late."""
    path = one(r"FINETUNE_ALIVE=(\S+)", "Dockerfile")
    probe = kube.pod(kube.overlay("base"))["containers"][0]["livenessProbe"]
    minutes = int(one(r'find \\"\$FINETUNE_ALIVE\\" -mmin -(\d+)', "Dockerfile"))

    assert f"find {path} -mmin -{minutes}" in probe["exec"]["command"][-1]
    assert probe["initialDelaySeconds"] >= 60
    assert minutes * 60 > 5 * alive.BEAT_SECONDS
    assert '"FINETUNE_ALIVE"' in text("entrypoint.py")


def test_a_pod_knows_its_place() -> None:
    """By the variables that the job reads, and no others."""
    container = kube.pod(kube.overlay("overlays/multi-node"))["containers"][0]
    environ = {each["name"]: each.get("value", "") for each in container["env"]}
    environ |= {"JOB_COMPLETION_INDEX": "1", "PET_MASTER_ADDR": "run-0.run"}  # as Kubernetes makes them

    node = cluster.discover(environ)

    assert (node.rank, node.count, node.first, node.port) == (1, int(environ["PET_NNODES"]), "run-0.run", PORT)
    assert "PET_" not in "".join(name for name in environ if f'"{name}"' not in text("job/cluster/node.py"))
    sky_names = set(re.findall(r"--env (PET_\w+)=", text("spot/skypilot.yaml")))
    assert sky_names == {"PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR"}


def test_the_images_name_is_the_projects_version() -> None:
    """In the Makefile, in all that start it, and on the command line."""
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    image = f"finetune-job:{version}"

    assert "IMAGE ?= finetune-job:$(VERSION)" in text("Makefile")
    assert f'version_option("{version}"' in text("job/cli/program.py")
    assert one(r"newTag: (\S+)", "k8s/base/kustomization.yaml") == version
    assert yaml.safe_load(text("spot/dstack.yml"))["image"] == image
    assert sky()["envs"]["IMAGE"] == image
    assert f"IMAGE={image}\n" in text("spot/user-data.yaml")


@pytest.mark.parametrize("name", FILES)
def test_a_key_that_is_set_exists(name: str) -> None:
    """A typo would end every start with 64."""
    keys = set(config.all_keys())

    assert set(re.findall(r"""--set[ =,]+"?([a-z_]+\.[a-z_]+)=""", text(name))) <= keys
    assert set(re.findall(r"value: ([a-z]+\.[a-z_]+)=", text(name))) <= keys


def test_the_keys_of_a_sweep_exist() -> None:
    """Each line is a name and what is set for it."""
    lines = [line.split() for line in text("slurm/sweep.txt").splitlines()]

    assert len({name for name, *_ in lines}) == len(lines) > 1
    assert {change.partition("=")[0] for _, *changes in lines for change in changes} <= set(config.all_keys())
    assert set(re.findall(r'--set "(\w+\.\w+)=', text("slurm/sweep.sbatch"))) == {"run.name", "run.url"}


@pytest.mark.parametrize("place", PLACES)
def test_what_a_user_must_change_is_marked(place: str) -> None:
    """One word to search for; what looks like a placeholder has it in its line, or the line before."""
    for name in [name for name in FILES if name.startswith(place)]:
        lines = text(name).splitlines()
        for before, line in zip(["", *lines], lines, strict=False):
            if re.search(r"your-bucket|registry\.example|111122223333", line) and not line.lstrip().startswith("#"):
                assert "EDIT" in line or "EDIT" in before, f"{name}: {line}"
    assert any("EDIT" in text(name) for name in FILES if name.startswith(place))


@pytest.mark.parametrize(
    "sentence",
    [
        r"has 110 of the 120 seconds",
        r"spot: 10 of 15",
        r"USR1, 120 s",
        r"\b120 s, of which it is told 110\b",
        r"\| … with 1 or by a signal .* requeued 3 times",
        r"\| ends with 1, or is killed .* three times",
        r"\| anything else \| .* three times",
        r"\*\*User\.\*\* 10001 in group 0",
        r"touches `/tmp/alive` every ten seconds \(`FINETUNE_ALIVE`\)",
    ],
)
def test_the_page_names_what_is_there(sentence: str) -> None:
    """docs/operations.md says the same numbers and names."""
    assert re.search(sentence, text("docs/operations.md"))


@pytest.mark.parametrize("path", re.findall(r"`((?:k8s|slurm|spot)/[\w./-]+)`", text("docs/operations.md")) or ["none"])
def test_every_file_that_the_page_names_exists(path: str) -> None:
    """A renamed one would leave the page behind."""
    assert (ROOT / path).exists()
