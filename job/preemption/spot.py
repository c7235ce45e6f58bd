"""Spot notices: what the metadata services of AWS, GCP and Azure say before they take a machine away.

Each is asked every five seconds, as AWS recommends ("Spot Instance interruption notices", EC2 user guide; "Preemptible
VM instances", Compute Engine documentation; "Scheduled Events for Linux VMs", Azure documentation).
"""

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from job import log
from job.preemption.notice import Notice

_POLL_SECONDS = 5.0
_SEARCHES, _SEARCH_SECONDS = 3, 30.0  # a metadata service may be slow when its machine has just been started
_PATIENCE_SECONDS = 2.0  # they are on the machine itself or not at all
_LINK_LOCAL = "http://169.254.169.254"
_AWS_SECONDS, _GCP_SECONDS, _AZURE_SECONDS = 120.0, 30.0, 30.0  # of warning, at least, as they are documented
_AZURE_TAKES = ("Preempt", "Terminate", "Reboot", "Redeploy")


@dataclass(frozen=True)
class Endpoints:
    """Where the three services are asked."""

    aws: str = _LINK_LOCAL
    gcp: str = "http://metadata.google.internal"
    azure: str = _LINK_LOCAL

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """As the environment says, by the names that the clouds' own tools read; Azure's have none, so ours."""
        told = {
            "aws": environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"),
            "gcp": f"http://{environ['GCE_METADATA_HOST']}" if environ.get("GCE_METADATA_HOST") else None,
            "azure": environ.get("AZURE_METADATA_ENDPOINT"),
        }
        return cls(**{name: url.rstrip("/") for name, url in told.items() if url})


class Service(Protocol):
    """One cloud's metadata service, known to answer."""

    @property
    def warning(self) -> float:
        """Seconds between the notice and the end of the machine."""

    def taken(self) -> str | None:
        """Why and when the machine will be taken away; None if nothing is planned."""

    def at_risk(self) -> str | None:
        """Why it may soon be taken away; None if nothing is known."""


def watch(endpoints: Endpoints, notice: Notice) -> None:
    """Ask the service of the cloud that this machine is in, if any, until the process ends; tell `notice`."""
    threading.Thread(target=_watch, args=(endpoints, notice), daemon=True, name="spot").start()


def _watch(endpoints: Endpoints, notice: Notice) -> None:
    pause = threading.Event()
    for _ in range(_SEARCHES):
        service = next((found for find in (_Aws.find, _Gcp.find, _Azure.find) if (found := find(endpoints))), None)
        if service:
            break
        pause.wait(_SEARCH_SECONDS)
    else:
        return
    log.event("spot.watch", f"watching for spot notices of {type(service).__name__.lstrip('_').upper()}")
    while not notice.reason:
        try:
            if why := service.taken():
                notice.request(why, service.warning - _POLL_SECONDS)  # it may be as old as that
            elif why := service.at_risk():
                notice.warn(why)
        except Exception as e:  # noqa: BLE001 - whatever it answers, asking again is all that can be done
            log.event("spot.silent", f"the metadata service did not answer: {e}")
        pause.wait(_POLL_SECONDS)


class _Aws:
    warning = _AWS_SECONDS

    def __init__(self, root: str, token: str) -> None:
        self._root, self._token = root, token

    @classmethod
    def find(cls, endpoints: Endpoints) -> Self | None:
        token = _found(lambda: cls._new_token(endpoints.aws))
        return cls(endpoints.aws, token) if token else None

    def taken(self) -> str | None:
        told = self._get("spot/instance-action")
        plan = json.loads(told) if told else None
        return f"an AWS spot notice: {plan['action']} at {plan['time']}" if plan else None

    def at_risk(self) -> str | None:
        told = self._get("events/recommendations/rebalance")
        return f"AWS recommends to rebalance since {json.loads(told)['noticeTime']}" if told else None

    @staticmethod
    def _new_token(root: str) -> str | None:
        seconds = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
        return _ask(f"{root}/latest/api/token", seconds, method="PUT")

    def _get(self, item: str) -> str | None:
        url = f"{self._root}/latest/meta-data/{item}"
        try:
            return _ask(url, {"X-aws-ec2-metadata-token": self._token})
        except urllib.error.HTTPError as e:
            if e.code != 401:  # noqa: PLR2004 - the token has expired
                raise
            self._token = self._new_token(self._root) or ""
            return _ask(url, {"X-aws-ec2-metadata-token": self._token})


class _Gcp:
    warning = _GCP_SECONDS
    _HEADERS = {"Metadata-Flavor": "Google"}  # noqa: RUF012 - never changed

    def __init__(self, root: str) -> None:
        self._root = root

    @classmethod
    def find(cls, endpoints: Endpoints) -> Self | None:
        service = cls(endpoints.gcp)
        return service if _found(lambda: service._get("instance/id")) else None

    def taken(self) -> str | None:
        return "a GCP notice: the instance is being preempted" if self._get("instance/preempted") == "TRUE" else None

    def at_risk(self) -> str | None:
        event = self._get("instance/maintenance-event")
        return f"GCP plans {event}" if event and event.startswith("TERMINATE") else None

    def _get(self, item: str) -> str | None:
        return _ask(f"{self._root}/computeMetadata/v1/{item}", self._HEADERS)


class _Azure:
    warning = _AZURE_SECONDS
    _HEADERS = {"Metadata": "true"}  # noqa: RUF012 - never changed

    def __init__(self, root: str, name: str) -> None:
        self._root, self._name = root, name

    @classmethod
    def find(cls, endpoints: Endpoints) -> Self | None:
        url = f"{endpoints.azure}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        name = _found(lambda: _ask(url, cls._HEADERS))
        return cls(endpoints.azure, name) if name else None

    def taken(self) -> str | None:
        told = _ask(f"{self._root}/metadata/scheduledevents?api-version=2020-07-01", self._HEADERS)
        events: list[dict[str, Any]] = json.loads(told)["Events"] if told else []
        for event in events:
            if event["EventType"] in _AZURE_TAKES and self._name in event["Resources"]:
                when = event.get("NotBefore") or "once"
                return f"an Azure scheduled event: {event['EventType']} at {when}"
        return None

    def at_risk(self) -> str | None:
        return None


def _found(ask: Callable[[], str | None]) -> str | None:
    """What the service answers; None where there is none."""
    try:
        return ask()
    except (OSError, ValueError, http.client.HTTPException):
        return None


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """The body of the answer; None if there is nothing under this URL."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)  # noqa: S310 - the machine's own service
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # link-local: never through a proxy
    try:
        with opener.open(request, timeout=_PATIENCE_SECONDS) as reply:
            return str(reply.read().decode())
    except urllib.error.HTTPError as e:
        if e.code == 404:  # noqa: PLR2004 - no notice
            return None
        raise
