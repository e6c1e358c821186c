"""Authorities and certificates for servers of this machine, made anew."""

import datetime as dt
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_NAMES = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])


class Authority:
    """An authority, whose certificate lies in a file.

    ca: path of its certificate. Each call of `issue` writes a certificate and its key to two files.
    """

    def __init__(self, directory, name):
        self._directory, self._name = directory, x509.Name([_named(name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        authority = x509.BasicConstraints(ca=True, path_length=0)
        self.ca = self._write(f"{name}.crt", self._signed(self._key, self._name, authority))

    def issue(self, name):
        """Return the paths of a certificate for 127.0.0.1 and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(key, x509.Name([_named(name)]), _NAMES)
        return self._write(f"{name}.crt", certificate), self._write(f"{name}.key", key)

    def _signed(self, key, subject, extension):
        own, theirs = self._key.public_key(), key.public_key()
        now = dt.datetime.now(dt.UTC)
        day = dt.timedelta(days=1)
        usage = x509.KeyUsage(**_USES | {"key_cert_sign": key is self._key})
        return (
            x509.CertificateBuilder(self._name, subject, theirs, x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(extension, critical=key is self._key)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(theirs), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _write(self, name, thing):
        path = self._directory / name
        path.write_bytes(_as_text(thing))
        return path


_USES = {
    "digital_signature": True,
    "content_commitment": False,
    "key_encipherment": False,
    "data_encipherment": False,
    "key_agreement": False,
    "key_cert_sign": False,
    "crl_sign": False,
    "encipher_only": False,
    "decipher_only": False,
}


def _named(name):
    return x509.NameAttribute(NameOID.COMMON_NAME, name)


def _as_text(thing):
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(serialization.Encoding.PEM)
    return thing.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
