"""Who may talk to a Ray cluster: the authentication token, and the proof that nobody else may.

Free of ray, so that all of it can be said before Ray starts.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
import tempfile
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

from learners.core.errors import ConfigError

AUTH_MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Ray's settings; it looks for the token in this order, then in `default_token_path`."""

OLDEST_RAY = (2, 54)
"""Older ones let strangers in: CVE-2025-62593 (fixed in 2.52), CVE-2026-27482 (in 2.54)."""

TOKEN_BYTES = 32
PROBE_SECONDS = 10.0
TURNED_AWAY = (401, 403)
PROTECTED = ("/api/version", "/api/jobs/")
"""Paths of the dashboard that a request without the token must not reach."""


# --- Ray's version ---


def check_ray_version(found: str | None = None) -> None:
    """Raises ConfigError for a Ray that is known to let strangers in."""
    found = found or metadata.version("ray")
    if version_numbers(found)[:2] < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise ConfigError(
            f"Ray {found} lets strangers run code on this machine (CVE-2026-27482, "
            f"CVE-2025-62593): install Ray {oldest} or newer"
        )


def version_numbers(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: 2.60.0rc1 → (2, 60, 0)."""
    numbers: list[int] = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


# --- The token ---


def default_token_path() -> Path:
    """Where Ray looks for the token if no setting says otherwise."""
    return Path.home() / ".ray" / "auth_token"


def token_path() -> Path:
    """The file that holds the token, or is to hold it."""
    given = os.environ.get(TOKEN_PATH)
    return Path(given) if given else default_token_path()


def use_token(*, create: bool) -> str:
    """The token; from here on Ray demands it in this process and in those that it starts.

    Args:
        create: whether to make a token where there is none, as for a new cluster.

    Raises:
        ConfigError: there is none, it is empty, or others can read it and we cannot change that.
    """
    token = find_token()
    if token is None:
        if not create:
            raise ConfigError(
                f"there is no authentication token: neither {TOKEN} nor {TOKEN_PATH} is set, and "
                f"{default_token_path()} does not exist. Copy the cluster's token into that file "
                "(chmod 600), or pass --accept-open-cluster where the cluster has none"
            )
        token = create_token(token_path())
    before = os.environ.get(AUTH_MODE)
    if before is not None and before.lower() != "token":
        warn("%s=%s is not heeded: Ray starts with a token", AUTH_MODE, before)
    os.environ[AUTH_MODE] = "token"
    return token


def find_token() -> str | None:
    """The token that Ray would use, or None; a loose file is tightened on the way.

    Raises:
        ConfigError: the file is empty, or others can read it and it is not ours.
    """
    given = os.environ.get(TOKEN, "").strip()
    if given:
        return given
    path = token_path()
    if not path.exists():
        return None
    tighten(path)
    token = path.read_text(encoding="utf-8").strip()
    if not token:
        raise ConfigError(f"the authentication token {path} is empty; remove the file")
    return token


def tighten(path: Path) -> None:
    """Takes a token away from everybody but its owner.

    Raises:
        ConfigError: it belongs to somebody else.
    """
    found = path.stat()
    if not found.st_mode & 0o077:
        return
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.getuid():
        raise ConfigError(
            f"the authentication token {path} has mode {mode:03o}, so that others can read it, and "
            f"belongs to user {found.st_uid}. Needed is a file of your own with mode 600: copy it "
            f"and set {TOKEN_PATH}, or set {TOKEN}"
        )
    path.chmod(0o600)
    warn(
        "%s had mode %03o and now has 600; if other people use this machine, remove it, so that a "
        "new one is made",
        path,
        mode,
    )


def create_token(path: Path) -> str:
    """Writes a new token that only its owner can read; one that is there already stays.

    Returns:
        The token in the file.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path == default_token_path() and path.parent.stat().st_uid == os.getuid():
        path.parent.chmod(0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # mode 600 under any umask
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(secrets.token_hex(TOKEN_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # never replaces the token of a cluster that started meanwhile
    except FileExistsError:
        pass
    finally:
        os.unlink(temporary)
    return path.read_text(encoding="utf-8").strip()


# --- Probes ---


def refuses_strangers(address: str) -> bool:
    """Whether a dashboard turns away who has no token, or a wrong one.

    Args:
        address: http://HOST:PORT.

    Raises:
        OSError: nothing answers.
    """
    return all(
        http_status(address + path, token) in TURNED_AWAY
        for path in PROTECTED
        for token in (None, secrets.token_hex(TOKEN_BYTES))
    )


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirection to the caller: where it leads says nothing about the cluster."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Not followed."""


def http_get(url: str, token: str | None) -> tuple[int, bytes]:
    """Status and body of a request with a token, or without one.

    Raises:
        OSError: nothing answers within `PROBE_SECONDS`.
    """
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=PROBE_SECONDS) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def http_status(url: str, token: str | None) -> int:
    """Status of a request."""
    return http_get(url, token)[0]


def gcs_refuses_strangers(address: str) -> bool:
    """Whether a cluster's head turns away who has no token, or a wrong one.

    Takes milliseconds: two calls of the cheapest method there is.

    Args:
        address: HOST:PORT of the cluster itself.

    Raises:
        ConnectionError: nothing answers.
    """
    return not any(gcs_answers(address, token) for token in (None, secrets.token_hex(TOKEN_BYTES)))


def gcs_answers(address: str, token: str | None) -> bool:
    """Whether a cluster's head lets in who shows this token, or none.

    Raises:
        ConnectionError: nothing answers within `PROBE_SECONDS`.
    """
    import grpc  # a dependency of ray's

    shown = () if token is None else (("authorization", f"Bearer {token}"),)
    refusals = [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED]
    if os.environ.get("RAY_USE_TLS") == "1":
        refusals.append(grpc.StatusCode.UNAVAILABLE)  # no certificate, no connection
    # Ray's own channels do not go through a proxy either.
    channel = grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),))
    try:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        call(b"", timeout=PROBE_SECONDS, metadata=shown)
    except grpc.RpcError as error:
        if error.code() in refusals:
            return False
        raise ConnectionError(f"{address}: {error.code().name}: {error.details()}") from None
    finally:
        channel.close()
    return True


def require_closed(address: str, closed: bool, accept_open: bool) -> None:
    """Goes on only where a cluster turns strangers away, or the user accepts that it does not.

    Args:
        address: of what was asked, for the message.
        closed: what it did with requests without a token.
        accept_open: --accept-open-cluster.

    Raises:
        ConfigError: it lets strangers in.
    """
    if closed:
        return
    found = (
        f"the Ray cluster at {address} answers requests without a token: whoever reaches it can "
        "run code there"
    )
    if not accept_open:
        raise ConfigError(
            f"{found}. Start every node of it with {AUTH_MODE}=token and the same token "
            "(`ray get-auth-token --generate` makes one); where something else keeps strangers "
            "away, say so with --accept-open-cluster"
        )
    warn("%s (--accept-open-cluster)", found)


def warn(message: str, *values: object) -> None:
    """Says something that the user should know and that stops nothing."""
    logging.getLogger("metaloop").warning(message, *values)
