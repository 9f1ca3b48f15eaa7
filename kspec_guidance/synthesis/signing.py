"""Signatures of images: C2PA manifests by the reference library, with the user's certificate or a self-signed one."""

import io
import json
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from kspec_guidance.synthesis.errors import RunFailedError, SynthesisError
from kspec_guidance.synthesis.marks import SOURCE_TYPE, encode_image
from kspec_guidance.utils.hashing import hash_json

__all__ = ["AUTO", "SELF_SIGNED", "Signer", "can_sign", "resolve_sign"]

AUTO, SELF_SIGNED = "auto", "self-signed"
WARNING = "self-signed, identity not verified"  # what the certificate itself says
YEARS = 10  # that a self-signed certificate is valid
HOWTO = "give one PEM file with the certificate chain and its private key, or 'self-signed'"
WITHOUT = "or leave signatures out (sign=None, --no-sign)"


def can_sign() -> bool:
    """Whether the packages that sign are installed."""
    return all(find_spec(name) is not None for name in ("c2pa", "cryptography"))


def resolve_sign(sign: str | Path | None, marks: bool = True) -> str | Path | None:
    """What ``auto`` stands for: ``self-signed`` if images have marks and the packages are installed, else None."""
    if sign != AUTO:
        return sign
    return SELF_SIGNED if marks and can_sign() else None


class Signer:
    """Adds a signed C2PA manifest to images.

    Args:
        name: ``self-signed`` for a new certificate, whose key is never written, or a PEM file with the certificate, those
            above it, and the private key.

    Attributes:
        digest: of the certificate; ``self-signed`` for such a one.

    Raises:
        SynthesisError: if ``c2pa-python`` is not installed, or the certificate cannot be read or is not valid for signing.
    """

    def __init__(self, name: str | Path):
        try:
            import c2pa
        except Exception as error:  # not installed, or without its native library
            raise SynthesisError(
                f"signing images needs: pip install 'kspec-guidance[publish]' ({_one_line(error)}); {WITHOUT}"
            ) from error
        self._c2pa, self_signed = c2pa, str(name) == SELF_SIGNED
        certificates, key = _parse(_self_signed(), SELF_SIGNED) if self_signed else _parse(_read(Path(name)), str(name))
        self.digest = SELF_SIGNED if self_signed else hash_json(certificates.decode("latin-1"), 12)
        try:
            info = c2pa.C2paSignerInfo(_algorithm(certificates), certificates, key, None)
            self._signer = c2pa.Signer.from_info(info)
            self._context = c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}})
            self._sign(encode_image(Image.new("RGB", (1, 1))), {})  # before images are made
        except (c2pa.C2paError, ValueError) as error:
            raise SynthesisError(f"cannot sign with {name}: {_one_line(error)}; {HOWTO}") from error

    def sign(self, data: bytes, row: Mapping[str, Any]) -> bytes:
        """The file of an image ``data``, a PNG, with a signed manifest.

        Raises:
            RunFailedError: if it cannot be signed.
        """
        try:
            return self._sign(data, row)
        except self._c2pa.C2paError as error:
            raise RunFailedError(
                f"cannot sign {row.get('file_name')}: {_one_line(error)}; finished images are safe, and the same command "
                "continues after them"
            ) from error

    def _sign(self, data: bytes, row: Mapping[str, Any]) -> bytes:
        name, _, version = str(row.get("versions") or "kspec-guidance unknown").partition(",")[0].partition(" ")
        agent = {"name": row.get("model") or name, **({"version": row["revision"]} if row.get("revision") else {})}
        created = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": agent}
        manifest: dict[str, Any] = {
            "claim_generator_info": [{"name": name, "version": version}],
            "title": str(row.get("file_name", "image.png")),
            "assertions": [{"label": "c2pa.actions", "created": True, "data": {"actions": [created]}}],
        }
        signed = io.BytesIO()
        with self._c2pa.Builder(json.dumps(manifest), self._context) as builder:
            builder.sign(self._signer, "image/png", io.BytesIO(data), signed)
        return signed.getvalue()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SynthesisError(f"cannot read the certificate {path}: {error.strerror or error}; {HOWTO}") from error


def _parse(data: bytes, name: str) -> tuple[bytes, bytes]:
    """The certificates and the private key of a PEM file."""
    text = data.decode("latin-1")
    blocks: dict[str, list[str]] = {}
    for part in text.split("-----BEGIN ")[1:]:
        kind = part.partition("-----")[0]
        blocks.setdefault(kind, []).append(
            "-----BEGIN " + part.partition(f"-----END {kind}-----")[0] + f"-----END {kind}-----\n"
        )
    keys = [block for kind, found in blocks.items() if kind.endswith("PRIVATE KEY") for block in found]
    certificates = blocks.get("CERTIFICATE", [])
    if not certificates or len(keys) != 1 or "ENCRYPTED" in keys[0]:
        encrypted = " an encrypted" if keys and "ENCRYPTED" in keys[0] else f" {len(keys)}"
        raise SynthesisError(
            f"{name} holds {len(certificates)} certificates and{encrypted} private key; {HOWTO}, without a password"
        )
    return "".join(certificates).encode("latin-1"), keys[0].encode("latin-1")


def _algorithm(certificates: bytes) -> str:
    """The signature algorithm of C2PA for the key of the first certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        certificate = x509.load_pem_x509_certificate(certificates)
        key = certificate.public_key()
    except Exception as error:  # of several kinds
        raise ValueError(f"its first certificate is damaged ({_one_line(error)})") from error
    now = datetime.now(timezone.utc)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise ValueError(
            f"its certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}, not today"
        )
    if isinstance(key, ec.EllipticCurvePublicKey):
        found = {256: "es256", 384: "es384", 521: "es512"}.get(key.curve.key_size)
        if found is not None:
            return found
    if isinstance(key, rsa.RSAPublicKey):
        return "ps256"
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "ed25519"
    raise ValueError(f"C2PA has no signature algorithm for its {type(key).__name__}")


def _self_signed() -> bytes:
    """A new certificate that says in its name that nobody vouches for it, the root above it, and its key, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    begin = datetime.now(timezone.utc) - timedelta(days=1)
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def certificate(name: str, public_key: Any, issuer: str, is_root: bool) -> x509.Certificate:
        subject, above = (
            x509.Name([
                x509.NameAttribute(NameOID.COMMON_NAME, n),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"kspec-guidance user ({WARNING})"),
            ])
            for n in (name, issuer)
        )  # fmt: skip
        others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
        usage = dict.fromkeys((*others, "decipher_only"), False)
        builder = x509.CertificateBuilder(above, subject, public_key, x509.random_serial_number())
        builder = builder.not_valid_before(begin).not_valid_after(begin + timedelta(days=365 * YEARS))
        builder = builder.add_extension(x509.BasicConstraints(is_root, 0 if is_root else None), critical=True)
        builder = builder.add_extension(
            x509.KeyUsage(digital_signature=not is_root, key_cert_sign=is_root, crl_sign=is_root, **usage), critical=True
        )
        if not is_root:
            builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False
        )
        return builder.sign(root_key, hashes.SHA256())

    root = certificate(f"root, {WARNING}", root_key.public_key(), f"root, {WARNING}", True)
    own = certificate(WARNING, key.public_key(), f"root, {WARNING}", False)
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in (own, root)) + secret


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
