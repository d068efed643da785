"""Pictures of a request: data URIs, and files and addresses as far as the operator allows them."""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import os
import re
import socket
import ssl
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, unquote_to_bytes, urlsplit

from vkvx.errors import InputError, OptionError

MAX_PICTURES = 64
"""Of a request."""
FETCH_SECONDS = 10.0
"""For the pictures of a request that are on other hosts."""
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[\w.-]+(?::([0-9]{1,5}))?")
"""A name, and a port if there is one."""
_BLOCK = 1 << 16


@dataclass(frozen=True)
class PictureSources:
    """Where pictures may come from besides data URIs: files below ``directory``, and ``hosts``, each NAME or NAME:PORT.

    A picture has at most ``max_bytes``.
    """

    directory: Path | None = None
    hosts: tuple[str, ...] = ()
    max_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        if self.directory is not None:
            if not self.directory.is_dir():
                raise OptionError(f"--allow-local-files {self.directory} is no directory; give one that holds pictures")
            object.__setattr__(self, "directory", self.directory.resolve())
        object.__setattr__(self, "hosts", tuple(host.lower() for host in self.hosts))
        for host in self.hosts:
            found = _HOST.fullmatch(host)
            if found is None or int(found[1] or 80) not in range(1, 1 << 16):
                raise OptionError(
                    f"--allow-hosts {host} is no host; give names such as example.org or example.org:8443"
                )

    def load(self, addresses: Sequence[str]) -> list[bytes]:
        """The files at these addresses. Raises InputError."""
        if len(addresses) > MAX_PICTURES:
            raise InputError(f"the request has {len(addresses)} pictures, at most {MAX_PICTURES} are taken; give fewer")
        end = time.monotonic() + FETCH_SECONDS
        return [self._load(address, f"picture {number}", end) for number, address in enumerate(addresses, 1)]

    def _load(self, address: str, name: str, end: float) -> bytes:
        if address[:5].lower() == "data:":
            return _data(address, name)
        try:
            url = urlsplit(address)
            port = url.port
        except ValueError as error:
            raise InputError(f"{name} has an address that is not understood ({error})") from None
        if url.scheme == "file":
            return self._read(url, name)
        if url.scheme not in _PORTS:
            raise InputError(f"{name} must be a data: URI{self._others}, got an address that begins '{address[:16]}'")
        host = (url.hostname or "").lower()
        allowed = {host} if port in (None, _PORTS[url.scheme]) else set()
        allowed.add(f"{host}:{port or _PORTS[url.scheme]}")
        if not host or url.username is not None or allowed.isdisjoint(self.hosts):
            raise InputError(f"{name} is on a host that is not allowed here; send it as a data: URI{self._others}")
        return _fetch(url, name, self.max_bytes, end)

    @property
    def _others(self) -> str:
        hosts = f", or an address on {', '.join(self.hosts)}" if self.hosts else ""
        return hosts + (", or a file: address of the server's own pictures" if self.directory else "")

    def _read(self, url: SplitResult, name: str) -> bytes:
        if self.directory is None:
            raise InputError(f"{name} is a file of the server, which are not allowed here; send it as a data: URI")
        absent = InputError(f"{name}: there is no such file below the directory that is allowed")
        if url.netloc not in ("", "localhost"):
            raise absent
        try:
            path = (self.directory / unquote(url.path)).resolve(strict=True)
            if not path.is_relative_to(self.directory):  # whether it exists is not told
                raise absent
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, ValueError):
            raise absent from None
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise absent
            if found.st_size > self.max_bytes:
                raise _too_large(name, self.max_bytes)
            with open(handle, "rb", closefd=False) as file:
                return file.read(self.max_bytes)
        finally:
            os.close(handle)


def _data(address: str, name: str) -> bytes:
    head, comma, data = address.partition(",")
    if not comma:
        raise InputError(f"{name} is a data: URI without a comma; write data:image/png;base64,...")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(data)
    try:
        return base64.b64decode(unquote_to_bytes(data).translate(None, b"\r\n"), validate=True)
    except binascii.Error as error:
        raise InputError(f"{name} is a data: URI that is no base64 ({error})") from None


def _addresses(host: str, port: int) -> list[str]:
    """Addresses of a host, none of which is of a private network. Raises InputError through ``OSError``."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(is_public(address) for address in found):
        raise PermissionError("it is in a private network")
    return found


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public network."""
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return found.is_global and not found.is_multicast and (inner is None or is_public(str(inner)))


def _fetch(url: SplitResult, name: str, most: int, end: float) -> bytes:
    """What a host answers to GET. The address that was checked is the one that is asked; redirects are not followed."""
    host, port = url.hostname or "", url.port or _PORTS[url.scheme]
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(host, port)
    try:
        channel = socket.create_connection((_addresses(host, port)[0], port), timeout=_left(end))
        if url.scheme == "https":
            channel = ssl.create_default_context().wrap_socket(channel, server_hostname=host)
        connection.sock = channel
        path = f"{url.path or '/'}{f'?{url.query}' if url.query else ''}"
        connection.request("GET", path, headers={"Accept": "image/*"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise InputError(f"{name}: {host} answers with status {response.status}; redirects are not followed")
        found = bytearray()
        while block := response.read1(_BLOCK):
            found += block
            if len(found) > most:
                raise _too_large(name, most)
            channel.settimeout(_left(end))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{name} cannot be fetched from {host}: {reason}; send it as a data: URI") from None
    finally:
        connection.close()
    return bytes(found)


def _left(end: float) -> float:
    """Seconds until then. Raises TimeoutError if there are none."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"the pictures took more than {FETCH_SECONDS:g} s")
    return left


def _too_large(name: str, most: int) -> InputError:
    return InputError(f"{name} has more than {most:,} bytes; send a smaller one")
