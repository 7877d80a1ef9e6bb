"""When certificates end, as OpenSSL would tell."""

from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from weightsync.certificates import ends_at

KEY = ec.generate_private_key(ec.SECP256R1())


def pem(year: int) -> bytes:
    """A certificate of many names, so that lengths of every form are in it."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "n" * 64)])
    names = [x509.DNSName(f"node-{n}.example.org") for n in range(40)]
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(KEY.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(1999, 1, 1))
        .not_valid_after(datetime.datetime(year, 2, 28, 23, 59, 58))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    signed = builder.sign(KEY, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("year", [1999, 2027, 2049, 2050, 2199])
def test_the_end_is_what_the_certificate_says_in_either_form_of_a_year(year, tmp_path):
    file = tmp_path / "cert.pem"
    file.write_bytes(pem(year))
    ends = datetime.datetime.fromtimestamp(ends_at(file), datetime.UTC)
    assert ends == datetime.datetime(year, 2, 28, 23, 59, 58, tzinfo=datetime.UTC)


def test_of_a_chain_with_its_key_the_first_end_counts(tmp_path):
    file = tmp_path / "chain.pem"
    secret = KEY.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file.write_bytes(pem(2060) + b"an intermediate\n" + pem(2030) + secret)
    assert datetime.datetime.fromtimestamp(ends_at(file), datetime.UTC).year == 2030


def test_what_holds_no_certificate_is_refused(tmp_path):
    file = tmp_path / "none.pem"
    file.write_text("no certificate")
    with pytest.raises(ValueError, match="no certificate"):
        ends_at(file)
    lines = pem(2027).decode().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:16], lines[-1]]))
    with pytest.raises(ValueError, match=r"cut off|time data"):
        ends_at(file)
