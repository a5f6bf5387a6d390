"""Repos and accounts of the loopback Hub, kept in memory."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".h5", ".png")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class Entry:
    """A file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        version = "https://git-lfs.github.com/spec/v1"
        return f"version {version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def blob_id(self) -> str:
        blob = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id

    def info(self, path: str) -> dict[str, Any]:
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        info = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        return info | ({"lfs": lfs} if self.is_lfs else {})


@dataclass(frozen=True)
class Commit:
    parent: str | None
    tree: dict[str, Entry]
    title: str

    @property
    def sha(self) -> str:
        files = "".join(f"{entry.blob_id} {path}\n" for path, entry in sorted(self.tree.items()))
        return hashlib.sha1(f"{self.parent}\n{self.title}\n{files}".encode()).hexdigest()


@dataclass
class Repo:
    """A repo; `refs` has full names such as `refs/heads/main`."""

    id: str
    type: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)

    def resolve(self, revision: str) -> Commit | None:
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        return self.commits.get(revision)

    def commit(self, ref: str, tree: dict[str, Entry], title: str) -> str:
        commit = Commit(self.refs.get(ref), tree, title)
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit.sha

    def titles(self, revision: str = "main") -> list[str]:
        """Commit titles of a revision, newest first."""
        titles, commit = [], self.resolve(revision)
        while commit is not None:
            titles.append(commit.title)
            commit = self.commits.get(commit.parent or "")
        return titles

    def files(self, revision: str = "main") -> dict[str, bytes]:
        commit = self.resolve(revision)
        assert commit is not None, f"{self.id} has no revision {revision}"
        return {path: entry.content for path, entry in commit.tree.items() if path != ".gitattributes"}


@dataclass(frozen=True)
class Account:
    """Owner of a token and the role of the token."""

    name: str
    role: str = "write"

    def owns(self, repo_id: str) -> bool:
        return repo_id.startswith(f"{self.name}/")
