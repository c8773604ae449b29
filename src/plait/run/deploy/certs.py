"""Certificates and node keys for a private federation, signed by a CA for tests.

    ca.key, ca.crt           the CA: signs the server's certificate and nothing else
    server.key, server.crt   the server's; subjectAltName holds its hosts, serverAuth, no CA
    CLIENT, CLIENT.pub       a client's key pair: NIST P-384, OpenSSH format

The server gets its key and certificate, ca.crt and all .pub files; a client gets ca.crt and its
key. ca.key stays with whoever made it. The CA cannot revoke anything, and its key lies unencrypted
on a disk: use it for trying things out and for a network that its users run themselves.

Keys are elliptic (P-256 for certificates). Needs the package cryptography, which flwr brings along.
"""

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import CertificateBuilder

CA, SERVER, SERVER_KEY = "ca.crt", "server.crt", "server.key"
_LOOPBACK = ("localhost", "127.0.0.1")  # the server's own processes come in there
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HOST = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
)
_SLACK = datetime.timedelta(minutes=10)  # clocks that are behind ours


def make_certs(
    folder: str | Path, hosts: Sequence[str] = (), clients: Sequence[str] = (), days: int = 30
) -> list[Path]:
    """Make certificates for a server and key pairs for clients; return the files.

    folder: made with mode 0700; an existing one keeps its mode; private keys get mode 0600.
    hosts: names and addresses at which clients reach the server; those of this machine are added;
    none: key pairs only. days: how long the certificates are valid; key pairs do not expire.

    Raises:
        ImportError: cryptography is not installed.
        ValueError: there is nothing to make, a name cannot be used, or days is below 1.
        FileExistsError: one of the files exists; nothing is written.
    """
    _check(hosts, clients, days)
    folder = Path(folder)
    names = ["ca.key", CA, SERVER_KEY, SERVER] if hosts else []
    names += [name + ending for name in clients for ending in ("", ".pub")]
    for name in names:
        if os.path.lexists(folder / name):
            raise FileExistsError(
                f"{folder / name}: is there already, and nothing is overwritten. Give another "
                "folder, or remove the file."
            )
    contents = _certificates(hosts, days) if hosts else {}
    for name in clients:
        contents |= _key_pair(name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in names:
        public = name.endswith((".crt", ".pub"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(folder / name, flags, 0o644 if public else 0o600), "wb") as file:
            file.write(contents[name])
    return [folder / name for name in names]


def _check(hosts: Sequence[str], clients: Sequence[str], days: int) -> None:
    if not hosts and not clients:
        raise ValueError("certs: neither a host nor a client is given. Give one of them.")
    if days < 1:
        raise ValueError(f"certs: days = {days}. Give 1 or more.")
    for host in hosts:
        if _address(host) is None and not _HOST.fullmatch(host):
            raise ValueError(
                f"certs: host {host!r} is no host name and no IP address. Give one without a port."
            )
    for name in clients:
        if not _NAME.fullmatch(name) or name.endswith((".crt", ".key", ".pub")):
            raise ValueError(
                f"certs: client {name!r} cannot be the name of a key file. Use letters, digits, "
                "'_', '-' and '.', and no ending .crt, .key or .pub."
            )
        if list(clients).count(name) > 1:
            raise ValueError(f"certs: client {name!r} is given twice. Give it once.")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _cryptography() -> Any:
    """The package, with what is used of it."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ImportError(
            "certs: the package cryptography, which makes keys and certificates, is not "
            'installed. Install it with: pip install "plait[federated]"'
        ) from error
    return x509, hashes, serialization, ec


def _certificates(hosts: Sequence[str], days: int) -> dict[str, bytes]:
    """File name -> content of the CA's and the server's key and certificate."""
    x509, hashes, serialization, ec = _cryptography()
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text: str) -> Any:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def usage(*on: str) -> Any:
        every = (
            "digital_signature content_commitment key_encipherment data_encipherment "
            "key_agreement key_cert_sign crl_sign encipher_only decipher_only"
        )
        return x509.KeyUsage(**{key: key in on for key in every.split()})

    def start(subject: str, key: "EllipticCurvePrivateKey") -> "CertificateBuilder":
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("plait test CA"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SLACK)
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        )

    def private(key: "EllipticCurvePrivateKey") -> bytes:
        return key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = (
        start("plait test CA", ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .add_extension(usage("key_cert_sign", "crl_sign"), True)
        .sign(ca_key, hashes.SHA256())
    )
    server_key = ec.generate_private_key(ec.SECP256R1())
    names = []
    for host in dict.fromkeys([*hosts, *_LOOPBACK]):
        address = _address(host)
        names.append(x509.DNSName(host) if address is None else x509.IPAddress(address))
    server = (
        start(hosts[0][:64], server_key)
        .add_extension(x509.SubjectAlternativeName(names), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .add_extension(usage("digital_signature"), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False
        )
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return {
        "ca.key": private(ca_key),
        CA: ca.public_bytes(pem),
        SERVER_KEY: private(server_key),
        SERVER: server.public_bytes(pem),
    }


def _key_pair(name: str) -> dict[str, bytes]:
    """File name -> content of a client's private and public key."""
    _, _, serialization, ec = _cryptography()
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return {name: private, f"{name}.pub": public + f" {name}\n".encode()}
