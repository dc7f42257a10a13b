"""The server over TLS, with a certificate of its own making, to OpenAI's client that trusts it alone."""

from __future__ import annotations

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from openai import APIConnectionError, DefaultHttpxClient, OpenAI

from ryot.edge.bundle import Bundle
from tests.serve.conftest import running


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1, which vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ryot")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return paths


def test_openais_client_is_answered_over_tls(plain_bundle: Bundle, tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    arguments = ("--tls-certificate", certificate, "--tls-key", key, "--api-key", "secret")
    with running(tmp_path, plain_bundle.path, *arguments) as server:
        assert server.address.startswith("https://127.0.0.1:")
        trusting = DefaultHttpxClient(verify=ssl.create_default_context(cafile=certificate))
        with OpenAI(base_url=f"{server.address}/v1", api_key="secret", max_retries=0, http_client=trusting) as client:
            asked = {"model": "tiny-1", "prompt": "a", "max_tokens": 9, "temperature": 0}
            whole = client.completions.create(**asked, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
            stream = client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
            assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
        # Whoever knows nothing of the certificate, or speaks no TLS, says no word.
        with pytest.raises(APIConnectionError):
            server.client("secret").models.list()
        with pytest.raises(APIConnectionError):
            server._replace(address=server.address.replace("https", "http")).client("secret").models.list()
        assert server.end() == 0
