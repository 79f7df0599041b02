"""A certificate for this server and for the platform's host names, from an authority made for it alone."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lcm_rt.errors import InputError

HOSTS = (
    "localhost",
    "127.0.0.1",
    "::1",
    "fal.run",
    "*.fal.run",
    "falrun.com",
    "*.falrun.com",
    "rest.fal.ai",
    "rest.alpha.fal.ai",
    "fal.media",
    "v3.fal.media",
    "*.gateway.alpha.fal.ai",
)
"""What every certificate is for: this machine, and the hosts that the platform's clients call."""

LIFETIME = timedelta(days=825)  # Apple's systems trust no longer one
_SKEW = timedelta(days=1)
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = re.compile(rf"(\*\.{_LABEL}\.)?{_LABEL}(\.{_LABEL})*")  # clients do not match a *. before a single label
_MAX_DNS_NAME = 253


@dataclass(frozen=True, slots=True)
class Certificate:
    """The three files, PEM: what clients trust, what the server shows, and what only the server may read."""

    ca: Path
    cert: Path
    key: Path


def write(folder: Path, hosts: Sequence[str] = (), *, now: datetime | None = None) -> Certificate:
    """Make ``ca.pem``, ``cert.pem`` and ``key.pem`` in ``folder``, for ``HOSTS`` and ``hosts``.

    The authority's own key is kept nowhere: whoever trusts ``ca.pem`` trusts this one certificate and never another.

    Raises: InputError: a host is neither a name, with ``*.`` before it perhaps, nor an address. FileExistsError: one of
    the files is there. OSError: the folder cannot be written.
    """
    names = [_general_name(host) for host in dict.fromkeys([*HOSTS, *hosts])]
    now = now or datetime.now(UTC)
    files = Certificate(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    for path in (files.ca, files.cert, files.key):
        if path.exists():
            raise FileExistsError(f"{path} is there already; nothing was written")
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    # With the time in its name, an authority that was trusted earlier is never mistaken for this one.
    issuer = _name(f"lcm-rt local authority {now:%Y-%m-%d %H:%M:%S}")
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = (
        _builder(issuer, issuer, ca_key, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(ca_id, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    cert = (
        _builder(_name("lcm-rt"), issuer, key, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    folder.mkdir(parents=True, exist_ok=True)
    _create(files.key, secret, 0o600)
    _create(files.cert, cert.public_bytes(serialization.Encoding.PEM), 0o644)
    _create(files.ca, ca.public_bytes(serialization.Encoding.PEM), 0o644)
    return files


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if len(host) > _MAX_DNS_NAME or not _DNS_NAME.fullmatch(host.lower()):
        raise InputError("host", f"{host!r} is neither a host's name nor an address")
    return x509.DNSName(host.lower())


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now - _SKEW + LIFETIME)
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _create(path: Path, data: bytes, mode: int) -> None:
    path.touch(mode, exist_ok=False)  # nobody else can open it before it has its mode
    path.write_bytes(data)
