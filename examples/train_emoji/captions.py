"""Captions of emoji: a subject, attributes, and random captions that leave most attributes out.

A caption such as ``runner`` deliberately fits several images (two art styles, six skin tones, three genders), so the number
of *modes* of a prompt is known from the data. ``modes`` lists them.
"""

import random
import re
from dataclasses import asdict, dataclass, field

TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}
STYLES = {"google": "noto style", "twitter": "twemoji style"}
HAIR = {"1F9B0": "red hair", "1F9B1": "curly hair", "1F9B2": "bald", "1F9B3": "white hair"}
# Subcategories whose members look alike, and the caption for any member.
FAMILIES = {
    "animal-bird": "bird", "animal-bug": "bug", "animal-marine": "sea animal", "animal-reptile": "reptile",
    "animal-mammal": "mammal", "cat-face": "cat face", "monkey-face": "monkey", "heart": "heart", "zodiac": "zodiac",
    "country-flag": "flag", "drink": "drink", "food-fruit": "fruit", "food-sweet": "sweet",
    "food-vegetable": "vegetable", "keycap": "keycap", "musical-instrument": "musical instrument",
    "place-building": "building", "plant-flower": "flower", "plant-other": "plant", "sport": "sport",
    "transport-ground": "vehicle", "transport-water": "boat", "transport-air": "aircraft", "arrow": "arrow",
    "face-smiling": "smiling face", "face-concerned": "worried face", "face-affection": "loving face",
    "face-unwell": "sick face", "face-tongue": "face with tongue", "clothing": "clothing", "tool": "tool",
    "book-paper": "book", "religion": "religious symbol", "award-medal": "medal",
}  # fmt: skip
CLOCKS = re.compile(r"^clock face ")
GENDER_SIGN = {"2640": "woman", "2642": "man"}
ADULTS = {"1F468": "man", "1F469": "woman", "1F9D1": "person"}

KEEP_ATTRIBUTE = 0.35  # probability of each attribute (tone, style, gender, ...) in a caption
USE_FAMILY = 0.2  # probability of the family, "bird", instead of the subject, "parrot"


@dataclass(frozen=True)
class Entry:
    """One 64 x 64 image: its path, its code points, its subject and its attributes."""

    path: str
    unified: str
    subject: str
    style: str
    tone: str | None = None
    gender: str | None = None
    detail: str | None = None
    families: tuple[str, ...] = field(default=())

    def attributes(self) -> list[str]:
        """Return the attributes that it has, in the order of captions."""
        return [a for a in (self.gender, self.detail, self.tone, self.style) if a]

    def caption(self, rng: random.Random) -> str:
        """Return a random caption; a few percent of all captions are full."""
        subject = rng.choice(self.families) if self.families and rng.random() < USE_FAMILY else self.subject
        attributes = [a for a in self.attributes() if rng.random() < KEEP_ATTRIBUTE]
        return ", ".join([subject, *attributes])

    def full_caption(self) -> str:
        """Return the caption with the subject and all attributes."""
        return ", ".join([self.subject, *self.attributes()])

    def answers(self, prompt: str) -> bool:
        """Return whether ``prompt`` ("runner, dark skin tone") is a possible caption of this image."""
        subject, *attributes = [part.strip() for part in prompt.split(",")]
        return subject in (self.subject, *self.families) and all(a in self.attributes() for a in attributes)

    def as_dict(self) -> dict:
        return asdict(self)


def clean(name: str) -> str:
    """Normalise a name: lower case, no punctuation, single spaces."""
    name = name.lower().replace("\u2019", "'").replace("&", "and").replace(":", "")
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s'-]", " ", name)).strip()


def _names(table: list[dict]) -> dict[str, str]:
    return {e["unified"].replace("-FE0F", ""): clean(e["name"] or e["short_name"].replace("-", " ")) for e in table}


def _subject(unified: str, names: dict[str, str]) -> tuple[str, str | None, str | None]:
    """Split a code point sequence into subject, gender and further detail, e.g. ``('runner', 'woman', None)``."""
    code = unified.replace("-FE0F", "")
    parts = code.split("-200D-")
    detail = None
    if parts[-1] == "27A1":
        detail, parts = "facing right", parts[:-1]
    gender = None
    if len(parts) > 1 and parts[-1] in GENDER_SIGN:
        gender, parts = GENDER_SIGN[parts[-1]], parts[:-1]
    elif len(parts) == 2 and parts[0] in ADULTS and parts[1] not in HAIR:
        gender = ADULTS[parts[0]]
        person = "-200D-".join(["1F9D1", parts[1]])
        return names.get(person, re.sub(r"^(man|woman|person) ", "", names[code])), gender, detail
    elif len(parts) == 2 and parts[0] in ADULTS:
        return ADULTS[parts[0]], None, HAIR[parts[1]]
    base = "-200D-".join(parts)
    if base == "1F9D1":
        return "person", gender, detail
    return names.get(base, names.get(code, "")), gender, detail


def build_entries(table: list[dict], folder: str = "") -> list[Entry]:
    """Make the entries of both styles: base images, and those with one skin tone."""
    names, entries = _names(table), []
    for emoji in table:
        subject, gender, detail = _subject(emoji["unified"], names)
        families = [FAMILIES[emoji["subcategory"]]] if emoji["subcategory"] in FAMILIES else []
        if CLOCKS.match(subject):
            families = ["clock face"]
        families = tuple(f for f in families if f != subject)
        images = [(emoji["image"], None)]
        for key, variation in emoji.get("skin_variations", {}).items():
            if key in TONES:
                images.append((variation["image"], TONES[key]))
        for image, tone in images:
            for style, caption in STYLES.items():
                if emoji[f"has_img_{style}"]:
                    path = f"{folder}{style}/img/{style}/64/{image}"
                    entries.append(Entry(path, emoji["unified"], subject, caption, tone, gender, detail, families))
    return entries


def modes(entries: list[Entry], prompt: str) -> list[Entry]:
    """Return the distinct images that a prompt may stand for."""
    return [e for e in entries if e.answers(prompt)]
