"""A namespace on a real cluster for the tests that need one; it and all that is in it goes at the end."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import kube
import yaml

Found = TypeVar("Found")
_LEVEL = "pod-security.kubernetes.io"


class Namespace:
    """A namespace in which only restricted pods are let in."""

    def __init__(self, name: str, history: Path) -> None:
        self.name, self._history = name, history

    def kubectl(self, *arguments: str, given: str | None = None, check: bool = True) -> str:
        command = [kube.kubectl(), f"--namespace={self.name}", *arguments]
        made = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
        assert made.returncode == 0 or not check, f"{' '.join(arguments)}: {made.stderr}"
        return made.stdout if made.returncode == 0 else made.stderr

    def apply(self, objects: list[kube.Object], *how: str) -> None:
        # by the server, for what the client would note in an annotation may be too large for one
        self.kubectl("apply", "--server-side", *how, "--filename=-", given=yaml.safe_dump_all(objects))

    def get(self, *what: str) -> kube.Object:
        found: kube.Object = json.loads(self.kubectl("get", *what, "--output=json"))
        return found

    def pods(self, job: str) -> list[kube.Object]:
        """The pods of a Job that there are, the oldest first."""
        listed = self.get("pods", f"--selector=batch.kubernetes.io/job-name={job}")["items"]
        return sorted(listed, key=lambda each: str(each["metadata"]["creationTimestamp"]))

    def logs(self, job: str) -> str:
        """What the pods of a Job have said, each in its turn."""
        return "\n".join(self.kubectl("logs", each["metadata"]["name"], check=False) for each in self.pods(job))

    def evict(self, pod: str) -> None:
        """As `kubectl drain` does it."""
        named = {"name": pod, "namespace": self.name}
        what = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": named}
        place = f"/api/v1/namespaces/{self.name}/pods/{pod}/eviction"
        self.kubectl("create", f"--raw={place}", "--filename=-", given=json.dumps(what))

    def seen(self, pod: str) -> list[kube.Object]:
        """Every state in which a pod has been, also one that is gone."""
        text, decoder, at, found = self._history.read_text(), json.JSONDecoder(), 0, []
        while (at := text.find("{", at)) >= 0:
            try:
                state, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError:  # its end is not written yet
                break
            found += [state] if state["metadata"]["name"] == pod else []
        return found

    def ended(self, job: str, patience: float) -> tuple[str, str]:
        """How the Job ended, and why."""

        def look() -> tuple[str, str] | None:
            for each in self.get("job", job)["status"].get("conditions", []):
                if each["type"] in ("Complete", "Failed") and each["status"] == "True":
                    return each["type"], each.get("reason", "")
            return None

        return self.until(look, patience, job)

    def until(self, look: Callable[[], Found | None], patience: float, job: str) -> Found:
        """What `look` finds at last; else all that a person would look at."""
        end = time.monotonic() + patience
        while not (found := look()):
            assert time.monotonic() < end, self.kubectl("describe", "job,pods", check=False) + self.logs(job)
            time.sleep(1)
        return found


@contextmanager
def namespace(history: Path) -> Iterator[Namespace]:
    """A new namespace, whose pods' states are written to the file `history`."""
    made = Namespace(f"finetune-test-{time.time_ns() // 10**6}", history)
    levels = {f"{_LEVEL}/{what}": "restricted" for what in ("enforce", "warn")}
    meta = {"name": made.name, "labels": levels}
    watch = [kube.kubectl(), f"--namespace={made.name}", "get", "pods", "--watch", "--output=json"]
    made.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": meta}])
    try:
        for what in ("serviceaccount/default", "configmap/kube-root-ca.crt"):  # no pod starts without
            made.kubectl("wait", "--for=create", what, "--timeout=60s")
        with history.open("w") as log, subprocess.Popen(watch, stdout=log, stderr=subprocess.DEVNULL) as watching:
            try:
                yield made
            finally:
                watching.terminate()
    finally:
        made.kubectl("delete", "namespace", made.name, "--timeout=240s")
