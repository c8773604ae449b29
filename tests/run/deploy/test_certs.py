"""The test CA: what is in the certificates and keys, who may read them, and what is refused."""

import datetime
import ipaddress
import stat
import sys
from pathlib import Path

import pytest

from plait.run.deploy.certs import make_certs
from plait_cli import main

pytest.importorskip("cryptography")


def test_certificates_hold_for_their_hosts_and_nothing_else(tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID
    from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

    folder = tmp_path / "certs"
    names = [path.name for path in make_certs(folder, ["fl.example", "10.0.0.7"], ["a", "b-1"])]
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    ca, server = (
        x509.load_pem_x509_certificate((folder / f"{name}.crt").read_bytes())
        for name in ("ca", "server")
    )
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    constraints = server.extensions.get_extension_for_class(x509.BasicConstraints)
    assert not constraints.value.ca
    assert constraints.critical
    usage = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example", "localhost"]
    addresses = names.get_values_for_type(x509.IPAddress)
    assert addresses == [ipaddress.ip_address("10.0.0.7"), ipaddress.ip_address("127.0.0.1")]
    days = (server.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).total_seconds()
    assert 29.9 < days / 86400 <= 30
    store = PolicyBuilder().store(Store([ca]))
    store.build_server_verifier(x509.DNSName("fl.example")).verify(server, [])
    with pytest.raises(VerificationError):
        store.build_server_verifier(x509.DNSName("other.example")).verify(server, [])
    make_certs(tmp_path / "other", ["fl.example"])
    other = x509.load_pem_x509_certificate((tmp_path / "other" / "ca.crt").read_bytes())
    with pytest.raises(VerificationError):
        PolicyBuilder().store(Store([other])).build_server_verifier(
            x509.DNSName("fl.example")
        ).verify(server, [])
    key = server.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)


def test_key_pairs_belong_together_and_are_of_the_kind_that_flower_takes(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        load_ssh_private_key,
        load_ssh_public_key,
    )

    make_certs(tmp_path, clients=["a", "b"])
    keys = {}
    for name in ("a", "b"):
        private = load_ssh_private_key((tmp_path / name).read_bytes(), None)
        public = load_ssh_public_key((tmp_path / f"{name}.pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(private.curve, ec.SECP384R1)
        assert private.public_key() == public
        keys[name] = public
    assert keys["a"] != keys["b"]


def test_private_files_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    make_certs(folder, ["127.0.0.1"], ["a"])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    private = {name for name, mode in modes.items() if mode == 0o600}
    assert private == {"ca.key", "server.key", "a"}


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    make_certs(tmp_path, clients=["a"])
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(FileExistsError, match=r"a: is there already, and nothing is overwritten"):
        make_certs(tmp_path, ["127.0.0.1"], ["b", "a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.pub"]
    assert (tmp_path / "a").read_bytes() == before
    (tmp_path / "c").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="c: is there already"):
        make_certs(tmp_path, clients=["c"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "neither a host nor a client is given"),
        ({"clients": ["../a"]}, r"client '\.\./a' cannot be the name of a key file"),
        ({"clients": ["ca.crt"]}, "client 'ca.crt' cannot be the name of a key file"),
        ({"clients": ["-a"]}, "client '-a' cannot be the name of a key file"),
        ({"clients": ["a", "a"]}, "client 'a' is given twice"),
        ({"hosts": ["127.0.0.1:8443"]}, "host '127.0.0.1:8443' is no host name and no IP address"),
        ({"hosts": ["h"], "days": 0}, "days = 0. Give 1 or more"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path: Path, given: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_certs(tmp_path / "certs", **given)
    assert not (tmp_path / "certs").exists()


def test_without_cryptography_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ImportError, match=r'pip install "plait\[federated\]"'):
        make_certs(tmp_path / "certs", ["127.0.0.1"])
    assert not (tmp_path / "certs").exists()


def test_the_command_says_who_gets_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["federate", "certs", str(tmp_path), "--host", "h", "--host", "::1", "--clients", "a,b"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "To client b: ca.crt and b" in shown
    assert "Keep ca.key." in shown
    assert main(words) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
