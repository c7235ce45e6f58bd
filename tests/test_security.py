"""What an attacker would like to find: secrets in files, unpinned packages, an image or an audit that hides it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, S3, command, need

REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
SECRETS = {
    "a key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{30,}\b",
    "a token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{36}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/]{16}",
    "a password in a URL": r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"{}$<>]+:[^\s/@'\"{}$<>*]+@",
}
PLANTED = {
    "AKIAIOSFODNN7EXAMPLE",
    "s3://KEY:SECRET@",
    "https://someone:t0ken@",
}  # made up, by documentation or by tests
FLAW = {
    "vulns": [
        {
            "id": "PYSEC-0000-1",
            "summary": "made up",
            "affected": [
                {
                    "package": {"name": "idna", "ecosystem": "PyPI"},
                    "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}],
                }
            ],
        }
    ]
}


def lines(name: str) -> list[str]:
    """What a file says, without its comments; continued lines are one."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def secrets(text: str) -> set[tuple[str, str]]:
    """What looks like a secret in a text, by kind."""
    found = {(kind, match[0]) for kind, pattern in SECRETS.items() for match in re.finditer(pattern, text)}
    return {(kind, match) for kind, match in found if match not in PLANTED}


@pytest.mark.parametrize(
    "text",
    [
        "key = AKIA" + "Q" * 16,
        "HF_TOKEN: hf_" + "x" * 34,
        "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIEowIBAAKCAQEAx",
        "index-url = https://me:" + "hunter2@pypi.example.com/simple",
    ],
)
def test_a_secret_is_recognised(text: str) -> None:
    """The next test would find these."""
    assert secrets(text)


def test_no_file_of_the_project_holds_a_secret() -> None:
    """Not the code, not the configs, not the tests."""
    found = {
        (path.relative_to(ROOT).as_posix(), *secret)
        for path in tracked()
        for secret in secrets(path.read_text(encoding="utf-8", errors="replace"))
    }

    assert not found


def test_every_requirement_is_pinned() -> None:
    """To one version, in its own line or in constraints.txt, which both files therefore take into account."""
    pins = {plain(line.partition("==")[0]) for line in lines("constraints.txt")}
    wanted = [line for name in REQUIREMENTS for line in lines(name) if not line.startswith("-")]

    assert all("==" in line for line in lines("constraints.txt"))
    assert "-c constraints.txt" in lines("requirements.txt")
    assert "-r requirements.txt" in lines("requirements-dev.txt")
    assert not [line for line in wanted if "==" not in line and plain(re.split(r"[\[ #;]", line)[0]) not in pins]


def test_the_image_begins_from_one_version() -> None:
    """Not from whatever is the latest: a tag with all of its version, or what a site gives instead."""
    base = next(line for line in lines("Dockerfile") if line.startswith("ARG BASE_IMAGE="))
    stages = {line.split()[-1] for line in lines("Dockerfile") if re.match("FROM .* AS ", line)}
    origins = {line.split()[1] for line in lines("Dockerfile") if line.startswith("FROM ")}

    assert re.search(r":\d+\.\d+\.\d+-|@sha256:", base)
    assert origins - stages == {"${BASE_IMAGE}"}


def test_the_image_takes_nothing_from_elsewhere_and_holds_no_secret() -> None:
    """Packages come from the distribution and from pip's index by their pins; credentials only as a mounted secret."""
    said = lines("Dockerfile")
    given = [word for line in said if re.match("ARG|ENV|LABEL", line) for word in line.split()]

    assert not [line for line in said if line.startswith("ADD ") or re.search("curl|wget|git clone|https?://", line)]
    assert not [word for word in given if re.search("TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY", word)]
    assert [line for line in said if line.startswith("USER ")] == ["USER 10001:0"]
    for line in said:
        if "pip install" in line:
            assert "--no-cache-dir" in line
            assert re.search(r"-r /build/requirements\.txt|-c /build/constraints\.txt", line)


def test_the_builder_is_given_only_what_the_image_copies() -> None:
    """The list of what is left out begins with everything."""
    first, *others = lines(".dockerignore")
    let_in = {line[1:] for line in others if line.startswith("!")}
    words = [line.split()[1:-1] for line in lines("Dockerfile") if line.startswith("COPY ") and "--from" not in line]

    assert first == "*"
    assert let_in == {word for each in words for word in each}
    assert "**/__pycache__" in others


def test_the_dockerfile_is_clean() -> None:
    """As its linter sees it, with the exceptions that are marked there."""
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    need("hadolint", linter)

    found = subprocess.run([str(linter), "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert found.stdout == ""
    assert found.returncode == 0


def test_credentials_in_the_url_of_the_repository_stay_out_of_the_label(tmp_path: Path) -> None:
    """A clone that was made with a token names where it came from without it, and a change that is not committed."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    secret = "https://someone:t0ken@example.com/group/job.git"
    for line in (("init", "-q"), ("add", "."), ("commit", "-qm", "one"), ("remote", "add", "origin", secret)):
        subprocess.run([*git, *line], cwd=tmp_path, check=True, capture_output=True)

    def told() -> str:
        line = ["make", "--dry-run", "image", "BUILDER=buildah"]
        return subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    clean = told()
    (tmp_path / "new.txt").touch()
    changed = told()

    assert "image.source=https://example.com/group/job.git" in clean
    assert "t0ken" not in clean
    assert re.search(r"image.revision=[0-9a-f]{40} ", clean)
    assert re.search(r"image.revision=[0-9a-f]{40}-dirty ", changed)
    assert "--format docker" in clean


@pytest.fixture
def advisories() -> Iterator[Callable[[int, dict[str, object]], str]]:
    """A server of advisories, as OSV's: it has one about `idna`, or fails."""
    servers: list[ThreadingHTTPServer] = []

    def serve(status: int, about_idna: dict[str, object]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = json.dumps(about_idna if asked["package"]["name"] == "idna" else {}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1/query"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def audit(*options: str, path: Path | None = None) -> "subprocess.CompletedProcess[str]":
    more = {"PYTHONPATH": str(path)} if path else {}
    line = [sys.executable, ".ci/audit.py", *options]
    environ = {"PATH": "/usr/bin:/bin", "HOME": "/nowhere", **more}
    return subprocess.run(line, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


def test_the_audit_fails_on_a_vulnerable_pin(advisories: Callable[..., str]) -> None:
    """It is named, with the version that helps; the other pins were asked about too."""
    found = audit("-s", "osv", "--osv-url", advisories(200, FLAW))
    nothing = audit("-s", "osv", "--osv-url", advisories(200, {}))

    assert found.returncode == 1, found.stdout + found.stderr
    assert re.search(r"VULNERABLE: idna [\d.]+: PYSEC-0000-1, fixed in 99\.1", found.stdout)
    assert nothing.returncode == 0
    assert re.search(r"^1\d\d packages audited: 0 known vulnerabilities$", nothing.stdout, re.MULTILINE)


def test_an_audit_without_advisories_says_that_it_was_none(advisories: Callable[..., str], tmp_path: Path) -> None:
    """Whether the server fails, cannot be reached, or does not know the packages: never a quiet pass."""
    double = tmp_path / "pip_audit"  # as pip-audit answers where PyPI has packages and no advisories
    double.mkdir()
    (double / "__init__.py").touch()
    skipped = {"dependencies": [{"name": "absl-py", "skip_reason": "could not be audited"}], "fixes": []}
    (double / "__main__.py").write_text(f"print({json.dumps(json.dumps(skipped))})")

    failing = audit("-s", "osv", "--osv-url", advisories(503, {}))
    gone = audit("-s", "osv", "--osv-url", "http://127.0.0.1:1/")
    unknown = audit(path=tmp_path)

    for each in (failing, gone, unknown):
        assert each.returncode == 0, each.stderr
        assert re.match(r"NOT AUDITED: (\d+) of \1 packages: \S", each.stdout), each.stdout
    assert "could not be audited" in unknown.stdout


def command_lines(of: str) -> set[str]:
    """Those of all processes that have `of` in theirs, as anybody on the machine can read them."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.add(place.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return {line for line in found if of in line}


def test_a_run_leaves_its_secrets_nowhere(
    s3: S3, bucket: str, tiny_model: Path, tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Not in the store, the cache, its words or a list of processes; and the cache is closed to other users."""
    s3.upload(tiny_model, bucket, "models/tiny")
    config = tiny_run(run={"url": f"s3://{bucket}/run"}, model={"base": f"s3://{bucket}/models/tiny"})
    planted = [s3.environ["AWS_SECRET_ACCESS_KEY"], "hf-planted-" + "9d21"]
    environ = {**os.environ, **s3.environ, "HF_TOKEN": planted[1]}
    line, lines = command("run", config, "--json", "--debug"), set()

    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(line, env=environ, stdout=said, stderr=said) as job,
    ):
        while job.poll() is None:
            lines |= command_lines(str(tmp_path))
            time.sleep(0.1)
    rendered = [
        subprocess.run(command("render", *kind, config), env=environ, capture_output=True, check=True)
        for kind in (("slurm",), ("k8s", "--image=x"))
    ]

    client = s3.client()
    told = {f"store: {key}": client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in s3.keys(bucket)}
    told |= {str(path): path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    told |= {"said": (tmp_path / "said").read_bytes(), "processes": "\n".join(lines).encode()}
    told |= {f"rendered {n}": each.stdout + each.stderr for n, each in enumerate(rendered)}
    assert job.returncode == 0, told["said"]
    assert len(lines) > 1  # the job, and what trains
    assert len(told) > 20
    assert not [where for where, text in told.items() for secret in planted if secret.encode() in text]
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
