"""Keeps web pages out: a page of any site, in a browser on this machine, can send requests to the server.

A page may send another site a body without asking first as long as its type is not JSON; so every body must be declared
as JSON. A page with a name that is made to point at this machine (DNS rebinding) passes for the server's own; so the
server answers only to names that it is known by. Browsers name the site of a page in `Origin`.
"""

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.config import RuntimeConfig
from runtime.errors import Forbidden, UnsupportedMedia

from .http import error_response

_JSON = re.compile(r"application/([\w.+-]+\+)?json", re.IGNORECASE)
# Names that no public DNS server can be asked for: of containers, and of a company's own network.
_PRIVATE_NAME = re.compile(r"[a-z0-9_-]+|[a-z0-9_.-]+\.internal")


def require_json(http: Request) -> None:
    """Raise UnsupportedMedia unless the body is declared as JSON."""
    declared = http.headers.get("content-type", "")
    if not _JSON.fullmatch(declared.partition(";")[0].strip()):
        given = f"not {declared[:100]!r}" if declared else "and the request has none"
        raise UnsupportedMedia(f"a body needs the header 'Content-Type: application/json', {given}")


class Guard:
    """Refuses requests for a host that is not this server, and those of pages of other sites.

    An API key makes it superfluous: a page does not know the key.
    """

    def __init__(self, app: ASGIApp, config: RuntimeConfig) -> None:
        self._app = app
        self._allowed = tuple(host_name(name) for name in config.allowed_hosts)
        self._origins = {origin.strip().lower().rstrip("/") for origin in config.cors_origins}
        self._own = {"localhost", config.bind.lower()}
        self._on_a_network = not _is_loopback(config.bind)
        if self._on_a_network:
            own = socket.gethostname().lower()
            self._own |= {own, f"{own}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.check(Headers(scope=scope))
            except Forbidden as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def check(self, headers: Headers) -> None:
        """Raise Forbidden for a foreign `Host` or `Origin`. HTTP/1.0 knows no Host, and no browser speaks it."""
        for host in headers.getlist("host"):
            name = host_name(host)
            if not self._is_ours(name):
                raise Forbidden(
                    f"this server is not known as {host[:200]!r}; if that is its name, start it with "
                    f"--allowed-hosts {name[:200] or 'NAME'} (DESKSIDE_ALLOWED_HOSTS)",
                    code="host_not_allowed",
                )
        for origin in headers.getlist("origin"):
            if not self._may_ask(origin.strip().lower(), headers.get("host", "").strip().lower()):
                raise Forbidden(
                    f"pages of {origin[:200]!r} may not use this server; to let them, start it with "
                    f"--cors-origins {origin[:200]} (DESKSIDE_CORS_ORIGINS)",
                    code="origin_not_allowed",
                )

    def _is_ours(self, name: str) -> bool:
        if name in self._own or name.endswith(".localhost") or self._is_allowed(name):
            return True
        # A page that was rebound has a public name, and never an address.
        return _is_address(name) or (self._on_a_network and _PRIVATE_NAME.fullmatch(name) is not None)

    def _is_allowed(self, name: str) -> bool:
        return any(
            allowed == "*" or name == allowed or (allowed.startswith("*.") and name.endswith(allowed[1:]))
            for allowed in self._allowed
        )

    def _may_ask(self, origin: str, host: str) -> bool:
        """True for the server's own pages, pages of an allowed site, and origins other than pages: extensions, apps."""
        if origin in self._origins or "*" in self._origins:
            return True
        scheme, colon, _ = origin.partition("://")
        if colon and scheme not in ("http", "https"):
            return True
        site = origin.removeprefix(f"{scheme}://") if colon else ""
        return bool(site) and (site == host or (self._is_allowed(host_name(site)) and "*" not in self._allowed))


def host_name(host: str) -> str:
    """The name in a `Host` header: without port, brackets and final dot, in lower case; "" if it holds none."""
    try:
        return (urlsplit(f"//{host.strip()}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(bind: str) -> bool:
    return bind.lower() == "localhost" or (_is_address(bind) and ipaddress.ip_address(bind).is_loopback)
