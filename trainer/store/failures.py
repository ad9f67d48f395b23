"""This file reads the text of obstore's exceptions: what went wrong, in one clause, and whether a retry may help."""

import re

from trainer.config.secrets import without_credentials

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound")
# The addresses at which a cloud machine asks for its role, on AWS, GCP and Azure. obstore asks there only when nothing
# else gave credentials.
_METADATA_SERVICE = re.compile(r"/latest/(api/token|meta-data)|/computeMetadata/|/metadata/identity")


def reason(error: BaseException, scheme: str) -> str:
    """Return the cause in one clause, without secrets.

    obstore's text also has the request, the server's XML and a debug rendering.
    """
    text = without_credentials(str(error).strip())
    if _METADATA_SERVICE.search(text):
        return (
            f"no credentials were found, neither in the environment ({CREDENTIALS[scheme]}) nor as a role of this"
            " machine"
        )
    if NO_BUCKET.search(text):
        return "the bucket does not exist"
    host = _first(r"https?://[^/\s]+", text)
    status = _first(r"status code: (\d{3}[A-Za-z ]*)", text)
    if status:
        details = filter(None, (_first(r"<Code>([^<\n]*)", text), _first(r"<Message>([^<\n]*)", text)))
        explanation = ": ".join(details).rstrip(". ")
        return f"{host} answered {status.strip()}" + (f" ({explanation})" if explanation else "")
    if "kind: Timeout" in text:
        return f"{host} did not answer in time"
    if "error sending request" in text:
        cause = _first(r'message: "(.*?)"', text) or _first(r'"((?:failed|dns|invalid)[^"]*)"', text)
        return f"{host} cannot be reached" + (f" ({cause})" if cause else "")
    if _ended_within(text):
        return "the connection ended within the answer"
    first_line = text.splitlines()[0] if text else type(error).__name__
    return re.sub(r"^Generic \w+ error: ", "", first_line).rstrip(".")


def passes(error: BaseException) -> bool:
    """Return whether the server or the connection failed, rather than the request."""
    text = str(error)
    status = _first(r"status code: (\d{3})", text)
    if _METADATA_SERVICE.search(text):
        return False
    if status:
        return status.startswith("5") or status in ("408", "429")
    return "error sending request" in text or "operation timed out" in text or _ended_within(text)


def _ended_within(text: str) -> bool:
    """Return whether the connection ended within an answer. The words are those of reqwest, which obstore passes on."""
    return "request or response body error" in text or "error decoding response body" in text


def slows(error: BaseException) -> bool:
    """Return whether the server refused the request because it is asked for too much."""
    return _first(r"status code: (\d{3})", str(error)) in ("429", "503")


def beyond_the_end(error: BaseException) -> bool:
    """Return whether the object ends before the requested bytes: then it is not the object that was written."""
    return (
        any(words in str(error) for words in ("range was invalid", "Invalid range"))
        or _first(r"status code: (\d{3})", str(error)) == "416"
    )


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[match.re.groups] if match else None
