"""Files of a folder and its subfolders, and what was left out."""

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["HIDDEN", "is_hidden", "list_files", "printable"]

HIDDEN = "hidden or of the operating system"  # why such files are left out
SYSTEM_NAMES = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir",
    "lost+found",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden (``.git``) or written by an operating system (``Thumbs.db``)."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def printable(name: str) -> str:
    """A name with control characters and bytes that are not UTF-8 escaped, for reports."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def list_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Regular files of a folder and its subfolders, by name, and the entries that were left out, with the reason.

    Hidden files and folders, and those of operating systems, are left out. Links to files are followed; links to folders
    are followed if they lead to a folder that is not read otherwise.
    """
    root, followed = folder.resolve(), set[Path]()
    files, left_out, pending = [], {}, [folder]
    while pending:
        here = pending.pop()
        try:
            entries = sorted(os.scandir(here), key=lambda e: e.name)
        except OSError as error:
            left_out[_name(here, folder) + "/"] = f"unreadable: {error.strerror}"
            continue
        for entry in entries:
            path = Path(entry.path)
            name = _name(path, folder)
            is_folder = _answer(entry.is_dir)
            if is_hidden(entry.name):
                left_out[name + "/" * is_folder] = HIDDEN
            elif is_folder and entry.is_symlink():
                target = path.resolve()
                known = {root, *followed}
                if any(target.is_relative_to(k) or k.is_relative_to(target) for k in known):
                    left_out[name + "/"] = "a link to a folder that is read under its own name"
                else:
                    followed.add(target)
                    pending.append(path)
            elif is_folder:
                pending.append(path)
            elif _answer(entry.is_file):
                files.append(path)
            else:
                left_out[name] = "a broken link" if entry.is_symlink() else "not a regular file"
    return sorted(files), dict(sorted(left_out.items()))


def _name(path: Path, folder: Path) -> str:
    return printable(path.relative_to(folder).as_posix())


def _answer(question: Callable[[], bool]) -> bool:
    """The answer of a directory entry; False if it cannot be had, e.g. for a link to itself."""
    try:
        return question()
    except OSError:
        return False
