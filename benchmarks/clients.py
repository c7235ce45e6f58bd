"""One transfer by one client in Python: ``clients.py NAME pull|push FOLDER PREFIX`` prints what it took as JSON.

Timed from when the client is connected: the job is running when it begins to transfer.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3

sys.path.insert(0, str(Path(__file__).parent.parent))

BUCKET = "bench"
Transfer = Callable[[Path, str], object]  # a folder, and a key prefix that ends in /


def ours() -> tuple[Transfer, Transfer]:
    """This job: parts, SHA-256 of every file, manifests."""
    from job import storage

    store = storage.connect(f"s3://{BUCKET}")
    store.list("none/")

    def pull(folder: Path, prefix: str) -> None:
        if storage.fetch(store, prefix, folder / "whole") is None:
            sys.exit("nothing sealed is there")

    return pull, lambda folder, prefix: storage.push(store, folder, prefix)


def boto3_classic() -> tuple[Transfer, Transfer]:
    """What boto3's download_file and upload_file do, several files at once."""
    from boto3.s3.transfer import TransferConfig

    config = TransferConfig(preferred_transfer_client="classic", max_concurrency=8)
    s3 = boto3.client("s3")
    keys(s3, "none/")

    def pull(folder: Path, prefix: str) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(
                    lambda k: s3.download_file(BUCKET, k, str(folder / Path(k).name), Config=config), keys(s3, prefix)
                )
            )

    def push(folder: Path, prefix: str) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda p: s3.upload_file(str(p), BUCKET, prefix + p.name, Config=config), folder.iterdir()))

    return pull, push


def crt() -> tuple[Transfer, Transfer]:
    """The AWS Common Runtime through s3transfer's manager, used directly because boto3 ignores the endpoint with it."""
    import botocore.session
    from s3transfer import crt as s3crt

    session, s3 = botocore.session.get_session(), boto3.client("s3")
    endpoint = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"], "region_name": os.environ["AWS_REGION"]}
    credentials = s3crt.BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
    client = s3crt.create_s3_crt_client(os.environ["AWS_REGION"], credentials, use_ssl=False)
    manager = s3crt.CRTTransferManager(client, s3crt.BotocoreCRTRequestSerializer(session, endpoint))

    def pull(folder: Path, prefix: str) -> None:
        for future in [manager.download(BUCKET, key, str(folder / Path(key).name)) for key in keys(s3, prefix)]:
            future.result()

    def push(folder: Path, prefix: str) -> None:
        for future in [manager.upload(str(path), BUCKET, prefix + path.name) for path in folder.iterdir()]:
            future.result()

    return pull, push


def keys(s3: "boto3.client", prefix: str) -> list[str]:
    """All keys that start with `prefix`."""
    return [item["Key"] for item in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]


CLIENTS = {"this job": ours, "boto3 classic": boto3_classic, "s3transfer CRT": crt}


def used() -> float:
    """CPU seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    name, direction, given_folder, given_prefix = sys.argv[1:]
    transfer = CLIENTS[name]()[direction == "push"]
    before, begun = used(), time.perf_counter()
    transfer(Path(given_folder), given_prefix)
    took = {
        "seconds": time.perf_counter() - begun,
        "cpu": used() - before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    sys.stdout.write(json.dumps(took))
