"""Trees of files, a folder a class: what is in them, found the same way by all that read them."""

import hashlib
import os
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ear_model.processes import job_rank
from ear_model.progress import say

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
SHOWN = 20
"""Most things that a message names."""


@dataclass(frozen=True)
class ImageTree:
    """The images below a directory: class = first folder, in sorted order; image = any file below it."""

    root: Path
    classes: tuple[str, ...]
    """Folder names, sorted; label i is the i-th."""
    paths: tuple[str, ...]
    """Relative to ``root``, with "/", sorted within a class; classes one after the other."""
    labels: np.ndarray
    """int64 ``[N]``."""

    def __len__(self) -> int:
        return len(self.paths)

    def names_digest(self) -> str:
        """SHA-256 of classes and file names: what is in the tree, in which order."""
        return hashlib.sha256(os.fsencode("\0".join(("/".join(self.classes), *self.paths)))).hexdigest()

    def files_digest(self, first: int, last: int) -> str:
        """SHA-256 of names, sizes and times of change of the images ``first .. last - 1``, to notice an edit."""
        digest = hashlib.sha256()
        for path in self.paths[first:last]:
            try:
                state = (self.root / path).stat()
                digest.update(os.fsencode(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\0"))
            except OSError as error:  # gone, or in a folder that may only be listed: reading it says so by name
                digest.update(os.fsencode(f"{path}\0{error.errno}\0"))
        return digest.hexdigest()


def find_images(
    root: str | Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES, *, allow_empty: bool = False
) -> ImageTree:
    """List a tree ``root/<class>/.../<file>``: regular files of these suffixes, links to such files included.

    Every directory is read once, whatever links lead to it: as a part of the class that it lies in, else of the class
    that is a link to it, else of the first link in sorted order. Links to a directory around them are not followed.
    Hidden files and folders and other suffixes are left out; so are, which is said in a line on the standard error,
    links to folders that are read already and pipes, sockets and devices.

    Args:
        root: the directory.
        suffixes: of the files to take, in lower case.
        allow_empty: take folders without such files as classes too.

    Raises:
        ValueError: no directory, no class folders, no files, or a class without files, which would shift nobody's
            label but leave a class that can't be learned; a class name that is not UTF-8; folders that can't be
            listed and links that lead nowhere, all of them (the first 20 by name).
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a directory: it is no image tree, with a folder a class")
    walk = _Walk(os.path.realpath(root), suffixes)
    found = walk.classes(str(root))
    if walk.unreadable:
        raise ValueError(
            f"{root}: {len(walk.unreadable)} folders or links can't be read: {named(walk.unreadable)}. Make them "
            "readable or remove them"
        )
    if not found:
        raise ValueError(f"{root} has no folders: it is no image tree, {root}/<class>/<file>")
    for name, paths in found.items():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{root}: the class folder {name!r} has a name that is not UTF-8; rename it") from None
        if not paths and not allow_empty:
            raise ValueError(
                f"{root / name} has no files of {', '.join(suffixes)}; fill or remove this class; "
                "`ear cache`, train-tokenizer and train-judge take it by --allow-empty"
            )
    if not any(found.values()):
        raise ValueError(f"{root} has no files of {', '.join(suffixes)}")
    if walk.left_out and job_rank() == 0:
        say(f"{root}: left out {named(walk.left_out)}")
    prefix = len(os.path.join(root, ""))
    relative = [path[prefix:].replace(os.sep, "/") for paths in found.values() for path in sorted(paths)]
    labels = np.repeat(np.arange(len(found), dtype=np.int64), [len(paths) for paths in found.values()])
    return ImageTree(root, tuple(found), tuple(relative), labels)


def named(things: Collection[str]) -> str:
    """The first of these in one line, and how many more there are."""
    more = f"; and {len(things) - SHOWN} more" if len(things) > SHOWN else ""
    return "; ".join(list(things)[:SHOWN]) + more


@dataclass
class _Walk:
    """Files below the folders of a tree. Directories are known by their real paths: inode numbers are not unique on
    every file system."""

    root: str
    suffixes: tuple[str, ...]
    unreadable: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    _read: set[str] = field(default_factory=set)
    """Real paths of the directories that are read, or kept for a class."""

    def classes(self, root: str) -> dict[str, list[str]]:
        """Files of every class folder of ``root``, in sorted order of the classes."""
        folders, links, _ = self._list(root)
        self._read = {self.root, *(os.path.join(self.root, os.path.basename(path)) for path in folders)}
        found: dict[str, list[str]] = {}
        inner: list[tuple[str, str]] = []

        def read(tops: list[str]) -> None:
            for top in tops:
                files = found[os.path.basename(top)] = []
                inner.extend((link, os.path.basename(top)) for link in self._below(top, files))

        # Folders, then links to classes, then links within classes: what lies in a class is not another's by a link.
        read(sorted(folders))
        read([link for link in sorted(links) if self._is_new(link, self.root)])
        while inner:
            new = []
            for link, name in sorted(inner):
                if self._is_new(link, os.path.realpath(os.path.dirname(link))):
                    new += [(other, name) for other in self._below(link, found[name])]
            inner = new
        return dict(sorted(found.items()))

    def _is_new(self, link: str, around: str) -> bool:
        """Whether a link in the real directory ``around`` leads to one that is to be read; it then counts as read."""
        real = os.path.realpath(link)
        if real in self._read or any(_encloses(real, inner) for inner in (around, self.root)):
            self.left_out.append(f"{link} (a link to {real}, which is read already or is around it)")
            return False
        self._read.add(real)
        return True

    def _below(self, top: str, found: list[str]) -> list[str]:
        """Add the files below a directory to ``found``, links to directories left aside; returns those links."""
        links: list[str] = []
        # Each with its real path.
        todo = [(top, os.path.realpath(top))]
        while todo:
            path, real = todo.pop()
            folders, inner, files = self._list(path)
            found += files
            links += inner
            for folder in folders:
                own = os.path.join(real, os.path.basename(folder))
                if own not in self._read:
                    self._read.add(own)
                    todo.append((folder, own))
        return links

    def _list(self, path: str) -> tuple[list[str], list[str], list[str]]:
        """Folders, links to folders, and files of a directory."""
        folders: list[str] = []
        links: list[str] = []
        files: list[str] = []
        entries: Iterable[os.DirEntry[str]] = ()
        try:
            with os.scandir(path) as listed:
                entries = list(listed)
        except OSError as error:
            self._fails(path, error)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                self._sort(entry, folders, links, files)
            except OSError as error:
                self._fails(entry.path, error)
        return folders, links, files

    def _sort(self, entry: os.DirEntry[str], folders: list[str], links: list[str], files: list[str]) -> None:
        """Add an entry to those of its kind. Raises OSError for a link that leads nowhere."""
        wanted = entry.name.lower().endswith(self.suffixes)
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        elif entry.is_file(follow_symlinks=False):
            if wanted:
                files.append(entry.path)
        elif not entry.is_symlink():
            if wanted:
                self.left_out.append(f"{entry.path} (no regular file)")
        else:
            mode = os.stat(entry.path).st_mode
            if stat.S_ISDIR(mode):
                links.append(entry.path)
            elif wanted and stat.S_ISREG(mode):
                files.append(entry.path)
            elif wanted:
                self.left_out.append(f"{entry.path} (a link to no regular file)")

    def _fails(self, path: str, error: OSError) -> None:
        self.unreadable.append(f"{path} ({error.strerror or error})")


def _encloses(outer: str, inner: str) -> bool:
    """Whether the real path ``inner`` is ``outer`` or below it."""
    return os.path.commonpath([outer, inner]) == outer
