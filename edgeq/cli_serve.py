"""`edgeq serve`: a package behind an OpenAI-compatible API."""

from __future__ import annotations

import ipaddress
import logging
import math
from pathlib import Path
from typing import Any, Literal

import click

from edgeq.cli_parts import PATH


def _rate_or_auto(context: click.Context, option: click.Parameter, value: str | None) -> float | Literal["auto"] | None:
    if value is None:
        return None
    if value == "auto":
        return "auto"
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto.") from None


def _seconds(context: click.Context, option: click.Parameter, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"{value} is not a number of seconds above 0.")
    return value


@click.command()
@click.argument("package", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. Others than loopback let other computers in.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--name", metavar="NAME", help="What clients call the model. Default: the package's name. Adapters are NAME:ADAPTER.")
@click.option("--api-key", envvar="EDGEQ_API_KEY", metavar="KEY", help="Ask clients for this key. Better kept in EDGEQ_API_KEY.")
@click.option(
    "--rate", callback=_rate_or_auto, metavar="R|auto", help="Cut an elastic package in memory, 0 to 0.35; auto: by as little as fits."
)
@click.option("--ctx", "n_ctx", type=click.IntRange(min=2), help="Context length. Default: the package's, or the model's own up to 4096.")
@click.option("--slots", type=click.IntRange(1, 64), default=4, show_default=True, help="Answers generated at once.")
@click.option("--max-queue", type=click.IntRange(0, 4096), default=64, show_default=True, help="Requests that may wait; more get a 429.")
@click.option("--timeout", callback=_seconds, type=float, default=300.0, show_default=True, help="Seconds for a request, waiting included.")
@click.option("--grace", callback=_seconds, type=float, default=30.0, show_default=True, help="Seconds for what runs at the end.")
@click.option("--max-request-bytes", type=click.IntRange(min=1024), default=1 << 20, show_default=True, help="Larger bodies get a 413.")
@click.option("--threads", type=click.IntRange(1, 512), help="CPU threads. Default: the physical cores this process may use.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
def serve(
    package: Path,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    rate: float | Literal["auto"] | None,
    n_ctx: int | None,
    slots: int,
    max_queue: int,
    timeout: float,
    grace: float,
    max_request_bytes: int,
    threads: int | None,
    device: str,
) -> None:
    """Serve a package to OpenAI clients: chat, completions, models, streaming.

    Adapters of the package are models of their own, NAME:ADAPTER, and are switched per request. One line on stdout tells the address when
    the server is ready. On SIGTERM or Ctrl-C it finishes what runs, refuses what comes, and ends. Needs edgeq[server].
    """
    from edgeq import api
    from edgeq.runtime.server.serving import ServerSettings, listen, serve, url_of

    settings = ServerSettings(
        name=_name_of(package.resolve()) if name is None else name,
        slots=slots,
        max_queue=max_queue,
        timeout_s=timeout,
        grace_s=grace,
        max_request_bytes=max_request_bytes,
        api_key=api_key,
    )
    options: dict[str, Any] = {"rate": rate, "n_ctx": n_ctx, "threads": threads, "device": device}
    with listen(host, port) as listening, api.load(package, **options) as session:
        if api_key is None and not _is_loopback(listening.getsockname()[0]):
            click.echo(f"warning: {host} is open to other computers, and no --api-key is set", err=True)

        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that hangs up

        def ready() -> None:
            names = ", ".join([settings.name, *(f"{settings.name}:{adapter.name}" for adapter in session.adapters)])
            click.echo(f"Serving {names} at {url_of(listening)}")

        serve(session, settings, listening, on_ready=ready)
    click.echo("Stopped.", err=True)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _name_of(path: Path) -> str:
    return path.name if path.is_dir() else path.stem
