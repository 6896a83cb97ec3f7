"""Without the emulator: Application Default Credentials, TLS and the endpoint, against servers of our own."""

import asyncio
import datetime
import json
import os
import sys

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pubsub_service import SUBSCRIPTION, Service, serving

# Another process, because gRPC reads which authorities to trust once.
CLIENT = """
import asyncio, sys
from rejoinder.adapters import AdapterError, open_subscription

async def main():
    try:
        async with open_subscription(sys.argv[1]) as subscription:
            messages = await subscription.receive(1, 20)
            print(messages[0].body.decode(), await subscription.ack(messages))
    except AdapterError as exc:
        print(type(exc).__name__, exc)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate(key):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


async def run(tmp_path, key, status, answer):
    """Run the client, whose tokens come from a server that answers like this; gives what it printed and our service."""
    cert = certificate(key)
    (tmp_path / "roots.pem").write_bytes(cert)
    service = Service()
    service.waiting.put_nowait(b"hello")

    async def give_token(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = [
            int(line.split(b":")[1]) for line in head.lower().splitlines() if line.startswith(b"content-length")
        ]
        await reader.readexactly(length)
        body = json.dumps(answer).encode()
        writer.write(b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\nConnection: close\r\n" % status)
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()
        await writer.wait_closed()

    tokens = await asyncio.start_server(give_token, "127.0.0.1", 0)
    account = {
        "type": "service_account",
        "client_email": "worker@p.example.com",
        "private_key": pem(key).decode(),
        "token_uri": f"http://127.0.0.1:{tokens.sockets[0].getsockname()[1]}/token",
    }
    (tmp_path / "account.json").write_text(json.dumps(account))
    environment = {name: value for name, value in os.environ.items() if name != "PUBSUB_EMULATOR_HOST"} | {
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "account.json"),
        "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(tmp_path / "roots.pem"),
        "no_proxy": "127.0.0.1,localhost",
    }
    async with tokens, serving(service, grpc.ssl_server_credentials([(pem(key), cert)])) as address:
        url = f"gcppubsub://{SUBSCRIPTION}?endpoint=localhost:{address.rpartition(':')[2]}"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENT, url, stdout=asyncio.subprocess.PIPE, env=environment
        )
        async with asyncio.timeout(120):
            output, _ = await process.communicate()
    return output.decode(), service


async def test_default_credentials_and_the_endpoint_are_used(tmp_path, key):
    token = {"access_token": "secret", "expires_in": 3600, "token_type": "Bearer"}
    output, service = await run(tmp_path, key, 200, token)
    assert output == "hello [None]\n"
    assert {name for name, _ in service.metadata} == {"GetSubscription", "Pull", "Acknowledge"}
    assert {metadata["authorization"] for _, metadata in service.metadata} == {"Bearer secret"}


@pytest.mark.parametrize(("status", "error", "kind"), [(400, "invalid_grant", "Denied"), (503, "x", "Transient")])
async def test_a_token_that_is_not_given(tmp_path, key, status, error, kind):
    output, service = await run(tmp_path, key, status, {"error": error, "error_description": "no such account"})
    assert output.startswith(f"{kind} Google credentials: ")
    assert output.count("\n") == 1
    assert not service.calls
