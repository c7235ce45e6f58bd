"""The clouds' spot notices, from servers that speak as their metadata services do."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from metadata import GCP, Metadata, served

from job import errors, preemption
from job.preemption import spot

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What the services tell, to be changed by the test; ``url`` is where they are."""
    monkeypatch.setattr(spot, "_POLL_SECONDS", 0.05)
    with served() as told:
        yield told


@pytest.fixture
def notice() -> Iterator[preemption.Notice]:
    made = preemption.Notice()
    made.listen()
    yield made
    made.reason = made.reason or "the test is over"  # ends the watching thread
    made.conclude()


@contextlib.contextmanager
def remembered(notice: preemption.Notice) -> Iterator[None]:
    """As while training: a request interrupts nothing."""
    with contextlib.suppress(errors.Preempted), notice.deferred():
        yield


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


AWS = "/latest/meta-data"
AZURE = {"/metadata/instance/compute/name": "vm-1", "/metadata/scheduledevents": json.dumps({"Events": []})}


def event(kind: str, machine: str) -> str:
    planned = {"EventId": "1", "EventType": kind, "ResourceType": "VirtualMachine", "Resources": [machine],
               "EventStatus": "Scheduled", "NotBefore": "Mon, 23 Nov 2026 18:29:47 GMT"}  # fmt: skip
    return json.dumps({"DocumentIncarnation": 1, "Events": [planned]})


def test_aws_takes_the_machine_away(told: dict[str, str], notice: preemption.Notice) -> None:
    """Through IMDSv2, whose tokens expire; first perhaps a recommendation, then two minutes."""
    preemption.watch(preemption.Endpoints(aws=told["url"], gcp=NOWHERE, azure=NOWHERE), notice)
    with remembered(notice):
        told[f"{AWS}/events/recommendations/rebalance"] = json.dumps({"noticeTime": "2026-11-22T08:00:00Z"})
        until(lambda: notice.at_risk)
        assert notice.reason is None
        Metadata.token = "token-2"
        told[f"{AWS}/spot/instance-action"] = json.dumps({"action": "terminate", "time": "2026-11-22T08:22:00Z"})
        until(lambda: notice.reason)

    assert "an AWS spot notice: terminate at 2026-11-22T08:22:00Z" in str(notice.reason)
    assert 110 < (notice.grace or 0) < 120


def test_gcp_takes_the_machine_away(told: dict[str, str], notice: preemption.Notice) -> None:
    """Thirty seconds before it does."""
    told.update(GCP)
    preemption.watch(preemption.Endpoints(aws=NOWHERE, gcp=told["url"], azure=NOWHERE), notice)
    with remembered(notice):
        time.sleep(0.3)
        assert notice.reason is None
        told["/computeMetadata/v1/instance/preempted"] = "TRUE"
        until(lambda: notice.reason)

    assert "the instance is being preempted" in str(notice.reason)
    assert 20 < (notice.grace or 0) < 30


def test_azure_takes_the_machine_away(told: dict[str, str], notice: preemption.Notice) -> None:
    """This one, and not another of the same set; a short freeze is nothing to stop for."""
    told.update(AZURE)
    preemption.watch(preemption.Endpoints(aws=NOWHERE, gcp=NOWHERE, azure=told["url"]), notice)
    with remembered(notice):
        for harmless in (event("Preempt", "vm-2"), event("Freeze", "vm-1")):
            told["/metadata/scheduledevents"] = harmless
            time.sleep(0.3)
            assert notice.reason is None
        told["/metadata/scheduledevents"] = event("Preempt", "vm-1")
        until(lambda: notice.reason)

    assert "Preempt at Mon, 23 Nov 2026 18:29:47 GMT" in str(notice.reason)


def test_a_notice_interrupts_what_can_be_repeated(told: dict[str, str], notice: preemption.Notice) -> None:
    """Outside training it stops the job at once, as a signal does."""
    told.update(GCP | {"/computeMetadata/v1/instance/preempted": "TRUE"})

    def work() -> None:
        preemption.watch(preemption.Endpoints(aws=NOWHERE, gcp=told["url"], azure=NOWHERE), notice)
        time.sleep(10)

    with pytest.raises(errors.Preempted, match="GCP"):
        work()


def test_elsewhere_the_watch_ends_by_itself(
    notice: preemption.Notice, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has looked a few times on a machine of no cloud."""
    monkeypatch.setattr(spot, "_SEARCH_SECONDS", 0.05)
    preemption.watch(preemption.Endpoints(aws=NOWHERE, gcp=NOWHERE, azure=NOWHERE), notice)

    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "spot"])

    assert "spot" not in said()


def test_endpoints_are_those_of_the_clouds_own_tools() -> None:
    """Tests and unusual machines name others."""
    environ = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://[fd00:ec2::254]/", "GCE_METADATA_HOST": "10.0.0.1:80"}

    found = preemption.Endpoints.of(environ)

    assert (found.aws, found.gcp) == ("http://[fd00:ec2::254]", "http://10.0.0.1:80")
    assert found.azure == "http://169.254.169.254"
