"""Where a server listens, for whom, and how much it takes."""

import dataclasses
import errno
import hmac
import ipaddress
import pathlib
import socket
import ssl


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """One server."""

    # Address to listen on; 0.0.0.0 opens the server to the network.
    host: str = "127.0.0.1"
    # Port; 0 takes a free one.
    port: int = 8000
    # What clients must send as `Authorization: Api-Key ...`; empty asks for none.
    api_key: str = dataclasses.field(default="", repr=False)
    # Certificate chain (PEM file); with it and its key the address is wss://.
    tls_cert: str = ""
    # Private key of the certificate (PEM file).
    tls_key: str = ""
    # Largest observation, MiB; a larger one is closed with 1009.
    max_request_mb: int = 64
    # Clients at once; one more is answered 503.
    max_clients: int = 32
    # Observations that may wait for their turn; one more is refused and closed with 1013.
    max_waiting: int = 16

    def __post_init__(self) -> None:
        for name in ("max_request_mb", "max_clients", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must lie in 0..65535, got {self.port}")
        if not (self.api_key.isascii() and self.api_key.isprintable() and " " not in self.api_key):
            raise ValueError("an API key is printable ASCII without spaces: make another")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("TLS needs a certificate and its key: give both files or neither")

    @property
    def is_open(self) -> bool:
        """Whether others than this machine can connect."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"

    def is_key(self, given: str) -> bool:
        """Whether this is the API key, in the same time for any wrong one."""
        return hmac.compare_digest(given.encode(errors="backslashreplace"), self.api_key.encode())

    def url(self, port: int) -> str:
        """The address clients connect to."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self.tls_cert else 'ws'}://{host}:{port}"

    def cannot_listen(self, error: OSError) -> ValueError:
        """What to tell a user whose address cannot be listened on."""
        if error.errno == errno.EADDRINUSE:
            return ValueError(
                f"port {self.port} of {self.host} is in use: stop what listens there, or give "
                "another --port"
            )
        return ValueError(f"cannot listen on {self.host}:{self.port}: {error}")

    def check(self) -> None:
        """Find out before a policy is loaded whether it could be served.

        Raises:
          FileNotFoundError, ValueError: the TLS files or the address will not do.
        """
        self.ssl_context()
        try:
            family, kind, *_, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM
            )[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise self.cannot_listen(error) from error

    def ssl_context(self) -> ssl.SSLContext | None:
        """TLS, where it is asked for.

        Raises:
          FileNotFoundError, ValueError: a file is not there, or not what it should be.
        """
        if not self.tls_cert:
            return None
        cert, key = (pathlib.Path(path).expanduser() for path in (self.tls_cert, self.tls_key))
        for path in (cert, key):
            if not path.is_file():
                raise FileNotFoundError(f"no TLS file {path}; expected PEM")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(cert, key)
        except ssl.SSLError as error:
            raise ValueError(
                f"{cert} and {key} are not a PEM certificate and its private key: {error}"
            ) from error
        return context
