"""The run's base model: what every site must have, who said so first, and the operator's word on it. Pure functions."""

from __future__ import annotations

from fedhds.errors import EnrollmentRefused, RequestError, RunOver
from fedhds.fingerprint import PARTS, combined, is_digest
from fedhds.tensors.manifest import AdapterManifest
from fedhds_server.run.events import Discard, DrawAdapter, Instruction, ModelConfirmed, Record, SiteRegistered, Wake
from fedhds_server.run.state import Phase, RunState, SiteState, packed


def check_model(state: RunState, fingerprint: dict[str, str], manifest: AdapterManifest) -> None:
    """Checks that a site has the run's base model and adapter; raises EnrollmentRefused saying what differs."""
    needed = {part for part in PARTS if part != "feature_model" or state.spec.selection.features.model}
    if set(fingerprint) != set(PARTS) or not all(fingerprint[part] for part in needed):
        raise EnrollmentRefused("the site sent no complete fingerprint of its base model")
    model = manifest.parsed_config().get("base_model_name_or_path", state.spec.model.name)
    if model != state.spec.model.name:
        raise EnrollmentRefused(f"the site's adapter names another base model than the run's ({state.spec.model.name})")
    digest, expected = combined(fingerprint), state.expected_fingerprint
    if expected and digest != expected:
        raise EnrollmentRefused(
            f"the site's base model ({state.spec.model.name}) has the fingerprint {digest}, the operator expects "
            f"{expected}; load the same files at the same revision"
        )
    if not state.fingerprint:
        return
    differing = [label for part, label in PARTS.items() if fingerprint[part] != state.fingerprint[part]]
    if differing:
        raise EnrollmentRefused(
            f"the site's base model is not the run's ({state.spec.model.name}): {', '.join(differing)} "
            f"differ{'s' if len(differing) == 1 else ''}; load the same files at the same revision{_doubt(state)}"
        )
    if not manifest.agrees_with(state.adapter_manifest):
        raise EnrollmentRefused(
            "the site's adapter has other tensors than the run's, or another configuration; install the same peft "
            f"version{_doubt(state)}"
        )


def check_confirmation(state: RunState, fingerprint: str) -> None:
    """Checks that the operator may say so now; raises RequestError or RunOver."""
    if not is_digest(fingerprint):
        raise RequestError("a fingerprint is 64 hexadecimal digits; `fedhds fingerprint MODEL` prints it")
    if state.phase.over:
        raise RunOver(f"the run is over: {state.message}")
    if state.phase is not Phase.ENROLLING and combined(state.fingerprint) != fingerprint:
        raise RunOver(
            f"the run has begun with the fingerprint {combined(state.fingerprint)} and cannot take another base model; "
            "stop it, and begin a new run with --expected-fingerprint"
        )


def model_given(state: RunState, event: SiteRegistered) -> list[Instruction]:
    """The first site to register fixes base model and adapter; the first to send them, the first values."""
    if state.manifest:
        return _values_given(state, event)
    state.fingerprint, state.model_given_by = event.fingerprint, event.site
    state.manifest = packed(event.manifest.to_proto())
    drawing: list[Instruction] = [DrawAdapter()] if not state.needs_first_values else _values_given(state, event)
    if state.expected_fingerprint:
        return drawing
    note = (
        f"the run's base model is that of site {event.site}, the first to register, with the fingerprint "
        f"{combined(event.fingerprint)}; `fedhds confirm-model` confirms or replaces it"
    )
    return [Record(note), *drawing]


def _values_given(state: RunState, event: SiteRegistered) -> list[Instruction]:
    if event.first_values is None or not state.needs_first_values:
        return []
    state.first_values = event.first_values
    return [DrawAdapter()]


def model_confirmed(state: RunState, event: ModelConfirmed) -> list[Instruction]:
    """The operator says which base model it is (checked by `check_confirmation` before)."""
    state.expected_fingerprint = event.fingerprint
    if not state.manifest or combined(state.fingerprint) == event.fingerprint:
        return [Record(f"the base model with the fingerprint {event.fingerprint} is confirmed: {event.reason}"), Wake()]
    reason = f"the operator expects the base model with the fingerprint {event.fingerprint}"
    for site in state.sites.values():
        if site.registered and site.state is not SiteState.EVICTED:
            # Without a session it enrolls again, and is checked again.
            site.session, site.state, site.last_error = "", SiteState.LEFT, reason
            site.rows, site.evaluates, site.evaluation_rows, site.validation_rows = 0, False, 0, 0
    note = Record(f"{reason}, not the one of site {state.model_given_by}: {event.reason}", trouble=True)
    return [note, *model_forgotten(state), Wake()]


def model_forgotten(state: RunState) -> list[Instruction]:
    """Of a run that has not begun, the next site to register fixes base model and adapter."""
    before = state.artifacts
    state.adapters, state.first_values = {}, None
    state.fingerprint, state.manifest, state.model_given_by = {}, "", ""
    return [Discard(artifact) for artifact in sorted(before - state.artifacts, key=lambda each: each.digest)]


def _doubt(state: RunState) -> str:
    if state.expected_fingerprint:
        return ""
    return (
        f". The run's base model is what site {state.model_given_by!r} brought, the first to register, and nobody has "
        "confirmed it: if yours is right, tell the operator of the coordinator"
    )
