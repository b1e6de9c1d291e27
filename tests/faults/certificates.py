"""Certificates made for one run: an authority that the process trusts, and hosts that deserve it or do not."""

from __future__ import annotations

import ssl
import warnings
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Pair = tuple[ec.EllipticCurvePrivateKey, x509.Certificate]


class Authority:
    """Signs certificates; keeps its files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pair = _made("Authority of the fault battery", None, days=2)
        self.file = folder / "authority.pem"
        self.file.write_bytes(self._pair[1].public_bytes(serialization.Encoding.PEM))

    def context(self, name: str, *, days: int = 1, self_signed: bool = False) -> ssl.SSLContext:
        """What a host of this name presents; with days < 0 the certificate has expired."""
        key, signed = _made(name, None if self_signed else self._pair, days=days)
        file = self._folder / f"{signed.serial_number}.pem"
        file.write_bytes(
            signed.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def old_context(self, name: str) -> ssl.SSLContext:
        """A host with a good certificate that speaks TLS 1.0 only."""
        context = self.context(name)
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1
        return context


def _made(name: str, issuer: Pair | None, *, days: int) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer_key, issuer_name = (issuer[0], issuer[1].subject) if issuer else (key, subject)
    now = datetime.now(timezone.utc)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=3))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name.replace(" ", "-"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=issuer is None,
                crl_sign=issuer is None,
                decipher_only=False,
                **usage,
            ),
            critical=True,
        )
    )
    return key, builder.sign(issuer_key, hashes.SHA256())
