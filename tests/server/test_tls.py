"""HTTPS: a server with a certificate, and files that do not make one."""

from __future__ import annotations

import asyncio
import signal
import ssl

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from served import ASKED, LiveFake
from services import GUARD_S

from echelon.errors import InvalidInput
from echelon.server.http_server import Address
from echelon.server.sending import SendProgress


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority, tmp_path_factory):
    """Paths of a certificate, its key, both in one file, another key, and its key encrypted."""
    folder = tmp_path_factory.mktemp("tls")
    ours, other = (authority.issue_cert("127.0.0.1") for _ in range(2))
    paths = {name: str(folder / f"{name}.pem") for name in ("cert", "key", "both", "other")}
    ours.cert_chain_pems[0].write_to_path(paths["cert"])
    ours.private_key_pem.write_to_path(paths["key"])
    ours.private_key_and_cert_chain_pem.write_to_path(paths["both"])
    other.private_key_pem.write_to_path(paths["other"])
    plain = serialization.load_pem_private_key(ours.private_key_pem.bytes(), None)
    paths["locked"] = str(folder / "locked.pem")
    (folder / "locked.pem").write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    return paths


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_nothing_waits_for_a_client_that_has_gone(authority, files, loop):
    """A connection then has no socket, and the shutdown still asks what it owes."""
    factory = asyncio.new_event_loop
    if loop == "uvloop":
        factory = pytest.importorskip("uvloop").new_event_loop
    trust = ssl.create_default_context()
    authority.configure_trust(trust)

    class Serving(asyncio.Protocol):
        def connection_made(self, transport):
            self.progress = SendProgress(transport, GUARD_S, lambda: None)
            self.transport = transport
            transport.write(b"a")

        def connection_lost(self, error):
            self.progress.stop()
            ended.set_result(self)

    async def main():
        nonlocal ended
        running = asyncio.get_running_loop()
        ended = running.create_future()
        context = Address("127.0.0.1", 0, files["both"]).tls_context()
        server = await running.create_server(Serving, "127.0.0.1", 0, ssl=context)
        reader, writer = await asyncio.open_connection(
            *server.sockets[0].getsockname(), ssl=trust, server_hostname="127.0.0.1"
        )
        await reader.readexactly(1)
        writer.transport.abort()
        gone = await asyncio.wait_for(ended, GUARD_S)
        server.close()
        assert gone.transport.get_extra_info("socket") is None
        assert gone.progress.waiting_bytes == 0

    ended = None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


@pytest.mark.parametrize("names", [("cert", "key"), ("both", None)])
def test_https_is_served_to_clients_that_trust_the_authority(authority, files, names):
    certificate, key = (name and files[name] for name in names)
    trust = ssl.create_default_context()
    with LiveFake(address={"certificate": certificate, "key": key}) as server:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{server.url}/health", verify=trust)
        authority.configure_trust(trust)
        assert server.url.startswith("https://")
        with httpx.Client(verify=trust) as client:
            response = client.post(f"{server.url}/v1/rerank", json=ASKED)
            assert (response.status_code, len(response.json()["results"])) == (200, 5)
            assert client.get(f"{server.url}/ready").status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(server.url.replace("https", "http") + "/health")
        assert server.end(signal.SIGTERM) == 0


def refusal(certificate, key=None) -> str:
    with pytest.raises(InvalidInput) as caught:
        Address("127.0.0.1", 0, certificate, key).tls_context()
    return str(caught.value)


def test_files_that_do_not_belong_together(files, tmp_path):
    cert, key = files["cert"], files["key"]
    Address("127.0.0.1", 0, cert, key).tls_context()
    Address("127.0.0.1", 0, files["both"]).tls_context()
    Address("127.0.0.1", 0).tls_context()
    other = files["other"]
    assert refusal(cert, other).startswith(f"--tls-key: {other} is not the key of {cert}.")
    assert refusal(None, key).startswith("--tls-key: has no certificate.")
    none = str(tmp_path / "none.pem")
    assert refusal(none, key).startswith("--tls-cert: cannot be used (No such file")
    for secret in (none, "-----BEGIN PRIVATE KEY-----\n" * 99, "secret\0"):
        words = refusal(cert, secret)
        assert words.startswith("--tls-key: cannot be used (")
        assert secret[:6] not in words
    assert "Is a directory" in refusal(cert, str(tmp_path))
    for wrong in ((cert, None), (key, key), (cert, cert), (cert, files["locked"])):
        words = refusal(*wrong)
        assert words.startswith("--tls-cert: ")
        assert "cannot be used (" in words
        assert words.endswith("without a password.")
