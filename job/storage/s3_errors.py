"""What boto3 raises, as our errors: may it pass, what was seen, where, and what to do."""

import contextlib
import email.utils
import time
from collections.abc import Iterator
from http import HTTPStatus

import boto3.exceptions
import botocore.exceptions
import urllib3.exceptions

from job import errors

MISSING = ("404", "NoSuchKey", "NotFound")
LOST = ("412", "PreconditionFailed")
LATER = ("429", "503", "SlowDown", "ServiceUnavailable")  # nothing is wrong with the request
UNABLE = ("501", "NotImplemented", "405", "MethodNotAllowed")
_DENIED = (errors.DeniedError, "check the credentials and what they may do with this bucket")
_EXPIRED = (errors.ExpiredError, "the credentials expired; a new start fetches new ones")
_ELSEWHERE = (errors.PermanentError, "the bucket lives in another region; set AWS_REGION or AWS_ENDPOINT_URL")
_UNABLE = (errors.UnsupportedError, "the store does not support this")
_REFUSALS: dict[str, tuple[type[errors.JobError], str]] = {
    "NoSuchBucket": (errors.NotFoundError, "create the bucket or correct the URL"),
    "RequestTimeTooSkewed": (errors.PermanentError, "correct this machine's clock"),
    "NoSuchUpload": (errors.ChangedError, "somebody gave the upload up; start again"),
    "400": (errors.ExpiredError, "it does not say why; perhaps the credentials expired"),  # a reply without a body
    **dict.fromkeys(MISSING, (errors.NotFoundError, "correct the URL")),
    **dict.fromkeys(("403", "AccessDenied", "AllAccessDisabled", "AccountProblem"), _DENIED),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"), _DENIED),
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"), _EXPIRED),
    **dict.fromkeys(("301", "PermanentRedirect", "AuthorizationHeaderMalformed"), _ELSEWHERE),
    **dict.fromkeys((*UNABLE, "EntityTooLarge"), _UNABLE),
}
_PASSING = (
    *("RequestTimeout", "IncompleteBody", "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch"),
    *("OperationAborted", "ConditionalRequestConflict", "PreconditionFailed"),
)
_PASSING_STATUS = (408, 409, 412, 425, 429)
_RAISED = (
    boto3.exceptions.Boto3Error,
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    urllib3.exceptions.HTTPError,
    ValueError,
)
_UNREACHED = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
    urllib3.exceptions.HTTPError,  # of a body that is being read; botocore translates only some
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
    except RuntimeError as e:
        if "refreshed credentials are still expired" not in str(e):  # the only way in which botocore says so
            raise
        raise errors.ExpiredError(f"{what}: {e}; a new start may find new ones") from e


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
    kind, advice = _REFUSALS.get(name) or _unknown(name, error.response["ResponseMetadata"]["HTTPStatusCode"])
    if name == "RequestTimeTooSkewed":
        advice += _clocks(error)
    said = f"{endpoint} answered {name} {message}".rstrip(" .")
    return kind(f"{what}: {said}: {advice}")


def _unknown(name: str, status: int) -> tuple[type[errors.JobError], str]:
    """What an error that the table does not know means: whose fault it is, says the class of its HTTP status."""
    if status == HTTPStatus.FORBIDDEN:
        return _DENIED
    if name in _PASSING or status in _PASSING_STATUS or not 400 <= status < 500:  # noqa: PLR2004 - the client errors
        return errors.StoreError, "a new start may succeed"
    return errors.PermanentError, "the store will not do this"


def _clocks(error: botocore.exceptions.ClientError) -> str:
    theirs = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return f" (it says {email.utils.formatdate(time.time(), usegmt=True)}, the store's {theirs})" if theirs else ""
