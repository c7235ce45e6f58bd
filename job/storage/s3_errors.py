"""What boto3 raises, as our errors: may it pass, what was seen, where, and what to do."""

import contextlib
import email.utils
import time
from collections.abc import Iterator

import boto3.exceptions
import botocore.exceptions

from job import errors

MISSING = ("404", "NoSuchKey", "NotFound")
LOST = ("412", "PreconditionFailed")
_DENIED = (errors.DeniedError, "check the credentials and what they may do with this bucket")
_EXPIRED = (errors.ExpiredError, "the credentials expired; a new start fetches new ones")
_ELSEWHERE = (errors.PermanentError, "the bucket lives in another region; set AWS_REGION or AWS_ENDPOINT_URL")
_UNABLE = (errors.UnsupportedError, "the store does not support this")
_REFUSALS: dict[str, tuple[type[errors.JobError], str]] = {
    "NoSuchBucket": (errors.NotFoundError, "create the bucket or correct the URL"),
    "RequestTimeTooSkewed": (errors.PermanentError, "correct this machine's clock"),
    "NoSuchUpload": (errors.NotFoundError, "start again"),
    **dict.fromkeys(MISSING, (errors.NotFoundError, "correct the URL")),
    **dict.fromkeys(("403", "AccessDenied", "AllAccessDisabled", "AccountProblem"), _DENIED),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"), _DENIED),
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"), _EXPIRED),
    **dict.fromkeys(("301", "PermanentRedirect", "AuthorizationHeaderMalformed"), _ELSEWHERE),
    **dict.fromkeys(("501", "NotImplemented", "405", "MethodNotAllowed", "EntityTooLarge"), _UNABLE),
}
_RAISED = (
    boto3.exceptions.Boto3Error,
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    ValueError,
)
_UNREACHED = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
)
_MISCONFIGURED = (
    botocore.exceptions.ParamValidationError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.ConfigNotFound,
    botocore.exceptions.ConfigParseError,
    botocore.exceptions.NoRegionError,
    ValueError,  # what boto3 raises for an endpoint that is no URL
)
_WITHOUT = (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError)


@contextlib.contextmanager
def explained(what: str, endpoint: str) -> Iterator[None]:
    """Turn what boto3 raises while doing `what` at `endpoint` into our errors."""
    try:
        yield
    except _RAISED as e:
        raise _explain(e, what, endpoint) from e


def code(error: botocore.exceptions.ClientError) -> str:
    """S3's name for the error, or the HTTP status where there is no body to say it."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _explain(error: Exception, what: str, endpoint: str) -> errors.JobError:
    if isinstance(error, botocore.exceptions.ClientError):
        return _refused(error, what, endpoint)
    if isinstance(error, _WITHOUT):
        return errors.DeniedError(
            f"{what}: no AWS credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or give the machine a role"
        )
    if isinstance(error, _UNREACHED):
        return errors.StoreError(f"{what}: cannot reach {endpoint}: {error}. Check AWS_ENDPOINT_URL and the network")
    if isinstance(error, _MISCONFIGURED):
        return errors.PermanentError(f"{what}: {error}. Check the URL and the AWS settings")
    return errors.StoreError(f"{what}: {error}")


def _refused(error: botocore.exceptions.ClientError, what: str, endpoint: str) -> errors.JobError:
    name, message = code(error), error.response.get("Error", {}).get("Message", "")
    kind, advice = _REFUSALS.get(name, (errors.StoreError, "a new start may succeed"))
    if name == "RequestTimeTooSkewed":
        advice += _clocks(error)
    said = f"{endpoint} answered {name} {message}".rstrip(" .")
    return kind(f"{what}: {said}: {advice}")


def _clocks(error: botocore.exceptions.ClientError) -> str:
    theirs = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return f" (it says {email.utils.formatdate(time.time(), usegmt=True)}, the store's {theirs})" if theirs else ""
