"""`fedhds`, the toolbox: certificates here, and whatever commands the installed packages add to it.

A package adds a command by an entry point of the group `fedhds.commands`: its name is the command's name, its
value a function with typer annotations. The function's module is imported to print its help, so it keeps
heavy imports inside its functions.
"""

from __future__ import annotations

import functools
import io
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from fedhds import __version__
from fedhds.cli.control import confirm_model, evict, pause, resume, rollback, stop
from fedhds.cli.doctor import doctor
from fedhds.cli.status import status
from fedhds.encoding import not_utf_8
from fedhds.errors import FedhdsError, UsageError, coded
from fedhds.security.identity import Role

COMMANDS_GROUP = "fedhds.commands"
_OWN_PACKAGES = ("fedhds", "fedhds_server", "fedhds_client")
_PROGRAM = {Role.SITE: "fedhds-client", Role.COORDINATOR: "fedhds-server", Role.OPERATOR: "fedhds status"}


class Toolbox(TyperGroup):
    """This package's commands, then those of entry points, which are imported when first looked at."""

    # The contexts and commands are typed Any, for typer's releases disagree on where their classes live.
    def list_commands(self, ctx: Any) -> list[str]:
        """Every command's name: this package's in order of definition, the others' in alphabetical order."""
        own = super().list_commands(ctx)
        return [*own, *sorted(set(_added_commands()) - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; one that cannot be imported says so when it is called. None: unknown."""
        own = super().get_command(ctx, cmd_name)
        entry_point = _added_commands().get(cmd_name)
        if own is not None or entry_point is None:
            return own
        return _command_from(entry_point)


# Plain help: rich would read the [client] of pip install 'fedhds[client]' as markup.
app = typer.Typer(
    cls=Toolbox,
    help="The toolbox of fedhds, federated instruction tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
certs = typer.Typer(
    help="Make the certificates of mutual TLS.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def main() -> NoReturn:
    """Runs the toolbox and exits: 0, 2 for a person's mistake, 1 for any other failure raised on purpose."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # The name of a file may hold what cannot be written there.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="fedhds")
    except FedhdsError as error:
        typer.echo(f"fedhds: {coded(error)}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except UnicodeEncodeError:
        # Files may have such names; messages of the protocol and some libraries take no such text.
        broken = next((text for text in sys.argv[1:] if not_utf_8(text)), None)
        if broken is None:
            raise
        typer.echo(
            f"fedhds: {coded(UsageError(f'{broken!r} is not UTF-8, and must be here; write it in UTF-8'))}", err=True
        )
        sys.exit(2)
    sys.exit(0)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"fedhds {__version__}")
        raise typer.Exit


@app.callback()
def toolbox(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The toolbox of fedhds, federated instruction tuning."""


@certs.command("init")
def certs_init(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for ca.crt and ca.key; made if missing.")] = Path(
        "certs"
    ),
    name: Annotated[
        str, typer.Option(metavar="NAME", help="The authority's name, as certificates show it.")
    ] = "fedhds federation",
    days: Annotated[int, typer.Option(metavar="N", help="Days until the authority expires.")] = 3650,
) -> None:
    """Make the federation's certificate authority, once."""
    from fedhds.security.pki import init_authority

    certificate = init_authority(out, name=name, days=days)
    typer.echo(f"Wrote {certificate}, for everybody who takes part.")
    typer.echo(f"Wrote {certificate.with_suffix('.key')}: it can admit anyone; keep it secret and off the network.")
    typer.echo("Next, a certificate for the coordinator and for every site:")
    folder = shlex.quote(str(out))
    typer.echo(f"  fedhds certs issue coordinator --role coordinator --host HOST --ca {folder}")
    typer.echo(f"  fedhds certs issue SITE --role site --ca {folder}")


@certs.command("issue")
def certs_issue(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Who it is for, e.g. hospital-a: 1 to 64 letters, digits, '.', '_' and '-'."
        ),
    ],
    role: Annotated[Role, typer.Option(help="What its holder may do.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="A host name or IP address by which sites reach the coordinator; repeat it for several. "
            "Default: localhost and this machine's name.",
        ),
    ] = None,
    ca: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the authority, from `fedhds certs init`.")] = Path(
        "certs"
    ),
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the files; default: that of --ca.")
    ] = None,
    days: Annotated[
        int, typer.Option(metavar="N", help="Days until it expires; never later than the authority.")
    ] = 825,
    renew: Annotated[bool, typer.Option("--renew", help="Replace the certificate; keep key and identity.")] = False,
    csr: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Sign the key of this request, from `fedhds certs request`, and make no key here."
        ),
    ] = None,
) -> None:
    """Issue a certificate to a coordinator, a site or an operator."""
    from fedhds.security.pki import AUTHORITY, expiry, issue

    if csr is not None:
        from fedhds.security.requests import sign_request

        path = sign_request(ca, csr, name, role=role, hosts=host or (), days=days, out=out, renew=renew)
        typer.echo(f"Wrote {path}, for the {role} {name}, valid until {expiry(path):%Y-%m-%d}.")
        typer.echo(f"Send it back with {path.with_name(AUTHORITY + '.crt')}; neither is secret.")
        return
    files = issue(ca, name, role=role, hosts=host or (), days=days, out=out, renew=renew)
    typer.echo(f"Wrote {files.cert}, for the {role} {name}, valid until {expiry(files.cert):%Y-%m-%d}.")
    typer.echo(f"{'Kept' if renew else 'Wrote'} {files.key}: the private key, for the {role} alone.")
    flags = ["--tls-ca", files.ca, "--tls-cert", files.cert, "--tls-key", files.key]
    typer.echo("Use them with:")
    typer.echo(f"  {_PROGRAM[role]} {shlex.join(str(flag) for flag in flags)}")


@certs.command("request")
def certs_request(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who the certificate is to be for.")],
    role: Annotated[Role, typer.Option(help="What its holder may do.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="A host name or IP address by which sites reach the coordinator; repeat it for several.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files; made if missing.")] = Path("certs"),
) -> None:
    """Make a private key here, and a request that its certificate be issued: the key never leaves this host."""
    from fedhds.security.requests import make_request

    request, key = make_request(out, name, role=role, hosts=host or ())
    typer.echo(f"The private key is {key}, for the {role} {name} alone.")
    typer.echo(f"Wrote {request}: send it to the person who issues certificates. It is not secret. They run:")
    hosts = "".join(f" --host {shlex.quote(each)}" for each in host or ())
    typer.echo(f"  fedhds certs issue {shlex.quote(name)} --role {role}{hosts} --csr {request.name} --out answer")


@certs.command("show")
def certs_show(certificate: Annotated[Path, typer.Argument(metavar="FILE", help="NAME.crt.")]) -> None:
    """Print whose certificate it is, with what lists and `fedhds evict` may name it by."""
    from fedhds.errors import EnrollmentRefused
    from fedhds.security.identity import identity_from_certificate
    from fedhds.security.pki import expiry

    ends = expiry(certificate)
    try:
        identity = identity_from_certificate(certificate.read_bytes())
    except EnrollmentRefused as error:
        raise UsageError(f"{certificate}: {error}") from error
    typer.echo(f"name             {identity.name} ({identity.role})")
    typer.echo(f"key fingerprint  {identity.key_fingerprint}")
    typer.echo(f"serial number    {identity.serial}")
    typer.echo(f"valid until      {ends:%Y-%m-%d}")


@certs.command("revoke")
def certs_revoke(
    certificate: Annotated[Path, typer.Argument(metavar="FILE", help="The certificate, NAME.crt.")],
    ca: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the authority, from `fedhds certs init`.")] = Path(
        "certs"
    ),
) -> None:
    """Put a certificate on the authority's revocation list, which `fedhds-server --revoked` reads."""
    from fedhds.security.pki import revoke

    path = revoke(ca, certificate)
    typer.echo(f"Wrote {path}: put it on the coordinator's host, as the file of --revoked; it counts at once.")
    typer.echo("Another certificate of the same key still counts: `fedhds evict` with the key's fingerprint, which")
    typer.echo("`fedhds certs show` prints, shuts that out of the run.")


# All commands of this package, in the order in which help shows them.
app.add_typer(certs, name="certs")
app.command("doctor")(doctor)
app.command("status")(status)
for command in (pause, resume, stop, rollback, evict, confirm_model):
    app.command(command.__name__.replace("_", "-"))(command)


@functools.cache
def _added_commands() -> dict[str, EntryPoint]:
    return {entry_point.name: entry_point for entry_point in entry_points(group=COMMANDS_GROUP)}


def _command_from(entry_point: EntryPoint) -> Any:
    """A click command around the entry point's function."""
    try:
        function = entry_point.load()
    except (ImportError, AttributeError) as error:
        return _unavailable(entry_point, error)
    single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    # A command with settings of its own reads its flags itself.
    options: dict[str, Any] = getattr(function, "command_options", {})
    single.command(entry_point.name, **options)(_explain_missing_packages(entry_point, function))
    return typer.main.get_command(single)


def _unavailable(entry_point: EntryPoint, error: Exception) -> Any:
    """A command that takes any arguments and only says what to install."""
    single = typer.Typer(add_completion=False, rich_markup_mode=None)

    @single.command(
        entry_point.name,
        help=f"(unavailable: {_remedy(entry_point)})",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def refuse() -> None:
        raise UsageError(f"`fedhds {entry_point.name}` {_remedy(entry_point)} ({error})") from error

    return typer.main.get_command(single)


def _explain_missing_packages(entry_point: EntryPoint, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ModuleNotFoundError as error:
            # A missing module of our own is a defect, and its traceback is what finds it.
            if error.name is None or error.name.partition(".")[0] in _OWN_PACKAGES:
                raise
            raise UsageError(f"`fedhds {entry_point.name}` {_remedy(entry_point)} ({error})") from error

    return call


def _remedy(entry_point: EntryPoint) -> str:
    package = entry_point.module.partition(".")[0]
    if package in _OWN_PACKAGES:
        extra = package.removeprefix("fedhds").lstrip("_")
        return f"needs pip install 'fedhds[{extra}]'" if extra else "needs pip install --force-reinstall fedhds"
    return f"needs packages that {package} did not bring"


if __name__ == "__main__":
    main()
