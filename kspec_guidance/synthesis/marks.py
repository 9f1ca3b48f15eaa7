"""Marks in image files: that a model made them, as IPTC and C2PA have it, and from what.

IPTC: an XMP packet with the digital source type ``trainedAlgorithmicMedia``, system and prompt, as IPTC Photo Metadata has
them since 2025. It depends on the row alone, so that the same image has the same bytes. C2PA: see
:mod:`~kspec_guidance.synthesis.signing`. Pixels are not changed.
"""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

from PIL import Image
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from kspec_guidance.synthesis.signing import Signer

__all__ = ["SOURCE_TYPE", "Marks", "encode_image", "xmp_packet"]

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
   xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
   xmlns:xmp="http://ns.adobe.com/xap/1.0/"
   xmlns:xmpRights="http://ns.adobe.com/xap/1.0/rights/"
   xmlns:dc="http://purl.org/dc/elements/1.1/"{attributes}>{elements}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""
MAX_PROMPT = 8000  # characters: a packet in a JPEG file has at most 64 KiB
CONTROL = {k: " " for k in range(32) if k not in (9, 10, 13)} | {0xFFFE: " ", 0xFFFF: " "}  # that XML cannot hold
CONTROL |= dict.fromkeys(range(0xD800, 0xE000), " ")


def xmp_packet(row: Mapping[str, Any]) -> bytes:
    """The XMP packet of an image, with its digital source type, and what its row says of model, prompt and licence.

    Args:
        row: metadata of the image; ``model``, ``versions``, ``prompt`` and ``licence`` are used where they are known.
    """
    program = str(row.get("versions") or "kspec-guidance").partition(",")[0]
    values = {
        "Iptc4xmpExt:DigitalSourceType": SOURCE_TYPE,
        "Iptc4xmpExt:AISystemUsed": row.get("model"),
        "Iptc4xmpExt:AISystemVersionUsed": row.get("revision"),
        "Iptc4xmpExt:AIPromptInformation": str(row.get("prompt") or "")[:MAX_PROMPT],
        "xmp:CreatorTool": program,
    }
    attributes = "".join(f"\n   {k}={quoteattr(_text(v))}" for k, v in values.items() if v)
    elements = ""
    if row.get("licence"):
        licence = escape(_text(row["licence"]))
        for name in ("dc:rights", "xmpRights:UsageTerms"):
            elements += f'\n   <{name}><rdf:Alt><rdf:li xml:lang="x-default">{licence}</rdf:li></rdf:Alt></{name}>'
    return PACKET.format(attributes=attributes, elements=elements).encode()


def _text(value: Any) -> str:
    return str(value).translate(CONTROL)


def encode_image(image: Image.Image, format: str = "PNG", row: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of an image file.

    Args:
        image: any image that the format can hold.
        format: ``PNG``, ``JPEG`` or ``WEBP``.
        row: metadata for the marks; None for a file without marks.

    Raises:
        ValueError: for another format.
    """
    if format not in ("PNG", "JPEG", "WEBP"):
        raise ValueError(f"format must be PNG, JPEG or WEBP, got {format!r}")
    data, options = io.BytesIO(), dict[str, Any]()
    if row is not None and format == "PNG":
        options["pnginfo"] = info = PngInfo()
        info.add_text("Software", str(row.get("versions") or "kspec-guidance").partition(",")[0])
        info.add_itxt("XML:com.adobe.xmp", xmp_packet(row).decode())
    elif row is not None:
        options["xmp"] = xmp_packet(row)
    image.save(data, format, **options)
    return data.getvalue()


class Marks:
    """The marks of the images of a run.

    Args:
        enabled: whether images have marks.
        signer: of C2PA manifests; None for none.
    """

    def __init__(self, enabled: bool = True, signer: "Signer | None" = None):
        self.enabled, self.signer = enabled, signer

    @property
    def names(self) -> str | None:
        """The kinds of marks, for the metadata: ``iptc``, ``iptc, c2pa``, or None."""
        return None if not self.enabled else "iptc" if self.signer is None else "iptc, c2pa"

    def describe(self) -> str:
        """What the settings of a run say of the marks."""
        return self.names or "none" if self.signer is None else f"{self.names}: {self.signer.digest}"

    def encode(self, image: Image.Image, row: Mapping[str, Any]) -> bytes:
        """The bytes of a PNG file with the marks.

        Raises:
            RunFailedError: if it cannot be signed.
        """
        data = encode_image(image, "PNG", row if self.enabled else None)
        return data if self.signer is None else self.signer.sign(data, row)
