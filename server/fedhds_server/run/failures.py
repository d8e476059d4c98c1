"""What failed at the sites, as the end of a message to the operator."""

from __future__ import annotations

from fedhds_server.run.quorum import listed
from fedhds_server.run.state import RunState, SiteState, Stage

# In a message: one line for people.
_MAX_ERRORS = 3


def last_failures(state: RunState, stage: Stage | None = None) -> str:
    """What sites said last that failed in `stage`, left with an error or are quarantined: the end of a message."""
    failed = stage.failed if stage else ()
    sites: dict[str, list[str]] = {}
    for site in sorted(state.sites.values(), key=lambda site: site.name):
        if site.last_error and (site.name in failed or site.state is SiteState.LEFT or site.quarantined):
            sites.setdefault(site.last_error, []).append(site.name)
    # What most sites say comes first; status and journal have all of it.
    errors = sorted(sites, key=lambda error: -len(sites[error]))
    lines = [f"site{'s' * (len(sites[error]) > 1)} {listed(sites[error])}: {error}" for error in errors[:_MAX_ERRORS]]
    more = [f"and {len(errors) - _MAX_ERRORS} other errors"] * (len(errors) > _MAX_ERRORS)
    return f"; last failures: {'; '.join([*lines, *more])}" if lines else ""
