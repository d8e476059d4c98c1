"""One site of this process: its name, its rows and the folder in which it keeps what must survive."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fedhds.encoding import not_utf_8
from fedhds.errors import SettingsError, StorageError
from fedhds.privacy.ledger import Account, Ledger
from fedhds.runtime.files import locked, make_folder, replace_file, take_back
from fedhds.security.credentials import TlsFiles, own_identity
from fedhds_client.data.shard import Shard
from fedhds_client.settings import ClientSettings
from fedhds_client.state_files import file_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """A site's identity, data and state folder."""

    name: str
    folder: Path
    shard: Shard | None
    held_out: Shard | None
    account: Account
    """What the ledger has of the site's rows."""
    validation: Shard | None = None
    target: Shard | None = None

    @property
    def target_account(self) -> Account:
        """What the ledger has of the target rows, which are no training rows."""
        return _account(self.account.ledger, self.target)

    @property
    def rows(self) -> int:
        """Training rows."""
        return len(self.shard) if self.shard else 0

    @property
    def evaluates(self) -> bool:
        """Whether it holds rows to evaluate on."""
        return self.held_out is not None

    def session(self) -> str:
        """The last session of this site, empty if there was none: it proves after a restart who comes back."""
        return _secret(self.folder / "session")

    def next_session(self) -> str:
        """The secret of the session that is to begin, the same until `keep_session`; raises StorageError.

        It is durable before the coordinator hears of it: if this process or the coordinator ends before the answer is
        here, the site can show that it was the one that asked.
        """
        path = self.folder / "session.next"
        if not _secret(path):
            replace_file(path, secrets.token_hex(32), private=True)
        return _secret(path)

    def keep_session(self) -> None:
        """The next session has begun; it is remembered for the next start."""
        (self.folder / "session.next").replace(self.folder / "session")


def _secret(path: Path) -> str:
    """The session's secret in a file; empty where there is none, or none that a site writes. Raises StorageError."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StorageError(f"cannot read the session in {path}: {error.strerror}; check the state folder") from error
    return text if re.fullmatch("[0-9a-f]{64}", text) else ""


def open_sites(settings: ClientSettings, tls: TlsFiles | None, stack: ExitStack) -> list[Site]:
    """Opens every shard before anything is sent; raises DataError, SettingsError or StorageError.

    `stack` closes the shards and unlocks the state folders.
    """
    names = _names(settings, tls)
    _check_writable(settings.out, "--out")
    try:
        make_folder(settings.ledger_file.parent, private=True)
    except OSError as error:
        raise SettingsError("--ledger", f"cannot make its folder: {error.strerror}; choose another file") from error
    _check_writable(settings.ledger_file.parent, "--ledger")
    ledger = Ledger(settings.ledger_file)
    # A damaged one stops the site before anything else does.
    ledger.entries()
    sites = []
    for index, name in enumerate(names):
        folder = _locked_folder(settings.state / file_key(name), name, stack)
        if (old := folder / "ledger.jsonl").exists():
            logger.warning("%s is of an earlier version and not counted: take what it has off the limits", old)
        shard = _opened(settings.data[index], settings, folder, stack) if settings.data else None
        held_out = _opened(settings.eval_data, settings, folder, stack) if settings.eval_data and not index else None
        validation = _validation(index, shard, held_out, settings, folder, stack)
        target = _target(held_out, settings, folder, stack) if settings.target_data and not index else None
        site = Site(name, folder, shard, held_out, _account(ledger, shard), validation, target)
        check_held_out(site, settings)
        sites.append(site)
    return sites


def _account(ledger: Ledger, shard: Shard | None) -> Account:
    if shard is None:
        return ledger.account("", lambda: ())
    # Both are read late: rows that the run's template refuses are left out first.
    return ledger.account(lambda: shard.digest, lambda: (bytes.fromhex(row.digest) for row in shard))


def check_held_out(site: Site, settings: ClientSettings) -> None:
    """Raises SettingsError for rows to measure so few that their metrics say what each of them is like."""
    flag = "--holdout" if settings.holdout else "--validation-data"
    for shard, setting in ((site.held_out, "--eval-data"), (site.validation, flag)):
        if shard and len(shard) < settings.rules.min_cluster_rows:
            raise SettingsError(
                setting,
                f"has {len(shard)} rows, and metrics of so few say what each of them is like; give "
                f"{settings.rules.min_cluster_rows}, or consent with a smaller --min-cluster-rows",
            )
    if site.target and len(site.target) < settings.rules.min_cluster_rows:
        raise SettingsError(
            "--target-data",
            f"has {len(site.target)} rows, and a mean over so few says what each of them is like; give "
            f"{settings.rules.min_cluster_rows}, or consent with a smaller --min-cluster-rows",
        )


def _target(held_out: Shard | None, settings: ClientSettings, folder: Path, stack: ExitStack) -> Shard:
    """The rows of a wanted task. Raises SettingsError for rows that an evaluation measures, DataError."""
    assert settings.target_data is not None
    rows = _opened(settings.target_data, settings, folder, stack)
    if held_out and (lines := rows.shared(held_out)):
        raise SettingsError(
            "--target-data",
            f"would select for rows that are reported: {len(lines)} of {rows.path}, the first in line {lines[0]}, are "
            f"in {held_out.path}, too; take them out of one of the files",
        )
    return rows


def _validation(
    index: int, shard: Shard | None, held_out: Shard | None, settings: ClientSettings, folder: Path, stack: ExitStack
) -> Shard | None:
    """The rows on which a site validates, apart from those that it evaluates on. Raises SettingsError, DataError."""
    if settings.holdout and shard:
        flag, rows = "--holdout", stack.enter_context(shard.hold_out(settings.holdout, settings.holdout_seed, folder))
        logger.info("%s: %d of its rows validate, %d train", shard.path, len(rows), len(shard))
    elif settings.validation_data and not index:
        flag, rows = "--validation-data", _opened(settings.validation_data, settings, folder, stack)
        if shard and (both := len(rows.shared(shard))):
            logger.warning("%d rows of %s train, too; their loss says little of others", both, rows.path)
    else:
        return None
    if held_out and (lines := rows.shared(held_out)):
        raise SettingsError(
            flag,
            f"would choose by rows that are reported: {len(lines)} of {rows.path}, the first in line {lines[0]}, are "
            f"in {held_out.path}, too; take them out of one of the files",
        )
    return rows


def _names(settings: ClientSettings, tls: TlsFiles | None) -> list[str]:
    """One name per site: the certificate's or --name, followed by the shard's where there are several."""
    files = settings.data or tuple(filter(None, (settings.eval_data, settings.validation_data)))[:1]
    stems = [file.name.split(".")[0] for file in files]
    given = tuple(dict.fromkeys(settings.name or ()))
    base = given[0] if given else None
    if tls:
        base = own_identity(tls).name
        if given not in ((), (base,)):
            raise SettingsError(
                "--name",
                f"the certificate is {base!r}'s and gives no other name; drop --name {' '.join(given)!r}",
            )
    if len(given) > 1:
        if len(given) != len(stems):
            raise SettingsError("--name", f"has {len(given)} names for {len(stems)} shards; give one for each")
        names = list(given)
    elif base is None:
        names = [f"{socket.gethostname()}-{stem}" for stem in stems]
    else:
        names = [base] if len(stems) == 1 else [f"{base}/{stem}" for stem in stems]
    broken = next((file for file, name in zip(files, names, strict=True) if not_utf_8(name)), None)
    if broken:
        flag = "--data" if settings.data else "--eval-data" if settings.eval_data else "--validation-data"
        remedy = ", or give --name" if len(stems) == 1 else ""
        raise SettingsError(
            flag, f"the name of {broken} is not UTF-8, and its site is named after it; rename the file{remedy}"
        )
    return names


def _opened(path: Path, settings: ClientSettings, folder: Path, stack: ExitStack) -> Shard:
    shard = stack.enter_context(Shard.open(path, skip_bad_rows=settings.skip_bad_rows, spool_dir=folder))
    skipped = ""
    if shard.skipped:
        first = "; ".join(f"line {line}: {reason}" for line, reason in shard.skipped_reasons[:3])
        skipped = f", {shard.skipped} skipped ({first})"
    logger.info("%s: %d rows%s", path, len(shard), skipped)
    return shard


def _locked_folder(folder: Path, name: str, stack: ExitStack) -> Path:
    try:
        make_folder(folder, private=True)
        take_back(folder)
        stack.enter_context(locked(folder / "lock"))
        (folder / "name").write_text(name + "\n", encoding="utf-8")
    except BlockingIOError as error:
        raise SettingsError(
            "--state", f"another process on this machine runs the site {name!r} on {folder}; stop it first"
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot write to the site's state folder {folder}: {error.strerror}; make room there, or choose another "
            "with --state"
        ) from error
    return folder


def _check_writable(folder: Path, flag: str) -> None:
    """Finds out now, not after hours of training, that the result cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".fedhds-probe"
        probe.touch()
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()
    except OSError as error:
        raise SettingsError(flag, f"cannot write to {folder}: {error.strerror}; choose another folder") from error
