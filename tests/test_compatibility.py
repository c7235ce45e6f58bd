"""GPUs and drivers that the installed libraries cannot use are refused before anything is downloaded."""

import importlib.util
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import nvml
import pytest
import shapes
from conftest import S3
from nvml import Card

import entrypoint
from job import cli, cluster, config, errors, inputs, launch, paths, preemption, storage
from job.cluster import Code, read_code
from job.launch import compatibility

FOUND = importlib.util.find_spec("bitsandbytes")
BITSANDBYTES = Path(str(FOUND and FOUND.origin)).parent
TURING = frozenset({(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)})


@pytest.fixture
def torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a torch for CUDA 13.0 whose library was built for the GPUs that bitsandbytes' was."""
    folder = tmp_path / "torch"
    (folder / "lib").mkdir(parents=True)
    (folder / "version.py").write_text("debug = False\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    (folder / "lib" / "libtorch_cuda.so").symlink_to(BITSANDBYTES / "libbitsandbytes_cuda130.so")
    monkeypatch.setattr(compatibility, "_folder", {"torch": folder, "bitsandbytes": BITSANDBYTES}.get)
    return folder


def check(cards: int = 1, environ: dict[str, str] | None = None, **sections: dict[str, object]) -> None:
    launch.check_hardware(shapes.settings(**sections), tuple(map(str, range(cards))), environ or {})


@pytest.mark.parametrize(
    ("version", "expected"),
    [("130", TURING), ("118", frozenset({(6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)}))],
)
def test_a_library_tells_which_gpus_it_was_built_for(version: str, expected: frozenset[tuple[int, int]]) -> None:
    """As bitsandbytes' build script lists them for each CUDA version; without loading it."""
    assert read_code(BITSANDBYTES / f"libbitsandbytes_cuda{version}.so") == Code(expected, frozenset())


def write_library(path: Path, binaries: list[list[tuple[int, int]]]) -> None:
    """Write an ELF file with fat binaries, each with images of these kinds and architectures."""
    code = b""
    for images in binaries:
        body = b""
        for kind, architecture in images:
            body += struct.pack("<HHIQIIHHI", kind, 0, 32, 8, 0, 0, 0, 0, architecture) + bytes(8)
        code += struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body + bytes(4)  # aligned
    names = b"\0.nv_fatbin\0.shstrtab\0"
    table = 64 + len(code) + len(names)
    header = b"\x7fELF\x02".ljust(0x28, b"\0") + struct.pack("<Q", table)
    header = header.ljust(0x3A, b"\0") + struct.pack("<HHH", 64, 3, 2)
    places = [(0, 0, 0), (1, 64, len(code)), (12, 64 + len(code), len(names))]
    sections = b""
    for name, start, size in places:
        entry = struct.pack("<I", name).ljust(0x18, b"\0") + struct.pack("<QQ", start, size)
        sections += entry.ljust(64, b"\0")
    path.write_bytes(header + code + names + sections)


def test_an_architecture_counts_from_half_of_the_fat_binaries_on(tmp_path: Path) -> None:
    """Kernels for features of a single GPU, however many, do not make a library run on it."""
    ptx, cubin = 1, 2
    everywhere = [(cubin, 75), (cubin, 90), (ptx, 90)]
    half, minority = [*everywhere, (cubin, 120)], [*everywhere, *[(cubin, 100)] * 5, (ptx, 100)]
    write_library(tmp_path / "library.so", [half, everywhere, minority, half])

    code = read_code(tmp_path / "library.so")

    assert code == Code(frozenset({(7, 5), (9, 0), (12, 0)}), frozenset({(9, 0)}))
    assert str(code) == "7.5, 9.0, 12.0, 9.0 and newer"


def test_a_library_without_gpu_code_tells_nothing() -> None:
    """And what is not known is no reason to refuse."""
    code = read_code(BITSANDBYTES / "libbitsandbytes_cpu.so")

    assert code == Code(frozenset(), frozenset())
    assert code.runs_on((3, 5))


def test_code_runs_on_newer_gpus_of_its_generation_and_ptx_on_all() -> None:
    """The rules of the CUDA C++ Programming Guide."""
    ampere, hopper = (
        Code(frozenset({(8, 6)}), frozenset()),
        Code(frozenset({(9, 0)}), frozenset({(9, 0)})),
    )

    assert [gpu for gpu in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)] if ampere.runs_on(gpu)] == [
        (8, 6),
        (8, 9),
    ]
    assert [gpu for gpu in [(7, 5), (8, 9), (9, 0), (12, 0)] if hopper.runs_on(gpu)] == [
        (9, 0),
        (12, 0),
    ]


@pytest.mark.usefixtures("torch")
def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its name, both numbers and what to do; a newer one beside it does not help."""
    nvml.install(monkeypatch, [Card(), Card("Tesla V100-SXM2-16GB", (7, 0))])

    with pytest.raises(errors.ConfigError) as caught:
        check(2)

    assert caught.value.status == 64
    told = str(caught.value)
    assert "GPU 1 (Tesla V100-SXM2-16GB) has compute capability 7.0, but torch" in told
    assert "was built for 7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0: use another GPU" in told
    check(1)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 3), (12, 1)])
@pytest.mark.usefixtures("torch")
def test_gpus_from_turing_on_are_fine(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are newer than the code, of the same generation."""
    nvml.install(monkeypatch, [Card(capability=capability)])

    check()


@pytest.mark.usefixtures("torch")
def test_slices_and_gpus_that_do_not_answer_are_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slice is as good as the card that it is cut from; of the other nothing is known."""
    nvml.install(monkeypatch, [Card(capability=None), Card("Tesla V100", (7, 0), mig="MIG-1")])

    check(1)
    assert cluster.describe_gpus(("MIG-1",)) == [cluster.Gpu("MIG-1 (Tesla V100)", (7, 0))]
    with pytest.raises(errors.ConfigError, match=r"GPU MIG-1 \(Tesla V100\) has compute capability 7\.0"):
        launch.check_hardware(shapes.settings(), ("MIG-1",), {})


def test_a_driver_that_is_too_old_is_refused(torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its version, both versions of CUDA, and the oldest driver that will do; minor versions do not matter."""
    nvml.install(monkeypatch, [Card()], "570.172.08", 12080)
    with pytest.raises(
        errors.ConfigError,
        match=r"driver 570\.172\.08 of this machine runs CUDA 12\.8, .* driver 580",
    ):
        check()

    nvml.install(monkeypatch, [Card()])
    check()
    (torch / "version.py").write_text("cuda: Optional[str] = '13.2'\n")
    check()


def test_a_torch_for_cpus_is_named_where_there_are_gpus(torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would train on the CPU for days; without GPUs it is what is wanted."""
    (torch / "version.py").write_text("cuda: Optional[str] = None\n")
    nvml.install(monkeypatch, [Card()])

    with pytest.raises(errors.ConfigError, match=r"1 GPU\(s\), but torch .* was built for CPUs: install the build"):
        check()
    check(0)


def test_bitsandbytes_counts_only_where_it_is_used(torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library is the one that it would load beside this torch, or that BNB_CUDA_VERSION names."""
    nvml.install(monkeypatch, [Card("Tesla V100", (7, 0))])
    (torch / "lib" / "libtorch_cuda.so").unlink()  # a build of one's own, of which nothing is known

    with pytest.raises(errors.ConfigError, match=r"but bitsandbytes .* was built for 7\.5"):
        check()
    check(environ={"BNB_CUDA_VERSION": "118"})
    check(model={"quantization": "none"}, train={"optimizer": "adamw_torch"})
    (torch / "version.py").write_text("cuda = '14.1'\n")
    nvml.install(monkeypatch, [Card()], "700.00", 14010)
    with pytest.raises(
        errors.ConfigError,
        match=r"CUDA 14\.1, but the installed bitsandbytes has libraries for 11\.8",
    ):
        check()


@pytest.mark.parametrize("forced", ["999", "13.0", ""])
@pytest.mark.usefixtures("torch")
def test_a_bitsandbytes_library_that_does_not_exist_is_refused(
    forced: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The variable is final for bitsandbytes, which fails at the first weight if it is wrong."""
    from bitsandbytes import cextension, cuda_specs

    nvml.install(monkeypatch, [Card()])
    with pytest.raises(errors.ConfigError) as caught:
        check(environ={"BNB_CUDA_VERSION": forced})

    assert caught.value.status == 64
    assert f"BNB_CUDA_VERSION is {forced!r}, but there is no {BITSANDBYTES}" in str(caught.value)
    assert "has: 118, 121, 124, 126, 128, 130, 132" in str(caught.value)
    unused = {"model": {"quantization": "none"}, "train": {"optimizer": "adamw_torch"}}
    check(environ={"BNB_CUDA_VERSION": forced}, **unused)
    monkeypatch.setenv("BNB_CUDA_VERSION", forced)
    specs = cuda_specs.CUDASpecs((8, 6), "130", (13, 0))
    if forced.isdigit():
        assert not cextension.get_cuda_bnb_library_path(specs).exists()
    else:
        with pytest.raises(RuntimeError, match="value must be digits only"):
            cextension.get_cuda_bnb_library_path(specs)


@pytest.mark.parametrize(
    ("cuda", "library"),
    [((13, 1), "cuda130"), ((13, 2), "cuda132"), ((12, 0), "cuda121"), ((12, 9), "cuda128")],
)
def test_bitsandbytes_library_is_chosen_as_it_chooses_itself(cuda: tuple[int, int], library: str) -> None:
    """The newest of the same major version that is not newer than torch's CUDA, else the oldest."""
    from bitsandbytes.cextension import get_cuda_bnb_library_path
    from bitsandbytes.cuda_specs import CUDASpecs

    its_own = get_cuda_bnb_library_path(CUDASpecs((8, 6), "".join(map(str, cuda)), cuda))

    assert compatibility._choose_library(BITSANDBYTES, cuda, {}) == its_own
    assert its_own.stem == f"libbitsandbytes_{library}"


def test_numbers_that_may_mean_two_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA counts the fastest first where it is told to, and the driver never; equal ones are counted alike."""
    fastest = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST", "CUDA_VISIBLE_DEVICES": "0"}
    nvml.install(monkeypatch, [Card("NVIDIA T400"), Card("NVIDIA A40")])

    with pytest.raises(
        errors.ConfigError,
        match=r"different GPUs \(NVIDIA A40, NVIDIA T400\).*set CUDA_DEVICE_ORDER to",
    ):
        cluster.gpus(fastest)
    assert cluster.gpus({**fastest, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == ("0",)
    assert cluster.gpus({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}) == ("0", "1")
    assert cluster.gpus({**fastest, "CUDA_VISIBLE_DEVICES": "GPU-1f"}) == ("GPU-1f",)
    nvml.install(monkeypatch, [Card(), Card()])
    assert cluster.gpus(fastest) == ("0",)


@pytest.mark.usefixtures("torch")
def test_a_mixture_that_cannot_fit_is_refused_before_it_is_downloaded(
    s3: S3,
    bucket: str,
    tiny_model: Path,
    tiny_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its config.json is enough; nothing is in the cache."""
    base = shapes.outline("Qwen3-30B-A3B", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tiny_model / name).read_bytes())
    (base / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # whose weights nobody asks for
    s3.upload(base, bucket, "base")
    read = config.read(tiny_run(model={"base": f"s3://{bucket}/base"}))
    machine = cli.Machine(read, {}, preemption.Notice(), ExitStack(), ())
    cache = paths.Cache(tmp_path / "cache", "run")
    here = entrypoint.Here(
        machine,
        storage.connect(read.run.url),
        cache,
        inputs.Team(gpus=True, strategy="auto"),
        cluster.Alone(),
        None,
    )

    nvml.install(monkeypatch, [Card(gigabytes=48)])
    with (
        machine.after,
        pytest.raises(errors.ConfigError, match=r"59\.\d GB .* weights are not quantized: experts") as e,
    ):
        entrypoint.ready(here)

    assert e.value.status == 64
    assert not list(cache.root.glob("models/*/*"))
