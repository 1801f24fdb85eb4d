"""Files that are whole or absent, whatever happens while they are written."""

import multiprocessing
import os
import stat

import pytest

from mgt_sampler.files import check_writable, make_folder, whole_file, write_csv


def write(path, data, times=1):
    for _ in range(times):
        with whole_file(path) as file:
            file.write(data)


def test_the_old_file_stays_where_writing_fails(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    real = os.fdopen

    def full(descriptor, mode):
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
        return real(descriptor, mode)

    monkeypatch.setattr(os, "fdopen", full)
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a.bin", b"x" * 100_000)
    assert os.listdir(tmp_path) == []


def test_two_processes_write_to_one_path(tmp_path):
    path = tmp_path / "a.bin"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(path, bytes([i]) * 300_000, 30)) for i in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert path.read_bytes() in (b"\0" * 300_000, b"\1" * 300_000)
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_planted_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    for name in ("a.bin.partial", ".a.bin.tmp", "a.bin.tmp"):
        (tmp_path / name).symlink_to(victim)
    write(tmp_path / "a.bin", b"new")
    assert victim.read_bytes() == b"untouched"


def test_modes_and_links_stay(tmp_path):
    path = tmp_path / "a.bin"
    write(path, b"1")
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    write(link, b"2")
    assert link.is_symlink() and path.read_bytes() == b"2"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_no_file_is_written_to_as_it_is():
    write("/dev/null", b"1")
    assert not os.path.isfile("/dev/null")


def test_what_cannot_be_written_is_refused_early(tmp_path):
    check_writable("out", tmp_path / "a.png")
    check_writable("out", "/dev/null")
    for path in (tmp_path / "nope" / "a.png", tmp_path):
        with pytest.raises(ValueError, match="out: expected"):
            check_writable("out", path)


def test_names_as_long_as_a_file_system_has(tmp_path):
    # 255 bytes: the fresh name beside it must not be longer
    for name in ("a" * 255, "界" * 85, "𝄞" * 63 + "abc"):
        check_writable("out", tmp_path / name)
        write(tmp_path / name, b"1")
        assert (tmp_path / name).read_bytes() == b"1"
    assert len(os.listdir(tmp_path)) == 3
    with pytest.raises(ValueError, match=r"^out: expected a path that can be written to, got .*: File name too long"):
        check_writable("out", tmp_path / ("a" * 256))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_folder_that_permissions_allow_and_the_system_does_not():
    with pytest.raises(
        ValueError, match=r"^out: expected a path in a folder that can be written to, got '/proc/a.png'"
    ):
        check_writable("out", "/proc/a.png")


def test_a_table_and_a_folder(tmp_path):
    make_folder("out", tmp_path / "a" / "b")
    write_csv(tmp_path / "a" / "b" / "t.csv", ["x", "y"], [{"x": "1,5", "y": "ü"}, {"x": 2, "y": ""}])
    content = (tmp_path / "a" / "b" / "t.csv").read_bytes()
    assert content == 'x,y\r\n"1,5",ü\r\n2,\r\n'.encode()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make_folder("out", tmp_path / "file" / "b")
