"""What a site says of its errors to others: no text of a library, and under noise nothing that depends on rows."""

from __future__ import annotations

from fedhds.errors import FedhdsError, PolicyError, PrivacyError

_OWN_LOG = "the site's log has the details"


def public_reason(error: Exception, *, noised: bool) -> str:
    """What others may read of an error: a library's text must not leave the site, as that could contain data.

    In a run with noise a message of ours could tell how many rows there are, or what is wrong with one.
    """
    if not isinstance(error, FedhdsError) or (noised and not isinstance(error, PolicyError | PrivacyError)):
        return _OWN_LOG
    return error.public_message
