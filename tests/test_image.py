"""The container image, built and run as clusters run it: without rights, on a read-only file system, as any user."""

import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import drivers
import pytest
from conftest import ROOT, need, tiny_config
from image import Image, build, possible
from killing import differences

from job import errors

pytestmark = pytest.mark.slow  # building takes minutes, and what it takes to run is no part of a CI machine
LONG = {
    "train": {"max_steps": 60, "eval_every": 20, "log_every": 5, "warmup": 0},
    "checkpoint": {"every_steps": 10},
    "lora": {"dropout": 0.05},
}
LARGEST = 2_350_000_000  # bytes, with a torch for CPUs and Triton; docs/operations.md lists them
USER = (10001, 0)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    need("what builds images (root, buildah, podman, debootstrap)", possible())
    return build(tmp_path_factory.mktemp("image"))


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Callable[..., tuple[str, ...]]:
    """A folder with a run's config, data and store, and one for its cache: the mounts of a container for `user`."""

    def make(name: str, user: tuple[int, int] = USER) -> tuple[str, ...]:
        folder, cache = tmp_path / name, tmp_path / f"{name}-cache"
        folder.mkdir()
        cache.mkdir()
        config = tiny_config(
            folder, tiny_model, run={"url": "/data/run", "cache": None}, model={"base": "/data/model"}, **LONG
        )
        config.write_text(config.read_text().replace(str(folder), "/data"))
        shutil.copytree(tiny_model, folder / "model")
        _give(folder, user)
        _give(cache, user)
        volumes = {folder: "/data", cache: "/cache", config: "/etc/finetune/run.yaml:ro"}
        return tuple(f"--volume={here}:{there}" for here, there in volumes.items())

    return make


RUN = ("run", "/etc/finetune/run.yaml")


def test_a_run_that_was_stopped_and_started_again_ends_like_one_that_was_not(
    image: Image, place: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    """SIGTERM reaches the job as process 1; it saves, ends with 75, and the next start makes the same weights."""
    undisturbed = image.run(*place("one"), told=RUN)
    assert undisturbed.returncode == 0, undisturbed.stderr
    mounts = place("other")
    first = image.start(tmp_path / "stopped.log", *mounts, told=RUN)
    first.until("step 15/60")
    healthy = first.healthy()

    status = first.stop()
    second = image.run(*mounts, told=RUN)
    third = image.run(*mounts, told=RUN)

    assert healthy
    assert status == errors.AGAIN, first.log.read_text()
    assert second.returncode == 0, second.stderr
    assert "going on after step" in second.stderr
    assert not differences(tmp_path / "one" / "run", tmp_path / "other" / "run")
    assert "done already" in third.stderr
    assert third.returncode == 0
    owners = {(p.stat().st_uid, p.stat().st_gid) for p in (tmp_path / "other").rglob("*")}
    assert owners == {USER}


def test_a_run_ends_well_for_a_user_that_nobody_knows(
    image: Image, place: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    """As on OpenShift: any number, group 0, no line in /etc/passwd; the group may write the image's own cache."""
    stranger = (123456, 0)
    mounts = [mount for mount in place("run", stranger) if not mount.endswith(":/cache")]
    cache = ("--mount=type=volume,source=finetune-test-cache,destination=/cache",)  # begins as a copy of the image's

    try:
        ended = image.run("--user=123456:0", *mounts, *cache, told=RUN)
    finally:
        image.podman("volume", "rm", "finetune-test-cache", check=False)

    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "run" / "done.json").exists()
    asks = "import getpass, torch._dynamo.config as c; print(getpass.getuser(), c.debug_dir_root)"  # asks for a name
    named = image.run("--user=123456:0", "--entrypoint=python", told=("-c", asks))
    assert named.stdout.startswith("job "), named.stderr


@pytest.mark.timeout(1800)  # the image may have to be built first
def test_the_smoke_run_works_in_the_container(image: Image, smol_model: Path, tmp_path: Path) -> None:
    """A real model of 135 million parameters learns real dialogues, with the preset that lies in the image."""
    smoke = tmp_path / ".smoke"
    for folder in (smol_model, smol_model.parent / "data"):
        shutil.copytree(folder, smoke / folder.name)
    _give(tmp_path, USER)
    ended = image.run(f"--volume={tmp_path}:/work", "--workdir=/work", told=("run", "/app/configs/smoke.yaml"))

    assert ended.returncode == 0, ended.stderr
    done = json.loads((smoke / "run" / "done.json").read_text())["training"]
    assert done["loss_after"] < done["loss_before"] - 0.5


def test_a_container_whose_job_hangs_or_is_gone_is_not_healthy(image: Image, tmp_path: Path) -> None:
    """No file, or one that nobody has touched for two minutes, is no sign of life; a young one is."""
    sleeper = image.start(tmp_path / "sleeper.log", "--entrypoint=sleep", "--stop-signal=KILL", told=("300",))
    said = []
    try:
        while not image.podman("ps", "--quiet", "--filter=name=sleeper").stdout:
            time.sleep(0.1)
        for touch in ("true", "touch -d -110sec /tmp/alive", "touch -d -130sec /tmp/alive"):
            image.podman("exec", "sleeper", "sh", "-c", touch)
            said.append(sleeper.healthy())
    finally:
        sleeper.stop()

    assert said == [False, True, False]


def test_a_place_that_cannot_be_written_is_said(image: Image, place: Callable[..., tuple[str, ...]]) -> None:
    """Without a mount for the cache, on a read-only file system, the status is permanent and the path is named."""
    mounts = [mount for mount in place("run") if not mount.endswith(":/cache")]

    ended = image.run(*mounts, told=RUN)

    assert ended.returncode == errors.PERMANENT, ended.stderr
    assert "/cache" in ended.stderr


def test_nothing_is_in_it_that_no_run_needs(image: Image) -> None:
    """No pip, no tests, no cache, no configuration of who built it, and only files that any user reads.

    Of compilers there is the one that Triton starts, without what it does not read.
    """
    with image.mounted() as root:
        files = {
            p
            for top in ("app", "opt", "usr", "etc", "var", "root", "cache", "tmp", "run")
            for p in (root / top).rglob("*")
        }
        names = {f"/{p.relative_to(root)}" for p in files}
        programs = {p.name for p in files if p.parent.name in ("bin", "sbin")}
        closed = [p for p in files if p.is_relative_to(root / "app") and not p.stat().st_mode & 0o004]
        loose = [p for p in files if not p.is_symlink() and p.is_file() and p.stat().st_mode & 0o022]
        app = sorted(p.name for p in (root / "app").iterdir())

    assert not programs & {"g++", "c++", "clang", "nvcc", "make", "pip", "pip3", "git", "curl"}
    unread = re.compile(r"/(lto1|lib\w*san\.\w+|libpython[\d.]+\.a)$")
    assert not [name for name in names if unread.search(name)]
    assert app == ["LICENSE", "__pycache__", "configs", "entrypoint.py", "job"]
    assert not [
        name for name in names if re.search(r"/(tests|torch/include|ensurepip/_bundled|\.git|\.cache)(/|$)", name)
    ]
    assert not [name for name in names if name.startswith("/opt/") and name.endswith(".a")]
    assert not [name for name in names if name.endswith((".conf.d/pip", "/pip.conf", ".deb", ".env", ".pem.key"))]
    assert not [
        name for name in names if name.startswith(("/root/.c", "/var/lib/apt/lists/", "/var/cache/", "/cache/"))
    ]
    assert not closed
    assert not loose


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The options of a container with a GPU, as far as programs look before they compute."""
    folder = drivers.build(tmp_path_factory.mktemp("drivers"), gpu=True)
    folder.chmod(0o755)
    return f"--volume={folder}:/drivers:ro", f"--volume={ROOT}/tests:/check:ro", "--env=LD_LIBRARY_PATH=/drivers"


@pytest.mark.parametrize(
    ("user", "cards"),
    [("10001:0", ("75", "80", "90", "120")), ("123456:0", ("90",))],
)
def test_the_loss_compiles_and_is_launched_on_every_gpu_that_is_supported(
    image: Image, gpu: tuple[str, ...], user: str, cards: tuple[str, ...]
) -> None:
    """As the image's user and as one that nobody knows, with a read-only root.

    The compiler builds Triton's driver module, which loads; ptxas compiles TRL's loss for each
    compute capability; and Triton's launcher passes it on to libcuda, which here only counts.
    """
    cache = "--mount=type=volume,source=finetune-test-kernels,destination=/cache"
    options = (f"--user={user}", cache, "--env=TRITON_CACHE_DIR=/cache/triton", "--entrypoint=python")

    try:
        ended = image.run(*options, *gpu, told=("/check/launch_loss_kernels.py", *cards))
    finally:
        image.podman("volume", "rm", "finetune-test-kernels", check=False)

    assert ended.returncode == 0, ended.stderr
    drivers.check_launched([json.loads(line) for line in ended.stdout.splitlines()], cards)


def test_a_container_with_a_gpu_can_compile(
    image: Image, gpu: tuple[str, ...], place: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    """The job tries it before anything is downloaded, and names what is in the way."""
    with image.mounted() as root:
        (torch,) = root.glob("opt/job/lib/python3*/site-packages/torch")
        drivers.write_version(torch, tmp_path / "version.py")  # else the job refuses a torch for CPUs
        version = f"--volume={tmp_path}/version.py:/{torch.relative_to(root)}/version.py:ro"
    gpu = (*gpu, version)
    mounts = place("run")
    without = [mount for mount in mounts if not mount.endswith(":/cache")]
    validate = ("validate", "/etc/finetune/run.yaml")

    good = image.run(*mounts, *gpu, told=validate)
    noexec = image.run(*without, "--tmpfs=/cache:mode=777,noexec", *gpu, told=validate)
    bare = image.run(*mounts, *gpu, "--env=PATH=/opt/job/bin", told=validate)

    assert good.returncode == 0, good.stderr
    assert noexec.returncode == errors.PERMANENT, noexec.stderr
    assert "/cache/finetune-job/triton: that file system is mounted noexec" in noexec.stderr
    assert bare.returncode == errors.PERMANENT, bare.stderr
    assert "no C compiler" in bare.stderr


def test_deepspeed_has_nothing_to_compile_on_a_gpu(image: Image) -> None:
    """What its engine would compile as soon as processes meet is for CPUs; on GPUs it asks for nothing."""
    asks = (
        "import deepspeed.runtime.engine, deepspeed.runtime.zero.stage3; from deepspeed import accelerator; "
        "from deepspeed.comm.torch import build_shm_op as op; print(type(accelerator.get_accelerator()).__name__, op())"
    )

    said = image.run("--env=DS_ACCELERATOR=cuda", "--entrypoint=python", told=("-c", asks))

    assert said.stdout.splitlines()[-1:] == ["CUDA_Accelerator None"], said.stdout + said.stderr


def test_what_nccl_opens_for_infiniband_is_there(image: Image) -> None:
    """The verbs library loads, and so does a provider for each driver that it is told of.

    NCCL opens it by that name, and it opens the provider of each device. Where one of them is
    missing there is no InfiniBand, and NCCL says so only in its log.
    """
    asks = (
        "import ctypes, pathlib; ctypes.CDLL('libibverbs.so.1'); "
        "paths = sorted(pathlib.Path('/usr/lib').glob('*/libibverbs/lib*-rdmav*.so')); "
        "[ctypes.CDLL(str(path)) for path in paths]; "
        "print(*(path.name[3:].rpartition('-')[0] for path in paths)); "
        "print(*(path.read_text() for path in pathlib.Path('/etc/libibverbs.d').iterdir()))"
    )

    said = image.run("--entrypoint=python", told=("-c", asks))

    assert said.returncode == 0, said.stderr
    loaded, _, told = said.stdout.partition("\n")
    wanted = set(re.findall(r"^ *driver (\S+)$", told, re.MULTILINE))
    assert {"mlx5", "efa"} <= wanted  # ConnectX, and AWS
    assert wanted <= set(loaded.split())


def test_every_module_starts_from_bytecode(image: Image) -> None:
    """A read-only start could not keep what it compiles, so it lies there, and no time of a file matters."""
    with image.mounted() as root:
        compiled = list((root / "app").rglob("*.pyc")) + list((root / "opt/job/lib").rglob("torch/nn/**/*.pyc"))
        flags = {int.from_bytes(path.read_bytes()[4:8], "little") for path in compiled}
        sources = {p.name for p in (root / "app").rglob("*.py")}

    assert flags == {1}  # by hash, unchecked: PEP 552
    assert sources <= {re.sub(r"\.cpython-\d+\.pyc$", ".py", p.name) for p in compiled}


def test_the_bill_of_materials_lists_what_is_there_and_all_of_it_is_pinned(image: Image) -> None:
    """Exactly the packages of the environment, each in the version of constraints.txt or of the requirements."""
    with image.mounted() as root:
        there = {
            (_plain(d.metadata["Name"]), d.version)
            for d in importlib.metadata.distributions(
                path=[str(p) for p in root.glob("opt/job/lib/python3*/site-packages")]
            )
        }
        bill = json.loads((root / "opt/job/sbom/python.cdx.json").read_text())
        debian = dict(line.split()[:2] for line in (root / "opt/job/sbom/debian.txt").read_text().splitlines())
        status = (root / "var/lib/dpkg/status").read_text()
    pins: dict[str, str] = {}
    for name in ("constraints.txt", "requirements.txt"):
        found = re.findall(r"^([\w.-]+)==([^\s#]+)", (ROOT / name).read_text(), re.MULTILINE)
        pins |= {_plain(package): version for package, version in found}

    assert {(_plain(each["name"]), each["version"]) for each in bill["components"]} == there
    assert bill["metadata"]["component"]["name"] == "finetune-job"
    assert debian == dict(re.findall(r"^Package: (\S+)\n(?:.+\n)*?Version: (\S+)", status, re.MULTILINE))
    assert not {name: version for name, version in there if pins.get(name) != version.partition("+")[0]}


def test_it_says_what_it_is(image: Image) -> None:
    """Version and revision, a user by number, and a python that is process 1."""
    told = image.inspect()
    config, labels = told["Config"], told["Labels"]

    assert config["User"] == "10001:0"
    assert config["Entrypoint"] == ["python", "/app/entrypoint.py"]
    assert "FINETUNE_ALIVE=/tmp/alive" in config["Env"]
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    assert labels["org.opencontainers.image.revision"].removesuffix("-dirty") == image.revision
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert not [word for word in config["Env"] if re.search("SECRET|TOKEN|PASSWORD|KEY", word)]
    assert told["Size"] < LARGEST, told["Size"]


def test_it_names_the_commit_of_its_last_build(image: Image, tmp_path: Path) -> None:
    """A commit that changes none of its files changes its revision, though every layer is there already."""
    for revision in ("a" * 40, "b" * 40):
        again = build(tmp_path, f"{image.name}-again", revision)
        labels = again.inspect()["Config"]["Labels"]
        again.podman("rmi", again.name)
        assert labels["org.opencontainers.image.revision"] == revision


def _give(folder: Path, user: tuple[int, int]) -> None:
    """Make `user` the owner of a folder and of all in it."""
    for each in (folder, *folder.rglob("*")):
        os.chown(each, *user)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
