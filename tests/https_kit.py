"""A PLM owner's public service over real TLS, with a key: on a port of this machine, its replicas without Ray."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
from functools import partial
from pathlib import Path

import httpx
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from serving_kit import DirectHandle

from pema_ray.data_owner.remote import RemotePLM
from pema_ray.line import ExtractBatch, Step, codec
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner.service.access import Access, Quota, add_client
from pema_ray.plm_owner.service.api import RequestLimits, make_api
from pema_ray.plm_owner.service.deployment import PLMEngine
from pema_ray.plm_owner.service.replicas import Replicas


def certificate(folder: Path, name: str, days: int = 1, address: str = "127.0.0.1") -> tuple[str, str]:
    """A self-signed certificate of an address and its key; with negative days it has expired."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pema-ray test")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=10))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.crt", folder / f"{name}.key"
    paths[0].write_bytes(built.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    )
    return str(paths[0]), str(paths[1])


class Owner:
    """A PLM owner's public service on a port of this machine."""

    def __init__(
        self,
        folder: Path,
        plm: str,
        days: int = 1,
        limits: RequestLimits | None = None,
        engine: dict | None = None,
        replicas: int = 1,
        **quota,
    ) -> None:
        self.folder = folder
        self.keys, self.audit = folder / "keys.yaml", folder / "audit.jsonl"
        self.key_file = folder / "key"
        self.key = add_client(self.keys, "data owner", Quota(**quota))
        self.key_file.write_text(self.key + "\n")
        self.certificate, self._private = certificate(folder, "server", days)
        config = {"name": plm, "dtype": "float32", "device": "cpu", "threads": 1}
        settings = {"slots": 8, "max_tokens": 90, **(engine or {})}
        self.handle = DirectHandle(lambda: PLMEngine(config, settings), replicas)
        self.now, self._remotes = 1000.0, list[RemotePLM]()
        self.access = Access(self.keys, self.audit, clock=lambda: self.now)
        self.api = make_api(self.access, limits or RequestLimits(), partial(Replicas, self.handle))

    async def __aenter__(self) -> Owner:
        config = uvicorn.Config(
            self.api, port=0, log_level="critical", ssl_certfile=self.certificate, ssl_keyfile=self._private
        )
        self.server = uvicorn.Server(config)
        self._task = asyncio.create_task(self.server.serve())
        while not self.server.started:
            await asyncio.sleep(0.01)
        self.url = f"https://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.fingerprint = (await self.handle.replicas["r0"].describe()).card.fingerprint
        return self

    async def stop(self) -> None:
        for remote in self._remotes:
            await remote.end()
        self.server.should_exit = True
        await self._task

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        for replica in self.handle.replicas.values():
            await replica.plm.end()

    async def replace(self, plm: str) -> None:
        """Put a replica of another PLM into the place of all there are."""
        config = {"name": plm, "dtype": "float32", "device": "cpu", "threads": 1}
        self.handle._make = lambda: PLMEngine(config, {"slots": 8})
        for name, replica in list(self.handle.replicas.items()):
            await replica.plm.end()
            self.handle.kill(name)
        self.handle.add()

    def steps(self, *steps: Step) -> bytes:
        """A frame for this PLM."""
        return codec.encode_steps(steps, self.fingerprint)

    def batch(self, *sequences: list[int], first: int = 0) -> bytes:
        """A frame for this PLM."""
        return codec.encode_extract(ExtractBatch(list(sequences), [first] * len(sequences)), self.fingerprint)

    def remote(self, **changes) -> RemotePLM:
        settings = {"url": self.url, "key_file": str(self.key_file), "ca_file": self.certificate, "timeout_seconds": 20}
        self._remotes.append(RemotePLM(PLMConfig(**(settings | changes))))
        return self._remotes[-1]

    def raw(self) -> httpx.AsyncClient:
        import ssl

        trusted = ssl.create_default_context(cafile=self.certificate)
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.url, verify=trusted, headers=headers, timeout=20)

    def log(self) -> list[dict]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()] if self.audit.exists() else []
