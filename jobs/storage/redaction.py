"""Text without the secrets that URLs carry: user:password@, signatures, tokens. Knows nothing of storage."""

import hashlib
import re
from urllib.parse import parse_qsl, urlencode

HIDDEN = "***"
DIGEST_DIGITS = 12  # of 64: 48 bits tell the URLs of one input apart
# Parameters that change when the same object is signed again: AWS (version 4 and 2), CloudFront, Google, Azure.
_SIGNING = re.compile(
    r"(x-amz-.*|x-goog-.*|awsaccesskeyid|googleaccessid|expires|signature|policy|key-pair-id"
    r"|sig|sv|se|st|sp|sr|ss|srt|sip|spr|sdd|skoid|sktid|skt|ske|sks|skv|saoid|suoid|scid)$",
    re.IGNORECASE,
)
_USER = re.compile(r"(://)[^/@\s]+@")
# To the end of the query, across escapes of JSON and repr (\u00e9), but not an escaped quote, which ends the text.
# URLs without a query match as well: a search that gave up on one would start again at each http:// within it.
_URL = re.compile(r"https?://(?:[^\s?\"'\\]|\\(?![\"']))+(?:\?(?:[^\s\"'\\]|\\(?![\"']))*)?", re.IGNORECASE)
_SIGNATURE = re.compile(
    r"([?&](?:x-amz-signature|x-amz-credential|x-amz-security-token|x-goog-signature|x-goog-credential|awsaccesskeyid"
    r"|signature|sig)=)[^&\s\"'\\]+",
    re.IGNORECASE,
)


def redact_url(url: str) -> str:
    """`url` without user and password and, for http, without its query, any value of which can be a secret.

    A short digest takes the query's place, so that URLs that differ in their queries stay different. Parameters of a
    signature are left out of it: an object that is signed again tomorrow keeps its redacted URL.
    """
    url = _USER.sub(rf"\1{HIDDEN}@", url)
    address, mark, query = url.partition("?")
    if not mark or not address.lower().startswith(("http://", "https://")) or query.startswith(HIDDEN):
        return url
    lasting = [(name, value) for name, value in parse_qsl(query, keep_blank_values=True) if not _SIGNING.match(name)]
    digest = hashlib.sha256(urlencode(lasting).encode("utf-8", "replace")).hexdigest() if lasting else ""
    return f"{address}?{HIDDEN}{digest[:DIGEST_DIGITS]}"


def redact_text(text: str) -> str:
    """`text` with every URL in it redacted."""
    return _URL.sub(lambda found: redact_url(found[0]), _USER.sub(rf"\1{HIDDEN}@", text))


def mask_signatures(text: str) -> str:
    """`text` unchanged except for hidden values of signing parameters: for metadata that should keep its links."""
    return _SIGNATURE.sub(rf"\1{HIDDEN}", text)
