"""
Files that are whole or not there, and nothing in which is ever run: this project's own, JSON, safetensors and .bin.

safetensors is read and written here by hand, so that a tensor is in memory once and not mapped as well, and so that every
size in the header is checked before anything is allocated.
"""

import functools
import hashlib
import io
import json
import math
import os
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from lib.checks import check, parse_json, regular, shown

# -----------------------------------------------------------------------------
# checks

# Git LFS leaves a text of three lines, which begins so, where a large file was not downloaded.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


def some(names, n=3):
    """The first n names for a message."""
    more = ", .." if len(names) > n else ""
    return ", ".join(sorted(names)[:n]) + more


def found_in(folder):
    """The first names in a folder for a message; "nothing" where it is empty, a file or not there."""
    return some([path.name for path in Path(folder).glob("*")]) or "nothing"


def check_no_pointer(path, beginning):
    """ValueError where the bytes that a file begins with are those of a Git LFS pointer."""
    is_pointer = beginning.startswith(LFS_POINTER)
    check(not is_pointer, f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


@contextmanager
def located(where):
    """Puts `where` in front of what a ValueError says that is raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


@contextmanager
def refusing(message):
    """Turns any error that is raised inside into ValueError(message), with the error in brackets."""
    try:
        yield
    except Exception as error:      # unpickling and parsing raise whatever the bytes make them raise
        words = " ".join(str(error).split())[:80]
        raise ValueError(f"{message} ({type(error).__name__}: {words})") from None


# -----------------------------------------------------------------------------
# whole files


def write_atomic(path, content):
    """Writes bytes, or an iterable of them, to a temporary sibling and renames it.

    A reader finds the old file or the new one, whole. A write that fails is a ValueError and leaves the old file.
    """
    path = Path(path)
    pieces = [content] if isinstance(content, bytes) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")    # fault 5
    try:
        with open(temporary, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)      # of the name, which lies in the folder and not in the file
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)                            # fault 6
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None


def read_bytes(path):
    """The bytes of a file; ValueError where it cannot be read, or is a Git LFS pointer."""
    try:
        content = Path(regular(path)).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    check_no_pointer(path, content)
    return content


def write_json(path, content):
    """Writes a dict of plain values as a JSON object."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomic(path, text.encode())


def read_json(path):
    """The object in a JSON file; ValueError for whatever else it may be."""
    return parse_json(read_bytes(path), path)


def read_json_lines(path):
    """
    The objects in a file of JSON, one a line; ValueError names the line that is something else. What follows the last line's
    end is left out, because whoever was writing it has been stopped.
    """
    lines = read_bytes(path).split(b"\n")[:-1]
    return [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


# A file of this project is a zip archive of torch.save with a comment, which a zip archive may end with:
#
#   | archive of torch.save, uncompressed | 64 as uint16, little-endian | SHA-256 of all before it, |
#   |                                     | (the comment's length)      | 64 hexadecimal digits     |


def torch_bytes(content):
    """The bytes that torch.save makes of content."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save_file(path, content):
    """Writes plain values and tensors so that read_file, or torch.load(weights_only=True), reads them back."""
    archive = bytearray(torch_bytes(content))
    archive[-2:] = (64).to_bytes(2, "little")
    checksum = sha256_of(archive)
    write_atomic(path, [archive, checksum.encode()])


def read_file(path):
    """The dict in a file of save_file. ValueError in one line for whatever else it may be."""
    raw = read_bytes(path)
    check(raw, f"{path}: empty")
    checksum = sha256_of(memoryview(raw)[:-64])
    whole = raw.endswith(checksum.encode())
    check(whole, f"{path}: truncated, damaged or not a file of this project, its checksum is wrong")    # fault 3
    with refusing(f"{path}: not a file of this project"):
        check_archive(io.BytesIO(raw), len(raw))
        content = load_quietly(io.BytesIO(raw))
    check(isinstance(content, dict), f"{path}: holds a {type(content).__name__}, not a dict")
    check_plain(content, path)
    return content


def load_quietly(source, **options):
    """What torch.save has written, on the CPU; nothing in it is run, and torch's warnings are kept from the one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(source, map_location="cpu", weights_only=True, **options)                     # fault 4


def check_archive(file, size):
    """ValueError unless a zip archive of that many bytes holds no more than these: nothing is compressed."""
    entries = zipfile.ZipFile(file).infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    check(stored and sum(entry.file_size for entry in entries) <= size, "compressed")


def check_plain(value, path, name="it"):
    """ValueError unless all tensors within a value lie in memory as their shape and type say, and in a type that is read here."""
    if isinstance(value, dict):
        for key, part in value.items():
            check_plain(part, path, shown(key))
    elif isinstance(value, (list, tuple)):
        for part in value:
            check_plain(part, path, name)
    elif isinstance(value, torch.Tensor):
        kind = value.dtype if value.layout is torch.strided else value.layout
        kind = kind if value.device.type == "cpu" else f"on the device {value.device}"
        check(kind in DTYPE_NAMES, f"{path}: {name} is {kind}; dense tensors of {', '.join(map(str, DTYPE_NAMES))} can be read")
        held = value.untyped_storage().nbytes()
        check(value.nbytes <= held, f"{path}: {name} of shape {tuple(value.shape)} repeats {held} bytes")


# -----------------------------------------------------------------------------
# tensors by name

# A safetensors file:
#
#   | N as uint64, little-endian | header: N bytes of JSON | tensors, one after the other, without gaps |
#
# The header is {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}}, where the offsets are
# counted from the header's end.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def memory_of(tensor):
    """The bytes of a contiguous tensor on the CPU, as a NumPy array on the same memory."""
    return tensor.view(-1).view(torch.uint8).numpy()


def read_header(file, path):
    """[(begin, end, name, dtype, shape)] of an open safetensors file in the order of its bytes, all of it checked."""
    file_size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    header_size = int.from_bytes(first, "little")
    check(len(first) == 8 and header_size <= min(file_size - 8, 10**8), f"{path}: truncated or not safetensors")
    entries = []
    with refusing(f"{path}: its header is damaged"):
        header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            (begin, end), shape = entry["data_offsets"], entry["shape"]
            check(len(shape) <= 16 and all(map(is_size, (begin, end, *shape))), f"{name} of shape {shown(shape)} at {shown([begin, end])}")
            entries.append((begin, end, name, DTYPES[entry["dtype"]], shape))
    entries.sort(key=lambda entry: entry[:2])
    place = 0
    for begin, end, name, dtype, shape in entries:
        n_bytes = math.prod(shape) * dtype.itemsize
        fits = begin == place and end - begin == n_bytes
        check(fits, f"{path}: {name} of shape {shape} does not fit its bytes {begin} to {end}")
        place = end
    expected_size = 8 + header_size + place
    check(expected_size == file_size, f"{path}: truncated or too long: {file_size} bytes, its header says {expected_size}")
    return entries


def is_size(value):
    """Whether a value of JSON can be a size in a tensor's shape, or a place in a file."""
    return type(value) is int and 0 <= value < 2**48


def read_safetensors(path):
    """Yields (name, tensor) one at a time. The whole header is checked before the first."""
    with open(regular(path), "rb") as file:
        check_no_pointer(path, file.read(len(LFS_POINTER)))
        file.seek(0)
        for begin, end, name, dtype, shape in read_header(file, path):
            tensor = torch.empty(shape, dtype=dtype)
            n_read = file.readinto(memory_of(tensor))
            check(n_read == end - begin, f"{path}: truncated at {name}")
            yield name, tensor


def write_safetensors(path, tensors):
    """tensors: {name: (dtype, shape, function that makes it)}, made one at a time as they are written."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, _) in tensors.items():
        end = place + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)      # so that the tensors begin at a multiple of 8

    def pieces():
        yield len(text).to_bytes(8, "little") + text
        for dtype, _, make in tensors.values():
            yield memory_of(make().detach().to("cpu", dtype).contiguous())
    write_atomic(path, pieces())


def entries_of(tensors):
    """{name: tensor}, in memory already, as write_safetensors takes them."""
    return {name: (t.dtype, t.shape, lambda t=t: t) for name, t in tensors.items()}


def read_bin(path):
    """(name, tensor) pairs of a pytorch_model.bin, nothing in it run."""
    damaged = f"{path}: truncated, damaged or not a checkpoint"
    with open(regular(path), "rb") as file:
        beginning = file.read(len(LFS_POINTER))
    check_no_pointer(path, beginning)
    with refusing(damaged):
        mapped = zipfile.is_zipfile(path)      # files from before 2020 are not, and cannot be mapped
        if mapped:
            check_archive(path, Path(path).stat().st_size)
        content = load_quietly(path, mmap=mapped)
    check(holds_tensors_by_name(content), f"{damaged} (it does not hold tensors by name)")
    check_plain(content, path)
    return content.items()


def holds_tensors_by_name(content):
    """Whether a value that torch has loaded is {str: tensor}."""
    if not isinstance(content, dict):
        return False
    return all(isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in content.items())


def weight_files(folder):
    """The files that hold a checkpoint's tensors."""
    folder = Path(folder)
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file():
            files = read_json(index).get("weight_map")
            named = isinstance(files, dict) and all(isinstance(name, str) for name in files.values())
            check(named, f"{index}: has no weight_map of file names")
            names = sorted(set(files.values()))
            for name in names:
                check(Path(name).name == name, f"{index}: {name!r} leads out of the folder")            # fault 22
            return [folder / name for name in names]
    for pattern in ("model.safetensors", "*.safetensors", "pytorch_model*.bin"):
        paths = sorted(folder.glob(pattern))
        if paths:
            return paths
    raise ValueError(f"{folder}: no weights there; it must hold *.safetensors or pytorch_model.bin")


def read_tensors(path):
    """(name, tensor) of every tensor in a folder or file, one at a time. A name that comes twice is refused."""
    seen = set()
    for file in weight_files(path) if Path(path).is_dir() else [Path(path)]:
        check(file.is_file(), f"{file}: no such file")
        read = read_safetensors if file.suffix == ".safetensors" else read_bin
        for name, tensor in read(file):
            check(name not in seen, f"{file}: {name} comes a second time")
            seen.add(name)
            yield name, tensor


def stored_type(folder):
    """The name of the type that holds the numbers of all of a checkpoint's tensors without loss: "bfloat16". Of a
    safetensors file only the header is read."""
    types = set()
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                types |= {dtype for _, _, _, dtype, _ in read_header(file, path)}
        else:
            types |= {tensor.dtype for _, tensor in read_bin(path)}
    floats = [dtype for dtype in types if dtype.is_floating_point]
    widest = functools.reduce(torch.promote_types, floats, floats[0] if floats else torch.float32)
    return str(widest).removeprefix("torch.")


# -----------------------------------------------------------------------------
# hashes


def sha256_of(content):
    """SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def sample_hash(tensor):
    """SHA-256 of a tensor's shape and of 4096 of its values, evenly spread, as float32."""
    flat = tensor.detach().reshape(-1)
    stride = max(flat.numel() // 4096, 1)
    values = flat[::stride][:4096].float().cpu().numpy()
    shape = repr(tuple(tensor.shape))
    return sha256_of(shape.encode() + values.tobytes())


def combine_hashes(hashes):
    """{name: hash} -> one hash, whatever the order of the names."""
    pairs = repr(sorted(hashes.items()))
    return sha256_of(pairs.encode())
