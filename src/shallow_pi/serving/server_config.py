"""A server's address, key, certificate and limits; and the sockets it listens on.

A connection that never finishes its handshake (TCP, TLS, or the HTTP request) is no client yet: it
is given a few seconds, and of too many at once the oldest is dropped, so that strangers who send
nothing or send slowly keep no robot out.
"""

import contextlib
import dataclasses
import errno
import hmac
import ipaddress
import math
import pathlib
import socket
import ssl

from shallow_pi import flags


@dataclasses.dataclass(frozen=True)
class Settings:
    """Address, certificate and limits of a server; a command line has them as flags."""

    # Address to listen on; 0.0.0.0 opens the server to the network (:: to IPv6 networks alone).
    host: str = "127.0.0.1"
    # Port; 0 uses a free one.
    port: int = 8000
    # Certificate chain for wss://, a PEM file.
    tls_cert: str = ""
    # Private key of the certificate, a PEM file.
    tls_key: str = ""
    # Largest observation in MiB; a connection that sends a larger one is closed with 1009.
    max_request_mb: int = 64
    # Maximum number of clients; others get status 503.
    max_clients: int = 32
    # Maximum number of waiting observations; others are refused, and their connections closed
    # with 1013.
    max_waiting: int = 16
    # Answer up to this many waiting observations at once, for several robots behind one server.
    # Programs for 1, 2, 4, 8 ... are compiled and timed at the start, and the fastest for those
    # that wait is used. 1 answers observations one at a time.
    batch: int = 1
    # With --batch: longest time in milliseconds that an observation waits for those of other active
    # clients. A lone client never waits.
    batch_wait_ms: float = 2.0
    # Seconds of one inference after which it counts as stuck: /healthz then answers 503, and a
    # supervisor restarts the server. Let it be longer than compiling for a camera's new image size.
    stuck_seconds: float = 120.0
    # Time limit in seconds for a connection's TLS handshake, and for its HTTP request.
    handshake_seconds: float = 5.0
    # Maximum number of handshakes in progress, not counting clients; a new one replaces the oldest.
    max_handshakes: int = 128


@dataclasses.dataclass(frozen=True)
class ServerConfig(Settings):
    """One server: its settings, checked, and its key."""

    # Key that clients must send as `Authorization: Api-Key ...`; empty asks for none.
    api_key: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        counts = ("max_request_mb", "max_clients", "max_waiting", "batch", "max_handshakes")
        flags.at_least(self, 1, *counts)
        if not 0 <= self.batch_wait_ms < math.inf:
            raise ValueError(
                f"--batch-wait-ms must be finite and not negative, got {self.batch_wait_ms}"
            )
        for name in ("stuck_seconds", "handshake_seconds"):
            if not (seconds := getattr(self, name)) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {seconds}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port must lie in 0..65535, got {self.port}")
        if not (self.api_key.isascii() and self.api_key.isprintable() and " " not in self.api_key):
            raise ValueError("an API key is printable ASCII without spaces: make another")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError(
                "TLS needs a certificate and its key: give both --tls-cert and --tls-key, or "
                "neither"
            )

    @property
    def is_open(self) -> bool:
        """Reachable from other machines."""
        return not is_loopback(self.host)

    def is_key(self, given: str) -> bool:
        """Compare with the API key, in the same time for any wrong one."""
        return hmac.compare_digest(given.encode(errors="backslashreplace"), self.api_key.encode())

    def url(self, port: int) -> str:
        """The address clients connect to."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self.tls_cert else 'ws'}://{host}:{port}"

    def check(self) -> None:
        """Find out before a policy is loaded that it could be served.

        Raises:
          FileNotFoundError, ValueError: unusable TLS files, or an address that is taken.
        """
        self.ssl_context()
        for one in self.listen():
            one.close()

    def listen(self) -> "list[Listener]":
        """Sockets bound to every address of the host, such as IPv4's and IPv6's of localhost.

        Raises:
          ValueError: an address that cannot be listened on.
        """
        opened: list[Listener] = []
        try:
            for family, kind, _, _, address in dict.fromkeys(
                socket.getaddrinfo(
                    self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
                )
            ):
                opened.append(Listener(family, kind, self.max_handshakes))
                port = opened[0].getsockname()[1] if len(opened) > 1 else self.port
                opened[-1].bind((address[0], port, *address[2:]))
        except OSError as error:
            for one in opened:
                one.close()
            if error.errno == errno.EADDRINUSE:
                raise ValueError(
                    f"port {self.port} of {self.host} is in use: stop the program that listens "
                    "there, or give another --port"
                ) from error
            raise ValueError(
                f"cannot listen on port {self.port} of {self.host!r}: {error}; give --host an "
                "address or name of this machine without scheme, port or brackets (127.0.0.1 for "
                "this machine alone, 0.0.0.0 for others too)"
            ) from error
        return opened

    def ssl_context(self) -> ssl.SSLContext | None:
        """The server's TLS; None without a certificate.

        Raises:
          FileNotFoundError, ValueError: a file is missing, unreadable, encrypted or not PEM.
        """
        if not self.tls_cert:
            return None
        cert, key = (pathlib.Path(path).expanduser() for path in (self.tls_cert, self.tls_key))
        for path in (cert, key):
            if not path.is_file():
                raise FileNotFoundError(f"no TLS file {path}; expected PEM")

        def refuse_passphrase() -> str:
            # OpenSSL would ask the terminal, which a service does not have.
            raise ValueError(
                f"the private key {key} is encrypted, and a server cannot ask for its passphrase: "
                f"write it without one (openssl pkey -in {key} -out NEW.pem)"
            )

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(cert, key, password=refuse_passphrase)
        except OSError as error:
            raise ValueError(
                f"{cert} and {key} are not a PEM certificate and its private key that this user "
                f"can read: {error}"
            ) from error
        return context


class Listener(socket.socket):
    """A listening socket that remembers unfinished handshakes, and drops the oldest of too many."""

    def __init__(self, family: int, kind: int, max_handshakes: int) -> None:
        super().__init__(family, kind)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            self.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self._limit = max_handshakes
        self._unfinished: dict[object, socket.socket] = {}

    def accept(self) -> tuple[socket.socket, object]:
        """A connection, as asyncio asks for it."""
        accepted, address = super().accept()
        open_ = {a: one for a, one in self._unfinished.items() if one.fileno() != -1}
        for old in list(open_)[: max(0, len(open_) + 1 - self._limit)]:
            with contextlib.suppress(OSError):
                open_.pop(old).shutdown(socket.SHUT_RDWR)
        self._unfinished = {**open_, address: accepted}
        return accepted, address

    def finished(self, address: object) -> None:
        """The connection from this address has finished its handshake."""
        self._unfinished.pop(address, None)


def is_loopback(host: str) -> bool:
    """True for an address or name that always means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
