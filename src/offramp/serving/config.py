"""The options of the server. Imports no PyTorch."""

import ipaddress
import math
import socket
from dataclasses import dataclass, field
from typing import Literal

from offramp.calibration.share import check_keep_promise, check_share
from offramp.errors import ConfigError

LONGEST_SECONDS = 1e6


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Options of a server: where it listens, who may use it, and the limits of requests."""

    host: str = "127.0.0.1"
    "The address to listen at; other machines reach 0.0.0.0, which needs an API key."
    port: int = 8000
    "The port to listen at; 0 takes a free one."
    api_key: str | None = field(default=None, repr=False)
    """Requests must send this key (Authorization: Bearer KEY). The environment variable
    OFFRAMP_API_KEY holds it where others must not read the command line."""
    cors: tuple[str, ...] = ()
    "Web pages of these origins, such as https://example.org, may call the server; * for all."
    name: str | None = None
    "The model's name in the API (default: that of its folder)."
    slots: int = 8
    "Number of requests that decode at the same time."
    capacity: int = 1024
    "Largest number of tokens of a request, its prompt and its new tokens together."
    waiting: int = 64
    "Largest number of requests that wait for a slot; one more is answered by 429."
    prefill_tokens: int = 64
    "Number of prompt tokens that run beside each new token of the other requests."
    max_new_tokens: int = 512
    "Largest number of new tokens that a request may ask for."
    max_body_bytes: int = 1 << 20
    "Largest body of a request; a larger one is answered by 413."
    request_seconds: float = 300.0
    "Longest time of a request, from its body to its last token."
    read_seconds: float = 30.0
    "Longest time in which a client sends its request."
    write_seconds: float = 30.0
    "A client that takes no byte of its answer for so long loses its connection."
    audit: float | None = None
    """Share of the tokens that exit early which are also run to the end, such as 0.02. No answer
    changes; /metrics bounds how often the last layer predicts another token."""
    keep_promise: float | None = None
    """With audit: keep the mean risk of all new tokens at or below this number, such as 0.05, at
    all times. Exits become careful as the audit's bound nears it, and never bolder than a request
    asks for. The first few thousand tokens run through nearly all layers."""
    promise_risk: Literal["disagreement", "nll-gap"] = "disagreement"
    """The risk that is promised: disagreement is the share of tokens for which the last layer
    predicts another one; nll-gap is the loss in nats per token, clipped to 1."""
    grace: float = 30.0
    "Seconds that running requests have to finish after SIGTERM or Ctrl-C."

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port: expected from 0 to 65535, got {self.port}")
        least = {"slots": 1, "capacity": 2, "waiting": 0, "prefill_tokens": 1}
        least |= {"max_new_tokens": 1, "max_body_bytes": 64}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(
                    f"{name}: expected at least {smallest}, got {getattr(self, name)}"
                )
        for name in ("request_seconds", "read_seconds", "write_seconds", "grace"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and 0 <= seconds <= LONGEST_SECONDS):
                raise ConfigError(
                    f"{name}: expected from 0 to {LONGEST_SECONDS:g} seconds, got {seconds:g}"
                )
            if not seconds and name != "grace":
                raise ConfigError(f"{name}: expected above 0 seconds, got 0")
        if self.audit is not None:
            check_share(self.audit)
        check_keep_promise(self.keep_promise, self.promise_risk, share=self.audit)
        if self.api_key is not None and not _is_key(self.api_key):
            raise ConfigError(
                "api-key: expected at least 1 character of ASCII, without spaces, got another key"
            )
        if self.name is not None and not (self.name.strip() and self.name.isprintable()):
            raise ConfigError(f"name: expected a printable name, got {self.name!r}")
        for origin in self.cors:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ConfigError(
                    f"cors: expected origins such as https://example.org, or *, got {origin!r}"
                )

    def require_key(self) -> None:
        """Raise a ConfigError if other machines reach the server and it has no key."""
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"api-key: expected one, since other machines may reach {self.host}: give "
                "--api-key, or set OFFRAMP_API_KEY"
            )


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address. Raises ConfigError for no address."""
    addresses = {str(each[4][0]).partition("%")[0] for each in addresses_of(host, 0)}
    return all(ipaddress.ip_address(each).is_loopback for each in addresses)


def addresses_of(host: str, port: int) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
    """Return what ``socket.getaddrinfo`` knows of an address to listen at."""
    try:
        if not host:
            raise OSError("no address")
        return list(
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        )
    except (OSError, UnicodeError):
        raise ConfigError(
            f"host: expected an address of this machine, such as 127.0.0.1, got {host!r}"[:300]
        ) from None


def _is_key(key: str) -> bool:
    return bool(key) and key.isascii() and key.isprintable() and " " not in key
