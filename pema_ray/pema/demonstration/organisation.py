"""One organisation on this machine: a folder, a home and an address of its own, and commands that run in them.

With root, each organisation has a network namespace, and a wire joins the two; without, they share the loopback device
and use different ports. Knows no owner.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pema_ray.errors import UserError
from pema_ray.runtime.environment import inherited_environment

_SUBNET = "10.77.32"
_ENDED_SECONDS = 30
_PEMA_RAY = ("-m", "pema_ray")
_REQUEST = """
import ssl, sys, urllib.request
url, body, key, ca_file = sys.argv[1:]
headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
trusted = ssl.create_default_context(cafile=ca_file) if ca_file else None
request = urllib.request.Request(url, body.encode() if body else None, headers)
print(urllib.request.urlopen(request, timeout=120, context=trusted).read().decode())
"""


@dataclass(frozen=True)
class Organisation:
    """An organisation, and how its commands run.

    Attributes:
        namespace: its network namespace; None: it shares this machine's network.
        site: a folder of Python packages that take precedence over installed ones.
    """

    name: str
    folder: Path
    address: str
    namespace: str | None = None
    site: Path | None = None

    def environment(self) -> dict[str, str]:
        """The environment of its processes, with a home of its own."""
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        site = {} if self.site is None else {"PYTHONPATH": str(self.site)}
        return {**inherited_environment(), "HOME": str(home), "RAY_AUTH_MODE": "disabled", **site}

    def command(self, *arguments: str) -> list[str]:
        """This Python with these arguments, in this organisation's network."""
        inside = [] if self.namespace is None else ["ip", "netns", "exec", self.namespace]
        return [*inside, sys.executable, *arguments]

    def request(self, url: str, body: str = "", key: str = "", ca_file: Path | str = "") -> str | None:
        """An HTTP service's answer to a request from this organisation's network; None if it fails."""
        process = subprocess.run(
            self.command("-c", _REQUEST, url, body, key, str(ca_file)), capture_output=True, text=True, check=False
        )
        return None if process.returncode else process.stdout

    def run(self, *arguments: str) -> None:
        """Run `pema-ray` to its end and show its output.

        Raises:
            UserError: it failed.
        """
        code = subprocess.call(self.command(*_PEMA_RAY, *arguments), cwd=self.folder, env=self.environment())
        if code:
            raise UserError(f"{self.name}: pema-ray {arguments[0]} failed with exit code {code}; see its error above.")

    def output(self, *arguments: str) -> str:
        """Run `pema-ray` to its end and return its stripped output.

        Raises:
            UserError: it failed.
        """
        command, environment = self.command(*_PEMA_RAY, *arguments), self.environment()
        process = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if process.returncode:
            raise UserError(f"{self.name}: pema-ray {arguments[0]} failed: {process.stderr.strip()}")
        return process.stdout.strip()

    @contextmanager
    def service(
        self, ready: Callable[[], object], *arguments: str, seconds: float = 300, **environment: str
    ) -> Iterator[None]:
        """Run `pema-ray` in the background until the block ends; its output goes to `<folder>/<command>.log`.

        Args:
            ready: polled until it is true; then the block begins.

        Raises:
            UserError: it ended, or was not ready in time.
        """
        log = self.folder / f"{arguments[0]}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                self.command(*_PEMA_RAY, *arguments),
                cwd=self.folder,
                env={**self.environment(), **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait(process, log, ready, time.monotonic() + seconds)
            yield
        finally:
            _end(process)

    def _wait(self, process: subprocess.Popen[bytes], log: Path, ready: Callable[[], object], deadline: float) -> None:
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace").strip().splitlines()[-3:]
                raise UserError(f"{self.name}: its service did not start: {' '.join(last) or 'no output'} (see {log})")
            time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDED_SECONDS)
            return


@contextmanager
def two_organisations(folder: Path, sites: Mapping[str, Path]) -> Iterator[tuple[Organisation, Organisation, str]]:
    """A PLM owner and a data owner, and a description of what separates them.

    Args:
        folder: gets a folder for each.
        sites: organisation's name -> folder of the packages that it may import.
    """
    plm_space, data_space = (f"pema-{name}-{os.getpid()}" for name in ("plm", "data"))
    created: list[str] = []
    try:
        try:
            for space in (plm_space, data_space):
                _ip("netns", "add", space)
                created.append(space)
            _join(plm_space, data_space)
            places = (f"{_SUBNET}.1", plm_space), (f"{_SUBNET}.2", data_space)
            separation = "two network namespaces, joined by one wire"
        except (OSError, subprocess.CalledProcessError):
            places = (("127.0.0.1", None),) * 2
            separation = "two ports of this machine (network namespaces need root)"
        owners = []
        for name, (address, space) in zip(("plm_owner", "data_owner"), places, strict=True):
            (folder / name).mkdir(parents=True, exist_ok=True)
            owners.append(Organisation(name, folder / name, address, space, sites.get(name)))
        yield owners[0], owners[1], separation
    finally:
        for space in created:
            subprocess.run(["ip", "netns", "del", space], check=False)


def _join(first: str, second: str) -> None:
    _ip("link", "add", "pema0", "netns", first, "type", "veth", "peer", "pema1", "netns", second)
    for number, (space, device) in enumerate(((first, "pema0"), (second, "pema1")), start=1):
        _ip("-n", space, "addr", "add", f"{_SUBNET}.{number}/24", "dev", device)
        for interface in (device, "lo"):
            _ip("-n", space, "link", "set", interface, "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def self_signed_certificate(folder: Path, address: str) -> tuple[Path, Path]:
    """A certificate for an IP address, valid for 30 days, and its private key: `server.crt`, `server.key`.

    Raises:
        UserError: the package `cryptography` is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID
    except ImportError:
        raise UserError("A certificate needs the package cryptography: pip install 'pema-ray[demo]'.") from None
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pema-ray PLM owner")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    paths = folder / "server.crt", folder / "server.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(private)
    paths[1].chmod(0o600)
    return paths
