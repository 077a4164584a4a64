"""
Files.
"""

import hashlib
import io
import json
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path

import torch


# -----------------------------------------------------------------------------
# checks


def check(condition, message):
    """ValueError(message) unless condition."""
    if not condition:
        raise ValueError(message)


def some(names, n=3):
    """The first n names for a message."""
    return ", ".join(sorted(names)[:n]) + (", .." if len(names) > n else "")


# -----------------------------------------------------------------------------
# whole files


def write_atomic(path, content):
    """Writes bytes, or an iterator of them, to a temporary sibling and renames it: a reader finds the old file or the new one, whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in [content] if isinstance(content, (bytes, memoryview)) else content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None


def save_file(path, content):
    """Writes plain values and tensors so that read_file, or torch.load(weights_only=True), reads them back."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    raw = bytearray(buffer.getbuffer())
    raw[-2:] = (64).to_bytes(2, "little")                        # the length of the comment, which was none
    write_atomic(path, [raw, hashlib.sha256(raw).hexdigest().encode()])


def read_file(path):
    """The dict in a file of save_file. ValueError in one line for whatever else it may be."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    check(raw, f"{path}: empty")
    check(hashlib.sha256(memoryview(raw)[:-64]).hexdigest().encode() == raw[-64:], f"{path}: truncated, damaged or not a file of this project, its checksum is wrong")
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            check(all(e.compress_type == zipfile.ZIP_STORED for e in archive.infolist()) and sum(e.file_size for e in archive.infolist()) <= len(raw),
                  f"{path}: compressed; not a file of this project")
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, RuntimeError, NotImplementedError,
            AttributeError, OSError, MemoryError, UnicodeDecodeError, OverflowError, AssertionError) as error:
        raise ValueError(f"{path}: not a file of this project ({str(error).strip().splitlines()[0][:80] if str(error).strip() else type(error).__name__})") from None
    check(isinstance(content, dict), f"{path}: holds a {type(content).__name__}, not a dict")
    return content


def read_json(path):
    """The object in a JSON file; ValueError for whatever else it may be."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


# -----------------------------------------------------------------------------
# tensors by name


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


def read_safetensors(path):
    """Yields (name, tensor) one at a time. The whole header is checked before the first."""
    with open(path, "rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        n = struct.unpack("<Q", start)[0] if len(start) == 8 else math.inf
        if n > min(file_size - 8, 10**8):
            raise ValueError(f"{path}: truncated or not safetensors")
        try:
            header = json.loads(file.read(n))
            header.pop("__metadata__", None)
            entries = sorted(((name, DTYPES[e["dtype"]], [int(d) for d in e["shape"]], *map(int, e["data_offsets"])) for name, e in header.items()),
                             key=lambda entry: entry[3])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: its header is damaged ({type(error).__name__}: {error})") from None
        place = 0
        for name, dtype, shape, begin, end in entries:
            if begin != place or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{path}: {name} of shape {shape} does not fit its bytes {begin} to {end}")
            place = end
        if 8 + n + place != file_size:
            raise ValueError(f"{path}: truncated or too long: {file_size} bytes, its header says {8 + n + place}")
        for name, dtype, shape, begin, end in entries:
            tensor = torch.empty(shape, dtype=dtype)
            if end > begin and file.readinto(tensor.view(-1).view(torch.uint8).numpy()) != end - begin:
                raise ValueError(f"{path}: truncated at {name}")
            yield name, tensor


def write_safetensors(path, tensors, metadata=None):
    """tensors: {name: (dtype, shape, function that makes it)}, made one at a time as they are written."""
    header, place = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for name, (dtype, shape, _) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": KINDS[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def chunks():
        yield struct.pack("<Q", len(text)) + text
        for dtype, shape, make in tensors.values():
            yield make().detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy()
    write_atomic(path, chunks())


def read_bin(path):
    """(name, tensor) of a pytorch_model.bin, nothing in it run."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:                                     # from before 2020: not a zip file, cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
            raise TypeError("it does not hold tensors by name")
    except Exception as error:                                   # unpickling raises whatever the bytes make it raise
        raise ValueError(f"{path}: truncated, damaged or not a checkpoint ({str(error).strip().splitlines()[0][:80] if str(error).strip() else type(error).__name__})") from None
    return content.items()


def weight_files(folder):
    """The files that hold a checkpoint's tensors."""
    folder = Path(folder)
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            names = read_json(folder / index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
                raise ValueError(f"{folder / index}: has no weight_map of file names")
            names = sorted(set(names.values()))
            if climbing := [n for n in names if Path(n).name != n]:
                raise ValueError(f"{folder / index}: {climbing[0]!r} leads out of the folder")
            return [folder / n for n in names]
    for pattern in ("model.safetensors", "*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise ValueError(f"{folder}: no weights there; it must hold *.safetensors or pytorch_model.bin")


def read_tensors(path):
    """(name, tensor) of every tensor in a folder or file, one at a time. A name that comes twice is refused."""
    seen = set()
    for file in weight_files(path) if Path(path).is_dir() else [Path(path)]:
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
        for name, tensor in read_safetensors(file) if file.suffix == ".safetensors" else read_bin(file):
            if name in seen:
                raise ValueError(f"{file}: {name} comes a second time")
            seen.add(name)
            yield name, tensor


# -----------------------------------------------------------------------------
# hashes


def sample_hash(tensor):
    """Hash of a tensor's shape and of 4096 of its values as float32."""
    flat = tensor.detach().reshape(-1)
    values = flat[::max(flat.numel() // 4096, 1)][:4096].float().cpu()
    return hashlib.sha256(repr(tuple(tensor.shape)).encode() + values.numpy().tobytes()).hexdigest()


def combine_hashes(hashes):
    """{name: hash} -> hash"""
    return hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()
