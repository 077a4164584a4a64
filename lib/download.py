"""
Fetches the E2E challenge's files, each checked by its SHA-256; `python data.py download e2e DIR` is the command.
"""

import http.client
import io
import stat
import urllib.request
import zipfile
import zlib
from pathlib import Path

from lib.checks import check, regular
from lib.files import sha256_of, write_atomic

E2E_ADDRESS = "https://github.com/tuetschek/e2e-dataset/releases/download/v1.0.0/e2e-dataset.zip"
E2E_FILES = {                    # SHA-256 of the official files; the archive's own is not published
    "trainset.csv": "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6",
    "devset.csv": "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
    "testset_w_refs.csv": "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd"}
LARGEST = 2**26                  # bytes, of the archive and of a file in it


def download(folder, archive=None, sha256=None, files=E2E_FILES):
    """Puts the E2E challenge's CSV files into folder, from an archive on disk or the official one.

    Nothing is written before every file's SHA-256 (and the archive's, if given) is right. Returns
    the archive's SHA-256.
    """
    folder, origin = Path(folder), archive or E2E_ADDRESS
    raw = read_archive(archive, folder)
    check(len(raw) <= LARGEST, f"{origin}: larger than {LARGEST} bytes, which the data is not")
    digest = sha256_of(raw)
    check(not sha256 or digest == sha256.lower(), f"{archive or 'the archive'}: SHA-256 is {digest}, wanted {sha256}; nothing was written")
    contents = unpack(raw, origin, files)
    for name, wanted in files.items():
        found = sha256_of(contents[name])
        check(found == wanted, f"{name} in {origin}: SHA-256 is {found}, wanted {wanted}; nothing was written")
        path = folder / name
        same = not path.exists() or path.read_bytes() == contents[name]
        check(same, f"{path} is there already and differs; move it away first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from None
    for name in files:
        write_atomic(folder / name, contents[name])
    return digest


def read_archive(archive, folder):
    """The bytes of the archive on disk or, where archive is None, of the official one."""
    try:
        source = open(regular(archive), "rb") if archive else urllib.request.urlopen(E2E_ADDRESS, timeout=30)
        with source:
            return source.read(LARGEST + 1)
    except (OSError, http.client.HTTPException) as error:        # URLError is an OSError
        if archive:
            raise ValueError(f"{archive}: {error.strerror}") from None
        reason = getattr(error, "reason", error)
        raise ValueError(f"cannot fetch {E2E_ADDRESS} ({reason}): put {', '.join(E2E_FILES)} into {folder} by hand, "
                         f"or pass the file with --archive") from None


def path_parts(entry, origin):
    """The folders and the name of an entry. ValueError where they lead out, or where it is a link."""
    parts = entry.filename.replace("\\", "/").split("/")
    climbs = ".." in parts or parts[0] == "" or ":" in parts[0]
    is_link = stat.S_ISLNK(entry.external_attr >> 16)
    check(not climbs and not is_link, f"{origin}: {entry.filename!r} climbs out of the folder or is a link; nothing was written")
    return parts


def unpack(raw, origin, names):
    """{name: content} of the named files, wherever they lie in the archive."""
    contents = {}
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for entry in archive.infolist():
                *folders, name = path_parts(entry, origin)
                if name in names and "__MACOSX" not in folders:
                    check(name not in contents, f"{origin}: {name} is in it twice")
                    with archive.open(entry) as file:
                        contents[name] = file.read(LARGEST + 1)
                    check(len(contents[name]) <= LARGEST, f"{origin}: {entry.filename} is larger than {LARGEST} bytes")
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{origin}: not a readable zip archive: {error}") from None
    missing = [name for name in names if name not in contents]
    check(not missing, f"{origin}: no {', '.join(missing)} in it")
    return contents
